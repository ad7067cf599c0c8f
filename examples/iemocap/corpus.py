"""IEMOCAP as released: texts or tables, a recording of each utterance, a film of each dialogue."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from examples.erc.dialogue import Clip, Corpus, Dialogue, Utterance, number_speakers
from examples.erc.errors import InputError
from examples.erc.table import Row, locate, read_table
from examples.iemocap.release import is_release, read_release
from examples.iemocap.turns import IDENTITY, LABELS, SPLITS, Turn

TABLE = "IEMOCAP_{split}.csv"
"""What TelME's table of a split is called."""

COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Start_Time", "End_Time", "Emotion")

FILM_FOLDERS = ("DivX", "Divx")
"""How the release spells the folder of the films: the second way in Session 5."""


def read(root: Path) -> Corpus:
    """Read the corpus: TelME's tables if they are there, else the texts of the release itself.

    The person who speaks is the session with the last letter of the utterance's id
    (``Ses01F_impro01_M000``: the man of session 1), so that each dialogue has two; the column
    Speaker of the tables holds the utterance's id. The places of the media follow from the ids as
    well; Wav_Path and Video_Path are not looked at. Audio is the recording of the utterance,
    visual the part of the dialogue's film between its start and its end. A file that is not there
    is ``None``.

    Args:
        root: The folder IEMOCAP_full_release.

    Returns:
        The corpus, each dialogue in the order in which its utterances begin. The tables are not
        quite in that order: some list a turn up to 17 seconds before one that it follows, which
        would let the context of an utterance look into the future.

    Raises:
        InputError: A file is not there or has a fault; the message says where.
    """
    return arrange(root, read_tables(root) if has_tables(root) else read_release(root).turns)


def has_tables(root: Path) -> bool:
    """Whether the corpus is to be read from tables.

    Args:
        root: The folder IEMOCAP_full_release.

    Raises:
        InputError: There is neither a table nor anything of the release's own texts.
    """
    names = [TABLE.format(split=split) for split in SPLITS]
    if any((root / name).exists() for name in names):
        return True
    if is_release(root):
        return False
    raise InputError(
        f"{root}: expected Session1/dialog/EmoEvaluation and its siblings, or {names[0]}, got "
        "neither; give the folder IEMOCAP_full_release"
    )


def read_tables(root: Path) -> dict[str, list[Turn]]:
    """Read TelME's three tables.

    Args:
        root: The folder with IEMOCAP_train.csv, IEMOCAP_dev.csv and IEMOCAP_test.csv.

    Returns:
        The turns of each split, in the order of its table.

    Raises:
        InputError: A table is not there or has a fault; the message says where.
    """
    places: dict[str, Row] = {}
    return {split: _read_table(root, split, places) for split in SPLITS}


def arrange(root: Path, turns: Mapping[str, Sequence[Turn]]) -> Corpus:
    """Arrange turns in dialogues, each with its media.

    Args:
        root: The folder IEMOCAP_full_release.
        turns: Those of each split, as read.

    Returns:
        The corpus; dialogues in the order in which they first occur.

    Raises:
        InputError: A link leads out of the root.
    """
    splits = {}
    for split in SPLITS:
        dialogues: dict[str, list[Turn]] = {}
        for turn in turns[split]:
            dialogues.setdefault(turn.dialogue, []).append(turn)
        splits[split] = tuple(
            _arrange_dialogue(root, name, held) for name, held in dialogues.items()
        )
    return Corpus("iemocap", LABELS, splits)


def find_side(identity: str) -> Literal["left", "right"]:
    """Tell where in the film of a dialogue the speaker of an utterance is seen.

    A film shows both people side by side, who wears the markers on the left. The letter in the
    dialogue's name is that of the person with the markers, the one at the end that of the speaker.

    Args:
        identity: Of the utterance, such as Ses01F_impro01_M000.

    Returns:
        The half of the picture: here ``"right"``, as the woman of session 1 wears the markers.
    """
    dialogue, _, turn = identity.rpartition("_")
    return "left" if dialogue[len("Ses01")] == turn[0] else "right"


def find_film(root: Path, session: int, dialogue: str) -> Path | None:
    """The film of a dialogue; ``None`` if it is not there.

    Raises:
        InputError: A link leads out of the root.
    """
    for folder in FILM_FOLDERS:
        path = locate(root, f"Session{session}/dialog/avi/{folder}/{dialogue}.avi")
        if path.is_file():
            return path
    return None


def _read_table(root: Path, split: str, places: dict[str, Row]) -> list[Turn]:
    turns = []
    for row in read_table(locate(root, TABLE.format(split=split)), COLUMNS):
        identity = row.text("Speaker")
        if identity in places:
            twin = places[identity]
            row.refuse(
                "Speaker",
                f"an utterance that is not in {twin.path.name}, line {twin.line} already",
                "remove one of the two lines",
            )
        places[identity] = row
        turns.append(_read_turn(row, identity))
    return turns


def _read_turn(row: Row, identity: str) -> Turn:
    parts = IDENTITY.fullmatch(identity)
    if parts is None:
        row.refuse(
            "Speaker", "an utterance id such as Ses01F_impro01_F000", "use the released table"
        )
    if parts["dialogue"] != row.text("Dialogue_ID"):
        row.refuse(
            "Dialogue_ID", f"{parts['dialogue']}, as in the utterance id", "use the released table"
        )
    start, end = row.seconds("Start_Time"), row.seconds("End_Time")
    if start >= end:
        row.refuse("End_Time", f"a time after the start, {start} s", "mend the times")
    return Turn(
        identity=identity,
        text=row.text("Utterance"),
        start=start,
        end=end,
        label=LABELS[row.index("Emotion", LABELS)],
        path=row.path,
        line=row.line,
    )


def _arrange_dialogue(root: Path, name: str, turns: list[Turn]) -> Dialogue:
    ordered = sorted(turns, key=lambda turn: turn.start)
    speakers = number_speakers(turn.person for turn in ordered)
    film = find_film(root, ordered[0].session, name)
    return Dialogue(
        name,
        tuple(
            _arrange_turn(root, turn, speaker, film)
            for turn, speaker in zip(ordered, speakers, strict=True)
        ),
    )


def _arrange_turn(root: Path, turn: Turn, speaker: int, film: Path | None) -> Utterance:
    wav = locate(root, turn.recording)
    return Utterance(
        identity=turn.identity,
        text=turn.text,
        speaker=speaker,
        label=LABELS.index(turn.label),
        audio=Clip(wav) if wav.is_file() else None,
        visual=Clip(film, turn.start, turn.end, find_side(turn.identity)) if film else None,
        name=turn.person,
    )
