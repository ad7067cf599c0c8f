"""What a check says: a table for the terminal, a page for people, a manifest for programs."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from examples.erc.corpus_check import KINDS, SPLITS, Examination, Expected, Finding

FORMAT = 1
"""Raised whenever the manifest changes its form."""

MANIFEST = "check.json"
PAGE = "check.html"
PICTURE = "classes.png"

_LISTED = 40
"""How many findings of a kind the page lists; the manifest has all."""


def write(examination: Examination, root: Path, folder: Path) -> Path:
    """Write the manifest, the picture and, last, the page; each appears whole or not at all.

    Args:
        examination: What was found.
        root: The folder that was checked.
        folder: Where they go; made if absent.

    Returns:
        The path of the page.
    """
    from examples.erc import plots
    from examples.erc.page import templates

    counts = {split: facts.classes for split, facts in examination.facts.items()}
    picture = plots.class_shares(examination.title, counts)
    page = templates().get_template("check.html.jinja")
    content = {
        "examination": examination,
        "root": root,
        "verdict": verdict(examination),
        "grid": list(_counts(examination)),
        "kinds": _kinds(examination),
        "picture": picture,
        "meanings": KINDS,
        "listed_at_most": _LISTED,
        "manifest": MANIFEST,
        "light": plots.LIGHT,
        "dark": plots.DARK,
    }
    _replace(folder / MANIFEST, _dump(manifest(examination, root)))
    _replace(folder / PICTURE, picture.light)
    _replace(folder / PAGE, page.render(content).encode(errors="backslashreplace"))
    return folder / PAGE


def write_failure(name: str, root: Path, error: str, folder: Path) -> None:
    """Write the manifest of a corpus that cannot be read, so that no older one stands there.

    Args:
        name: The corpus in lower case.
        root: The folder that was to be checked.
        error: Why it cannot be read.
        folder: Where it goes; nothing is written if it does not exist.
    """
    if not folder.is_dir():
        return
    document = {
        "format": FORMAT,
        "corpus": name,
        "root": str(root),
        "status": 2,
        "error": error,
        "findings": [],
    }
    _replace(folder / MANIFEST, _dump(document))


def manifest(examination: Examination, root: Path) -> dict[str, Any]:
    """Everything that was found, for programs; ``docs/pipelines.rst`` describes it.

    Args:
        examination: What was found.
        root: The folder that was checked.
    """
    return {
        "format": FORMAT,
        "corpus": examination.name,
        "title": examination.title,
        "root": str(root),
        "layout": examination.layout,
        "status": examination.status,
        "error": None,
        "splits": {
            split: {
                "utterances": facts.utterances,
                "dialogues": facts.dialogues,
                "classes": dict(facts.classes),
                "speakers": {str(number): count for number, count in facts.speakers.items()},
                "seconds": None if facts.seconds is None else round(facts.seconds, 3),
                "repaired": facts.repaired,
                "opened": {kind: opened[split] for kind, opened in examination.clips.items()},
            }
            for split, facts in examination.facts.items()
        },
        "not_checked": list(examination.not_checked),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "split": finding.split,
                "subject": finding.subject,
                "file": finding.file,
                "detail": finding.detail,
                "known": finding.is_known,
                "source": finding.source,
            }
            for finding in examination.findings
        ],
    }


def summary(examination: Examination) -> str:
    """Sum everything up as plain text, for a terminal.

    Args:
        examination: What was found.

    Returns:
        Several lines without a final line break, at most 100 characters wide but for long paths.
    """
    blocks = [
        [f"{examination.title}, from {examination.layout}"],
        _aligned([["", *SPLITS, ""], *_counts(examination)], text=4),
    ]
    kinds = _kinds(examination)
    if kinds:
        rows = [["Findings", "known", "new", ""]]
        rows += [
            [kind, str(len(known)), str(len(new)), KINDS[kind].meaning]
            for kind, (known, new) in kinds.items()
        ]
        blocks.append(_aligned(rows, text=3))
    news = [_told(finding) for finding in examination.news]
    if news:
        more = [f"  ... and {len(news) - 10} more"] if len(news) > 10 else []
        blocks.append(["New", *(f"  {line}" for line in news[:10]), *more])
    if examination.not_checked:
        blocks.append(["Not checked", *(f"  {line}" for line in examination.not_checked)])
    blocks.append([verdict(examination)])
    return "\n\n".join("\n".join(block) for block in blocks)


def verdict(examination: Examination) -> str:
    """The outcome in one sentence."""
    known = sum(finding.is_known for finding in examination.findings)
    news = len(examination.news)
    if news:
        return (
            f"Something to look at: {news} {'finding is' if news == 1 else 'findings are'} new "
            f"({known} known)."
        )
    if examination.findings:
        return "Usable: what was found is known, or makes no difference."
    return "Usable: nothing was found."


def _counts(examination: Examination) -> Iterator[list[str]]:
    """The lines of the table of counts: a name, and a cell for each split."""
    facts = [examination.facts[split] for split in SPLITS]
    expected = [examination.expected.get(split, Expected()) for split in SPLITS]

    def counted(name: str, found: list[int], published: list[int | None]) -> list[str]:
        told = _compared(found, published, examination.promise)
        return [name, *(f"{number:,}" for number in found), told]

    yield counted(
        "dialogues", [each.dialogues for each in facts], [each.dialogues for each in expected]
    )
    yield counted(
        "utterances", [each.utterances for each in facts], [each.utterances for each in expected]
    )
    for label in examination.labels:
        yield counted(
            f"  {label}",
            [each.classes[label] for each in facts],
            [each.classes.get(label) for each in expected],
        )
    means = (f"{each.speakers_per_dialogue:.1f}" for each in facts)
    yield ["speakers per dialogue, mean", *means, ""]
    yield ["  most", *(str(max(each.speakers)) for each in facts), ""]
    yield ["length", *(_length(each.seconds) for each in facts), ""]
    if any(each.repaired for each in facts):
        yield ["texts repaired", *(f"{each.repaired:,}" for each in facts), ""]
    for kind, opened in examination.clips.items():
        yield [f"{kind} opened", *(f"{opened[split]:,}" for split in SPLITS), ""]


def _compared(found: Sequence[int], published: Sequence[int | None], promise: str) -> str:
    if all(number is None for number in published):
        return ""
    pairs = zip(found, published, strict=True)
    if all(number is None or number == got for got, number in pairs):
        return f"as {promise}" if None not in published else f"as far as {promise}"
    shown = ("unknown" if number is None else f"{number:,}" for number in published)
    return f"{promise}: {', '.join(shown)}"


def _length(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _kinds(examination: Examination) -> dict[str, tuple[list[Finding], list[Finding]]]:
    """The findings of each kind, known and new; the worst kind first."""
    counted = Counter(finding.kind for finding in examination.findings)
    return {
        kind: (
            [each for each in examination.findings if each.kind == kind and each.is_known],
            [each for each in examination.findings if each.kind == kind and not each.is_known],
        )
        for kind in KINDS
        if counted[kind]
    }


def _told(finding: Finding) -> str:
    where = finding.subject or finding.file or finding.split or ""
    return f"{finding.kind}: {where + ': ' if where else ''}{finding.detail}"


def _aligned(rows: Sequence[Sequence[str]], text: int | None = None) -> list[str]:
    """Columns of numbers beside names, ruled below the head; column ``text`` is left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index and index != text else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _dump(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode()


def _replace(path: Path, data: bytes) -> None:
    # Imported here, for PyTorch takes seconds.
    from examples.erc.artifacts import replace

    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, partial(Path.write_bytes, data=data))
