"""Triton's interpreter, without the half of its time in which it does again what is done."""

from typing import Any


def patch_the_language_once() -> None:
    """Let the interpreter replace ``triton.language``'s functions by its own once, and for good.

    It does so at every launch, and again at every call of a function by a kernel, some twenty per
    launch, and undoes the first alone. Nothing here uses the language but interpreted kernels.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    def once(kernel: Any) -> _Kept:
        languages = [interpreter.tl, interpreter.tl.core]
        seen = {id(value) for value in kernel.__globals__.values()}
        kind = tuple(id(language) for language in languages if id(language) in seen)
        if kind not in patched:
            patch(kernel)
            patched.add(kind)
        return _Kept()

    interpreter._patch_lang = once


class _Kept:
    """In the place of what would undo the patch."""

    def restore(self) -> None:
        pass
