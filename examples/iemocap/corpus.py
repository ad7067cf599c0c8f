"""IEMOCAP as released: tables, a recording of each utterance and a film of each dialogue."""

import re
from pathlib import Path

from examples.erc.dialogue import Clip, Corpus, Dialogue, Utterance, number_speakers
from examples.erc.table import Row, locate, read_table

LABELS = ("ang", "exc", "fru", "hap", "neu", "sad")
"""The emotions, in the order of every result."""

SPLITS = ("train", "dev", "test")

COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Start_Time", "End_Time", "Emotion")

FILM_FOLDERS = ("DivX", "Divx")
"""How the release spells the folder of the films: the second way in Session 5."""

# The letter in the dialogue's part is the actor with the markers; the last one is who speaks.
_UTTERANCE = re.compile(r"(?P<dialogue>Ses(?P<session>\d\d)[FM]_\w+)_(?P<person>[FM])\d+", re.ASCII)


def read(root: Path) -> Corpus:
    """Read the corpus.

    The Speaker column holds utterance ids; the person is the session with the last letter of the
    id (``Ses01F_impro01_M000``: the man of session 1), so that each dialogue has two. The places
    of the media follow from the ids as well; Wav_Path and Video_Path are not looked at. Audio is
    the recording of the utterance, visual the part of the dialogue's film between its start and
    its end. A file that is not there is ``None``.

    Args:
        root: The folder IEMOCAP_full_release, with IEMOCAP_train.csv, ..._dev.csv and ..._test.csv.

    Returns:
        The corpus, each dialogue in the order in which its utterances begin. The tables are not
        quite in that order: some list a turn up to 17 seconds before one that it follows, which
        would let the context of an utterance look into the future.

    Raises:
        InputError: A table is not there or has a fault; the message says where.
    """
    places: dict[str, Row] = {}
    splits = {split: _read_split(root, split, places) for split in SPLITS}
    return Corpus("iemocap", LABELS, splits)


def _read_split(root: Path, split: str, places: dict[str, Row]) -> tuple[Dialogue, ...]:
    dialogues: dict[str, list[Row]] = {}
    for row in read_table(root / f"IEMOCAP_{split}.csv", COLUMNS):
        identity = row.text("Speaker")
        if identity in places:
            twin = places[identity]
            row.refuse(
                "Speaker",
                f"an utterance that is not in {twin.path.name}, line {twin.line} already",
                "remove one of the two lines",
            )
        places[identity] = row
        dialogues.setdefault(row.text("Dialogue_ID"), []).append(row)
    return tuple(_read_dialogue(root, name, rows) for name, rows in dialogues.items())


def _read_dialogue(root: Path, name: str, rows: list[Row]) -> Dialogue:
    ordered = sorted(rows, key=lambda row: row.seconds("Start_Time"))
    parts = [_take_apart(row) for row in ordered]
    speakers = number_speakers(part["person"] for part in parts)
    film = _find_film(root, int(parts[0]["session"]), name)
    return Dialogue(
        name,
        tuple(
            _read_utterance(root, row, int(part["session"]), speaker, film)
            for row, part, speaker in zip(ordered, parts, speakers, strict=True)
        ),
    )


def _take_apart(row: Row) -> re.Match[str]:
    parts = _UTTERANCE.fullmatch(row.text("Speaker"))
    if parts is None:
        row.refuse(
            "Speaker", "an utterance id such as Ses01F_impro01_F000", "use the released table"
        )
    if parts["dialogue"] != row.text("Dialogue_ID"):
        row.refuse(
            "Dialogue_ID", f"{parts['dialogue']}, as in the utterance id", "use the released table"
        )
    return parts


def _find_film(root: Path, session: int, dialogue: str) -> Path | None:
    for folder in FILM_FOLDERS:
        path = locate(root, f"Session{session}/dialog/avi/{folder}/{dialogue}.avi")
        if path.is_file():
            return path
    return None


def _read_utterance(
    root: Path, row: Row, session: int, speaker: int, film: Path | None
) -> Utterance:
    identity, dialogue = row.text("Speaker"), row.text("Dialogue_ID")
    start, end = row.seconds("Start_Time"), row.seconds("End_Time")
    if start >= end:
        row.refuse("End_Time", f"a time after the start, {start} s", "mend the times")
    wav = locate(root, f"Session{session}/sentences/wav/{dialogue}/{identity}.wav")
    return Utterance(
        identity=identity,
        text=row.text("Utterance"),
        speaker=speaker,
        label=row.index("Emotion", LABELS),
        audio=Clip(wav) if wav.is_file() else None,
        visual=Clip(film, start, end) if film else None,
    )
