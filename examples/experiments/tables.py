"""The tables of the experiments, free of any format."""

from collections.abc import Iterator
from dataclasses import replace

from examples.erc.comparison import (
    SCORES,
    Cell,
    Column,
    Measure,
    Probability,
    Row,
    Spread,
    Table,
    difference,
    spread,
    weighted_f1,
    words,
)
from examples.erc.results import System
from examples.experiments.catalogue import Comparison, Line
from examples.experiments.outcome import Outcome
from examples.experiments.published import PUBLISHED
from examples.experiments.significance import Significance, holm

LEVEL = 0.05
"""Differences with a smaller adjusted p-value are called better or worse."""

CHANCE = "may be chance"

ASIDE = ("n", "p_seeds", "p_dialogues", "verdict")
"""Columns that are left out where there is little room."""


def table(comparison: Comparison, outcome: Outcome) -> Table:
    """Fill a table with scores, differences and p-values.

    Args:
        comparison: One of an experiment that was run.
        outcome: The results.

    Returns:
        Columns of words, then of scores, then of the comparison with the baseline.
    """
    systems = [outcome.system(line.system.key) for line in comparison.lines]
    columns = [Column(head.lower(), head) for head in comparison.heads]
    cells: list[list[Cell]] = [list(line.words) for line in comparison.lines]
    found = [
        *_scores(systems),
        *_against_baseline(comparison, outcome),
    ]
    for column, held in found:
        columns.append(column)
        for row, cell in zip(cells, held, strict=True):
            row.append(cell)
    rows = [
        Row(line.system.key, tuple(row)) for line, row in zip(comparison.lines, cells, strict=True)
    ]
    made = Table(
        comparison.key,
        comparison.title,
        comparison.note,
        tuple(columns),
        tuple(rows),
        labels=len(comparison.heads),
    )
    return _beside_published(made, outcome) if comparison.key == "comparison" else made


def class_scores(comparison: Comparison, outcome: Outcome) -> Table:
    """F1 of every class on test, for the lines of a table.

    Args:
        comparison: One of an experiment that was run.
        outcome: The results.
    """
    columns = [Column(head.lower(), head) for head in comparison.heads]
    rows = [
        Row(
            line.system.key,
            (
                *line.words,
                *(
                    spread(outcome.system(line.system.key).runs, _class_f1(index))
                    for index in range(len(outcome.results.labels))
                ),
            ),
        )
        for line in comparison.lines
    ]
    columns += [
        Column(f"f1/{label}", f"{label} ({outcome.classes['test'][label]})", 1, ranked=True)
        for label in outcome.results.labels
    ]
    return Table(
        f"{comparison.key}_by_class",
        f"{comparison.title} by class",
        "F1 of each class on test; beside a class, how many test utterances have it.",
        tuple(columns),
        tuple(rows),
        labels=len(comparison.heads),
    )


def class_table(outcome: Outcome) -> Table:
    """How many utterances of each split each label has, and which share of the split that is."""
    splits = list(outcome.classes)
    totals = {split: sum(counts.values()) for split, counts in outcome.classes.items()}
    columns = [Column("label", "Label")]
    for split in splits:
        columns += [Column(split, split.capitalize()), Column(f"{split}_share", "Share, %")]
    rows = []
    for label in outcome.results.labels:
        cells: list[Cell] = [label]
        for split in splits:
            count = outcome.classes[split][label]
            cells += [count, 100 * count / totals[split]]
        rows.append(Row(label, tuple(cells)))
    return Table(
        "classes",
        "Class distribution",
        "Utterances of each split by label.",
        tuple(columns),
        tuple(rows),
    )


def finding(comparison: Comparison, outcome: Outcome) -> str:
    """Say in a few sentences what a table shows, whether it flatters the method or not."""
    lines = list(zip(comparison.lines, _verdicts(comparison, outcome), strict=True))
    scores = {line: _score(line, outcome) for line, _ in lines}
    best = max(scores, key=lambda line: scores[line].mean)
    sentences = [f"Highest mean: {_called(best)}, {words(scores[best])}."]
    sentences += _counted("better than", "better", lines)
    sentences += _counted("worse than", "worse", lines)
    doubtful = sum(verdict == CHANCE for _, verdict in lines)
    if doubtful:
        compared = sum(verdict is not None for _, verdict in lines)
        sentences.append(f"{doubtful} of {compared} differences from the baseline may be chance.")
    return " ".join(sentences)


def narrow(full: Table) -> Table:
    """Leave out what a page of a paper has no room for, and what follows from the rest.

    Args:
        full: As :func:`table` filled it.
    """
    kept = [index for index, column in enumerate(full.columns) if column.key not in ASIDE]
    return replace(
        full,
        columns=tuple(full.columns[index] for index in kept),
        rows=tuple(Row(row.system, tuple(row.cells[index] for index in kept)) for row in full.rows),
    )


def legend(outcome: Outcome) -> str:
    """How to read the cells of every table."""
    several = len(outcome.results.seeds) > 1
    sentences = [
        "Scores in percent; differences in percentage points of weighted F1, subtracted seed by "
        "seed.",
        "Mean ± sample standard deviation over n seeds."
        if several
        else "One seed, so no spread can be given.",
        "p, seeds: paired t-test over the seeds." if several else "",
        "p, dialogues: exchange of whole test dialogues between the two systems, on the mean over "
        "seeds.",
        f"p, Holm: {'the larger of both' if several else 'the same'}, adjusted for all comparisons "
        f"of its table; below {LEVEL} a difference is called better or worse.",
        "All tests are two-sided. Bold: the highest mean of the column.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _scores(systems: list[System]) -> Iterator[tuple[Column, list[Cell]]]:
    yield Column("n", "n"), [len(system.runs) for system in systems]
    for column, measure in SCORES:
        yield column, [spread(system.runs, measure) for system in systems]


def _against_baseline(
    comparison: Comparison, outcome: Outcome
) -> Iterator[tuple[Column, list[Cell]]]:
    lines = comparison.lines
    tests = _tests(lines, outcome)
    adjusted = _adjusted(lines, outcome)
    yield (
        Column("difference", "Against baseline"),
        [
            difference(outcome.system(line.system.key), outcome.system(line.baseline.key))
            if line.baseline
            else None
            for line in lines
        ],
    )
    for key, title in (("seeds", "p, seeds"), ("dialogues", "p, dialogues")):
        found = [None if test is None else getattr(test, key) for test in tests]
        if any(value is not None for value in found):
            yield Column(f"p_{key}", title), [_probability(value) for value in found]
    yield Column("p_holm", "p, Holm"), [_probability(value) for value in adjusted]
    yield Column("verdict", "Verdict"), list(_verdicts(comparison, outcome))


def _class_f1(index: int) -> Measure:
    return lambda run: run.per_class_f1[index]


def _tests(lines: tuple[Line, ...], outcome: Outcome) -> list[Significance | None]:
    return [
        outcome.significance[line.system.key, line.baseline.key] if line.baseline else None
        for line in lines
    ]


def _adjusted(lines: tuple[Line, ...], outcome: Outcome) -> list[float | None]:
    tests = _tests(lines, outcome)
    family = iter(holm([test.probability for test in tests if test is not None]))
    return [None if test is None else next(family) for test in tests]


def _probability(value: float | None) -> Probability | None:
    return None if value is None else Probability(value)


def _verdicts(comparison: Comparison, outcome: Outcome) -> list[str | None]:
    verdicts: list[str | None] = []
    for line, probability in zip(
        comparison.lines, _adjusted(comparison.lines, outcome), strict=True
    ):
        if line.baseline is None or probability is None:
            verdicts.append(None)
            continue
        gap = difference(outcome.system(line.system.key), outcome.system(line.baseline.key))
        if probability >= LEVEL or gap is None:
            verdicts.append(CHANCE)
        else:
            verdicts.append("better" if gap.mean > 0 else "worse")
    return verdicts


def _counted(said: str, verdict: str, lines: list[tuple[Line, str | None]]) -> list[str]:
    names = [_called(line) for line, found in lines if found == verdict]
    return [f"{said.capitalize()} the baseline: {'; '.join(names)}."] if names else []


def _called(line: Line) -> str:
    return ", ".join(line.words).lower().replace("telme", "TelME")


def _score(line: Line, outcome: Outcome) -> Spread:
    return spread(outcome.system(line.system.key).runs, weighted_f1)


def _beside_published(ours: Table, outcome: Outcome) -> Table:
    """Put published scores into a column of their own, and their systems into lines above ours."""
    published = PUBLISHED[outcome.results.corpus]
    place = next(i for i, column in enumerate(ours.columns) if column.key == "weighted_f1")
    blank: tuple[Cell, ...] = (None,) * (len(ours.columns) - 1)
    rows = [Row(entry.system, (entry.system, *blank)) for entry in published]
    figures: list[Cell] = [Spread(entry.weighted_f1, None, 1) for entry in published]
    sources = "; ".join(f"{entry.system.split(',')[0]}: {entry.source}" for entry in published)
    widened = [
        Row(row.system, (*row.cells[:place], figure, *row.cells[place:]))
        for row, figure in zip(
            (*rows, *ours.rows), (*figures, *(None for _ in ours.rows)), strict=True
        )
    ]
    return Table(
        ours.key,
        ours.title,
        f"{ours.note} Sources of published scores: {sources}.",
        (
            *ours.columns[:place],
            Column("published", "Published weighted F1"),
            *ours.columns[place:],
        ),
        tuple(widened),
        ours.labels,
    )
