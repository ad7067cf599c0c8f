"""What is expensive to make and never changes, kept in a folder that several runs may share.

A shard is one safetensors file named ``KEY.SHA256.safetensors``. The key is a digest of all that
its content depends on, so that another option is another shard; the rest of the name is a digest
of the file, so that a flipped bit is found, and that shard alone made again. It appears under its
name once it is whole. Who makes a shard holds the lock of its key, and others wait for it or make
another one meanwhile.
"""

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from examples.erc import artifacts
from examples.erc.errors import InputError
from examples.erc.source import JSON

SOURCES = "sources.json"
"""The digests of the files that shards were made of."""

_SUFFIX = ".safetensors"
_LOCK = ".lock"
_PARTIAL = ".partial"
_NOTES = "notes"

_SETTLED = 2_000_000_000
"""Nanoseconds: a file that is as young may change again without looking any different."""


class Signature(NamedTuple):
    """What a file looks like from outside.

    A copy that keeps size and time of another file still gets a ``changed`` of its own.
    """

    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Shard:
    """A shard whose content has been verified.

    Attributes:
        path: The file.
        sha256: Of the file.
        notes: What was written down with it.
    """

    path: Path
    sha256: str
    notes: Any


class Cache:
    """A folder of shards.

    Args:
        folder: Made if it is not there.

    Raises:
        InputError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _explain(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._digests = _read_digests(folder / SOURCES)
        self._fresh: dict[str, tuple[Signature, str]] = {}

    def find(self, key: str) -> Shard | None:
        """Look for a shard and verify it; a damaged one is removed."""
        for path in sorted(self.folder.glob(f"{key}.*{_SUFFIX}")):
            expected = path.name.removesuffix(_SUFFIX).rpartition(".")[2]
            with suppress(FileNotFoundError):
                with suppress(artifacts.DamageError):
                    if artifacts.file_sha256(path) == expected:
                        return Shard(path, expected, _read_notes(path))
                path.unlink()
        return None

    def put(self, key: str, arrays: Mapping[str, npt.NDArray[Any]], notes: JSON) -> Shard:
        """Write a shard; the caller holds its claim.

        Raises:
            InputError: There is no room, or no permission.
        """
        data = save(dict(arrays), {_NOTES: json.dumps(notes, sort_keys=True)})
        sha256 = artifacts.sha256(data)
        path = self.folder / f"{key}.{sha256}{_SUFFIX}"
        with _explain(path):
            artifacts.replace(path, lambda partial: partial.write_bytes(data))
        return Shard(path, sha256, json.loads(json.dumps(notes)))

    def claim(self, key: str, *, wait: bool) -> "Claim | None":
        """Get the right to make a shard; after that, look again whether it is there.

        Args:
            key: Of the shard.
            wait: Until whoever has the right has given it back.

        Returns:
            The right, or ``None`` if it is not to be had and ``wait`` is false.
        """
        path = self.folder / f"{key}{_LOCK}"
        while True:
            with _explain(path):
                file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # The one before may have removed the file that this one waited for.
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    return Claim(path, file)
            except BlockingIOError:
                file.close()
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()

    def digest(self, path: Path) -> str:
        """The SHA-256 of a file.

        It is read again only if it looks different from when it was last read: by its size, or by
        one of its two times, of which even a copy that keeps the other changes one.

        Raises:
            OSError: It cannot be read.
        """
        name = os.path.abspath(path)  # noqa: PTH100 - symbolic links may stay
        signature = _sign(path)
        known = self._fresh.get(name) or self._digests.get(name)
        if known is not None and known[0] == signature:
            self._fresh[name] = known
            return known[1]
        sha256 = artifacts.file_sha256(path)
        self._fresh[name] = signature, sha256
        return sha256

    def check_unchanged(self, paths: Collection[Path]) -> None:
        """Make sure that files are still those whose digests were asked for.

        Raises:
            InputError: One is not.
        """
        for path in paths:
            name = os.path.abspath(path)  # noqa: PTH100
            try:
                same = self._fresh[name][0] == _sign(path)
            except OSError:
                same = False
            if not same:
                raise InputError(
                    f"{path}: expected a file that stays as it is, but it changed while it was "
                    "read; run the same command again when the corpus is complete"
                )

    def keep_digests(self) -> None:
        """Write down the digests of this run, with those of others that wrote meanwhile."""
        young = time.time_ns() - _SETTLED
        fresh = {
            name: (signature, sha256)
            for name, (signature, sha256) in self._fresh.items()
            if max(signature.modified, signature.changed) < young
        }
        if all(self._digests.get(name) == known for name, known in fresh.items()):
            return
        path = self.folder / SOURCES
        claim = self.claim(SOURCES, wait=True)
        assert claim is not None
        with claim:
            self._digests = {**_read_digests(path), **fresh}
            with _explain(path):
                artifacts.write_record(
                    path,
                    {name: [*known[0], known[1]] for name, known in sorted(self._digests.items())},
                )

    def keep_only(self, shards: Sequence[Shard]) -> None:
        """Remove all other shards, and what killed runs left; for a folder that no one shares."""
        kept = {shard.path.name for shard in shards}
        for path in self.folder.iterdir():
            if path.name not in kept and path.name.endswith((_SUFFIX, _LOCK, _PARTIAL)):
                path.unlink(missing_ok=True)


class Claim:
    """The right to make a shard; used as a context, or given back once."""

    def __init__(self, path: Path, file: Any) -> None:  # noqa: ANN401
        self._path = path
        self._file = file

    def __enter__(self) -> None:
        """Keep it."""

    def __exit__(self, *error: object) -> None:
        """Give it back."""
        self.release()

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _sign(path: Path) -> Signature:
    status = path.stat()
    return Signature(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read_notes(path: Path) -> Any:  # noqa: ANN401
    """The notes of a shard.

    Raises:
        DamageError: It has none: this cache did not write it.
    """
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()[_NOTES])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise artifacts.DamageError(f"{path.name} is no shard") from error


def _read_digests(path: Path) -> dict[str, tuple[Signature, str]]:
    """The digests that were written down; none where there is no whole file."""
    try:
        known = artifacts.read_record(path)
        return {
            name: (Signature(int(size), int(modified), int(changed)), str(sha256))
            for name, (size, modified, changed, sha256) in known.items()
        }
    except (OSError, artifacts.DamageError, ValueError, TypeError, OverflowError):
        return {}


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: expected to write there, got an error ({error.strerror}); make room, or "
            "choose another folder: finished shards are kept"
        ) from error
