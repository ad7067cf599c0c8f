"""What is wrong with a copy of MELD, beyond what its readers know already."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from examples.erc.corpus_check import (
    Examination,
    Expected,
    Finding,
    Known,
    compare_counts,
    count,
    inspect_clip,
    inspect_length,
    inspect_text,
    synthetic_counts,
)
from examples.erc.dialogue import Corpus
from examples.erc.table import Row, read_table
from examples.meld.corpus import COLUMNS, FOLDERS, LABELS, find_clips, find_table, read, repair

TITLE = "MELD"

EXPECTED = {
    split: Expected(utterances, dialogues, dict(zip(LABELS, classes, strict=True)))
    for split, utterances, dialogues, classes in (
        ("train", 9989, 1038, (1109, 271, 268, 1743, 4710, 683, 1205)),
        ("dev", 1109, 114, (153, 22, 40, 163, 470, 111, 150)),
        ("test", 2610, 280, (345, 68, 50, 402, 1256, 208, 281)),
    )
}
"""The published counts.

The utterances are those of Table 1 of the paper (arXiv 2401.12987). The 1039 dialogues for training
in MELD's own table count number 60 as well, which is in no published file.
"""

_REPORTS = "github.com/declare-lab/MELD/issues"
_TABLES = "the published tables"

HARMLESS = (
    Known("control-characters", ".*", "the tables in github.com/yuntaeyang/TelME at f22fc9f"),
    Known("gap", r"(train|dev|test)_dia\d+", _TABLES),
)
"""What any copy may have."""

KNOWN = (
    *HARMLESS,
    Known("missing", "dev_dia110_utt7", f"{_REPORTS}/22 and /27"),
    Known("broken truncated mis-cut missing", "train_dia125_utt3", f"{_REPORTS}/39 and /52"),
    Known("too-long", "train_dia309_utt0|test_dia38_utt4|test_dia220_utt0", f"{_REPORTS}/20"),
    Known("no-duration", "test_dia155_utt3", _TABLES),
    Known(
        "too-short",
        "train_(dia71_utt0|dia179_utt8|dia312_utt9|dia332_utt1|dia406_utt2|dia523_utt10)"
        "|dev_(dia99_utt3|dia108_utt5)",
        "README of github.com/UPC-AIDL-MER/multimodal_emotion_recognition",
    ),
    Known("too-short", "train_(dia338_utt3|dia598_utt3)", _TABLES),
    Known("jump", "train_(dia111_utt12|dia446_utt19|dia1029_utt9)", _TABLES),
    Known(
        "mis-cut",
        "train_(dia338_utt3|dia556_utt2)|test_(dia151_utt2|dia155_utt3|dia242_utt2)",
        "lengths of the sound in github.com/zehuiwu/SpeechCueLLM at 8ad6295",
    ),
    Known("extra", r".*/final_videos_testdia\d+_utt\d+\.mp4", f"{_REPORTS}/22"),
    Known(
        "extra",
        r"(.*/)?dev_splits_complete/dia(49_utt[45]|66_utt(9|10))\.mp4"
        r"|(.*/)?output_repeated_splits_test/dia(93_utt[567]|108_utt[12])\.mp4",
        f"{_REPORTS}/22, and the numbers that these dialogues leave out",
    ),
)
"""What the published corpus has."""

_TIME = re.compile(r"(\d{1,3}):(\d{1,2}):(\d{1,2})[,.](\d{1,3})", re.ASCII)

_JUMP = 30.0
"""Seconds that an utterance may begin before the one that it follows: people interrupt."""

_SHOWN = 8
"""How many ranges of numbers a finding lists."""

_LONGEST_TIME = 20
"""How many characters of a faulty time a finding shows."""

Span: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class _Line:
    """A line of a table: who and when."""

    row: Row
    identity: str
    dialogue: int
    number: int
    span: Span | None


def check(root: Path) -> Examination:
    """Look at everything but what the clips show.

    Args:
        root: The folder MELD.Raw, with or without clips.

    Returns:
        What was found.

    Raises:
        InputError: A table is not there or has a fault; the message says where.
    """
    corpus = read(root)
    home = root.resolve()
    synthetic = synthetic_counts(root, TITLE)
    known = HARMLESS if synthetic else KNOWN
    lines = {split: _read_lines(root, split) for split in FOLDERS}
    examination = Examination(
        name="meld",
        title=f"Synthetic {TITLE}" if synthetic else TITLE,
        layout="tables",
        labels=LABELS,
        facts=count(
            corpus,
            {split: _total(held) for split, held in lines.items()},
            {split: sum(map(_is_repaired, held)) for split, held in lines.items()},
        ),
        promise="made" if synthetic else "published",
        expected=synthetic or EXPECTED,
    )
    examination.add(compare_counts(examination.facts, examination.expected))
    for split, held in lines.items():
        file = held[0].row.path.relative_to(home).as_posix()
        examination.add(_inspect_table(split, file, held), known)
    measured = _check_clips(root, corpus, examination, known)
    for split, held in lines.items():
        for line in held:
            examination.add(_inspect_length(split, home, line, measured.get(line.identity)), known)
    if not any(line.span for held in lines.values() for line in held):
        examination.not_checked.append(
            "lengths and order by the tables: they have no StartTime and EndTime"
        )
    return examination


def _read_lines(root: Path, split: str) -> list[_Line]:
    """The lines of a table, in the order of their dialogues and numbers."""
    lines = []
    for row in read_table(find_table(root, split), COLUMNS):
        dialogue, number = row.integer("Dialogue_ID"), row.integer("Utterance_ID")
        identity = f"{split}_dia{dialogue}_utt{number}"
        lines.append(_Line(row, identity, dialogue, number, _read_span(row)))
    return sorted(lines, key=lambda line: (line.dialogue, line.number))


def _read_span(row: Row) -> Span | None:
    start, end = (_read_time(row.cells.get(name, "")) for name in ("StartTime", "EndTime"))
    return None if start is None or end is None else (start, end)


def _read_time(text: str) -> float | None:
    """Seconds; ``00:05:11,82`` is 5 minutes and 11.82 seconds, as the clips were cut."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None
    hours, minutes, seconds = (int(part) for part in found.groups()[:3])
    return 3600 * hours + 60 * minutes + float(f"{seconds}.{found[4]}")


def _is_repaired(line: _Line) -> bool:
    text = line.row.cells["Utterance"]
    return repair(text) != text


def _total(lines: Sequence[_Line]) -> float | None:
    spans = [line.span for line in lines if line.span]
    return sum(max(0.0, end - start) for start, end in spans) if spans else None


def _inspect_table(split: str, file: str, lines: Sequence[_Line]) -> Iterator[Finding]:
    """Look at texts, numbers and order."""
    yield from _inspect_gaps(split, file, lines)
    before: _Line | None = None
    for line in lines:
        row = line.row
        yield from inspect_text(
            split,
            line.identity,
            file,
            {name: row.cells[name] for name in ("Utterance", "Speaker")},
            repaired=True,
        )
        given = [row.cells[name] for name in ("StartTime", "EndTime") if name in row.cells]
        if given and line.span is None:
            shown = " to ".join(repr(text[:_LONGEST_TIME]) for text in given)
            yield Finding("time", split, line.identity, file, f"line {row.line}: {shown}")
        if line.span and before and before.span and before.dialogue == line.dialogue:
            back = before.span[0] - line.span[0]
            if back > _JUMP:
                detail = f"line {row.line}: {back:.1f} s before {before.identity}"
                yield Finding("jump", split, line.identity, file, detail)
        before = line


def _inspect_gaps(split: str, file: str, lines: Sequence[_Line]) -> Iterator[Finding]:
    dialogues: dict[int, list[int]] = {}
    for line in lines:
        dialogues.setdefault(line.dialogue, []).append(line.number)
    for gap in _gaps(list(dialogues)):
        yield Finding("gap", split, f"{split}_dia{gap}", file, "no such dialogue")
    for dialogue, numbers in dialogues.items():
        gaps = _gaps(numbers)
        if gaps:
            shown = ", ".join(gaps[:_SHOWN]) + (", ..." if len(gaps) > _SHOWN else "")
            yield Finding("gap", split, f"{split}_dia{dialogue}", file, f"no utterance {shown}")


def _gaps(numbers: Sequence[int]) -> list[str]:
    """The numbers from 0 that are left out, in ranges; the others are in order."""
    gaps = []
    for before, after in pairwise([-1, *numbers]):
        first, last = before + 1, after - 1
        if first <= last:
            gaps.append(str(first) if first == last else f"{first} to {last}")
    return gaps


def _inspect_length(
    split: str, home: Path, line: _Line, measured: tuple[str, float] | None
) -> Iterator[Finding]:
    table = line.row.path.relative_to(home).as_posix()
    file, seconds = measured or (table, None)
    span = line.span
    annotated = span[1] - span[0] if span else None
    return inspect_length(split, line.identity, file, annotated=annotated, measured=seconds)


def _check_clips(
    root: Path, corpus: Corpus, examination: Examination, known: Sequence[Known]
) -> dict[str, tuple[str, float]]:
    """Open every clip; the file and the seconds of those that can be opened, by utterance."""
    home = root.resolve()
    folders = {split: find_clips(root, split) for split in FOLDERS}
    names = {split: _list(folder) for split, folder in folders.items()}
    measured = {}
    if not any(names.values()):
        examination.not_checked.append(
            f"clips: none in {', '.join(FOLDERS.values())}; lengths are those of the tables"
        )
        return {}
    opened = examination.clips["clips"] = dict.fromkeys(FOLDERS, 0)
    for split, folder in folders.items():
        place = folder.relative_to(home).as_posix()
        if not names[split]:
            examination.add([Finding("no-clips", split, None, place, "no mp4 file")])
            continue
        rows = corpus.utterances(split)
        for row in tqdm(rows, desc=f"MELD clips, {split}", unit="clip", disable=None):
            name = f"{row.identity.removeprefix(f'{split}_')}.mp4"
            names[split].discard(name)
            file = f"{place}/{name}"
            if row.audio is None:
                examination.add([Finding("missing", split, row.identity, file, "no file")], known)
                continue
            seconds, findings = inspect_clip(
                split, row.identity, file, row.audio.path, ("audio", "visual")
            )
            examination.add(findings, known)
            opened[split] += seconds is not None
            if seconds is not None:
                measured[row.identity] = file, seconds
        examination.add(
            (
                Finding("extra", split, None, f"{place}/{name}", "no line of the table names it")
                for name in sorted(names[split])
            ),
            known,
        )
    return measured


def _list(folder: Path) -> set[str]:
    """The names of the clips in a folder."""
    try:
        return {path.name for path in folder.iterdir() if path.suffix == ".mp4"}
    except OSError:
        return set()
