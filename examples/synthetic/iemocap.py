"""The synthetic corpus in the published layout of IEMOCAP (``IEMOCAP_full_release``).

A transcription and an evaluation for each dialogue, as the university releases them, and one CSV
file for each split, as TelME's authors do; one 16 kHz recording for each utterance, but one film
for each dialogue, in which the utterances are windows. As in the released CSV files, the column
``Speaker`` holds the utterance's own id, and the people of the test split (Session 5) occur
nowhere else. Unlike the real films, which show both people side by side and have sound, these are
silent and show whoever speaks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.iemocap.release import DEV
from examples.synthetic.face import FRAME_RATE, Frame
from examples.synthetic.manifest import Manifest
from examples.synthetic.media import write_avi, write_lines, write_table, write_wav
from examples.synthetic.person import Person, draw_duration
from examples.synthetic.script import Line, Size, write_dialogues

EMOTIONS = {
    "anger": "ang",
    "excitement": "exc",
    "frustration": "fru",
    "joy": "hap",
    "neutral": "neu",
    "sadness": "sad",
}
"""IEMOCAP's label of every emotion."""

EVALUATIONS = {
    "anger": ("Anger", (2, 4, 4)),
    "excitement": ("Excited", (4, 4, 3)),
    "frustration": ("Frustration", (2, 3, 3)),
    "joy": ("Happiness", (4, 3, 3)),
    "neutral": ("Neutral", (3, 2, 3)),
    "sadness": ("Sadness", (2, 2, 2)),
}
"""What every evaluator makes of an emotion: its name; valence, activation and dominance of 5."""

EVALUATORS = ("E1", "E2", "E4")

SHARES = {
    "anger": 0.16,
    "excitement": 0.14,
    "frustration": 0.23,
    "joy": 0.10,
    "neutral": 0.22,
    "sadness": 0.15,
}
"""Share of every emotion, about as in IEMOCAP."""

SESSIONS = {"train": (1, 2, 3, 4), "dev": (1, 2, 3, 4), "test": (5,)}
"""Sessions of every split; in each one two people talk, F and M."""

COLUMNS = (
    "Utterance", "Speaker", "Dialogue_ID", "Start_Time", "End_Time", "Wav_Path", "Video_Path",
    "Emotion",
)  # fmt: skip

PREFIX = "./dataset/IEMOCAP_full_release"
"""Where the paths of the released CSV files begin."""

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class _Utterance:
    identity: str
    line: Line
    start: float
    duration: float
    key: tuple[int, ...]

    @property
    def end(self) -> float:
        return round(self.start + self.duration, 4)


@dataclass(frozen=True)
class _Dialogue:
    identity: str
    session: int
    utterances: tuple[_Utterance, ...]
    end: float
    key: tuple[int, ...]

    @property
    def transcription(self) -> str:
        return f"Session{self.session}/dialog/transcriptions/{self.identity}.txt"

    @property
    def evaluation(self) -> str:
        return f"Session{self.session}/dialog/EmoEvaluation/{self.identity}.txt"

    @property
    def film(self) -> str:
        return f"Session{self.session}/dialog/avi/DivX/{self.identity}.avi"

    def recording(self, utterance: _Utterance) -> str:
        folder = f"Session{self.session}/sentences/wav/{self.identity}"
        return f"{folder}/{utterance.identity}.wav"


def write(folder: Path, *, seed: int = 0, size: Size = Size()) -> Path:  # noqa: B008
    """Write the corpus, or continue an interrupted one; a finished one is left as it is.

    Args:
        folder: Where the corpus goes, as the folder ``IEMOCAP_full_release``.
        seed: Seed of everything in it, at least 0.
        size: Number of utterances.

    Returns:
        The root of the corpus, ``folder / "IEMOCAP_full_release"``.

    Raises:
        InputError: The root holds something else.
    """
    root = folder / "IEMOCAP_full_release"
    manifest = Manifest(root, "IEMOCAP", seed, size)
    if manifest.is_finished():
        return root
    manifest.begin()
    dialogues = _dialogues(seed, size)
    total = sum(len(dialogue.utterances) for split in dialogues.values() for dialogue in split)
    written = []
    with tqdm(total=total, desc="synthetic IEMOCAP", unit="utterance", disable=None) as progress:
        for split, scenes in dialogues.items():
            for dialogue in scenes:
                paths = [root / dialogue.recording(row) for row in dialogue.utterances]
                paths.append(root / dialogue.film)
                if not all(path.exists() for path in paths):
                    _write_dialogue(root, dialogue, seed)
                written += [*paths, *_write_texts(root, dialogue)]
                progress.update(len(dialogue.utterances))
            written.append(root / f"IEMOCAP_{split}.csv")
            cells = (_cells(scene, row) for scene in scenes for row in scene.utterances)
            write_table(written[-1], COLUMNS, cells)
    manifest.finish(written)
    return root


def _dialogues(seed: int, size: Size) -> dict[str, list[_Dialogue]]:
    """All dialogues; they are numbered through a session, whichever their split."""
    counts = dict.fromkeys(range(1, 6), 0)
    splits: dict[str, list[_Dialogue]] = {}
    for order, (split, sessions) in enumerate(SESSIONS.items()):
        random = np.random.default_rng([seed, order])
        scenes = write_dialogues(getattr(size, split), SHARES, lambda _: ("F", "M"), random)
        splits[split] = []
        reserved = [*DEV] if split == "dev" else []
        for number, lines in enumerate(scenes):
            identity = (
                reserved.pop() if reserved else _name(sessions[number % len(sessions)], counts)
            )
            session = int(identity[3:5])
            splits[split].append(_dialogue(identity, session, lines, (seed, order, number), random))
    return splits


def _name(session: int, counts: dict[int, int]) -> str:
    """The next name in a session; those of the real dev dialogues are left to the dev split."""
    while True:
        counts[session] += 1
        # The letter in a dialogue's name is the one who wore the markers, not the speaker.
        marked = "FM"[counts[session] % 2]
        name = f"Ses{session:02}{marked}_impro{counts[session]:02}"
        if name not in DEV:
            return name


def _dialogue(
    identity: str,
    session: int,
    lines: tuple[Line, ...],
    key: tuple[int, ...],
    random: np.random.Generator,
) -> _Dialogue:
    clock = 0.0
    utterances = []
    turns = dict.fromkeys("FM", 0)
    for number, line in enumerate(lines):
        clock += random.uniform(0.1, 0.6)
        duration = draw_duration(line, random)
        name = f"{identity}_{line.speaker}{turns[line.speaker]:03}"
        turns[line.speaker] += 1
        utterances.append(_Utterance(name, line, round(clock, 4), duration, (*key, number)))
        clock += duration
    return _Dialogue(identity, session, tuple(utterances), clock + 0.5, key)


def _write_texts(root: Path, dialogue: _Dialogue) -> list[Path]:
    """Write what is said and what evaluators make of it; return the places."""
    words = [
        f"{row.identity} [{row.start:08.4f}-{row.end:08.4f}]: {row.line.text}"
        for row in dialogue.utterances
    ]
    evaluation = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for row in dialogue.utterances:
        name, scales = EVALUATIONS[row.line.emotion]
        mean = ", ".join(f"{value:.4f}" for value in scales)
        label = EMOTIONS[row.line.emotion]
        evaluation += [
            f"[{row.start:.4f} - {row.end:.4f}]\t{row.identity}\t{label}\t[{mean}]",
            *(f"C-{person}:\t{name};\t()" for person in EVALUATORS),
            *(
                "A-{}:\tval {}; act {}; dom  {};\t()".format(person, *scales)
                for person in EVALUATORS
            ),
            "",
        ]
    paths = [root / dialogue.transcription, root / dialogue.evaluation]
    for path, lines in zip(paths, (words, evaluation), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, lines)
    return paths


def _write_dialogue(root: Path, dialogue: _Dialogue, seed: int) -> None:
    people = {letter: Person.named(f"Ses{dialogue.session:02}{letter}", seed) for letter in "FM"}
    shots = []
    for row in dialogue.utterances:
        recording, film = people[row.line.speaker].perform(
            row.line.emotion,
            row.duration,
            SAMPLE_RATE,
            np.random.default_rng(dialogue.key),
            np.random.default_rng(row.key),
        )
        path = root / dialogue.recording(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, recording.samples, SAMPLE_RATE)
        shots.append(film)
    path = root / dialogue.film
    path.parent.mkdir(parents=True, exist_ok=True)
    write_avi(path, _cut(dialogue, shots))


def _cut(dialogue: _Dialogue, shots: list[Iterator[Frame]]) -> Iterator[Frame]:
    """The film of a dialogue: a shot holds its first frame before, and its last one after."""
    total = round(dialogue.end * FRAME_RATE)
    starts = [round(row.start * FRAME_RATE) for row in dialogue.utterances]
    for number, shot in enumerate(shots):
        begin = starts[number] if number else 0
        end = starts[number + 1] if number + 1 < len(shots) else total
        frame = next(shot)
        for index in range(begin, end):
            if index > starts[number]:
                frame = next(shot, frame)
            yield frame


def _cells(dialogue: _Dialogue, row: _Utterance) -> tuple[object, ...]:
    return (
        row.line.text,
        row.identity,
        dialogue.identity,
        row.start,
        row.end,
        f"{PREFIX}/{dialogue.recording(row)}",
        f"{PREFIX}/{dialogue.film}",
        EMOTIONS[row.line.emotion],
    )
