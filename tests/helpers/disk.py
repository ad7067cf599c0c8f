"""A disk that is full from some moment on, or that shows what a killed process leaves behind.

The moments are those before and after every call that changes a file, and the middle of every
write. They are the same whenever the same work is done.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.erc import artifacts

_WRITES = ((artifacts, "save_file"), (Path, "write_bytes"), (Path, "write_text"))
_CALLS = ((os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"))


@contextmanager
def _moments(tick: Callable[[bool], None]) -> Iterator[None]:
    """Call ``tick`` at every moment, with whether the disk may be found full there."""
    with pytest.MonkeyPatch.context() as patch:

        def watch(holder: Any, name: str, full: bool) -> None:
            function = getattr(holder, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                tick(full)
                result = function(*arguments, **options)
                tick(False)
                return result

            patch.setattr(holder, name, watched)

        def write(holder: Any, name: str) -> None:
            function = getattr(holder, name)

            def written(*arguments: Any, **options: Any) -> Any:
                result = function(*arguments, **options)
                path = arguments[1] if holder is artifacts else arguments[0]
                descriptor = os.open(path, os.O_RDWR)
                try:
                    size = os.fstat(descriptor).st_size
                    whole = os.read(descriptor, size)
                    os.truncate(descriptor, size // 2)
                    tick(True)
                    os.pwrite(descriptor, whole, 0)
                finally:
                    os.close(descriptor)
                return result

            patch.setattr(holder, name, written)

        for holder, name in _WRITES:
            write(holder, name)
        for holder, name in _CALLS:
            watch(holder, name, name in ("replace", "mkdir"))
        # What was written is there for other processes at once: only a power cut needs this.
        patch.setattr(os, "fsync", lambda descriptor: tick(True))
        yield


def count(work: Callable[[], object]) -> int:
    """The moments of some work, which is done."""
    seen = 0

    def tick(full: bool) -> None:
        nonlocal seen
        seen += 1

    with _moments(tick):
        work()
    return seen


def full(moment: int, work: Callable[[], object]) -> None:
    """Work on a disk that is full from a moment on, but for what may still be removed.

    Args:
        moment: From 1; beyond the last one the work is done as ever.
        work: What is done.
    """
    seen = 0

    def tick(may: bool) -> None:
        nonlocal seen
        seen += 1
        if may and seen >= moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _moments(tick):
        work()


def killed(moment: int, folder: Path, work: Callable[[], object]) -> bool:
    """Leave a folder as SIGKILL would, had it come at a moment of some work.

    The work is done to its end, and the folder is then put back to what it was at the moment.

    Args:
        moment: From 1.
        folder: All that the work changes is in it.
        work: What is done.

    Returns:
        Whether there was such a moment; if not, the work is done.
    """
    seen = 0
    kept = folder.with_name(f"{folder.name}.kept")

    def tick(_: bool) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            shutil.copytree(folder, kept)  # whose own calls come after the moment

    with _moments(tick):
        work()
    if seen < moment:
        return False
    shutil.rmtree(folder)
    kept.rename(folder)
    return True
