"""Dialogues that a user wrote down, with or without clips: a CSV table or JSON.

A table has a line for each utterance, in the order in which they were said, and the columns
``Speaker`` and ``Utterance``. ``Dialogue_ID`` tells several dialogues apart, ``Utterance_ID`` names
an utterance. ``Clip`` is a film with its sound; ``Audio`` and ``Video`` are files for one of the
two, and go before it. ``Clip_Start``, ``Clip_End`` and the like are seconds from the beginning of
that file; ``Side`` is the half of the picture, left or right, in which the speaker is seen. The
tables of MELD can be read as they are; their StartTime, which counts from the beginning of the
episode, is not looked at.

JSON is a list of utterances, each an object with ``speaker``, ``text`` and, if at hand, ``id``,
``clip``, ``audio``, ``video`` and ``side``. A file is its path, or an object with ``file``,
``start`` and ``end``. Several dialogues are a list of objects with ``id`` and ``utterances``.

The places of files are relative to one folder, and nothing outside of it is opened.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.source import Line
from examples.erc.table import Row, locate, read_bytes, read_table

FILES = ("clip", "audio", "video")
"""The kinds of file that an utterance may name."""

NEEDED = ("Speaker", "Utterance")
"""The columns of a table that are always there."""

COLUMNS = (
    *NEEDED,
    "Dialogue_ID",
    "Utterance_ID",
    *(f"{kind}{part}".title() for kind in FILES for part in ("", "_start", "_end")),
    "Side",
)
"""The columns of a table that are looked at."""

KEYS = ("speaker", "text", "id", *FILES, "side")
"""The keys of an utterance in JSON that are looked at."""

MOST_ROWS = 100_000
"""Utterances in a file, at most; both corpora together have a fifth of that."""

_SHOWN = 60


@dataclass(frozen=True)
class Said:
    """An utterance with its files.

    Attributes:
        line: Who says what; the text is empty where there is none.
        audio: The voice, if a file was named.
        visual: The picture, if a file was named.
    """

    line: Line
    audio: Clip | None
    visual: Clip | None


@dataclass(frozen=True)
class DialogueFile:
    """What a file holds.

    Attributes:
        dialogues: The utterances of each dialogue, in order; at least one each, and one dialogue.
        ignored: The columns or keys that mean nothing here.
    """

    dialogues: tuple[tuple[Said, ...], ...]
    ignored: tuple[str, ...]


def read(path: Path, clips: Path | None = None, repair: Callable[[str], str] = str) -> DialogueFile:
    """Read dialogues.

    Args:
        path: The file; a name that ends in ``.json`` is JSON, any other a table.
        clips: The folder that the places of files are relative to; ``None``: that of the file.
        repair: What the corpus of the run does with names and texts before they are read.

    Returns:
        What it holds.

    Raises:
        InputError: It has a fault, or names a file outside the folder; the message says where.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: expected a CSV table or JSON with a dialogue, got a folder; only runs that "
            "were trained on extracted features take one"
        )
    root = path.parent if clips is None else clips
    if clips is not None and not clips.is_dir():
        raise InputError(f"--clips: expected a folder, got {clips}; check the path")
    entries = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)
    if len(entries.utterances) > MOST_ROWS:
        raise InputError(
            f"{path}: expected at most {MOST_ROWS} utterances, got {len(entries.utterances)}; cut "
            "the file between two dialogues"
        )
    dialogues: dict[str, list[Said]] = {}
    for entry in entries.utterances:
        dialogues.setdefault(entry.dialogue, []).append(_settle(entry, root, repair))
    for name, said in dialogues.items():
        _check_names(path, name, said)
    return DialogueFile(tuple(map(tuple, dialogues.values())), entries.ignored)


@dataclass(frozen=True)
class _File:
    """A file as it was named: its place, and the seconds of its part."""

    place: str
    start: float | None
    end: float | None


@dataclass(frozen=True)
class _Entry:
    """An utterance as it was written, each value checked on its own."""

    where: str
    dialogue: str
    utterance: str | None
    speaker: str
    text: str
    files: Mapping[str, _File]
    side: Literal["left", "right"] | None


@dataclass(frozen=True)
class _Entries:
    utterances: Sequence[_Entry]
    ignored: tuple[str, ...]


def _settle(entry: _Entry, root: Path, repair: Callable[[str], str]) -> Said:
    clips = {}
    for kind, file in entry.files.items():
        if file.end is not None and file.end <= (file.start or 0.0):
            raise InputError(
                f"{entry.where}: expected the {kind} to end after its start at "
                f"{file.start or 0:g} s, got {file.end:g} s; mend the times"
            )
        side = None if kind == "audio" else entry.side
        clips[kind] = Clip(_locate(entry, root, file.place), file.start, file.end, side)
    either = clips.get("clip")
    line = Line(entry.dialogue, entry.utterance or "", repair(entry.speaker), repair(entry.text))
    return Said(line, clips.get("audio", either), clips.get("video", either))


def _locate(entry: _Entry, root: Path, place: str) -> Path:
    try:
        path = locate(root, place)
        path.is_file()
    except InputError as error:
        raise InputError(
            f"{entry.where}: {error}; --clips names another folder for all files"
        ) from error
    except (OSError, ValueError) as error:
        # An error of the system repeats the whole path.
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{entry.where}: expected the path of a file, got {_shown(place)} ({reason}); mend it"
        ) from error
    return path


def _check_names(path: Path, dialogue: str, said: list[Said]) -> None:
    """Number utterances without a name, and refuse names that occur twice."""
    seen: set[str] = set()
    for number, each in enumerate(said):
        name = each.line.utterance or str(number)
        if name in seen:
            raise InputError(
                f"{path}: expected utterances with different names in dialogue "
                f"{_shown(dialogue)}, got {_shown(name)} twice; give each a name of its own, or "
                "none any"
            )
        seen.add(name)
        said[number] = Said(each.line._replace(utterance=name), each.audio, each.visual)


def _read_csv(path: Path) -> _Entries:
    rows = read_table(path, NEEDED, COLUMNS)
    ignored = tuple(column for column in rows[0].cells if column not in COLUMNS)
    return _Entries([_read_row(row) for row in rows], ignored)


def _read_row(row: Row) -> _Entry:
    files = {}
    for kind in FILES:
        column = kind.title()
        start, end = (
            row.seconds(name) if row.cells.get(name, "").strip() else None
            for name in (f"{column}_Start", f"{column}_End")
        )
        if place := row.cells.get(column, "").strip():
            files[kind] = _File(place, start, end)
        elif start is not None or end is not None:
            row.refuse(
                f"{column}_Start" if start is not None else f"{column}_End",
                f"no time without a file in {column}",
                f"name the file in {column}, or leave the time out",
            )
    side = row.cells.get("Side", "").strip()
    if side not in ("", "left", "right"):
        row.refuse("Side", "left, right or nothing", "say in which half the speaker is seen")
    return _Entry(
        where=f"{row.path}, line {row.line}",
        dialogue=row.cells.get("Dialogue_ID", "").strip() or "0",
        utterance=row.cells.get("Utterance_ID", "").strip() or None,
        speaker=row.text("Speaker"),
        text=row.cells["Utterance"].strip(),
        files=files,
        side=cast("Any", side or None),
    )


def _read_json(path: Path) -> _Entries:
    data = read_bytes(path, "JSON")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected JSON in UTF-8, got something else ({error}); write it with a JSON "
            "library"
        ) from error
    if not isinstance(document, list) or not document:
        _refuse(f"{path}", "a list of utterances, or of dialogues", document)
    several = all(isinstance(entry, dict) and "utterances" in entry for entry in document)
    dialogues = document if several else [{"id": "0", "utterances": document}]
    entries: list[_Entry] = []
    ignored: dict[str, None] = {}
    names: set[str] = set()
    for index, dialogue in enumerate(dialogues):
        where = f"{path}, dialogue {index}" if several else f"{path}"
        name = _text(where, "id", dialogue.get("id", str(index)))
        if name in names:
            _refuse(f"{where}, id", "a name that no other dialogue has", name)
        names.add(name)
        utterances = dialogue["utterances"]
        if not isinstance(utterances, list) or not utterances:
            _refuse(f"{where}, utterances", "a list of utterances", utterances)
        for number, utterance in enumerate(utterances):
            place = f"{where}, utterance {number}"
            if not isinstance(utterance, dict):
                _refuse(place, "an object with speaker and text", utterance)
            ignored |= dict.fromkeys(key for key in utterance if key not in KEYS)
            entries.append(_read_utterance(place, name, utterance))
    return _Entries(entries, tuple(ignored))


def _read_utterance(where: str, dialogue: str, utterance: Mapping[str, Any]) -> _Entry:
    if "speaker" not in utterance:
        raise InputError(
            f"{where}: expected an object with speaker and text, got the keys "
            f"{_shown(', '.join(utterance)) if utterance else 'of an empty one'}; say who speaks"
        )
    side = utterance.get("side")
    if side not in (None, "left", "right"):
        _refuse(f"{where}, side", "left or right", side)
    text = utterance.get("text")
    name = utterance.get("id")
    return _Entry(
        where=where,
        dialogue=dialogue,
        utterance=None if name is None else _text(where, "id", name),
        speaker=_text(where, "speaker", utterance["speaker"]),
        text="" if text is None else _text(where, "text", text, blank=True),
        files={
            kind: _read_file(f"{where}, {kind}", utterance[kind])
            for kind in FILES
            if utterance.get(kind) is not None
        },
        side=side,
    )


def _read_file(where: str, value: object) -> _File:
    if isinstance(value, str):
        return _File(_text(where, "file", value), None, None)
    if not isinstance(value, dict) or "file" not in value or {*value} - {"file", "start", "end"}:
        _refuse(where, "a path, or an object with file, start and end", value)
    times = [value.get(key) for key in ("start", "end")]
    for key, time in zip(("start", "end"), times, strict=True):
        number = isinstance(time, int | float) and not isinstance(time, bool)
        if time is not None and not (number and _finite(time)):
            _refuse(f"{where}, {key}", "a finite number of seconds >= 0", time)
    start, end = (None if time is None else float(time) for time in times)
    return _File(_text(where, "file", value["file"]), start, end)


def _finite(value: float) -> bool:
    try:
        return value >= 0 and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _text(where: str, key: str, value: object, *, blank: bool = False) -> str:
    """A text that can be printed and written, without the blanks around it."""
    if isinstance(value, int) and not isinstance(value, bool) and key == "id":
        value = str(value) if abs(value) < 10**9 else value
    if not isinstance(value, str) or "\0" in value or not _encodes(value):
        _refuse(f"{where}, {key}", "text", value)
    if not blank and not value.strip():
        _refuse(f"{where}, {key}", "some text", value)
    return value.strip()


def _encodes(value: str) -> bool:
    """Whether there is no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(where: str, expected: str, got: object) -> NoReturn:
    shown = _shown(got) if isinstance(got, str) else _shown(_dumped(got))
    raise InputError(f"{where}: expected {expected}, got {shown}; mend it")


def _dumped(value: object) -> str:
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):  # pragma: no cover - what was read can be written
        return type(value).__name__


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
