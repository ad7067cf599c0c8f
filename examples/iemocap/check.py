"""What is wrong with a copy of IEMOCAP, beyond what its readers know already."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from examples.erc.corpus_check import (
    APART,
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
from examples.erc.errors import InputError
from examples.erc.table import locate
from examples.iemocap.corpus import TABLE, arrange, find_film, has_tables, read_tables
from examples.iemocap.release import SESSIONS, Release, is_release, read_release
from examples.iemocap.turns import LABELS, SPLITS, Turn

TITLE = "IEMOCAP"

EXPECTED = {
    split: Expected(utterances, dialogues, dict(zip(LABELS, classes, strict=True)))
    for split, utterances, dialogues, classes in (
        ("train", 5163, 108, (831, 593, 1296, 451, 1221, 771)),
        ("dev", 647, 12, (102, 149, 172, 53, 103, 68)),
        ("test", 1623, 31, (170, 299, 381, 144, 384, 245)),
    )
}
"""The counts of TelME's tables: those of Table 1 of the paper (arXiv 2401.12987)."""

EXPECTED_OF_RELEASE = {
    "train": Expected(None, 108, {**EXPECTED["train"].classes, "hap": None}),
    "dev": Expected(None, 12, {**EXPECTED["dev"].classes, "hap": None}),
    "test": Expected(1622, 31, {**EXPECTED["test"].classes, "hap": 143}),
}
"""The counts by the labels of the release: fewer are happy.

TelME's tables call 53 turns happy on which the evaluators did not agree. One of them is in Session
5; how the others fall to train and dev is not known.
"""

_RELEASE = "the release itself; see examples/iemocap/README.rst"
_TELME = "the tables in github.com/yuntaeyang/TelME at f22fc9f"

HARMLESS = (
    Known("speaker-column unsorted", ".*", _TELME),
    Known("left-out untimed", ".*", _RELEASE),
    Known("extra", r"Session\d/sentences/wav/\w+/Ses\d\d[FM]_\w+_[FM]\d\d\d\.wav", _RELEASE),
)
"""What any copy may have."""

KNOWN = (
    *HARMLESS,
    Known("too-long", "Ses05M_script02_2_F013|Ses05M_script02_1_M030", _TELME),
    Known("disagreement", ".*", _RELEASE, r"line \d+: hap, in the release xxx"),
)
"""What the published corpus has."""

_TOKENS = 9
"""How many speakers TelME's code knows."""


def check(root: Path) -> Examination:
    """Look at everything but what the media show.

    Args:
        root: The folder IEMOCAP_full_release, with or without media.

    Returns:
        What was found.

    Raises:
        InputError: A file is not there or has a fault; the message says where.
    """
    tables = read_tables(root) if has_tables(root) else None
    release, why_not = _try_release(root) if tables else (read_release(root), "")
    turns = tables or (release or Release()).turns
    corpus = arrange(root, turns)
    synthetic = synthetic_counts(root, TITLE)
    examination = Examination(
        name="iemocap",
        title=f"Synthetic {TITLE}" if synthetic else TITLE,
        layout=" and ".join(
            name
            for name, held in (("tables", tables), ("texts of the release", release))
            if held is not None
        ),
        labels=LABELS,
        facts=count(
            corpus,
            {split: sum(turn.end - turn.start for turn in turns[split]) for split in SPLITS},
            {},
        ),
        promise="made" if synthetic else "published",
        expected=synthetic or (EXPECTED if tables else EXPECTED_OF_RELEASE),
    )
    known = HARMLESS if synthetic else KNOWN
    examination.add(compare_counts(examination.facts, examination.expected))
    if tables:
        examination.add(_inspect_tables(tables), known)
    if release:
        examination.add(_inspect_release(root, release), known)
    if tables and release:
        examination.add(_compare(root, tables, release), known)
    elif tables:
        examination.not_checked.append(f"whether the tables agree with the release: {why_not}")
    measured = _check_recordings(root, turns, release, examination, known)
    _check_films(root, turns, examination, known)
    home = root.resolve()
    for split in SPLITS:
        for turn in turns[split]:
            file = turn.path.relative_to(home).as_posix()
            words = {"Utterance": turn.text}
            examination.add(inspect_text(split, turn.identity, file, words, repaired=False), known)
            seconds = measured.get(turn.identity)
            examination.add(
                inspect_length(
                    split,
                    turn.identity,
                    file if seconds is None else turn.recording,
                    annotated=turn.end - turn.start,
                    measured=seconds,
                ),
                known,
            )
    return examination


def _try_release(root: Path) -> tuple[Release | None, str]:
    """The texts of the release, which the tables make dispensable, or why there are none."""
    if not is_release(root):
        return None, "no Session*/dialog/EmoEvaluation"
    try:
        return read_release(root), ""
    except InputError as error:
        return None, str(error)


def _inspect_tables(tables: Mapping[str, Sequence[Turn]]) -> Iterator[Finding]:
    for split, turns in tables.items():
        dialogues: dict[str, list[Turn]] = {}
        for turn in turns:
            dialogues.setdefault(turn.dialogue, []).append(turn)
        file = TABLE.format(split=split)
        beyond = sum(max(0, len(held) - _TOKENS) for held in dialogues.values())
        yield Finding(
            "speaker-column",
            split,
            None,
            file,
            f"by it, {beyond} of {len(turns)} utterances come from a tenth speaker or a later one",
        )
        for name, held in dialogues.items():
            starts = [turn.start for turn in held]
            if starts != sorted(starts):
                yield Finding("unsorted", split, name, file, f"line {held[0].line} and after")


def _inspect_release(root: Path, release: Release) -> Iterator[Finding]:
    home = root.resolve()
    for turn in release.left_out:
        file = turn.path.relative_to(home).as_posix()
        yield Finding("left-out", None, turn.identity, file, f"line {turn.line}: {turn.label}")
    for oddity in release.oddities:
        file = oddity.path.relative_to(home).as_posix()
        yield Finding(oddity.kind, None, None, file, f"line {oddity.line}: {_cut(oddity.text)}")


def _compare(
    root: Path, tables: Mapping[str, Sequence[Turn]], release: Release
) -> Iterator[Finding]:
    """Tell where TelME's tables say something else than the release."""
    turns = [turn for held in release.turns.values() for turn in held]
    official = {turn.identity: turn for turn in (*turns, *release.left_out)}
    listed = set()
    for split, held in tables.items():
        file = TABLE.format(split=split)
        for turn in held:
            listed.add(turn.identity)
            other = official.get(turn.identity)
            if other is None:
                detail = f"line {turn.line}: not in the release"
                yield Finding("disagreement", split, turn.identity, file, detail)
                continue
            if turn.label != other.label:
                detail = f"line {turn.line}: {turn.label}, in the release {other.label}"
                yield Finding("disagreement", split, turn.identity, file, detail)
            if abs(turn.start - other.start) > APART or abs(turn.end - other.end) > APART:
                yield Finding(
                    "disagreement",
                    split,
                    turn.identity,
                    file,
                    f"line {turn.line}: {turn.start:.4f} to {turn.end:.4f} s, in the release "
                    f"{other.start:.4f} to {other.end:.4f} s",
                )
            if other.text and _letters(turn.text) != _letters(other.text):
                detail = f"line {turn.line}: {_cut(turn.text)}, in the release {_cut(other.text)}"
                yield Finding("disagreement", split, turn.identity, file, detail)
    home = root.resolve()
    for turn in turns:
        if turn.identity not in listed:
            file = turn.path.relative_to(home).as_posix()
            detail = f"line {turn.line}: {turn.label}, in no table"
            yield Finding("disagreement", None, turn.identity, file, detail)


def _check_recordings(
    root: Path,
    turns: Mapping[str, Sequence[Turn]],
    release: Release | None,
    examination: Examination,
    known: Sequence[Known],
) -> dict[str, float]:
    """Open every recording; the seconds of those that can be opened, by utterance."""
    names = _list_recordings(root)
    if not names:
        examination.not_checked.append(
            "recordings: none in Session*/sentences/wav; lengths are those of the texts or tables"
        )
        return {}
    measured: dict[str, float] = {}
    opened = examination.clips["recordings"] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        held = turns[split]
        if not any(turn.recording in names for turn in held):
            examination.add([Finding("no-clips", split, None, None, "no recording")])
            continue
        for turn in tqdm(held, desc=f"{TITLE} recordings, {split}", unit="clip", disable=None):
            if turn.recording not in names:
                absent = Finding("missing", split, turn.identity, turn.recording, "no recording")
                examination.add([absent], known)
                continue
            path = locate(root, turn.recording)
            seconds, findings = inspect_clip(split, turn.identity, turn.recording, path, ("audio",))
            examination.add(findings, known)
            if seconds is not None:
                opened[split] += 1
                measured[turn.identity] = seconds
    used = {turn.recording for split in SPLITS for turn in turns[split]}
    used |= {turn.recording for turn in (release.left_out if release else ())}
    examination.add(
        (
            Finding("extra", None, None, name, "an utterance without one of the six labels")
            for name in sorted(names - used)
        ),
        known,
    )
    return measured


def _list_recordings(root: Path) -> set[str]:
    """The places of all recordings, relative to the root."""
    home = root.resolve()
    names: set[str] = set()
    for session in SESSIONS:
        folder = f"Session{session}/sentences/wav"
        for dialogue in _list(locate(root, folder)):
            # Resolved before it is listed: a link must not lead out of the root.
            for path in _list(locate(root, f"{folder}/{dialogue.name}")):
                if path.suffix == ".wav":
                    names.add(path.relative_to(home).as_posix())
    return names


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _check_films(
    root: Path,
    turns: Mapping[str, Sequence[Turn]],
    examination: Examination,
    known: Sequence[Known],
) -> None:
    """Open the film of every dialogue, and see whether it lasts until the last turn ends."""
    home = root.resolve()
    dialogues: dict[tuple[str, str], list[Turn]] = {}
    for split in SPLITS:
        for turn in turns[split]:
            dialogues.setdefault((split, turn.dialogue), []).append(turn)
    films = {
        key: find_film(root, held[0].session, held[0].dialogue) for key, held in dialogues.items()
    }
    if not any(films.values()):
        examination.not_checked.append("films: none in Session*/dialog/avi/DivX")
        return
    opened = examination.clips["films"] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        if not any(film for key, film in films.items() if key[0] == split):
            examination.add([Finding("no-clips", split, None, None, "no film")])
    rows = tqdm(films.items(), desc=f"{TITLE} films", unit="film", disable=None)
    for (split, name), film in rows:
        if film is None:
            if any(other for key, other in films.items() if key[0] == split):
                examination.add([Finding("missing", split, name, None, "no film")], known)
            continue
        file = film.relative_to(home).as_posix()
        seconds, findings = inspect_clip(split, name, file, film, ("visual",))
        examination.add(findings, known)
        if seconds is None:
            continue
        opened[split] += 1
        end = max(turn.end for turn in dialogues[split, name])
        if end > seconds + APART:
            detail = f"{seconds:.3f} s, but its last turn ends after {end:.3f} s"
            examination.add([Finding("mis-cut", split, name, file, detail)], known)


def _letters(text: str) -> str:
    """What is left of a text that was cleaned up."""
    return "".join(filter(str.isalnum, text)).casefold()


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
