"""MELD as published: annotation tables and one clip for each utterance."""

from pathlib import Path

from examples.erc.dialogue import Clip, Corpus, Dialogue, Utterance, number_speakers
from examples.erc.errors import InputError
from examples.erc.table import Row, locate, read_table

LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
"""The emotions, in the order of every result."""

FOLDERS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
"""Where the clips of each split are."""

TABLES = ("{split}_sent_emo.csv", "{split}_meld_emo.csv")
"""What the table of a split may be called: by MELD itself, or as TelME gives it out."""

COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")

# The five bytes that cp1252 leaves undefined stay as they are.
_REPAIRS = {
    code: character
    for code in range(0x80, 0xA0)
    if (character := bytes([code]).decode("cp1252", errors="ignore"))
}


def read(root: Path) -> Corpus:
    """Read the corpus.

    A split's table and folder of clips may stand in the root or in a folder with the split's name,
    as the archives of MELD unpack them. The place of a clip follows from the ids of its utterance
    (``dia3_utt7.mp4``); a Video_Path column is not looked at. An utterance whose clip is not
    there has neither audio nor visual: dev dia110_utt7 was never published.

    The published text shows cp1252 punctuation as control characters (U+0092 for an apostrophe);
    here it has its meaning back.

    Args:
        root: The folder MELD.Raw.

    Returns:
        The corpus, each dialogue in the order of its utterance ids.

    Raises:
        InputError: A table is not there or has a fault; the message says where.
    """
    splits = {split: _read_split(root, split) for split in FOLDERS}
    return Corpus("meld", LABELS, splits)


def repair(text: str) -> str:
    """Give C1 control characters (U+0080 to U+009F) the meaning that they have in cp1252.

    Args:
        text: Any text.

    Returns:
        The text, of the same length.
    """
    return text.translate(_REPAIRS)


def _read_split(root: Path, split: str) -> tuple[Dialogue, ...]:
    dialogues: dict[int, dict[int, Row]] = {}
    for row in read_table(find_table(root, split), COLUMNS):
        dialogue = dialogues.setdefault(row.integer("Dialogue_ID"), {})
        number = row.integer("Utterance_ID")
        if number in dialogue:
            row.refuse(
                "Utterance_ID",
                f"an utterance that is not in line {dialogue[number].line} already",
                "remove one of the two lines",
            )
        dialogue[number] = row
    clips = find_clips(root, split)
    return tuple(
        _read_dialogue(clips, f"{split}_dia{identity}", rows)
        for identity, rows in dialogues.items()
    )


def find_table(root: Path, split: str) -> Path:
    """The table of a split.

    Raises:
        InputError: There is none, or it is a link that leads out of the root.
    """
    names = [name.format(split=split) for name in TABLES]
    for place in (f"{home}{name}" for home in ("", f"{split}/") for name in names):
        path = locate(root, place)
        if path.is_file():
            return path
    raise InputError(
        f"{root}: expected {' or '.join(names)}, got neither; give the folder MELD.Raw"
    )


def find_clips(root: Path, split: str) -> Path:
    """The folder of a split's clips, whether it is there or not.

    Raises:
        InputError: It is a link that leads out of the root.
    """
    inner = locate(root, f"{split}/{FOLDERS[split]}")
    return inner if inner.is_dir() else locate(root, FOLDERS[split])


def _read_dialogue(folder: Path, identity: str, rows: dict[int, Row]) -> Dialogue:
    ordered = sorted(rows.items())
    names = [repair(row.text("Speaker")) for _, row in ordered]
    utterances = []
    for (number, row), name, speaker in zip(ordered, names, number_speakers(names), strict=True):
        path = locate(folder, f"dia{row.integer('Dialogue_ID')}_utt{number}.mp4")
        clip = Clip(path) if path.is_file() else None
        utterances.append(
            Utterance(
                identity=f"{identity}_utt{number}",
                text=repair(row.text("Utterance")),
                speaker=speaker,
                label=row.index("Emotion", LABELS),
                audio=clip,
                visual=clip,
                name=name,
            )
        )
    return Dialogue(identity, tuple(utterances))
