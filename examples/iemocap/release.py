"""IEMOCAP as the University of Southern California releases it: no table, a file per dialogue.

The words of a dialogue are in ``dialog/transcriptions``, one turn a line::

    Ses01F_impro01_F000 [006.2901-008.2357]: ...

and what its evaluators made of them in ``dialog/EmoEvaluation``, one turn a block, of which only
the first line is read::

    [6.2901 - 8.2357]    Ses01F_impro01_F000    neu    [2.5000, 2.5000, 2.5000]

with a tab between its parts. The label there is the majority of the evaluators, ``xxx`` where there
is none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.erc.errors import InputError
from examples.erc.table import locate, read_bytes
from examples.iemocap.turns import IDENTITY, LABELS, SPLITS, Turn

SESSIONS = range(1, 6)

TEST_SESSION = 5
"""Test is this session: its two people occur nowhere else."""

DEV = (
    "Ses01M_impro01", "Ses01M_script03_1",
    "Ses02F_impro02", "Ses02F_impro07", "Ses02M_script01_2",
    "Ses03F_impro01", "Ses03M_impro02", "Ses03M_impro08a", "Ses03M_script02_2",
    "Ses03M_script03_2",
    "Ses04F_impro07", "Ses04F_script02_1",
)  # fmt: skip
"""The dialogues of dev in TelME's tables: a tenth of the first four sessions, drawn by lot."""

_SECONDS = r"\d{1,6}(?:\.\d{1,20})?"
_NAME = r"Ses\d\d[FM]_\w{1,40}"
_EVALUATION = re.compile(
    rf"\[(?P<start>{_SECONDS}) - (?P<end>{_SECONDS})\]\s+(?P<identity>\w{{1,60}})\s+"
    r"(?P<label>[a-z]{3})\s+\[[^\]]{1,60}\]",
    re.ASCII,
)
_TURN = re.compile(
    rf"(?P<identity>{_NAME}_[FM](?P<number>\d{{3}}|XX\d)) \[{_SECONDS}-{_SECONDS}\]:(?P<text>.*)",
    re.ASCII,
)
_UNTIMED = re.compile(r"[FM] ?:.*")


@dataclass(frozen=True)
class Oddity:
    """A line of the release that is not used.

    Attributes:
        kind: "untimed": words without a time or a label, as the release has some; "unread": a line
            in no form that is known.
        path: The file.
        line: The line, from 1.
        text: What stands there.
    """

    kind: Literal["untimed", "unread"]
    path: Path
    line: int
    text: str


@dataclass
class Release:
    """The turns of the release.

    Attributes:
        turns: Those with one of the six labels, by split; in the order of the files.
        left_out: Those with another label.
        oddities: Lines that are not used.
    """

    turns: dict[str, list[Turn]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    left_out: list[Turn] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)


def is_release(root: Path) -> bool:
    """Whether a folder has evaluations in a place where the release has them."""
    return any((root / _evaluations(session)).is_dir() for session in SESSIONS)


def read_release(root: Path) -> Release:
    """Read the transcriptions and evaluations of all sessions.

    Args:
        root: The folder IEMOCAP_full_release.

    Returns:
        Every turn that has an evaluation.

    Raises:
        InputError: A session or a file is not there, or a turn with one of the six labels has a
            fault; the message says where.
    """
    release = Release()
    seen: dict[str, Turn] = {}
    for session in SESSIONS:
        folder = locate(root, _evaluations(session))
        # Archives unpacked on a Mac have a second, hidden file beside each one.
        paths = sorted(path for path in folder.glob(f"Ses0{session}*.txt") if path.is_file())
        if not paths:
            raise InputError(
                f"{root / _evaluations(session)}: expected evaluations such as "
                f"Ses0{session}F_impro01.txt, got none; unpack the whole release"
            )
        for path in paths:
            _read_dialogue(root, session, path.stem, release, seen)
    for split, turns in release.turns.items():
        if not turns:
            raise InputError(
                f"{root}: expected dialogues of the {split} split, got none; "
                "unpack the whole release"
            )
    return release


def split_of(dialogue: str) -> str:
    """The split of a dialogue, by its name."""
    if dialogue.startswith(f"Ses{TEST_SESSION:02}"):
        return "test"
    return "dev" if dialogue in DEV else "train"


def _evaluations(session: int) -> str:
    return f"Session{session}/dialog/EmoEvaluation"


def _read_dialogue(
    root: Path, session: int, name: str, release: Release, seen: dict[str, Turn]
) -> None:
    words = _read_transcription(root, f"Session{session}/dialog/transcriptions/{name}.txt", release)
    path = locate(root, f"{_evaluations(session)}/{name}.txt")
    for number, line in _lines(path):
        if not line.startswith("["):
            continue
        found = _EVALUATION.fullmatch(line)
        parts = found and IDENTITY.fullmatch(found["identity"])
        if not found or not parts or parts["dialogue"] != name:
            release.oddities.append(Oddity("unread", path, number, line))
            continue
        turn = Turn(
            identity=found["identity"],
            text=words.get(found["identity"], ""),
            start=float(found["start"]),
            end=float(found["end"]),
            label=found["label"],
            path=path,
            line=number,
        )
        if turn.identity in seen:
            twin = seen[turn.identity]
            raise InputError(
                f"{path}, line {number}: expected an utterance that is not in {twin.path.name}, "
                f"line {twin.line} already, got {turn.identity}; remove one of the two lines"
            )
        seen[turn.identity] = turn
        if turn.label not in LABELS:
            release.left_out.append(turn)
            continue
        _check(turn, root / f"Session{session}/dialog/transcriptions/{name}.txt")
        release.turns[split_of(name)].append(turn)


def _read_transcription(root: Path, name: str, release: Release) -> dict[str, str]:
    path = locate(root, name)
    words = {}
    for number, line in _lines(path):
        found = _TURN.fullmatch(line)
        if found and not found["number"].startswith("XX"):
            words[found["identity"]] = found["text"].strip()
        elif found or _UNTIMED.fullmatch(line):
            release.oddities.append(Oddity("untimed", path, number, line))
        elif line:
            release.oddities.append(Oddity("unread", path, number, line))
    return words


def _check(turn: Turn, transcription: Path) -> None:
    if not turn.text:
        raise InputError(
            f"{transcription}: expected the words of {turn.identity}, got none; "
            "take the file from the release"
        )
    if turn.start >= turn.end:
        raise InputError(
            f"{turn.path}, line {turn.line}: expected {turn.identity} to end after its start, "
            f"{turn.start} s, got {turn.end} s; take the file from the release"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    data = read_bytes(path, "a text of the release")
    # Whatever is not UTF-8 costs a letter, not the dialogue; a check of the corpus tells of it.
    text = data.decode("utf-8-sig", errors="replace")
    return enumerate(map(str.strip, text.split("\n")), start=1)
