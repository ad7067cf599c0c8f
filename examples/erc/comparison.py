"""How the systems compare: the tables of the report, free of any format."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from examples.erc.results import DISTILLATIONS, FUSIONS, Results, Run, System

COMBINATIONS = (
    ("audio",),
    ("visual",),
    ("text",),
    ("text", "visual"),
    ("text", "audio"),
    ("text", "audio", "visual"),
)
"""The rows of the paper's Table 4, in its order."""

SPLIT = (
    "Scores are those of the test split; the epoch of every run was selected on the dev split, "
    "by weighted F1."
)
"""Which split is shown. Every rendering says so."""


@dataclass(frozen=True)
class Spread:
    """Some fractions summed up.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; ``None`` for a single one.
        count: How many there are.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference(Spread):
    """One system's scores less another's, subtracted seed by seed before being summed up."""

    @property
    def verdict(self) -> str:
        """How the mean compares with its spread, in words; no test of significance is made."""
        if self.deviation is None:
            return "one seed"
        if self.mean == 0 or abs(self.mean) < self.deviation:
            return "within the spread"
        return "beyond the spread"


@dataclass(frozen=True)
class Probability:
    """A p-value, in [0, 1]."""

    value: float

    def __str__(self) -> str:
        return "< 0.001" if self.value < 0.001 else f"{self.value:.3f}"


Cell: TypeAlias = str | int | float | Spread | Probability | None


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        key: Its name in ``report.json``.
        title: Its name for people.
        decimals: Digits after the point of a percentage.
        ranked: Whether the highest mean in the column is the best.
    """

    key: str
    title: str
    decimals: int = 2
    ranked: bool = False


@dataclass(frozen=True)
class Row:
    """The system that a row is about, and one cell per column."""

    system: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table that knows nothing of HTML, Markdown or reStructuredText.

    Attributes:
        key: Its name in ``report.json``.
        title: Its name for people.
        note: What a reader has to know.
        columns: The heads; the first ``labels`` columns say what a row is.
        rows: At least one.
        labels: How many columns are words.
    """

    key: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    labels: int = 1

    def best(self, row: Row, index: int) -> bool:
        """Whether a cell holds the highest mean of a ranked column of two rows or more."""
        means = [other.cells[index] for other in self.rows]
        cell = row.cells[index]
        return (
            self.columns[index].ranked
            and len(means) > 1
            and isinstance(cell, Spread)
            and cell.mean == max(held.mean for held in means if isinstance(held, Spread))
        )


Measure: TypeAlias = Callable[[Run], float]


def weighted_f1(run: Run) -> float:
    """Weighted F1 on test, the measure that systems are compared by."""
    return run.test.weighted_f1


SCORES: tuple[tuple[Column, Measure], ...] = (
    (Column("weighted_f1", "Weighted F1", ranked=True), weighted_f1),
    (Column("macro_f1", "Macro F1", ranked=True), lambda run: run.test.macro_f1),
    (Column("accuracy", "Accuracy", ranked=True), lambda run: run.test.accuracy),
)
"""What every comparison shows."""


def spread(runs: Iterable[Run], measure: Measure) -> Spread:
    """Sum up a measure over one or more runs."""
    values = [measure(run) for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def paired(left: System, right: System | None) -> list[float]:
    """Subtract right's weighted F1 from left's, seed by seed, for the seeds that both have."""
    others = {run.seed: weighted_f1(run) for run in right.runs} if right else {}
    return [weighted_f1(run) - others[run.seed] for run in left.runs if run.seed in others]


def difference(left: System, right: System | None) -> Difference | None:
    """Sum up the paired differences; ``None`` against nothing, or against itself."""
    values = paired(left, right)
    if not values or left == right:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Difference(statistics.fmean(values), deviation, len(values))


def confusion(system: System) -> list[list[int]]:
    """The ``[C][C]`` confusion counts, summed over seeds."""
    return [
        [sum(counts) for counts in zip(*rows, strict=True)]
        for rows in zip(*(run.confusion for run in system.runs), strict=True)
    ]


def parts(cell: Cell, decimals: int = 2) -> tuple[str, str]:
    """Write a cell as its value and its spread, fractions in percent; the spread may be empty."""
    if isinstance(cell, Spread):
        sign = "+" if isinstance(cell, Difference) else "-"
        value = f"{100 * cell.mean:{sign}.{decimals}f}".replace("-", "\N{MINUS SIGN}")
        if cell.deviation is None:
            return value, ""
        return value, f"± {100 * cell.deviation:.{decimals}f}"
    if isinstance(cell, float):
        return f"{cell:.1f}", ""
    return ("\N{EN DASH}" if cell is None else str(cell)), ""


def words(cell: Cell, decimals: int = 2) -> str:
    """Write a cell in one piece."""
    return " ".join(parts(cell, decimals)).strip()


def listed(modalities: Iterable[str]) -> str:
    """Write modalities as people do: ``"text + audio"``."""
    return " + ".join(modalities)


def named(choice: str | None) -> str:
    """Write a distillation or a fusion as people do: ``"Response + feature"``."""
    return (choice or "none").replace("+", " + ").capitalize()


def concatenated(results: Results, system: System) -> System | None:
    """The concatenation of the same students that a shifting fusion stands against."""
    if system.fusion != "shifting" or system.distillation is None:
        return None
    return results.fused(system.modalities, "concatenation", system.distillation)


def tables(results: Results) -> list[Table]:
    """Every table that the systems at hand can fill, in the order of the report."""
    made = [
        headline(results),
        ablation(results),
        combinations(results),
        students(results),
        per_class(results),
        every_system(results),
        every_run(results),
    ]
    return [table for table in made if table.rows]


def legend(results: Results) -> str:
    """How to read the cells of every table."""
    several = len(results.seeds) > 1
    sentences = ["Percent."]
    sentences.append(
        "Mean ± sample standard deviation over n runs, one per seed."
        if several
        else "One seed, so no spread can be given."
    )
    if len(results.systems) > 1:
        sentences.append(
            "Differences are in percentage points of weighted F1, subtracted seed by seed; against "
            "concatenation: shifting less concatenation of the same students."
        )
        sentences.append(
            "“Within the spread”: the mean difference is smaller than its standard deviation; no "
            "test of significance is made."
            if several
            else "A difference on one seed may well be chance."
        )
        sentences.append("Bold: the highest mean of the column.")
    return " ".join(sentences)


def headline(results: Results) -> Table:
    """The teacher, its fully distilled students, their concatenation and TelME."""
    chosen = [
        results.teacher,
        *(s for s in results.group("student") if s.distillation == "response+feature"),
        results.plain,
        results.fused(results.everything, "concatenation", "response+feature"),
        results.method,
    ]
    return _scored(
        Table(
            "headline",
            "Headline",
            "The main systems, as far as they were run: the text teacher, the students distilled "
            "both ways, everything concatenated without and with distillation, and TelME.",
            (Column("system", "System"),),
            tuple(Row(system.key, (system.title,)) for system in chosen if system),
        ),
        results,
    )


def ablation(results: Results) -> Table:
    """The paper's Table 3: the fusion of everything, by fusion head and by distillation."""
    found = [
        results.fused(results.everything, fusion, distillation)
        for fusion in FUSIONS
        for distillation in DISTILLATIONS
    ]
    return _scored(
        Table(
            "ablation",
            "Ablation",
            f"The fusion of {listed(results.everything)}, by fusion head and by what the students "
            "learnt from the teacher; the form of the paper's Table 3.",
            (Column("fusion", "Fusion"), Column("distillation", "Distillation")),
            tuple(
                Row(system.key, (named(system.fusion), named(system.distillation)))
                for system in found
                if system
            ),
            labels=2,
        ),
        results,
    )


def combinations(results: Results) -> Table:
    """The paper's Table 4: which modalities it takes."""
    rows = []
    for modalities in COMBINATIONS:
        everything = len(modalities) > 1 and set(modalities) == set(results.everything)
        name = listed(modalities).capitalize() + (" (all)" if everything else "")
        rows += [
            Row(system.key, (name, named(system.fusion)))
            for system in results.systems
            if set(system.modalities) == set(modalities)
            and system.distillation in (None, "response+feature")
        ]
    return _scored(
        Table(
            "combinations",
            "Modalities",
            "Every set of modalities that was run, students being distilled both ways; the form of "
            "the paper's Table 4.",
            (Column("modalities", "Modalities"), Column("fusion", "Fusion")),
            tuple(rows),
            labels=2,
        ),
        results,
    )


def students(results: Results) -> Table:
    """What distillation does for each student on its own."""
    systems = results.group("student")
    return _scored(
        Table(
            "students",
            "Students",
            "Each student on its own, by what it learnt from the text teacher.",
            (Column("modality", "Student"), Column("distillation", "Distillation")),
            tuple(Row(s.key, (named(s.modalities[0]), named(s.distillation))) for s in systems),
            labels=2,
        ),
        results,
        (
            Column("against_none", "Against no distillation"),
            lambda system: difference(system, results.untaught(system)),
        ),
    )


def per_class(results: Results) -> Table:
    """F1 of every class, beside the two means over classes."""
    # Every run was tested on the same utterances, so any one tells how many a class has.
    support = [sum(row) for row in results.systems[0].runs[0].confusion]
    measures: list[tuple[Column, Measure]] = [
        (
            Column(f"f1/{label}", f"{label} ({count})", decimals=1, ranked=True),
            _f1_of(index),
        )
        for index, (label, count) in enumerate(zip(results.labels, support, strict=True))
    ]
    measures += [
        (replace(column, decimals=1), measure)
        for column, measure in SCORES
        if column.key != "accuracy"
    ]
    return Table(
        "per_class",
        "F1 by class",
        "Beside each class, the number of test utterances that have it.",
        (Column("system", "System"), *(column for column, _ in measures)),
        tuple(
            Row(
                system.key,
                (system.title, *(spread(system.runs, measure) for _, measure in measures)),
            )
            for system in results.systems
        ),
    )


def every_system(results: Results) -> Table:
    """All systems by their scores, with the dev score that epochs were selected by."""
    rows = tuple(Row(system.key, (system.title,)) for system in results.systems)
    return _scored(
        Table(
            "systems",
            "All systems",
            "The dev score is the one that epochs were selected by: it flatters every system.",
            (Column("system", "System"),),
            rows,
        ),
        results,
        (
            Column("dev_weighted_f1", "Dev weighted F1"),
            lambda system: spread(system.runs, lambda run: run.dev.weighted_f1),
        ),
    )


def every_run(results: Results) -> Table:
    """Each run on its own."""
    columns = (
        Column("system", "System"),
        Column("seed", "Seed"),
        Column("weighted_f1", "Weighted F1"),
        Column("dev_weighted_f1", "Dev weighted F1"),
        Column("selected_epoch", "Epoch selected"),
        Column("epochs", "Epochs trained"),
        Column("seconds", "Seconds"),
    )
    rows = tuple(
        Row(
            system.key,
            (
                system.title,
                run.seed,
                spread([run], weighted_f1),
                spread([run], lambda run: run.dev.weighted_f1),
                run.selected_epoch,
                len(run.history),
                run.seconds,
            ),
        )
        for system in results.systems
        for run in system.runs
    )
    return Table(
        "runs", "Every run", "Each run on its own, with what its training took.", columns, rows
    )


def _f1_of(index: int) -> Measure:
    return lambda run: run.per_class_f1[index]


def _scored(
    table: Table, results: Results, *more: tuple[Column, Callable[[System], Cell]]
) -> Table:
    """Put scores and differences to the right of the words; columns of nothing are left out."""
    by_key = {system.key: system for system in results.systems}
    measured: list[tuple[Column, Callable[[System], Cell]]] = [
        (Column("count", "n"), lambda system: len(system.runs)),
        *(
            (column, lambda system, measure=measure: spread(system.runs, measure))
            for column, measure in SCORES
        ),
        (
            Column("against_teacher", "Against text teacher"),
            lambda system: difference(system, results.teacher),
        ),
        (
            Column("against_concatenation", "Against concatenation"),
            lambda system: difference(system, concatenated(results, system)),
        ),
        *more,
    ]
    found = [
        (column, [measure(by_key[row.system]) for row in table.rows])
        for column, measure in measured
    ]
    found = [(column, cells) for column, cells in found if any(cell is not None for cell in cells)]
    return replace(
        table,
        columns=(*table.columns, *(column for column, _ in found)),
        rows=tuple(
            Row(row.system, (*row.cells, *(cells[index] for _, cells in found)))
            for index, row in enumerate(table.rows)
        ),
    )
