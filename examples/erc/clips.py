"""Every clip decoded once, into shards that are read row by row."""

import sys
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from examples.erc import artifacts
from examples.erc.cache import Cache, Claim, Shard
from examples.erc.crew import Crew, Decoding, Result
from examples.erc.dialogue import Clip
from examples.erc.source import JSON

FORMAT = 2
"""Raised whenever the same clip and settings would give another shard."""

SHARD_ROWS = 64
"""Rows in a shard: 77 MB of 8 pictures of 224 x 224 each; an interruption loses those at work."""

Kind = Literal["missing", "broken", "late", "damaged"]

LOST: tuple[Kind, ...] = ("missing", "broken", "late")
"""The kinds of fault that leave nothing to use."""

Row = tuple[str, Clip | None]
"""The name of an utterance, and its clip if there is one."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a clip.

    Attributes:
        utterance: Whose clip it is.
        kind: "missing": there is no file; "broken": nothing can be decoded; "late": decoding was
            given up without knowing why, and is tried again by the next run; "damaged": some of
            it can be decoded, and is used.
        reason: Why, in one line.
        row: Of the utterance.
    """

    utterance: str
    kind: Kind
    reason: str
    row: int


class ClipStore:
    """Decoded clips, read from their shards when they are asked for.

    Args:
        shards: In row order.
        utterances: The name of each row.

    Attributes:
        faults: What is wrong with the clips, in row order.
        digest: The SHA-256 of everything decoded.
    """

    def __init__(self, shards: Sequence[Shard], utterances: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self._starts = list(accumulate((shard.notes["rows"] for shard in shards), initial=0))
        self._rows = len(utterances)
        self._open: dict[int, tuple[Any, list[int]]] = {}
        self.faults = [
            Fault(utterances[start + number], kind, reason, start + number)
            for start, shard in zip(self._starts, shards, strict=False)
            for number, kind, reason in shard.notes["faults"]
        ]
        self.digest = artifacts.sha256("\n".join(shard.sha256 for shard in shards).encode())

    def __len__(self) -> int:
        """The number of rows, clips that are missing or broken included."""
        return self._rows

    def __getitem__(self, row: int) -> Tensor | None:
        """What was decoded for a row; ``None`` where the clip is missing or broken."""
        if not 0 <= row < self._rows:
            raise IndexError(row)
        number = bisect_right(self._starts, row) - 1
        if number not in self._open:
            shard: Any = safe_open(self.shards[number].path, framework="pt")
            self._open[number] = (shard, shard.get_tensor("offsets").tolist())
        shard, offsets = self._open[number]
        within = row - self._starts[number]
        begin, end = offsets[within : within + 2]
        if begin == end:
            return None
        values: Tensor = shard.get_slice("values")[begin:end]
        return values

    def count(self) -> int:
        """Count the rows for which there is something."""
        count = 0
        for shard in self.shards:
            with safe_open(shard.path, framework="np") as file:
                offsets = file.get_tensor("offsets")
            count += int((offsets[1:] > offsets[:-1]).sum())
        return count

    @property
    def lost(self) -> list[Fault]:
        """The faults of the rows for which there is nothing."""
        return [fault for fault in self.faults if fault.kind in LOST]


def decode_clips(
    clips: Sequence[Row],
    decoding: Decoding,
    cache: Cache,
    crew: Crew,
    *,
    title: str,
    label: str,
    settings: Mapping[str, JSON],
    shard_rows: int = SHARD_ROWS,
) -> ClipStore:
    """Decode clips, or take them from the cache.

    A shard is identified by the content of the files of its clips, their windows and the settings.
    It ends between two files, so that each file is opened once, for all of its clips that follow
    one another. A clip that is missing or broken costs its own row alone: it is written down in
    the shard, and read as ``None``.

    Args:
        clips: In row order; at least one.
        decoding: How one file is decoded.
        cache: Where the shards are; it may be in use by others.
        crew: Who decodes.
        title: What the progress bar says.
        label: What the shards' names begin with.
        settings: Everything that what is decoded depends on, besides the clips and the options of
            ``decoding``.
        shard_rows: Rows in a shard, >= 1; more where a single file has more.

    Returns:
        The decoded clips.

    Raises:
        InputError: A file changes while it is read, or the cache cannot be written to.
    """
    common: dict[str, JSON] = {
        "format": FORMAT,
        "function": decoding.function,
        "options": dict(decoding.options),
        "settings": dict(settings),
    }
    sources = _identify(clips, cache, crew)
    batches = [
        _Batch(rows, sources, f"{label}-{_key(common, rows, sources)}")
        for rows in _cut(clips, shard_rows)
    ]
    found: dict[str, Shard] = {}
    with tqdm(total=len(clips), desc=title, unit="clip", disable=None) as progress:
        for batch, shard in zip(batches, crew.each(partial(_look_up, cache), batches), strict=True):
            if shard is not None:
                found[batch.key] = shard
                progress.update(len(batch.rows))
        missing = {batch.key: batch for batch in batches if batch.key not in found}
        for key, shard in _fill(list(missing.values()), decoding, cache, crew):
            found[key] = shard
            progress.update(len(missing[key].rows))
        progress.update(len(clips) - progress.n)  # of shards that occur twice
    cache.keep_digests()
    store = ClipStore([found[batch.key] for batch in batches], [name for name, _ in clips])
    _report(store, title)
    return store


@dataclass(frozen=True)
class _Batch:
    """The rows of a shard.

    Attributes:
        rows: At least one.
        sources: Of every file its digest, or the fault that it has.
        key: Of the shard.
    """

    rows: Sequence[Row]
    sources: Mapping[Path, "str | OSError"]
    key: str

    def files(self) -> list[tuple[list[int], list[Clip]]]:
        """For each file that can be read, the rows of its clips and the clips."""
        there = [
            (number, clip)
            for number, (_, clip) in enumerate(self.rows)
            if clip is not None and isinstance(self.sources[clip.path], str)
        ]
        by_file: dict[Path, list[tuple[int, Clip]]] = {}
        for number, clip in there:
            by_file.setdefault(clip.path, []).append((number, clip))
        return [
            ([number for number, _ in group], [clip for _, clip in group])
            for group in by_file.values()
        ]


class _Flight:
    """A shard in the making."""

    def __init__(self, batch: _Batch, claim: Claim, decoding: Decoding, crew: Crew) -> None:
        self.batch = batch
        self.claim = claim
        self.files: list[tuple[list[int], Future[dict[int, Result]]]] = [
            (numbers, crew.decode(clips, decoding)) for numbers, clips in batch.files()
        ]

    def unfinished(self) -> int:
        """How many files are not decoded yet."""
        return sum(not future.done() for _, future in self.files)

    def cancel(self) -> None:
        """Begin with no more of its files."""
        for _, future in self.files:
            future.cancel()

    def land(self, cache: Cache) -> Shard:
        """Wait for the clips, and write the shard."""
        results: dict[int, Result] = {}
        for numbers, future in self.files:
            decoded = future.result()
            results |= {numbers[position]: result for position, result in decoded.items()}
        cache.check_unchanged({clips[0].path for _, clips in self.batch.files()})
        pieces, offsets = [], [0]
        faults: list[JSON] = []
        for number in range(len(self.batch.rows)):
            result = results.get(number)
            if result is None:
                faults.append([number, "missing", self._why(number)])
            elif result.kind != "whole":
                faults.append([number, result.kind, result.reason])
            values = None if result is None else result.values
            offsets.append(offsets[-1] + (0 if values is None else len(values)))
            if values is not None:
                pieces.append(values)
        joined = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
        notes: JSON = {"rows": len(self.batch.rows), "faults": faults}
        return cache.put(self.batch.key, {"values": joined, "offsets": np.array(offsets)}, notes)

    def _why(self, number: int) -> str:
        clip = self.batch.rows[number][1]
        source = None if clip is None else self.batch.sources[clip.path]
        return "no file" if not isinstance(source, OSError) else source.strerror or "unreadable"


def _fill(
    batches: Sequence[_Batch], decoding: Decoding, cache: Cache, crew: Crew
) -> Iterator[tuple[str, Shard]]:
    """Make the shards that are not there; those that another run makes are left to it.

    So many are in the making that no process waits for the last clips of a shard.
    """
    waiting = deque(batches)
    flying: deque[_Flight] = deque()
    with ExitStack() as claims:
        while waiting or flying:
            while waiting and sum(flight.unfinished() for flight in flying) <= crew.size:
                claim = _claim_any(waiting, cache, wait=not flying)
                if claim is None:
                    break
                claims.callback(claim.release)
                batch = waiting.popleft()
                shard = cache.find(batch.key)
                if shard is None or _is_late(shard):
                    if shard is not None:
                        shard.path.unlink(missing_ok=True)
                    flying.append(_Flight(batch, claim, decoding, crew))
                    claims.callback(flying[-1].cancel)
                else:  # another run was quicker
                    claim.release()
                    yield batch.key, shard
            if flying:
                flight = flying.popleft()
                shard = flight.land(cache)
                flight.claim.release()
                yield flight.batch.key, shard


def _claim_any(waiting: "deque[_Batch]", cache: Cache, *, wait: bool) -> Claim | None:
    """Claim the first shard that is free, and bring it to the front.

    Only a run that holds no claim waits for one, so that no two wait for each other.
    """
    for _ in range(len(waiting)):
        claim = cache.claim(waiting[0].key, wait=False)
        if claim is not None:
            return claim
        waiting.rotate(-1)
    return cache.claim(waiting[0].key, wait=True) if wait else None


def _look_up(cache: Cache, batch: _Batch) -> Shard | None:
    shard = cache.find(batch.key)
    return None if shard is None or _is_late(shard) else shard


def _is_late(shard: Shard) -> bool:
    """Whether it is worth another try."""
    return any(kind == "late" for _, kind, _ in shard.notes["faults"])


def _identify(clips: Sequence[Row], cache: Cache, crew: Crew) -> dict[Path, "str | OSError"]:
    """Of every file its digest, or why it cannot be read."""
    paths = list(dict.fromkeys(clip.path for _, clip in clips if clip is not None))

    def identify(path: Path) -> str | OSError:
        try:
            return cache.digest(path)
        except OSError as error:
            return error

    return dict(zip(paths, crew.each(identify, paths), strict=True))


def _key(
    common: Mapping[str, JSON], rows: Sequence[Row], sources: Mapping[Path, "str | OSError"]
) -> str:
    described: list[JSON] = []
    for _, clip in rows:
        source = None if clip is None else sources[clip.path]
        if clip is None or not isinstance(source, str):
            described.append(None)
        else:
            described.append([source, clip.start, clip.end, clip.side])
    return artifacts.sha256(artifacts.canonical({**common, "rows": described}))[:32]


def _cut(clips: Sequence[Row], shard_rows: int) -> Iterator[Sequence[Row]]:
    """Cut the rows into shards, never between two clips of one file."""
    rows: list[Row] = []
    for path, group in groupby(clips, key=lambda row: row[1] and row[1].path):
        same = list(group)
        # Rows without a file belong together no more than rows of different files.
        for unit in [same] if path else [[row] for row in same]:
            if rows and len(rows) + len(unit) > shard_rows:
                yield rows
                rows = []
            rows += unit
    yield rows


def _report(store: ClipStore, title: str) -> None:
    """Count the faults in one line."""
    kinds = Counter(fault.kind for fault in store.faults)
    counts = "".join(f", {count} {kind}" for kind, count in sorted(kinds.items()))
    present = len(store) - len(store.lost)
    tqdm.write(f"{title}: {present} of {len(store)} clips{counts}", file=sys.stderr)
