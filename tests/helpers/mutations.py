"""Spoil media files at random, and see what preparing them costs.

``python -m tests.helpers.mutations --count 500`` does what the test does with more files.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import av
import numpy as np
from PIL import Image

from examples.erc.cache import Cache
from examples.erc.clips import ClipStore, Row, decode_clips
from examples.erc.crew import Crew, Decoding
from examples.erc.dialogue import Clip
from examples.erc.ledger import Place, write
from examples.erc.pictures import Picture

LONGEST = 30.0
"""Seconds that one file may take."""

LARGEST = 2 << 30
"""Bytes that all processes for decoding together may hold, and this one besides."""

CODECS = {"mp4": "libx264", "avi": "mpeg4", "mkv": "libx264"}


@dataclass(frozen=True)
class Outcome:
    """What a corpus of spoiled files cost.

    Attributes:
        ledger: As it was written.
        slowest: Seconds that the slowest file took.
        largest: Bytes that a process for decoding held at most.
    """

    ledger: dict[str, object]
    slowest: float
    largest: int


def make_film(path: Path) -> Path:
    """Write a second of moving pictures, with sound where the format is a film's."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(CODECS[path.suffix[1:]], rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        columns = np.arange(64)
        for number in range(25):
            line = (127 * (1 + np.sin(columns / 5 + number))).astype(np.uint8)
            picture = np.ascontiguousarray(np.broadcast_to(line[None, :, None], (48, 64, 3)))
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode(None))
        tone = np.sin(np.arange(16_000) / 5)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def spoil(data: bytes, random: np.random.Generator) -> bytes:
    """Spoil a file in one of seven ways."""
    spoiled = bytearray(data)
    length = len(data)

    def flip(many: int) -> None:
        for place in random.integers(0, 8 * length, many):
            spoiled[place // 8] ^= 1 << place % 8

    def extremes() -> None:
        # Lengths, sizes, counts and rates are 32-bit numbers, most of them near the two ends.
        for _ in range(random.integers(1, 6)):
            near = int(min(random.exponential(300), length - 5))
            place = near if random.random() < 0.5 else length - 5 - near
            value = random.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00010000])
            order = "big" if random.random() < 0.5 else "little"
            spoiled[place : place + 4] = int(value).to_bytes(4, order)

    def noise() -> None:
        place, size = random.integers(0, length), random.integers(1, 2000)
        end = min(place + size, length)
        spoiled[place:end] = random.bytes(int(end - place))

    def cut() -> None:
        del spoiled[random.integers(0, length) :]

    def drop() -> None:
        place = random.integers(0, length)
        del spoiled[place : place + random.integers(1, 3000)]

    def repeat() -> None:
        begin, end = sorted(random.integers(0, length, 2))
        spoiled[begin:begin] = spoiled[begin:end] * int(random.integers(1, 5))

    ways: list[Callable[[], None]] = [
        lambda: flip(1), lambda: flip(200), extremes, noise, cut, drop, repeat,
    ]  # fmt: skip
    ways[random.integers(len(ways))]()
    return bytes(spoiled)


def fit(pictures: Picture) -> Picture:
    """Bring pictures to one size."""
    return np.stack([np.asarray(Image.fromarray(one).resize((32, 32))) for one in pictures])


def prepare(folder: Path, count: int, seed: int = 0, workers: int = 2) -> Outcome:
    """Spoil ``count`` files and prepare their sound and pictures.

    Raises:
        RuntimeError: The ledger does not add up.
    """
    random = np.random.default_rng(seed)
    whole = [make_film(folder / f"whole.{suffix}") for suffix in CODECS]
    clips: list[Clip] = []
    for number in range(count):
        source = whole[number % len(whole)]
        path = folder / f"{number:04}{source.suffix}"
        path.write_bytes(spoil(source.read_bytes(), random))
        clips.append(Clip(path, 0.25, 0.75) if number % 4 == 3 else Clip(path))
    rows: list[Row] = [(clip.path.stem, clip) for clip in clips]
    decodings = {
        "audio": Decoding("examples.erc.sound:decode", {"max_seconds": 30}, np.asarray),
        "visual": Decoding("examples.erc.pictures:decode", {"max_seconds": 30, "count": 8}, fit),
    }
    stores: dict[Place, ClipStore] = {}
    times: list[float] = []
    cache = Cache(folder / "cache")
    with Crew(workers) as crew, _Watch(crew) as watch:
        for modality, decoding in decodings.items():
            place = (modality, "train")
            with _Clock(crew) as clock:
                stores[place] = decode_clips(
                    rows, decoding, cache, crew, title=modality, label=modality, settings={}
                )
            times += clock.seconds
            write(folder / "ledger.json", "mask", stores, dict.fromkeys(stores, rows))
    ledger = json.loads((folder / "ledger.json").read_text("utf-8"))
    return Outcome(ledger, max(times), watch.largest)


class _Clock:
    """Measures how long each file takes."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._original = crew._decode
        self.seconds: list[float] = []

    def __enter__(self) -> "_Clock":
        def timed(clips: Sequence[Clip], decoding: Decoding) -> object:
            started = time.monotonic()
            try:
                return self._original(clips, decoding)
            finally:
                self.seconds.append(time.monotonic() - started)

        self._crew._decode = timed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        self._crew._decode = self._original  # type: ignore[method-assign]


class _Watch:
    """Looks at how much the processes of a crew hold, every 20 ms."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._over = Event()
        self._thread = Thread(target=self._look)
        self.largest = 0

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for process in list(self._crew._all):
                try:
                    status = Path(f"/proc/{process._popen.pid}/status").read_text("ascii")
                except OSError:
                    continue
                held = [line.split()[1] for line in status.splitlines() if "VmHWM" in line]
                self.largest = max(self.largest, *(1024 * int(value) for value in held), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        outcome = prepare(Path(folder), options.count, options.seed)
    for place in outcome.ledger["clips"]:  # type: ignore[attr-defined]
        kinds: dict[str, int] = {}
        for fault in place.pop("faults"):
            kinds[fault["reason"]] = kinds.get(fault["reason"], 0) + 1
        print(json.dumps(place))
        for reason, count in sorted(kinds.items(), key=lambda item: -item[1]):
            print(f"  {count:4} {reason}")
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{options.count} files in {time.monotonic() - started:.1f} s; the slowest "
        f"{outcome.slowest:.2f} s; at most {outcome.largest >> 20} MiB in a process for decoding, "
        f"{own >> 20} MiB here"
    )
    if outcome.slowest > LONGEST or max(outcome.largest, own) > LARGEST:
        sys.exit("too slow, or too large")


if __name__ == "__main__":
    main()
