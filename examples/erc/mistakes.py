"""The most confident mistakes of a run, modality by modality, for a person to look at.

A mistake is an utterance of a split whose most probable emotion is not its label. Beside what a
system said stands what the systems of the other modalities said of the same utterance.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.erc import artifacts
from examples.erc.dialogue import Corpus
from examples.erc.errors import InputError
from examples.erc.finished import FinishedRun
from examples.erc.source import Line
from examples.erc.systems import System
from examples.erc.terminal import abbreviations, fit, plain

FORMAT = 1
"""Raised whenever a file here changes its form."""

TABLE = "mistakes.csv"
DOCUMENT = "mistakes.json"

SHOWN = 10
"""Mistakes of each system that a report shows."""

_PAIRS = 5
"""Pairs of emotions that a report shows for each system."""

_WIDTH = 120
"""Columns of the table on a narrow terminal."""

_PERCENT = 5
"""The column with numbers."""

_SPEAKER, _SHORT_LINE = 12, 20
"""Columns for a speaker, at most, and for an utterance, at least."""


@dataclass(frozen=True)
class Opinion:
    """What a system says of an utterance: an emotion, and the probability that it gives it."""

    emotion: str
    probability: float


@dataclass(frozen=True)
class Mistake:
    """An utterance that a system gets wrong.

    Attributes:
        line: Who says what.
        truth: The label.
        said: What the system says.
        truth_probability: What it gives the label.
        others: What the other systems say, by their keys.
    """

    line: Line
    truth: str
    said: Opinion
    truth_probability: float
    others: Mapping[str, Opinion]

    @property
    def where(self) -> str:
        """Dialogue and utterance, without repeating the one in the other."""
        dialogue, utterance = self.line.dialogue, self.line.utterance
        return utterance if utterance.startswith(dialogue) else f"{dialogue} {utterance}"


@dataclass(frozen=True)
class Pair:
    """How often an emotion is taken for another.

    Attributes:
        truth: The label.
        said: What the system says.
        count: Utterances.
        share: Of all utterances with that label, in [0, 1].
    """

    truth: str
    said: str
    count: int
    share: float


@dataclass(frozen=True)
class Record:
    """What a system gets wrong.

    Attributes:
        key: Of the system.
        title: Of the system.
        name: What it is called in a column: its modality, or "fusion".
        mistakes: The most confident first.
        pairs: The most frequent first.
    """

    key: str
    title: str
    name: str
    mistakes: tuple[Mistake, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Analysis:
    """What the systems of a run get wrong.

    Attributes:
        title: The corpus as people write it.
        split: Which utterances.
        seed: Whose systems.
        seeds: How many there are to choose from.
        count: The utterances of the split.
        labels: The C class names, in index order.
        records: One for each modality, then one for the fusion of them all.
    """

    title: str
    split: str
    seed: int
    seeds: int
    count: int
    labels: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def shown(self) -> int:
        """How many mistakes of each system a report shows."""
        return SHOWN

    def names(self, mistake: Mistake) -> list[tuple[str, Opinion]]:
        """The other systems by name, with what they say."""
        names = {record.key: record.name for record in self.records}
        return [(names[key], opinion) for key, opinion in mistake.others.items()]


def analyse(run: FinishedRun, split: str = "test", annotations: Corpus | None = None) -> Analysis:
    """Find what the systems of a run get wrong.

    Args:
        run: The run.
        split: ``"dev"`` or ``"test"``.
        annotations: The corpus to take the words from, for a run on features, which has none;
            ``None``: those that the run kept.

    Returns:
        The mistakes of each modality's own system and of the fusion of everything.

    Raises:
        InputError: The annotations are of other utterances.
    """
    lines, targets = run.lines(split), run.targets(split)
    if annotations is not None:
        lines = _add_words(lines, targets, annotations, split)
    systems = [system for system in run.stages if not system.fusion]
    fusions = [system for system in run.stages if system.fusion]
    systems += fusions[:1]  # the first sees everything
    said = {
        system: run.stages[system].outputs(split)["logits"].softmax(dim=1) for system in systems
    }
    opinions = {
        system: [
            Opinion(run.labels[index], probability)
            for probability, index in zip(*map(Tensor.tolist, values.max(dim=1)), strict=True)
        ]
        for system, values in said.items()
    }
    truth = [run.labels[target] for target in targets]
    given = torch.tensor(targets)
    records = []
    for system in systems:
        of_truth = said[system].gather(1, given[:, None])[:, 0].tolist()
        mistakes = [
            Mistake(
                line,
                truth[row],
                opinions[system][row],
                of_truth[row],
                {other.key: opinions[other][row] for other in systems if other != system},
            )
            for row, line in enumerate(lines)
            if opinions[system][row].emotion != truth[row]
        ]
        mistakes.sort(key=lambda mistake: -mistake.said.probability)
        records.append(
            Record(
                system.key, system.title, _name(system), tuple(mistakes), _pairs(mistakes, truth)
            )
        )
    return Analysis(
        run.title, split, run.seed, len(run.seeds), len(lines), run.labels, tuple(records)
    )


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """Write ``mistakes.csv`` and ``mistakes.json`` with all mistakes; each whole or not at all.

    Args:
        analysis: The mistakes.
        folder: Where they go; made if absent.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {TABLE: _table(analysis), DOCUMENT: _document(analysis)}
    for name, content in files.items():
        artifacts.replace(folder / name, partial(Path.write_bytes, data=content.encode()))
    return [folder / name for name in files]


def text(analysis: Analysis, top: int, width: int = _WIDTH) -> str:
    """Write the most confident mistakes as plain text, for a terminal.

    Args:
        analysis: The mistakes.
        top: How many of each system.
        width: Columns of the terminal; a narrow one gets 120 all the same.

    Returns:
        Several lines without a final line break.
    """
    seeds = f", the best on dev of {analysis.seeds}" if analysis.seeds > 1 else ""
    lines = [
        f"{analysis.title}: the most confident mistakes on {analysis.split}, seed "
        f"{analysis.seed}{seeds}; probabilities in %"
    ]
    for record in analysis.records:
        wrong = len(record.mistakes)
        lines += ["", f"{record.title}: {wrong} of {analysis.count} wrong"]
        pairs = ", ".join(
            f"{pair.truth} as {pair.said} {pair.count} ({100 * pair.share:.0f}%)"
            for pair in record.pairs[:_PAIRS]
        )
        if wrong:
            lines += [f"  Most often: {pairs}", "", *_grid(analysis, record.mistakes[:top], width)]
    return "\n".join(lines)


def _add_words(
    lines: Sequence[Line], targets: Sequence[int], corpus: Corpus, split: str
) -> list[Line]:
    """Take the words from a corpus with the same utterances, by their names or one by one."""
    utterances = corpus.utterances(split)
    lengths = [len(dialogue.utterances) for dialogue in corpus.splits[split]]
    named = {row.identity: row for row in utterances}
    names = [line.utterance for line in lines]
    if len({*names}) < len(names):
        names = [f"{line.dialogue}_{line.utterance}" for line in lines]
    rows = [named.get(name) for name in names]
    if None in rows and list(Counter(line.dialogue for line in lines).values()) == lengths:
        rows = [*utterances]
    found = [row for row in rows if row is not None]
    if len(found) < len(lines) or [row.label for row in found] != list(targets):
        raise InputError(
            f"--annotations: expected the {len(lines)} utterances that the run was scored on in "
            f"{split}, in the same order and with the same labels, got {len(utterances)} others; "
            "give the annotations that the features were made from"
        )
    return [
        line._replace(text=row.text, speaker=row.name or line.speaker)
        for line, row in zip(lines, found, strict=True)
    ]


def _name(system: System) -> str:
    return "fusion" if system.fusion else system.modalities[0]


def _pairs(mistakes: Sequence[Mistake], truth: Sequence[str]) -> tuple[Pair, ...]:
    sizes = Counter(truth)
    counted = Counter((mistake.truth, mistake.said.emotion) for mistake in mistakes)
    return tuple(
        Pair(true, said, count, count / sizes[true])
        for (true, said), count in counted.most_common()
    )


def _grid(analysis: Analysis, mistakes: Sequence[Mistake], width: int) -> list[str]:
    short = dict(zip(analysis.labels, abbreviations(analysis.labels), strict=True))
    others = [name for name, _ in analysis.names(mistakes[0])]
    rows = [["Where", "Speaker", "Utterance", "True", "Said", "%", *others]]
    rows += [
        [
            plain(mistake.where),
            mistake.line.speaker,
            mistake.line.text or "",
            mistake.truth,
            mistake.said.emotion,
            f"{100 * mistake.said.probability:.0f}",
            *(
                f"{short[held.emotion]} {100 * held.probability:.0f}"
                for _, held in analysis.names(mistake)
            ),
        ]
        for mistake in mistakes
    ]
    widths = [max(len(plain(cell)) for cell in column) for column in zip(*rows, strict=True)]
    widths[1] = min(widths[1], _SPEAKER)
    # The words take what the rest leaves, between a short line and the longest.
    rest = max(width, _WIDTH) - 2 - sum(widths) + widths[2] - 2 * (len(widths) - 1)
    widths[2] = min(widths[2], max(rest, _SHORT_LINE))
    spoken = any(mistake.line.text for mistake in mistakes)
    lines = [
        "  ".join(
            cell.rjust(columns) if index == _PERCENT else fit(cell, columns)
            for index, (cell, columns) in enumerate(zip(row, widths, strict=True))
            if index != 2 or spoken
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return [f"  {line}" for line in lines]


def _table(analysis: Analysis) -> str:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    names = [(record.key, record.name) for record in analysis.records]
    writer.writerow(
        [
            "system", "rank", "dialogue", "utterance", "speaker", "text", "true", "predicted",
            "probability", "true_probability",
            *(f"{name}_{part}" for _, name in names for part in ("predicted", "probability")),
        ]
    )  # fmt: skip
    for record in analysis.records:
        for rank, mistake in enumerate(record.mistakes, start=1):
            opinions = {record.key: mistake.said, **mistake.others}
            writer.writerow(
                [
                    record.key, rank, *mistake.line[:3], mistake.line.text or "", mistake.truth,
                    mistake.said.emotion, mistake.said.probability, mistake.truth_probability,
                    *(
                        value
                        for key, _ in names
                        for value in (opinions[key].emotion, opinions[key].probability)
                    ),
                ]
            )  # fmt: skip
    return written.getvalue()


def _document(analysis: Analysis) -> str:
    document: dict[str, Any] = {
        "format": FORMAT,
        "title": analysis.title,
        "split": analysis.split,
        "seed": analysis.seed,
        "utterances": analysis.count,
        "labels": list(analysis.labels),
        "systems": [
            {
                "key": record.key,
                "title": record.title,
                "pairs": [
                    {
                        "true": pair.truth,
                        "predicted": pair.said,
                        "count": pair.count,
                        "share": pair.share,
                    }
                    for pair in record.pairs
                ],
                "mistakes": [_describe(mistake) for mistake in record.mistakes],
            }
            for record in analysis.records
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _describe(mistake: Mistake) -> dict[str, Any]:
    return {
        **mistake.line._asdict(),
        "true": mistake.truth,
        "predicted": mistake.said.emotion,
        "probability": mistake.said.probability,
        "true_probability": mistake.truth_probability,
        "others": {
            key: {"predicted": held.emotion, "probability": held.probability}
            for key, held in mistake.others.items()
        },
    }
