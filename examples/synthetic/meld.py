"""The synthetic corpus in the published layout of MELD (``MELD.Raw``).

One CSV file and one folder of clips for each split; H.264 video and 48 kHz stereo AAC audio. As in
the published CSV files, apostrophes are the control character U+0092.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from examples.synthetic.manifest import Manifest
from examples.synthetic.media import write_mp4, write_table
from examples.synthetic.person import Person, draw_duration
from examples.synthetic.script import Line, Size, write_dialogues

SHARES = {
    "anger": 0.13,
    "disgust": 0.08,
    "fear": 0.08,
    "joy": 0.18,
    "neutral": 0.29,
    "sadness": 0.11,
    "surprise": 0.13,
}
"""Share of every emotion: uneven as in MELD, but less so, for the corpus is small."""

SENTIMENTS = {
    **dict.fromkeys(("anger", "disgust", "fear", "sadness"), "negative"),
    **dict.fromkeys(("joy", "surprise"), "positive"),
    "neutral": "neutral",
}
"""Sentiment of every emotion; MELD's own depends on the utterance where it is surprise."""

CAST = ("Mira", "Oskar", "June", "Tobias", "Lena", "Ravi", "Pilar", "Hugh")

CLIPS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
"""Folder of the clips of every split."""

COLUMNS = (
    "Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID",
    "Season", "Episode", "StartTime", "EndTime",
)  # fmt: skip

SAMPLE_RATE = 48000


@dataclass(frozen=True)
class _Row:
    """One utterance and its place; ``key`` seeds all that is random in its clip."""

    line: Line
    dialogue: int
    utterance: int
    start: float
    duration: float
    room: tuple[int, ...]
    key: tuple[int, ...]


def write(folder: Path, *, seed: int = 0, size: Size = Size()) -> Path:  # noqa: B008
    """Write the corpus, or continue an interrupted one; a finished one is left as it is.

    Args:
        folder: Where the corpus goes, as the folder ``MELD.Raw``.
        seed: Seed of everything in it, at least 0.
        size: Number of utterances.

    Returns:
        The root of the corpus, ``folder / "MELD.Raw"``.

    Raises:
        InputError: The root holds something else.
    """
    root = folder / "MELD.Raw"
    manifest = Manifest(root, "MELD", seed, size)
    if manifest.is_finished():
        return root
    manifest.begin()
    people = {name: Person.named(name, seed) for name in CAST}
    rows = {split: list(_rows(seed, split, getattr(size, split))) for split in CLIPS}
    written = []
    with tqdm(
        total=sum(map(len, rows.values())), desc="synthetic MELD", unit="clip", disable=None
    ) as progress:
        for split, clips in CLIPS.items():
            (root / clips).mkdir(exist_ok=True)
            for row in rows[split]:
                path = root / clips / f"dia{row.dialogue}_utt{row.utterance}.mp4"
                if not path.exists():
                    _write_clip(path, row, people[row.line.speaker])
                written.append(path)
                progress.update()
            written.append(root / f"{split}_sent_emo.csv")
            cells = (_cells(number, row) for number, row in enumerate(rows[split], start=1))
            write_table(written[-1], COLUMNS, cells)
    manifest.finish(written)
    return root


def _draw_cast(random: np.random.Generator) -> tuple[str, ...]:
    people = int(random.integers(2, 5))
    return tuple(str(name) for name in random.choice(CAST, size=people, replace=False))


def _rows(seed: int, split: str, count: int) -> Iterator[_Row]:
    order = tuple(CLIPS).index(split)
    random = np.random.default_rng([seed, order])
    dialogues = write_dialogues(count, SHARES, _draw_cast, random)
    for dialogue, lines in enumerate(dialogues):
        clock = float(random.integers(60, 1200))
        for utterance, line in enumerate(lines):
            duration = draw_duration(line, random)
            room = (seed, order, dialogue)
            yield _Row(line, dialogue, utterance, clock, duration, room, (*room, utterance))
            clock = round(clock + duration + random.uniform(0.1, 1.0), 3)


def _write_clip(path: Path, row: _Row, person: Person) -> None:
    random = np.random.default_rng(row.key)
    room = np.random.default_rng(row.room)
    recording, film = person.perform(row.line.emotion, row.duration, SAMPLE_RATE, room, random)
    write_mp4(path, film, _stereo(recording.samples, random), SAMPLE_RATE)


def _stereo(
    samples: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Place a voice between two microphones, each with its own noise: (2, n)."""
    left = random.uniform(0.6, 1.0)
    gains = np.array([[left], [1.6 - left]])
    return gains * samples + 0.002 * random.standard_normal((2, len(samples)))


def _cells(number: int, row: _Row) -> tuple[object, ...]:
    line = row.line
    return (
        number,
        line.text.replace("'", "\u0092"),
        line.speaker,
        line.emotion,
        SENTIMENTS[line.emotion],
        row.dialogue,
        row.utterance,
        1,
        1 + row.dialogue,
        _timestamp(row.start),
        _timestamp(row.start + row.duration),
    )


def _timestamp(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"
