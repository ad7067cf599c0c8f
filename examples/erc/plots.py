"""The pictures of the report, each drawn for a light page and for a dark one.

Colours tell distillations apart and come from the palette of Okabe and Ito; markers tell them apart
once more, for eyes and printers without colour. Figures are objects of their own: matplotlib's
global state is left alone.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from examples.erc.comparison import (
    Spread,
    concatenated,
    confusion,
    difference,
    listed,
    named,
    paired,
    spread,
    weighted_f1,
    words,
)
from examples.erc.results import DISTILLATIONS, Results, System

PIXELS = 96
"""CSS pixels to the inch."""

DENSITY = 2
"""Pixels drawn for each CSS pixel, for sharp screens and paper."""


@dataclass(frozen=True)
class Theme:
    """The colours of a page; the report's style sheet takes them from here.

    Attributes:
        paper: The background.
        ink: Text and marks.
        muted: Text of less weight.
        grid: Lines that guide the eye.
        marks: The colour of the teacher and of each distillation.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    marks: dict[str, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2129",
    muted="#5b6675",
    grid="#e1e5ea",
    marks={
        "teacher": "#009e73",
        "none": "#6b6b6b",
        "response": "#d55e00",
        "feature": "#cc79a7",
        "response+feature": "#0072b2",
    },
)
DARK = Theme(
    paper="#14181e",
    ink="#e7eaef",
    muted="#a0abba",
    grid="#2b323c",
    marks={
        "teacher": "#1fbf90",
        "none": "#b4b4b4",
        "response": "#e69f00",
        "feature": "#e1a5c7",
        "response+feature": "#56b4e9",
    },
)
MARKERS = {"teacher": "^", "none": "o", "response": "s", "feature": "v", "response+feature": "D"}


@dataclass(frozen=True)
class Picture:
    """A picture, for those who see it and for those who do not.

    Attributes:
        name: The stem of its file name.
        alt: What it shows, in words and with its main figures.
        width: In CSS pixels.
        height: In CSS pixels.
        light: PNG for a light page.
        dark: PNG for a dark page.
    """

    name: str
    alt: str
    width: int
    height: int
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Gallery:
    """Pictures that are read alike.

    Attributes:
        title: Their name.
        note: What they show and how to read it.
        pictures: One or more; drawn small, to stand beside each other, or large.
        small: Whether they are small.
    """

    title: str
    note: str
    pictures: tuple[Picture, ...]
    small: bool


def galleries(results: Results) -> list[Gallery]:
    """Draw everything that the systems at hand can fill, in the order of the report."""
    made = [scores(results), differences(results), confusions(results), curves(results)]
    return [gallery for gallery in made if gallery.pictures]


def scores(results: Results) -> Gallery:
    """Draw every system as a dot per seed, with mean and whisker."""
    teacher = results.teacher
    level = 100 * spread(teacher.runs, weighted_f1).mean if teacher else None
    panels = [
        _Panel(heading, [_score(system) for system in members], reference)
        for heading, members, reference in (
            (
                "Text teacher and fusions",
                [*results.group("teacher"), *results.group("fusion")],
                level,
            ),
            ("Students on their own", results.group("student"), None),
        )
        if members
    ]
    strands = [strand for panel in panels for strand in panel.strands]
    best = max(strands, key=lambda strand: strand.summary.mean)
    worst = min(strands, key=lambda strand: strand.summary.mean)
    picture = _picture(
        "systems",
        f"Dot plot of the weighted F1 of {len(strands)} systems on test, one dot per seed. Highest "
        f"mean: {best.label}, {words(best.summary)}. Lowest mean: {worst.label}, "
        f"{words(worst.summary)}. All figures are in the table of all systems.",
        lambda theme: _dots(panels, "Weighted F1 on test, %", theme, shared=False),
    )
    note = _reading(results) + " The scale does not start at zero."
    if teacher:
        note += " The dashed line is the mean of the text teacher."
    if len(panels) > 1:
        note += " Students have a scale of their own."
    return Gallery("Seed by seed", note, (picture,), small=False)


def differences(results: Results) -> Gallery:
    """Draw what each fusion gains, seed by seed."""
    fusions = results.group("fusion")
    panels = [
        _Panel(heading, strands, 0.0)
        for heading, strands in (
            ("Fusion less text teacher", _gains(fusions, [results.teacher] * len(fusions))),
            (
                "Shifting less concatenation of the same students",
                _gains(fusions, [concatenated(results, system) for system in fusions]),
            ),
        )
        if strands
    ]
    counted = "; ".join(
        f"{panel.heading.lower()}: {sum(strand.summary.mean > 0 for strand in panel.strands)} of "
        f"{len(panel.strands)} means are above zero"
        for panel in panels
    )
    alt = (
        f"Dot plot of paired differences in weighted F1 on test, one dot per seed; {counted}. All "
        "figures are in the table of all systems."
    )
    label = "Difference in weighted F1, percentage points"

    def draw(theme: Theme) -> Figure:
        return _dots(panels, label, theme, shared=True)

    return Gallery(
        "Differences",
        f"Weighted F1 on test, subtracted seed by seed. {_reading(results)} Right of the dashed "
        "line is a gain.",
        (_picture("differences", alt, draw),) if panels else (),
        small=False,
    )


def side_by_side(
    name: str, panels: Sequence[tuple[str, Sequence[System], System | None]]
) -> Picture:
    """Draw systems as a dot per seed, with mean and whisker, in panels with scales of their own.

    Args:
        name: Of the picture.
        panels: For each its heading, its systems and the one whose mean is a dashed line.

    Returns:
        The picture.
    """
    made = [
        _Panel(
            heading,
            [_score(system) for system in systems],
            100 * spread(reference.runs, weighted_f1).mean if reference else None,
        )
        for heading, systems, reference in panels
    ]
    told = "; ".join(
        f"{strand.label}, {words(strand.summary)}" for panel in made for strand in panel.strands
    )
    return _picture(
        name,
        f"Dot plot of weighted F1 on test in percent, one dot per seed: {told}.",
        lambda theme: _dots(made, "Weighted F1 on test, %", theme, shared=False),
    )


def confusions(results: Results) -> Gallery:
    """Draw where TelME, the text teacher and plain concatenation go wrong."""
    chosen = (
        ("telme", results.method),
        ("teacher", results.teacher),
        ("concatenation", results.plain),
    )
    return Gallery(
        "Confusions",
        "How the test utterances of each true class (rows) were labelled (columns). In a cell: the "
        "percentage of its row, which the colour shows too, above the number of utterances, summed "
        "over seeds.",
        tuple(
            confusion_matrix(results.labels, system, f"confusion-{name}")
            for name, system in chosen
            if system
        ),
        small=True,
    )


def curves(results: Results) -> Gallery:
    """Draw how each system trained; the distillations of one student or fusion share a picture."""
    families: dict[tuple[str, ...], list[System]] = {}
    for system in results.systems:
        family = (system.group, *system.modalities, system.fusion or "")
        families.setdefault(family, []).append(system)
    return Gallery(
        "Training",
        "Weighted F1 on dev and training loss by epoch, a line per seed. A large mark is the epoch "
        "that was selected.",
        tuple(_training(members) for members in families.values()),
        small=True,
    )


def class_shares(title: str, counts: Mapping[str, Mapping[str, int]]) -> Picture:
    """Draw how the classes of a corpus are distributed, a panel for each split.

    Args:
        title: The corpus, for those who do not see it.
        counts: For each split how many utterances each label has, in index order.

    Returns:
        The picture ``classes``.
    """
    told = "; ".join(
        f"{split}: " + ", ".join(f"{label} {number}" for label, number in held.items())
        for split, held in counts.items()
    )
    return _picture(
        "classes",
        f"Bar chart of the classes of {title}, utterances in each split. {told}.",
        lambda theme: _bars(counts, theme),
    )


def _bars(counts: Mapping[str, Mapping[str, int]], theme: Theme) -> Figure:
    labels = list(next(iter(counts.values())))
    totals = {split: max(1, sum(held.values())) for split, held in counts.items()}
    most = max(held[label] / totals[split] for split, held in counts.items() for label in labels)
    figure = _figure(8.8, 0.5 + 0.3 * len(labels), theme)
    panels = figure.subplots(1, len(counts), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (split, held) in zip(panels, counts.items(), strict=True):
        _dress(axes, theme, "both")
        # Every bar says its figures, so that nothing is left for an axis to say.
        axes.grid(visible=False)
        axes.tick_params(labelbottom=False)
        axes.set_title(
            f"{split}, {sum(held.values()):,}", loc="left", size=10.5, weight="bold",
            color=theme.ink,
        )  # fmt: skip
        shares = [100 * held[label] / totals[split] for label in labels]
        axes.barh(range(len(labels)), shares, 0.68, color=theme.marks["response+feature"])
        for row, (label, share) in enumerate(zip(labels, shares, strict=True)):
            axes.annotate(
                f"{share:.1f}%  ({held[label]:,})", (share, row), (4, 0),
                textcoords="offset points", va="center", size=8.5, color=theme.ink,
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        # Room for the figures of the longest bar.
        axes.set_xlim(0, 100 * most * 1.6)
    return figure


def _reading(results: Results) -> str:
    if len(results.seeds) == 1:
        return "There is one seed, so a small dot and the large mark below it say the same."
    return (
        "A small dot is one seed; the large mark is the mean, and the whisker reaches one sample "
        "standard deviation to either side."
    )


@dataclass(frozen=True)
class _Strand:
    """One line of a dot plot; the values are in percent, the summary in fractions."""

    label: str
    kind: str
    values: list[float]
    summary: Spread


@dataclass(frozen=True)
class _Panel:
    heading: str
    strands: list[_Strand]
    reference: float | None


def _kind(system: System) -> str:
    return system.distillation or "teacher"


def _score(system: System) -> _Strand:
    values = [100 * weighted_f1(run) for run in system.runs]
    return _Strand(system.title, _kind(system), values, spread(system.runs, weighted_f1))


def _gains(systems: list[System], others: Sequence[System | None]) -> list[_Strand]:
    strands = []
    for system, other in zip(systems, others, strict=True):
        summary = difference(system, other)
        if summary:
            values = [100 * value for value in paired(system, other)]
            strands.append(_Strand(system.title, _kind(system), values, summary))
    return strands


def _picture(name: str, alt: str, draw: Callable[[Theme], Figure]) -> Picture:
    light, dark = draw(LIGHT), draw(DARK)
    width, height = (round(inches * PIXELS) for inches in light.get_size_inches())
    return Picture(name, alt, width, height, png(light), png(dark))


def png(figure: Figure) -> bytes:
    """Draw a figure as a PNG with a palette; no text in it is taken for mathematics."""
    # Titles come from outside: a dollar sign in one is a dollar sign, not mathematics.
    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False)
    canvas = FigureCanvasAgg(figure)
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="raw")
    # Flat colours with smoothed edges fit a palette, which makes the file a third of the size.
    image = Image.frombytes("RGBA", canvas.get_width_height(), drawn.getvalue()).convert("RGB")
    palette = image.quantize(256, dither=Image.Dither.NONE)
    palette.save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def _figure(width: float, height: float, theme: Theme) -> Figure:
    # Eighths of an inch come to whole pixels, in binary arithmetic too.
    return Figure(
        figsize=(round(8 * width) / 8, round(8 * height) / 8),
        dpi=PIXELS * DENSITY,
        layout="constrained",
        facecolor=theme.paper,
    )


def _dress(axes: Axes, theme: Theme, guides: Literal["both", "y"]) -> None:
    """Take away what does not carry meaning."""
    axes.set_facecolor(theme.paper)
    axes.spines[:].set_visible(False)
    axes.grid(axis=guides, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=theme.ink)
    axes.xaxis.label.set(color=theme.muted, size=9)
    axes.yaxis.label.set(color=theme.muted, size=9)


def _wrapped(title: str, width: int) -> str:
    """Break a title that is too long, after its first comma if it has one; cut what remains."""
    head, comma, tail = title.partition(", ")
    pieces = [title] if len(title) <= width else [head + comma.strip(), tail]
    return "\n".join(
        textwrap.fill(piece, width, max_lines=2, placeholder=" …") for piece in pieces if piece
    )


def _dots(panels: list[_Panel], label: str, theme: Theme, *, shared: bool) -> Figure:
    heights = [len(panel.strands) + 0.8 for panel in panels]
    figure = _figure(8.8, 0.9 + 0.34 * sum(heights) + 0.45 * len(panels), theme)
    grid = figure.subplots(len(panels), squeeze=False, sharex=shared, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _dress(axes, theme, "both")
        axes.set_title(panel.heading, loc="left", size=10.5, weight="bold", color=theme.ink)
        if panel.reference is not None:
            axes.axvline(panel.reference, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        for row, strand in enumerate(panel.strands):
            _strand(axes, row, strand, theme)
        axes.set_yticks(range(len(panel.strands)), [_wrapped(s.label, 58) for s in panel.strands])
        axes.set_ylim(len(panel.strands) - 0.4, -0.6)
        axes.margins(x=0.06)
    grid[-1, 0].set_xlabel(label)
    kinds = {strand.kind for panel in panels for strand in panel.strands}
    figure.legend(
        handles=_keys(kinds, theme), loc="outside upper left", **_legend_style(theme, len(kinds))
    )
    return figure


def _strand(axes: Axes, row: int, strand: _Strand, theme: Theme) -> None:
    """Seeds a little above the line, the mean with its whisker a little below."""
    colour = theme.marks[strand.kind]
    mean = 100 * strand.summary.mean
    axes.plot(
        strand.values, [row - 0.17] * len(strand.values), "o", color=colour, alpha=0.6,
        markersize=4, markeredgewidth=0,
    )  # fmt: skip
    if strand.summary.deviation is not None:
        reach = 100 * strand.summary.deviation
        axes.plot([mean - reach, mean + reach], [row + 0.14] * 2, color=colour, linewidth=1.6)
    axes.plot(mean, row + 0.14, MARKERS[strand.kind], color=colour, markersize=6.5)
    axes.text(
        1.01, row, words(strand.summary), transform=axes.get_yaxis_transform(), va="center",
        size=9, color=theme.ink,
    )  # fmt: skip


def _keys(kinds: set[str], theme: Theme) -> list[Line2D]:
    return [
        Line2D(
            [], [], color=theme.marks[kind], marker=MARKERS[kind], markersize=6, linewidth=1.6,
            label="Teacher" if kind == "teacher" else _taught(kind),
        )
        for kind in ("teacher", *DISTILLATIONS)
        if kind in kinds
    ]  # fmt: skip


def _taught(distillation: str) -> str:
    return "Not distilled" if distillation == "none" else named(distillation)


def _legend_style(theme: Theme, columns: int, size: float = 9) -> dict[str, Any]:
    return {
        "ncols": columns, "frameon": False, "fontsize": size, "labelcolor": theme.ink,
        "handlelength": 1.6, "columnspacing": 1.2, "borderaxespad": 0.2,
    }  # fmt: skip


def confusion_matrix(labels: Sequence[str], system: System, name: str) -> Picture:
    """Draw how the test utterances of each true class were labelled, summed over seeds.

    Args:
        labels: The C class names.
        system: With one or more runs.
        name: Of the picture.

    Returns:
        The picture.
    """
    shares = _shares(confusion(system))
    found = ", ".join(
        f"{label} {100 * row[index]:.0f}%"
        for index, (label, row) in enumerate(zip(labels, shares, strict=True))
    )
    return _picture(
        name,
        f"Confusion matrix of {system.title} on test. Share of each true class that was found: "
        f"{found}.",
        lambda theme: _matrix(labels, system, theme),
    )


def _shares(counts: list[list[int]]) -> list[list[float]]:
    return [[count / max(sum(row), 1) for count in row] for row in counts]


def _matrix(labels: Sequence[str], system: System, theme: Theme) -> Figure:
    side = 0.4 + 0.08 * max(map(len, labels)) + 0.44 * len(labels)
    figure = _figure(side, side + 0.5, theme)
    axes = figure.subplots()
    _dress(axes, theme, "both")
    axes.grid(visible=False)
    axes.set_anchor("S")
    counts = confusion(system)
    shares = _shares(counts)
    axes.imshow(shares, cmap=colormaps["cividis"], vmin=0, vmax=1)
    for row in range(len(labels)):
        for column in range(len(labels)):
            share = shares[row][column]
            style: dict[str, Any] = {
                "ha": "center",
                "va": "center",
                # At 0.46 of cividis, white and black stand out equally.
                "color": "white" if share < 0.46 else "black",
            }
            axes.text(column, row - 0.13, f"{100 * share:.1f}", size=8.5, **style)
            axes.text(column, row + 0.26, str(counts[row][column]), size=7, **style)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    title = _wrapped(system.title, round(11 * side))
    figure.suptitle(title, size=10, weight="bold", color=theme.ink, x=0.02, ha="left")
    return figure


def _training(members: list[System]) -> Picture:
    first = members[0]
    if first.group == "teacher":
        title = first.title
    elif first.group == "student":
        title = f"{first.modalities[0].capitalize()} student"
    else:
        title = f"{listed(first.modalities).capitalize()} by {first.fusion}"
    told = "; ".join(
        f"{system.title}: dev weighted F1 of "
        f"{words(spread(system.runs, lambda run: run.dev.weighted_f1))} at epochs "
        + ", ".join(str(run.selected_epoch) for run in system.runs)
        for system in members
    )
    name = "-".join(("training", *first.modalities, *filter(None, (first.fusion,))))
    return _picture(
        name,
        f"Weighted F1 on dev and training loss by epoch, a line per seed. Selected: {told}.",
        lambda theme: _epochs(members, title, theme),
    )


def _epochs(members: list[System], title: str, theme: Theme) -> Figure:
    figure = _figure(4.1, 4.0, theme)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for axes, label in ((upper, "Dev weighted F1, %"), (lower, "Training loss")):
        _dress(axes, theme, "y")
        axes.set_ylabel(label)
    for system in members:
        colour = theme.marks[_kind(system)]
        for run in system.runs:
            epochs = [epoch.number for epoch in run.history]
            dev = [100 * epoch.dev_weighted_f1 for epoch in run.history]
            upper.plot(epochs, dev, ".-", color=colour, alpha=0.55, linewidth=1, markersize=3)
            lower.plot(
                epochs, [epoch.loss for epoch in run.history], ".-", color=colour, alpha=0.55,
                linewidth=1, markersize=3,
            )  # fmt: skip
            upper.plot(
                run.selected_epoch, dev[epochs.index(run.selected_epoch)], MARKERS[_kind(system)],
                color=colour, markersize=5.5, zorder=3,
            )  # fmt: skip
    lower.set_xlabel("Epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set_title(_wrapped(title, 46), loc="left", size=10, weight="bold", color=theme.ink)
    kinds = {_kind(system) for system in members} - {"teacher"}
    if kinds:
        figure.legend(
            handles=_keys(kinds, theme), loc="outside lower left", **_legend_style(theme, 3, 8.5)
        )
    return figure
