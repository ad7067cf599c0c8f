"""What a check of a corpus says: counts, findings, and what could not be looked at."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from examples.erc.dialogue import Corpus
from examples.erc.media import ClipError
from examples.erc.media_length import measure
from examples.erc.table import read_bytes

Severity: TypeAlias = Literal["note", "warning", "error"]
"""Dealt with without a loss; costs an utterance some of its input; not the published corpus."""

SPLITS = ("train", "dev", "test")

LONGEST = 30.0
"""Seconds of a clip that the pipelines use: its first."""

SHORTEST = 0.1
"""Seconds that hold two pictures at most, and four frames of data2vec's sound."""

APART = 0.25
"""Seconds by which a clip and its annotation may differ.

In published features of MELD's sound, all clips but nine of 13,706 are within 0.05 s of their
annotation; a file may end with its last picture instead, up to 0.04 s later.
"""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: What it means for a training.
        meaning: What it is, and what becomes of it, in one sentence.
    """

    severity: Severity
    meaning: str


KINDS = {
    "count": Kind("error", "a count is not the published one"),
    "no-clips": Kind("error", "a split has no clips at all, though another one has"),
    "missing": Kind("warning", "there is no such file; its utterances have a feature of zero"),
    "broken": Kind("warning", "the file cannot be opened; its utterances have a feature of zero"),
    "truncated": Kind("warning", "the file ends before its own header says; what is there is used"),
    "mis-cut": Kind("warning", "the file is not as long as the annotation says; used as it is"),
    "too-long": Kind("warning", "longer than 30 s; the first 30 s are used"),
    "too-short": Kind("warning", "shorter than 0.1 s; used as it is"),
    "no-duration": Kind("warning", "the annotation ends where it begins, or before"),
    "jump": Kind("warning", "begins more than 30 s before the utterance that it follows"),
    "time": Kind("warning", "a time that cannot be read; the clip is used as it is"),
    "encoding": Kind("warning", "characters lost in a wrong encoding; used as they are"),
    "disagreement": Kind("warning", "the table and the release differ; the table is used"),
    "unread": Kind("warning", "a line in no known form; left out"),
    "control-characters": Kind("note", "cp1252 punctuation as control characters; repaired"),
    "extra": Kind("note", "a clip that no annotation names; not used"),
    "gap": Kind("note", "numbers that are left out; dialogues are read in order all the same"),
    "left-out": Kind("note", "a turn whose label is none of the six; not used"),
    "untimed": Kind("note", "words without a time or a label; not used"),
    "unsorted": Kind("note", "a dialogue whose turns are not in order of time; put in order"),
    "speaker-column": Kind("note", "the column Speaker holds ids; the speaker is read from them"),
}  # fmt: skip
"""Every kind, the worst first."""


@dataclass(frozen=True)
class Finding:
    """Something about a corpus that is not as it should be, or that people trip over.

    Attributes:
        kind: One of :data:`KINDS`.
        split: "train", "dev" or "test"; ``None`` where it concerns no single split.
        subject: The identity of the utterance or dialogue; ``None`` where there is none.
        file: The file, relative to the root; ``None`` where there is none.
        detail: What was found, in one line.
        source: Who has described it before; ``None`` for what is new.
    """

    kind: str
    split: str | None
    subject: str | None
    file: str | None
    detail: str
    source: str | None = None

    @property
    def severity(self) -> Severity:
        """That of its kind."""
        return KINDS[self.kind].severity

    @property
    def is_known(self) -> bool:
        """Whether it has been described before."""
        return self.source is not None


@dataclass(frozen=True)
class Known:
    """Findings that the published corpus has.

    Attributes:
        kinds: Some of :data:`KINDS`, separated by blanks.
        subjects: A regular expression for the whole subject, or for the whole file where a finding
            has no subject.
        source: Who has described them.
        details: A regular expression for the whole detail.
    """

    kinds: str
    subjects: str
    source: str
    details: str = ".*"

    def fits(self, finding: Finding) -> bool:
        """Whether a finding is one of these."""
        name = finding.subject or finding.file or ""
        return (
            finding.kind in self.kinds.split()
            and re.fullmatch(self.subjects, name) is not None
            and re.fullmatch(self.details, finding.detail) is not None
        )


@dataclass(frozen=True)
class Expected:
    """The published counts of a split.

    Attributes:
        utterances: How many; ``None`` where that is not known.
        dialogues: How many; ``None`` where that is not known.
        classes: How many utterances of each label; ``None`` where that is not known.
    """

    utterances: int | None = None
    dialogues: int | None = None
    classes: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """The counts of a split.

    Attributes:
        utterances: How many.
        dialogues: How many.
        classes: How many utterances of each label, in index order.
        speakers: How many dialogues have one speaker, two, ...: by the number of speakers.
        seconds: How long all utterances are together, by their annotation; ``None`` where it has
            no times.
        repaired: How many texts had control characters in place of punctuation.
    """

    utterances: int
    dialogues: int
    classes: Mapping[str, int]
    speakers: Mapping[int, int]
    seconds: float | None
    repaired: int

    @property
    def speakers_per_dialogue(self) -> float:
        """The mean number of speakers."""
        return sum(number * count for number, count in self.speakers.items()) / self.dialogues


@dataclass
class Examination:
    """The outcome of a check.

    Attributes:
        name: The corpus in lower case.
        title: The corpus as people write it.
        layout: What was read, in a few words.
        labels: The class names, in index order.
        facts: The counts of each split.
        expected: The counts that each split should have.
        promise: Where these stand: "published", or "made" of a synthetic corpus.
        findings: All of them.
        clips: For each kind of media how many files were opened in each split.
        not_checked: What could not be looked at, and why.
    """

    name: str
    title: str
    layout: str
    labels: Sequence[str]
    facts: Mapping[str, Facts]
    expected: Mapping[str, Expected]
    promise: str = "published"
    findings: list[Finding] = field(default_factory=list)
    clips: dict[str, dict[str, int]] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)

    @property
    def news(self) -> list[Finding]:
        """What nobody has described before and is more than a note."""
        return [
            finding
            for finding in self.findings
            if not finding.is_known and finding.severity != "note"
        ]

    @property
    def status(self) -> int:
        """0: usable, nothing new; 1: something to look at."""
        return 1 if self.news else 0

    def add(self, findings: Iterable[Finding], known: Sequence[Known] = ()) -> None:
        """Add findings, each with its source if it is known."""
        for finding in findings:
            source = next((each.source for each in known if each.fits(finding)), None)
            self.findings.append(replace(finding, source=source))


# Quotation marks, dashes and accents in UTF-8 that was read as cp1252 or Latin-1.
_MOJIBAKE = re.compile(r"â(?:€|\x80)|Ã[\x80-\xbf©¨¡³±¼]|Â[\xa0-\xbf]|\ufffd")
_CP1252 = re.compile(r"[\x80\x82-\x8c\x8e\x91-\x9c\x9e\x9f]")
_NO_TEXT = re.compile(r"[\x81\x8d\x8f\x90\x9d]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def count(
    corpus: Corpus, seconds: Mapping[str, float | None], repaired: Mapping[str, int]
) -> dict[str, Facts]:
    """Count what is in a corpus.

    Args:
        corpus: As its reader returned it.
        seconds: How long the utterances of each split are together.
        repaired: How many of their texts the reader repairs.

    Returns:
        The counts of each split.
    """
    facts = {}
    for split in SPLITS:
        rows = corpus.utterances(split)
        labels = Counter(row.label for row in rows)
        speakers = Counter(
            len({row.speaker for row in dialogue.utterances}) for dialogue in corpus.splits[split]
        )
        facts[split] = Facts(
            utterances=len(rows),
            dialogues=len(corpus.splits[split]),
            classes={label: labels[index] for index, label in enumerate(corpus.labels)},
            speakers=dict(sorted(speakers.items())),
            seconds=seconds[split],
            repaired=repaired.get(split, 0),
        )
    return facts


def compare_counts(
    facts: Mapping[str, Facts], expected: Mapping[str, Expected]
) -> Iterator[Finding]:
    """Tell where the counts are not those that were published."""
    for split, published in expected.items():
        found = facts[split]
        pairs = {
            "utterances": (found.utterances, published.utterances),
            "dialogues": (found.dialogues, published.dialogues),
        }
        pairs |= {
            f"utterances of {label}": (found.classes[label], number)
            for label, number in published.classes.items()
        }
        for name, (got, number) in pairs.items():
            if number is not None and got != number:
                yield Finding("count", split, None, None, f"expected {number} {name}, got {got}")


def synthetic_counts(root: Path, title: str) -> dict[str, Expected] | None:
    """What a synthetic corpus says about its size; ``None`` for any other corpus."""
    try:
        marker = json.loads(read_bytes(root / "synthetic.json", "the marker"))
        if marker["corpus"] != title:
            return None
        sizes = {split: marker["size"][split] for split in SPLITS}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not all(type(size) is int for size in sizes.values()):
        return None
    return {split: Expected(utterances=size) for split, size in sizes.items()}


def inspect_text(
    split: str, subject: str, file: str, cells: Mapping[str, str], *, repaired: bool
) -> Iterator[Finding]:
    """Look for characters that suffered from an encoding.

    Args:
        split: Where the utterance is.
        subject: Its identity.
        file: The file, relative to the root.
        cells: Texts as they stand there, by the names of their columns.
        repaired: Whether the reader gives control characters their meaning in cp1252.
    """
    for name, text in cells.items():
        lost = _NO_TEXT.findall(text) or _MOJIBAKE.findall(text)
        found = _CP1252.findall(text)
        if lost or found:
            kind = "control-characters" if repaired and not lost else "encoding"
            letters = "".join(dict.fromkeys(lost or sorted(found)))
            codes = ", ".join(f"U+{ord(letter):04X}" for letter in letters)
            yield Finding(kind, split, subject, file, f"{name}: {codes}")


def inspect_length(
    split: str, subject: str, file: str, *, annotated: float | None, measured: float | None
) -> Iterator[Finding]:
    """Look at how long an utterance is.

    Args:
        split: Where the utterance is.
        subject: Its identity.
        file: The clip if it was measured, else the table; relative to the root.
        annotated: Seconds from its start to its end; ``None``: it has no times.
        measured: Seconds of its clip; ``None``: there is none, or it was not opened.
    """
    if annotated is not None and annotated <= 0:
        yield Finding(
            "no-duration", split, subject, file, f"{annotated:.3f} s from the start to the end"
        )
    if annotated is not None and measured is not None and abs(annotated - measured) > APART:
        detail = f"{measured:.3f} s, annotated with {annotated:.3f} s"
        yield Finding("mis-cut", split, subject, file, detail)
    seconds = annotated if measured is None else measured
    by = "annotation" if measured is None else "clip"
    if seconds is not None and seconds > LONGEST:
        yield Finding("too-long", split, subject, file, f"{seconds:.1f} s by the {by}")
    elif seconds is not None and 0 < seconds < SHORTEST:
        yield Finding("too-short", split, subject, file, f"{seconds:.3f} s by the {by}")


def inspect_clip(
    split: str, subject: str, file: str, path: Path, streams: Sequence[str]
) -> tuple[float | None, list[Finding]]:
    """Open a clip and look at its length.

    Args:
        split: Where it belongs.
        subject: The identity of its utterance or dialogue.
        file: The file, relative to the root.
        path: The file; it is there.
        streams: What it must have: "audio", "visual" or both.

    Returns:
        Its seconds, and what is wrong with it; ``None`` where it cannot be opened.
    """
    try:
        length = measure(path, streams)
    except (ClipError, OSError) as error:
        return None, [Finding("broken", split, subject, file, str(error))]
    if length.reached < length.seconds - APART:
        detail = f"ends after {length.reached:.3f} of {length.seconds:.3f} s"
        return length.reached, [Finding("truncated", split, subject, file, detail)]
    return length.seconds, []
