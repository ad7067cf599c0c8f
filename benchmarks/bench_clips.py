"""What preparing clips costs, beside what one would do without it.

Two corpora are rendered: films of dialogues with many turns each, as IEMOCAP has them, and short
films with sound, as MELD has them. Two questions are measured.

- *Dialogues*: the pictures of all turns, from one pass through each film, against a scan per turn:
  the film is opened anew for every turn and decoded from its beginning to the end of the turn. (The
  released code decodes each film to its very end for each turn, which takes about twice as long.)
  Both go through the same processes into the same kind of shards. The scan is measured on every
  sixteenth turn, and both are given per turn.
- *Epochs*: the inputs of an audio and a visual student for one epoch, decoded anew for every batch
  against read from the cache, with what filling the cache took, and what opening it again takes,
  which verifies every byte. Decoding anew is measured on every fourth batch, and given for all.

Run ``python -m benchmarks.bench_clips``; it writes
``benchmarks/results/<version>/clips--cpu.json``. The rendered corpora stay in ``--corpus``, as
rendering takes longer than measuring.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import (
    TimesformerConfig,
    VideoMAEImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

from benchmarks import results
from benchmarks.machine import machines, versions
from examples.erc import artifacts, pictures, sound
from examples.erc.audio import AudioDataset, WaveformCollator
from examples.erc.cache import Cache
from examples.erc.clips import ClipStore, Row, decode_clips
from examples.erc.crew import Crew, Decoding
from examples.erc.dialogue import Clip
from examples.erc.pretrained import Pretrained
from examples.erc.visual import FrameFitter, VisualDataset

COUNT = 8  # pictures of a turn, of 224 x 224, as the encoder of the paper wants them
MAX_SECONDS = 30.0
BATCH_SIZE = 8
RATE = 25
SOUND_RATE = 48_000
SCAN_EVERY = 16
DECODE_EVERY = 4

SCAN = "benchmarks.scanning:scan"
PASS = "examples.erc.pictures:decode"
SOUND = "examples.erc.sound:decode"


@dataclass(frozen=True)
class Size:
    """How large the corpora are.

    Attributes:
        dialogues: Films of dialogues.
        turns: Turns in each.
        turn_seconds: From the beginning of a turn to that of the next, a third of it a pause.
        film: Width and height of those films.
        clips: Short films.
        clip_seconds: Their length.
        clip: Their width and height.
    """

    dialogues: int
    turns: int
    turn_seconds: float
    film: tuple[int, int]
    clips: int
    clip_seconds: float
    clip: tuple[int, int]


FULL = Size(8, 64, 4.5, (720, 480), 500, 3.0, (640, 360))
QUICK = Size(1, 32, 1.2, (64, 48), 16, 1.0, (64, 48))


def render(folder: Path, size: Size) -> tuple[list[Path], list[Path]]:
    """Write both corpora, unless they are there.

    Returns:
        The films of the dialogues, and the short ones.
    """
    films = [folder / f"dialogue{number:03}.avi" for number in range(size.dialogues)]
    clips = [folder / f"clip{number:04}.mp4" for number in range(size.clips)]
    folder.mkdir(parents=True, exist_ok=True)
    todo = [path for path in (*films, *clips) if not path.exists()]
    for path in tqdm(todo, desc="rendering", unit="film", disable=None):
        number = (films + clips).index(path)
        if path.suffix == ".avi":
            artifacts.replace(path, lambda partial: _write_film(partial, size, number))  # noqa: B023
        else:
            artifacts.replace(path, lambda partial: _write_clip(partial, size, number))  # noqa: B023
    return films, clips


def _write_film(path: Path, size: Size, number: int) -> None:
    """A silent film, key frames every 12 pictures, as FFmpeg's MPEG-4 encoder has them."""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        _encode(container, stream, size.film, size.turns * size.turn_seconds, number)


def _write_clip(path: Path, size: Size, number: int) -> None:
    """A film with sound, key frames at most every 250 pictures, as x264 has them."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="stereo")
        _encode(container, video, size.clip, size.clip_seconds, number)
        times = np.arange(round(size.clip_seconds * SOUND_RATE)) / SOUND_RATE
        tone = np.sin(2 * np.pi * (200 + number % 100 + 50 * np.sin(times)) * times)
        frame = av.AudioFrame.from_ndarray(
            np.stack([tone, 0.5 * tone]).astype(np.float32), format="fltp", layout="stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def _encode(
    container: Any,  # noqa: ANN401
    stream: Any,  # noqa: ANN401
    shape: tuple[int, int],
    seconds: float,
    number: int,
) -> None:
    """Waves over a grainy ground, each on its way: not all of it can be predicted."""
    width, height = shape
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    random = np.random.default_rng(number)
    ground = random.integers(0, 60, (2 * height, 2 * width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[: 2 * height, : 2 * width]
    waves = (90 + 60 * np.sin(columns / 23) * np.cos(rows / 17)).astype(np.uint8)[..., None]

    def cut(whole: npt.NDArray[np.uint8], down: int, right: int) -> npt.NDArray[np.uint8]:
        top, left = down % height, right % width
        return whole[top : top + height, left : left + width]

    for index in range(round(seconds * RATE)):
        picture = cut(waves, 3 * index, 4 * index) + cut(ground, index, 2 * index)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def turns(films: Sequence[Path], size: Size) -> list[Row]:
    """The clips of the dialogues: each film cut into turns with pauses between."""
    rows: list[Row] = []
    for film in films:
        for number in range(size.turns):
            start = number * size.turn_seconds
            clip = Clip(film, start, start + size.turn_seconds * 2 / 3)
            rows.append((f"{film.stem}_{number:03}", clip))
    return rows


class Bench:
    """Both measurements on the same corpora.

    Args:
        size: How large.
        corpus: Where the corpora are.
        scratch: A folder for caches.
        workers: Processes for decoding.
    """

    def __init__(self, size: Size, corpus: Path, scratch: Path, workers: int) -> None:
        self._size = size
        self._scratch = scratch
        self._workers = workers
        self._films, self._clips = render(corpus, size)
        self._fitter = FrameFitter(Pretrained(str(_visual_folder(scratch / "visual"))))
        self._collator = WaveformCollator(Pretrained(str(_audio_folder(scratch / "audio"))))

    def dialogues(self) -> dict[str, Any]:
        """One pass for each film against one scan for each turn."""
        rows = turns(self._films, self._size)
        some = rows[SCAN_EVERY // 2 :: SCAN_EVERY]
        options = {"count": COUNT, "max_seconds": MAX_SECONDS}
        with Crew(self._workers) as crew:
            _warm_up(crew, rows[0][1], self._fitter.fit)
            seconds, once = self._prepare(
                rows, Decoding(PASS, options, self._fitter.fit), crew, "pass"
            )
            scan_seconds, scanned = self._prepare(
                some, Decoding(SCAN, options, self._fitter.fit), crew, "scan"
            )
        differing = sum(
            not torch.equal(_rows(once)[SCAN_EVERY // 2 + SCAN_EVERY * number], values)
            for number, values in enumerate(_rows(scanned))
        )
        per_turn, per_scan = seconds / len(rows), scan_seconds / len(some)
        return {
            "turns": len(rows),
            "films": len(self._films),
            "scanned_turns": len(some),
            "seconds_of_film": self._size.turns * self._size.turn_seconds,
            "pass_milliseconds_per_turn": 1000 * per_turn,
            "scan_milliseconds_per_turn": 1000 * per_scan,
            "scan_over_pass": per_scan / per_turn,
            "turns_whose_pictures_differ": differing,
        }

    def epochs(self) -> dict[str, Any]:
        """Decoding every batch anew against reading the cache."""
        rows: list[Row] = [(path.stem, Clip(path)) for path in self._clips]
        pictures_options = {"count": COUNT, "max_seconds": MAX_SECONDS}
        decodings = {
            "audio": Decoding(SOUND, {"max_seconds": MAX_SECONDS}, np.asarray),
            "visual": Decoding(PASS, pictures_options, self._fitter.fit),
        }
        started = time.perf_counter()
        with Crew(self._workers) as crew:
            stores = {
                name: self._prepare(rows, decoding, crew, name)[1]
                for name, decoding in decodings.items()
            }
        fill = time.perf_counter() - started
        started = time.perf_counter()
        with Crew(self._workers) as crew:
            for name, decoding in decodings.items():
                self._prepare(rows, decoding, crew, name)
        again = time.perf_counter() - started
        order = torch.randperm(len(rows), generator=torch.manual_seed(0)).tolist()
        batches = [order[first : first + BATCH_SIZE] for first in range(0, len(order), BATCH_SIZE)]
        datasets = (
            AudioDataset(stores["audio"], self._collator),
            VisualDataset(stores["visual"], self._fitter),
        )
        anew = (
            AudioDataset(_Anew(self._clips, _decode_sound), self._collator),  # type: ignore[arg-type]
            VisualDataset(_Anew(self._clips, self._decode_pictures), self._fitter),  # type: ignore[arg-type]
        )
        some = batches[::DECODE_EVERY]
        read = _epoch(datasets, batches)
        decode = _epoch(anew, some) * len(batches) / len(some)
        return {
            "clips": len(rows),
            "batch_size": BATCH_SIZE,
            "batches": len(batches),
            "batches_decoded_anew": len(some),
            "decode_seconds": decode,
            "cache_seconds": read,
            "decode_over_cache": decode / read,
            "fill_seconds": fill,
            "open_seconds": again,
            "epochs_to_pay_for_filling": fill / (decode - read) if decode > read else None,
            "cache_megabytes": sum(
                shard.path.stat().st_size for store in stores.values() for shard in store.shards
            ) / 1e6,
        }  # fmt: skip

    def _prepare(
        self, rows: Sequence[Row], decoding: Decoding, crew: Crew, label: str
    ) -> tuple[float, ClipStore]:
        started = time.perf_counter()
        store = decode_clips(
            rows,
            decoding,
            Cache(self._scratch / "cache"),
            crew,
            title=label,
            label=label,
            settings={},
        )
        seconds = time.perf_counter() - started
        assert store.count() == len(rows)
        return seconds, store

    def _decode_pictures(self, path: Path) -> npt.NDArray[Any]:
        values, _ = pictures.decode_frames(Clip(path), COUNT, MAX_SECONDS)
        return self._fitter.fit(values)


class _Anew:
    """Decodes a row whenever it is asked for."""

    def __init__(self, paths: Sequence[Path], decode: Callable[[Path], npt.NDArray[Any]]) -> None:
        self._paths = paths
        self._decode = decode

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self._decode(self._paths[row]))


def _decode_sound(path: Path) -> npt.NDArray[Any]:
    waveform, _ = sound.decode_waveform(Clip(path), MAX_SECONDS)
    return sound.quantise(waveform)


def _epoch(datasets: Sequence[Any], batches: Sequence[list[int]]) -> float:
    """Seconds for all batches of one epoch."""
    started = time.perf_counter()
    for dataset in datasets:
        for rows in batches:
            dataset[rows]
    return time.perf_counter() - started


def _rows(store: ClipStore) -> list[torch.Tensor]:
    found = [store[row] for row in range(len(store))]
    return [values for values in found if values is not None]


def _warm_up(crew: Crew, clip: Clip | None, finish: Callable[..., Any]) -> None:
    """Start all processes, and load what the first call of a processor loads."""
    assert clip is not None
    options = {"count": COUNT, "max_seconds": 0.1}
    for future in [crew.decode([clip], Decoding(SCAN, options, finish)) for _ in range(8)]:
        future.result()


def _visual_folder(folder: Path) -> Path:
    TimesformerConfig(image_size=224, num_frames=COUNT).save_pretrained(folder)
    VideoMAEImageProcessorPil().save_pretrained(folder)
    return folder


def _audio_folder(folder: Path) -> Path:
    Wav2Vec2Config().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the preparation of clips.")
    parser.add_argument("--quick", action="store_true", help="small corpora: does it run at all?")
    parser.add_argument("--corpus", type=Path, help="folder of the rendered corpora")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    runs = results.ROOT / "runs" / "benchmarks"
    size = QUICK if options.quick else FULL
    corpus = options.corpus or runs / ("clips-quick" if options.quick else "clips")
    workers = min(os.cpu_count() or 1, 8)
    if options.render_only:
        render(corpus, size)
        return corpus
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(size, corpus, Path(scratch), workers)
        rows = {"dialogues": bench.dialogues(), "epochs": bench.epochs()}
    machine = machines()[0]
    path = results.path_of(
        options.output or (runs if options.quick else results.RESULTS), "clips", "cpu"
    )
    document = {
        "experiment": "clips",
        "command": "python -m benchmarks.bench_clips" + (" --quick" if options.quick else ""),
        "device": "cpu",
        "machine": {"name": machine.name, "processes": workers},
        "versions": {**versions("cpu"), "av": av.__version__},
        "size": asdict(size),
        "rows": rows,
    }
    results.write(path, document)
    for name, row in rows.items():
        print(name)
        for key, value in row.items():
            print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    print(path)
    return path


if __name__ == "__main__":
    main()
