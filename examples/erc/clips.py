"""Every clip decoded once, into shards that are read row by row."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError
from examples.erc.source import JSON

MANIFEST = "manifest.json"
"""What was decoded, with which settings, and what could not be."""

FORMAT = 1
"""Raised whenever the same clip and settings would give another shard."""

SHARD_ROWS = 64
"""Rows in a shard: 77 MB of 8 pictures of 224 x 224 each; an interruption loses one shard."""

_PARTIAL = ".partial"

Decode: TypeAlias = Callable[[Clip], tuple[npt.NDArray[Any], int]]
"""Decodes a clip to values, cut along the first axis into rows, and counts damaged packets."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a clip.

    Attributes:
        utterance: Whose clip it is.
        kind: "missing": there is no file; "broken": nothing can be decoded; "damaged": some of it
            can be, and is used.
        reason: Why, in one line.
    """

    utterance: str
    kind: Literal["missing", "broken", "damaged"]
    reason: str


class ClipStore:
    """Decoded clips, read from their shards when they are asked for.

    Args:
        folder: What :func:`decode_clips` filled.

    Attributes:
        faults: What is wrong with the clips, in row order.
        digest: The SHA-256 of everything decoded.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._paths = [folder / shard["file"] for shard in manifest["shards"]]
        self._rows: int = manifest["rows"]
        self._shard_rows: int = manifest["shard_rows"]
        self._open: dict[int, tuple[Any, list[int]]] = {}
        self.faults = [Fault(**fault) for shard in manifest["shards"] for fault in shard["faults"]]
        self.digest = _digest([shard["sha256"] for shard in manifest["shards"]])

    def __len__(self) -> int:
        """The number of rows, clips that are missing or broken included."""
        return self._rows

    def __getitem__(self, row: int) -> Tensor | None:
        """What was decoded for a row; ``None`` where the clip is missing or broken."""
        if not 0 <= row < self._rows:
            raise IndexError(row)
        number, within = divmod(row, self._shard_rows)
        if number not in self._open:
            shard: Any = safe_open(self._paths[number], framework="pt")
            self._open[number] = (shard, shard.get_tensor("offsets").tolist())
        shard, offsets = self._open[number]
        begin, end = offsets[within : within + 2]
        if begin == end:
            return None
        values: Tensor = shard.get_slice("values")[begin:end]
        return values


def decode_clips(
    clips: Sequence[tuple[str, Clip | None]],
    decode: Decode,
    folder: Path,
    *,
    title: str,
    settings: Mapping[str, JSON],
    shard_rows: int = SHARD_ROWS,
    workers: int | None = None,
) -> ClipStore:
    """Decode clips into a folder, or go on where an interruption ended it.

    A shard is written whole or not at all, and kept for as long as its clips and the settings are
    the same and its digest is right. A clip that is missing or broken costs its own row alone: it
    is written down in the manifest, counted in a line on standard error, and read as ``None``.

    Args:
        clips: The name of each utterance and its clip, in row order; at least one.
        decode: Decodes one clip; called from several threads.
        folder: Where the shards and their manifest go.
        title: What the progress bar says.
        settings: Everything that what is decoded depends on, besides the clips.
        shard_rows: Rows in a shard, >= 1.
        workers: Threads, >= 1; ``None``: one for each processor, at most 8.

    Returns:
        The decoded clips.

    Raises:
        InputError: Not one clip can be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _read_shards(folder)
    outline = {
        "title": title,
        "settings": dict(settings),
        "rows": len(clips),
        "shard_rows": shard_rows,
    }
    names = []
    with (
        _pool(workers or min(os.cpu_count() or 1, 8)) as pool,
        tqdm(total=len(clips), desc=title, unit="clip", disable=None) as progress,
    ):
        for first in range(0, len(clips), shard_rows):
            rows = clips[first : first + shard_rows]
            fingerprint = _fingerprint(rows, settings)
            path = folder / f"{first // shard_rows:05}.safetensors"
            names.append(path.name)
            if _is_intact(path, shards.get(path.name), fingerprint):
                progress.update(len(rows))
                continue
            data, faults = _decode_shard(rows, decode, pool, progress)
            _write(path, data)
            shards[path.name] = {
                "file": path.name,
                "fingerprint": fingerprint,
                "sha256": hashlib.sha256(data).hexdigest(),
                "faults": [asdict(fault) for fault in faults],
            }
            _write_manifest(folder, outline, shards.values())
    _write_manifest(folder, outline, [shards[name] for name in names])
    _remove_others(folder, names)
    store = ClipStore(folder)
    _report(store, title, folder)
    return store


def _read_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The shards of an earlier run by name; none where there is no readable manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {shard["file"]: shard for shard in manifest["shards"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _fingerprint(rows: Sequence[tuple[str, Clip | None]], settings: Mapping[str, JSON]) -> str:
    """Changes when the settings, a clip's window or the size of its file do."""
    described = [
        [name, clip and [clip.path.name, _size(clip.path), clip.start, clip.end]]
        for name, clip in rows
    ]
    return _digest([json.dumps([FORMAT, settings, described], sort_keys=True)])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_intact(path: Path, shard: Mapping[str, Any] | None, fingerprint: str) -> bool:
    return (
        shard is not None
        and shard.get("fingerprint") == fingerprint
        and path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() == shard.get("sha256")
    )


def _decode_shard(
    rows: Sequence[tuple[str, Clip | None]],
    decode: Decode,
    pool: ThreadPoolExecutor,
    progress: "tqdm[Any]",
) -> tuple[bytes, list[Fault]]:
    pieces: list[npt.NDArray[Any]] = []
    offsets = [0]
    faults = []
    for values, fault in pool.map(lambda row: _attempt(decode, *row), rows):
        offsets.append(offsets[-1] + (0 if values is None else len(values)))
        if values is not None:
            pieces.append(values)
        if fault is not None:
            faults.append(fault)
        progress.update()
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
    return save({"values": joined, "offsets": np.array(offsets)}), faults


def _attempt(
    decode: Decode, utterance: str, clip: Clip | None
) -> tuple[npt.NDArray[Any] | None, Fault | None]:
    if clip is None:
        return None, Fault(utterance, "missing", "no file")
    try:
        values, damaged = decode(clip)
    except ClipError as error:
        return None, Fault(utterance, "broken", str(error))
    if damaged:
        return values, Fault(utterance, "damaged", f"{damaged} packets left out")
    return values, None


def _report(store: ClipStore, title: str, folder: Path) -> None:
    """Count the faults in one line.

    Raises:
        InputError: There is nothing but faults.
    """
    kinds = Counter(fault.kind for fault in store.faults)
    present = len(store) - kinds["missing"] - kinds["broken"]
    if not present:
        first = store.faults[0]
        raise InputError(
            f"{title}: expected clips that can be decoded, got none in {len(store)} "
            f"({first.utterance}: {first.reason}); check the folder of the corpus"
        )
    counts = "".join(f", {count} {kind}" for kind, count in sorted(kinds.items()))
    where = f"; see {folder / MANIFEST}" if counts else ""
    tqdm.write(f"{title}: {present} of {len(store)} clips{counts}{where}", file=sys.stderr)


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that an interruption ends after the clips that they are at."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _write_manifest(
    folder: Path, outline: Mapping[str, Any], shards: Iterable[Mapping[str, Any]]
) -> None:
    ordered = sorted(shards, key=lambda shard: str(shard["file"]))
    text = json.dumps({**outline, "shards": ordered}, indent=1)
    _write(folder / MANIFEST, (text + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: There is no room, or no permission.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: expected to write {len(data)} bytes, got an error ({error.strerror}); "
            "make room, or choose another run folder: finished shards are kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a change of names last through a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove shards of a larger corpus, and what a killed run was writing."""
    for path in folder.iterdir():
        if path.name.endswith(_PARTIAL) or (
            path.suffix == ".safetensors" and path.name not in names
        ):
            path.unlink(missing_ok=True)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
