"""The report of experiments: one HTML page, a LaTeX and a CSV file for each table, the plots."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from examples.erc import plots
from examples.erc.comparison import SPLIT, Difference, Table, parts
from examples.erc.errors import InputError
from examples.erc.page import templates
from examples.erc.plots import Picture
from examples.erc.results import System
from examples.experiments import exports, tables
from examples.experiments.catalogue import EXPERIMENTS, Comparison, Experiment
from examples.experiments.outcome import Outcome, read


@dataclass(frozen=True)
class Exhibit:
    """What one experiment shows.

    Attributes:
        experiment: Which.
        tables: Its tables, each with a sentence or more on what it shows.
        pictures: Its plots.
        small: Whether the plots may stand side by side.
    """

    experiment: Experiment
    tables: tuple[tuple[Table, str], ...]
    pictures: tuple[Picture, ...]
    small: bool


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the report.

    Everything is checked and made in memory before the first file is written, and each file appears
    whole or not at all. The folder receives ``tables/*.tex`` and ``tables/*.csv``, ``plots/*.png``
    and, last, ``report.html``.

    Args:
        results: As :func:`examples.experiments.running.run` returns them.
        folder: Where to write; made if absent.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: The results do not hold together, or the folder is a file; nothing was written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder: expected a folder, got the file {folder}; name another place")
    outcome = read(results)
    shown = list(exhibits(outcome))
    title = outcome.results.title
    files: dict[str, bytes] = {}
    for exhibit in shown:
        for table, _ in exhibit.tables:
            files[f"tables/{table.key}.tex"] = exports.latex(tables.narrow(table), title).encode()
            files[f"tables/{table.key}.csv"] = exports.csv_table(table).encode()
        for picture in exhibit.pictures:
            files[f"plots/{picture.name}.png"] = picture.light
    files["report.html"] = _page(outcome, shown).encode(errors="backslashreplace")
    # Imported here, so that tables can be made where there is no training library.
    from examples.erc.artifacts import replace

    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, partial(Path.write_bytes, data=content))
    return folder / "report.html"


def exhibits(outcome: Outcome) -> Iterator[Exhibit]:
    """What each experiment shows, in the order of the paper.

    Args:
        outcome: The results.
    """
    for experiment in outcome.experiments:
        comparisons = experiment.plan(outcome.modalities)
        if not comparisons:
            picture = plots.class_shares(outcome.results.title, outcome.classes)
            yield Exhibit(experiment, ((tables.class_table(outcome), ""),), (picture,), small=False)
            continue
        filled = tuple(
            (tables.table(comparison, outcome), tables.finding(comparison, outcome))
            for comparison in comparisons
        )
        pictures = [_dots(comparison, outcome) for comparison in comparisons]
        if experiment.name == "confusions":
            filled += ((tables.class_scores(comparisons[0], outcome), ""),)
            pictures = [
                plots.confusion_matrix(
                    outcome.results.labels, outcome.system(line.system.key), f"confusion-{number}"
                )
                for number, line in enumerate(comparisons[0].lines, 1)
            ]
        yield Exhibit(experiment, filled, tuple(pictures), small=experiment.name == "confusions")


def summary(results: Mapping[str, Any]) -> str:
    """Sum the results up for a terminal, in a line or more for each table.

    Args:
        results: As :func:`examples.experiments.running.run` returns them.

    Returns:
        Several lines without a final line break.

    Raises:
        InputError: The results do not hold together.
    """
    outcome = read(results)
    lines = []
    for experiment in outcome.experiments:
        for comparison in experiment.plan(outcome.modalities):
            lines.append(
                f"{comparison.title} ({experiment.paper}): {tables.finding(comparison, outcome)}"
            )
        if not experiment.plan(outcome.modalities):
            lines.append(f"{experiment.title} ({experiment.paper}): see the report.")
    lines += [
        f"{EXPERIMENTS[name].title} ({EXPERIMENTS[name].paper}): left out; {reason}"
        for name, reason in outcome.left_out.items()
    ]
    return "\n".join(lines)


def _dots(comparison: Comparison, outcome: Outcome) -> Picture:
    """A panel for each baseline, with those that are compared with it, the baseline first."""
    panels: list[tuple[str, list[System], System | None]] = []
    grouped: dict[str | None, list[System]] = {}
    for line in comparison.lines:
        key = line.baseline.key if line.baseline else None
        grouped.setdefault(key, []).append(outcome.system(line.system.key))
    alone = grouped.pop(None, [])
    for key, systems in grouped.items():
        baseline = outcome.system(str(key))
        panels.append(("Compared with the first line", [baseline, *systems], baseline))
    rest = [system for system in alone if system.key not in grouped]
    if rest:
        panels.append(("Not compared", rest, None))
    return plots.side_by_side(comparison.key.replace("_", "-"), panels)


def _page(outcome: Outcome, shown: list[Exhibit]) -> str:
    environment = templates(beside=Path(__file__).parent)
    environment.filters["parts"] = parts
    environment.tests["difference"] = lambda cell: isinstance(cell, Difference)
    return environment.get_template("experiments.html.jinja").render(
        outcome=outcome,
        results=outcome.results,
        exhibits=shown,
        left_out=[(EXPERIMENTS[name], reason) for name, reason in outcome.left_out.items()],
        split=SPLIT,
        legend=tables.legend(outcome),
        light=plots.LIGHT,
        dark=plots.DARK,
    )
