"""Ways to damage files, and a look at which paths are opened meanwhile."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

PAYLOADS = [
    b"../../outside/secret", b"/etc/passwd", b"..", b"\x00", b'"', b"\xef\xbb\xbf", b"\x92",
    b"\xed\xa0\x80", b"\xff\xfe", b"\r", b"\r\n", b"\n", b"\x1b[2J", "\u2028\u202e\ufffd".encode(),
    "\u0085\u0081\u00e2\u20ac\u2122".encode(), b",", b",,,,", b"\t", b"[", b"[[[[]]]]", b"]:",
    b"-1", b"nan", b"inf", b"1e999", b"9" * 30, b"9" * 5000, b"999999999", b"00:00:00,000",
    b"99:99:99,999", b"0.0", b"joy", b"xxx", b"hap", b"Ses05F_impro01_F000", b"Ses99F_x_M000",
    b"_" * 300, b"A" * 140_000, "\u0661\u0662".encode(), b"=cmd|' /C calc'!A0", b"%s%n{0}",
    b"[" * 100_000, b'{"":' * 100_000,
]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308, -1e308,
    float("nan"), float("inf"), "", " ", "x", "\0", "\ud800", "a\nb", "\u202e", "x" * 100_000,
    "..", "../../outside/secret.mp4", "/etc/passwd", "~/x", [], {}, [[]], [None], [{}], {"": []},
    ["x", "x"], [1, 2, 3], {"x": 1}, {"../../outside/secret.mp4": "0" * 64}, {"a\0b": "x"},
]  # fmt: skip
"""What JSON can hold and nobody expects."""


class Mutation(NamedTuple):
    """A change to one of some files; ``payload`` goes where ``place`` says."""

    file: int
    action: str
    place: float
    length: int
    payload: bytes


def mutations(others: Sequence[str] = ()) -> st.SearchStrategy[Mutation]:
    """Changes to bytes.

    Args:
        others: Actions besides, which are not :func:`mutate`'s.
    """
    return st.builds(
        Mutation,
        st.integers(0, 40),
        st.sampled_from(
            ["insert"] * 4 + ["overwrite"] * 3
            + ["delete", "repeat", "cut", "flip", "swap lines", "empty", *others]
        ),
        st.floats(0, 1),
        st.integers(1, 80),
        st.one_of(st.sampled_from(PAYLOADS), st.binary(min_size=1, max_size=6)),
    )  # fmt: skip


def mutate(data: bytes, mutation: Mutation) -> bytes:
    """Change some bytes."""
    at = int(mutation.place * len(data))
    end = at + mutation.length
    if mutation.action == "swap lines":
        lines = data.split(b"\n")
        one, other = int(mutation.place * (len(lines) - 1)), mutation.length % len(lines)
        lines[one], lines[other] = lines[other], lines[one]
        return b"\n".join(lines)
    middle = {
        "insert": mutation.payload + data[at:end],
        "overwrite": mutation.payload,
        "delete": b"",
        "repeat": data[at:end] * 3,
        "flip": bytes(byte ^ 1 << mutation.length % 8 for byte in data[at:end]),
    }
    if mutation.action in middle:
        return data[:at] + middle[mutation.action] + data[end:]
    return data[:at] if mutation.action == "cut" else b""


class Change(NamedTuple):
    """A change to a JSON document: another value, another key or no entry at a place."""

    place: int
    action: str
    value: Any


changes = st.builds(
    Change,
    st.integers(0, 10_000),
    st.sampled_from(["replace"] * 4 + ["remove", "add", "repeat"]),
    st.sampled_from(VALUES),
)


def change(document: Any, changed: Change) -> bytes:
    """Change a JSON document, which stays as it is; what comes out is JSON."""
    document = json.loads(json.dumps(document))
    places = list(_places(document))
    if not places:
        return json.dumps(changed.value).encode()
    holder, key = places[changed.place % len(places)]
    if changed.action == "replace":
        holder[key] = changed.value
    elif changed.action == "remove":
        del holder[key]
    elif changed.action == "repeat":
        holder[key] = [holder[key]] * 3
    elif isinstance(holder, dict):
        holder[changed.value if isinstance(changed.value, str) else "x"] = changed.value
    else:
        holder.append(changed.value)
    return json.dumps(document).encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def all_changes(document: Any) -> Iterator[bytes]:
    """Every value that nobody expects, in every kind of place; entries of a list are one kind."""
    kinds: dict[tuple[Any, ...], int] = {}
    for number, kind in enumerate(_kinds(document, ())):
        kinds.setdefault(kind, number)
    for number in kinds.values():
        yield change(document, Change(number, "remove", None))
        for value in VALUES:
            yield change(document, Change(number, "replace", value))


def _kinds(document: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The kind of each of :func:`_places`."""
    entries = document.items() if isinstance(document, dict) else ((None, v) for v in document)
    for key, value in entries:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from _kinds(value, (*above, key))


_opened: list[str] | None = None
_hooked = False
_NOTED = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.truncate"}


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in _NOTED:
        _opened.append(str(arguments[0]))


@contextmanager
def audited() -> Iterator[list[str]]:
    """The paths that are opened, listed or changed in here."""
    global _opened, _hooked
    if not _hooked:
        # Never taken away again: Python has no way to. It does nothing outside of this context.
        sys.addaudithook(_note)
        _hooked = True
    _opened = paths = []
    try:
        yield paths
    finally:
        _opened = None


def astray(paths: list[str], root: Path) -> list[str]:
    """Those that are neither of a folder nor of Python, which may import on the way."""
    homes = (root, sys.prefix, sys.base_prefix)
    return [path for path in paths if not any(Path(path).is_relative_to(home) for home in homes)]
