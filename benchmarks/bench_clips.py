"""What the pipeline takes for a stage, beside what the released code would do.

Two corpora are rendered: films of dialogues with many turns each, as long and as large as those of
IEMOCAP, and the synthetic MELD, once as it is and once with larger pictures.

- *Preparation*: the pictures of all turns of a dialogue, from one pass through its film, against a
  scan per turn, for which the film is opened anew and decoded from its beginning to the end of the
  turn; and against opening it anew for each turn, but entering it at a key frame. All go through
  the same processes into the same kind of shards. The latter two are measured on every sixteenth
  turn, and all are given per turn.
- *Stages*: an epoch of each stage of the training; see :mod:`benchmarks.stages`.

Run ``python -m benchmarks.bench_clips``; it writes
``benchmarks/results/<version>/clips--cpu.json``. The rendered corpora stay in ``--corpus``, as
rendering takes longer than measuring.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import TimesformerConfig, VideoMAEImageProcessorPil

from benchmarks import results, stages
from benchmarks.machine import machines, versions
from examples.erc import artifacts
from examples.erc.cache import Cache
from examples.erc.clips import ClipStore, Row, decode_clips
from examples.erc.crew import Crew, Decoding
from examples.erc.dialogue import Clip
from examples.erc.pretrained import Pretrained
from examples.erc.source import SPLITS
from examples.erc.visual import FrameFitter
from examples.synthetic import face, meld, script

COUNT = 8  # pictures of a turn, of 224 x 224, as the encoder of the paper wants them
RATE = 25
EVERY = 16  # one of so many turns is taken alone

PASS = "examples.erc.pictures:decode"
SCAN = "benchmarks.scanning:scan"
LOOK = "benchmarks.scanning:look"


@dataclass(frozen=True)
class Size:
    """How large the corpora are.

    Attributes:
        dialogues: Films of dialogues.
        turns: Turns in each.
        turn_seconds: From the beginning of a turn to that of the next, a third of it a pause.
        film: Width and height of those films.
        utterances: Of the synthetic MELD: in train, dev and test.
        larger: Width and height to which its pictures are enlarged.
    """

    dialogues: int
    turns: int
    turn_seconds: float
    film: tuple[int, int]
    utterances: tuple[int, int, int]
    larger: tuple[int, int]


FULL = Size(8, 64, 4.5, (720, 480), (500, 50, 50), (640, 360))
QUICK = Size(1, 32, 1.2, (64, 48), (24, 4, 4), (192, 144))


def render(folder: Path, size: Size) -> tuple[list[Path], dict[str, Path]]:
    """Write the corpora, unless they are there.

    Returns:
        The films of the dialogues; and the roots of the synthetic MELD, by what its pictures are.
    """
    films = [folder / f"dialogue{number:03}.avi" for number in range(size.dialogues)]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number, path in enumerate(films) if not path.exists()]
    for number in tqdm(missing, desc="rendering", unit="film", disable=None):
        artifacts.replace(films[number], lambda part: _write_film(part, size, number))  # noqa: B023
    drawn = meld.write(folder, seed=stages.SEED, size=script.Size(*size.utterances))
    width, height = size.larger
    larger = folder / f"MELD.Raw-{width}x{height}"
    stages.enlarge(drawn, larger, width, height)
    return films, {f"{face.WIDTH} x {face.HEIGHT}": drawn, f"{width} x {height}": larger}


def _write_film(path: Path, size: Size, number: int) -> None:
    """A silent film, key frames every 12 pictures, as FFmpeg's MPEG-4 encoder has them."""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        _encode(container, stream, size.film, size.turns * size.turn_seconds, number)


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


class Preparation:
    """The pictures of dialogues, prepared in three ways.

    Args:
        films: Of the dialogues.
        size: How large they are.
        scratch: A folder for caches.
        workers: Processes for decoding.
    """

    def __init__(self, films: Sequence[Path], size: Size, scratch: Path, workers: int) -> None:
        self._films = films
        self._size = size
        self._scratch = scratch
        self._workers = workers
        self._fitter = FrameFitter(Pretrained(str(_visual_folder(scratch / "visual"))))

    def measure(self) -> dict[str, Any]:
        """One pass for each film against one scan, and one look, for each turn."""
        rows = turns(self._films, self._size)
        some = rows[EVERY // 2 :: EVERY]
        with Crew(self._workers) as crew:
            _warm_up(crew, rows[0][1], self._fitter.fit)
            pass_seconds, once = self._prepare(rows, PASS, crew)
            scan_seconds, scanned = self._prepare(some, SCAN, crew)
            look_seconds, looked = self._prepare(some, LOOK, crew)
        expected = _rows(once)[EVERY // 2 :: EVERY]
        per_turn = pass_seconds / len(rows)
        scan_per_turn, look_per_turn = scan_seconds / len(some), look_seconds / len(some)
        return {
            "turns": len(rows),
            "films": len(self._films),
            "film": list(self._size.film),
            "seconds_of_film": self._size.turns * self._size.turn_seconds,
            "turns_taken_alone": len(some),
            "pass_milliseconds_per_turn": 1000 * per_turn,
            "scan_milliseconds_per_turn": 1000 * scan_per_turn,
            "look_milliseconds_per_turn": 1000 * look_per_turn,
            "scan_over_pass": scan_per_turn / per_turn,
            "look_over_pass": look_per_turn / per_turn,
            "required": 10.0,
            "turns_whose_pictures_differ": sum(
                not torch.equal(values, known)
                for store in (scanned, looked)
                for values, known in zip(_rows(store), expected, strict=True)
            ),
        }

    def _prepare(self, rows: Sequence[Row], function: str, crew: Crew) -> tuple[float, ClipStore]:
        options = {"count": COUNT, "max_seconds": stages.MAX_SECONDS}
        started = time.perf_counter()
        store = decode_clips(
            rows,
            Decoding(function, options, self._fitter.fit),
            Cache(self._scratch / "cache"),
            crew,
            title=function,
            label=function.rpartition(":")[2],
            settings={},
        )
        seconds = time.perf_counter() - started
        assert store.count() == len(rows)
        return seconds, store


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


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description="Measure the preparation and the stages.")
    parser.add_argument("--quick", action="store_true", help="small corpora: does it run at all?")
    parser.add_argument("--corpus", type=Path, help="folder of the rendered corpora")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    runs = results.ROOT / "runs" / "benchmarks"
    size = QUICK if options.quick else FULL
    corpus = options.corpus or runs / ("clips-quick" if options.quick else "clips")
    films, roots = render(corpus, size)
    if options.render_only:
        return corpus
    processes = min(os.cpu_count() or 1, 8)
    usual_threads = torch.get_num_threads()
    # Loaders want the other processors; what is trained here is too small for threads.
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            preparation = Preparation(films, size, scratch, processes).measure()
            by_pictures = {
                pictures: list(stages.Stages(root, scratch / pictures, processes).measure())
                for pictures, root in roots.items()
            }
    finally:
        torch.set_num_threads(usual_threads)
    path = results.path_of(
        options.output or (runs if options.quick else results.RESULTS), "clips", "cpu"
    )
    document = {
        "experiment": "clips",
        "command": "python -m benchmarks.bench_clips" + (" --quick" if options.quick else ""),
        "device": "cpu",
        "machine": {"name": machines()[0].name, "processes": processes},
        "versions": {**versions("cpu"), "av": av.__version__},
        "utterances": dict(zip(SPLITS, size.utterances, strict=True)),
        "rows": {"preparation": preparation, "stages": by_pictures},
    }
    results.write(path, document)
    print(json.dumps(document["rows"], indent=2))
    print(path)
    return path


if __name__ == "__main__":
    main()
