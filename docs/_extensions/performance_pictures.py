"""The performance page's pictures: ratios to the eager reference, and memory by batch size."""

from collections.abc import Sequence
from typing import Any

from generated import COLOURS, dress, svg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Row = dict[str, Any]

REFERENCE = "reference"
_FUSED = ("cpu", "triton")
_CLOCKS = {"wall": "wall clock", "cold": "cold cache", "graph": "graph replay"}
_MOST_MEMORY_PANELS = 3


def ratios(document: Row, theme: str) -> bytes | None:
    """Draw speed-ups by clock or thread count, and peak memory: a line per case, 1 is eager."""
    panels = [(title, values) for title, values in _panels(document) if any(values.values())]
    labels = list(dict.fromkeys(label for _, values in panels for label in _labels(values)))
    names = list(dict.fromkeys(name for _, values in panels for name in values if values[name]))
    if not panels:
        return None
    colours = COLOURS[theme]
    height = 1.3 + 0.26 * len(labels)
    figure = Figure(figsize=(8.6, height), layout="constrained", facecolor="none")
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(drawn, panels, strict=True):
        dress(axes, colours)
        axes.set_title(title, loc="left", size=9, color=colours["ink"])
        axes.axvline(1.0, color=colours["muted"], linewidth=1.2)
        for name in names:
            points = values.get(name, {})
            lines = [labels.index(label) for label in points]
            axes.plot(
                list(points.values()), lines, linestyle="none", label=name, **_mark(name, theme)
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        _ratio_axis(axes)
    _legend(figure, drawn[0], names, theme)
    return svg(figure)


def memory(document: Row, theme: str) -> bytes | None:
    """Draw peak memory over the batch size, where a size was measured at three batches or more."""
    families: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in _usual(document):
        batch, *width = row["shape"]
        family = ", ".join(
            word
            for word in (row["variant"], f"B × {' × '.join(map(str, width))}", row["dtype"])
            if word
        )
        for name, found in row["providers"].items():
            if "peak_bytes" in found:
                points = families.setdefault(family, {}).setdefault(name, [])
                points.append((batch, found["peak_bytes"] / 1e6))
    families = {
        family: by_name
        for family, by_name in families.items()
        if max(len(points) for points in by_name.values()) >= 3
    }
    if not families or len(families) > _MOST_MEMORY_PANELS:
        return None
    colours = COLOURS[theme]
    names = list(dict.fromkeys(name for by_name in families.values() for name in by_name))
    figure = Figure(figsize=(8.6, 3.2), layout="constrained", facecolor="none")
    drawn = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, (family, by_name) in zip(drawn, families.items(), strict=True):
        dress(axes, colours)
        axes.set_title(f"Peak memory, MB: {family}", loc="left", size=9, color=colours["ink"])
        axes.set_xlabel("Batch size", size=8.5, color=colours["muted"])
        for name in names:
            points = sorted(by_name.get(name, []))
            axes.loglog(
                [batch for batch, _ in points],
                [peak for _, peak in points],
                label=name,
                linewidth=1.4,
                **_mark(name, theme),
            )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(figure, drawn[0], names, theme)
    return svg(figure)


# What is drawn -----------------------------------------------------------------------------------

Values = dict[str, dict[str, float]]  # by provider and case


def _panels(document: Row) -> list[tuple[str, Values]]:
    found = []
    if document["machine"]["kind"] == "cpu":
        for threads in document["machine"]["threads"]:
            rows = [row for row in document["rows"] if row["threads"] == threads]
            word = "thread" if threads == 1 else "threads"
            found.append((f"Speed-up, {threads} {word}", _speed_ups(rows, "wall")))
    else:
        found += [
            (f"Speed-up, {name}", _speed_ups(_usual(document), clock))
            for clock, name in _CLOCKS.items()
        ]
    found.append(("Peak memory over eager's", _memory_ratios(_usual(document))))
    return found


def _speed_ups(rows: Sequence[Row], clock: str) -> Values:
    values: Values = {}
    for row in rows:
        seconds = {
            name: found["seconds"][clock]["full"]["p50"]
            for name, found in row["providers"].items()
            if clock in found.get("seconds", {})
        }
        eager = seconds.pop(REFERENCE, None)
        for name, value in seconds.items():
            if eager is not None:
                values.setdefault(name, {})[_label(row)] = eager / value
    return values


def _memory_ratios(rows: Sequence[Row]) -> Values:
    values: Values = {}
    for row in rows:
        peaks = {
            name: found["peak_bytes"]
            for name, found in row["providers"].items()
            if "peak_bytes" in found
        }
        eager = peaks.pop(REFERENCE, None)
        for name, value in peaks.items():
            if eager:
                values.setdefault(name, {})[_label(row)] = value / eager
    return values


def _usual(document: Row) -> list[Row]:
    usual = document["machine"]["threads"][0]
    return [row for row in document["rows"] if row["threads"] == usual]


def _labels(values: Values) -> list[str]:
    return [label for points in values.values() for label in points]


def _label(row: Row) -> str:
    short = {"bfloat16": "bf16", "float16": "fp16"}
    words = [row["variant"], " × ".join(map(str, row["shape"])), short.get(row["dtype"], "")]
    return " ".join(word for word in words if word)


# How it looks ------------------------------------------------------------------------------------


def _mark(provider: str, theme: str) -> dict[str, Any]:
    """Ours filled; what PyTorch makes of the reference hollow; each mode a shape of its own."""
    colours = COLOURS[theme]
    if provider in _FUSED:
        return {"marker": "o", "markersize": 5.5, "color": colours["mark"]}
    if provider == REFERENCE:
        return {"marker": "|", "markersize": 7, "color": colours["muted"]}
    shape = "^" if "autotune" in provider else "D" if "graphs" in provider else "s"
    return {
        "marker": shape,
        "markersize": 4.5,
        "color": colours["other"],
        "markerfacecolor": "none",
    }


def _ratio_axis(axes: Axes) -> None:
    """A logarithmic axis that is read as ``2×``, never narrower than a factor of two each way."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low / 1.1, 0.5), max(high * 1.1, 2.0))
    wide = axes.get_xlim()[1] / axes.get_xlim()[0] > 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, names: Sequence[str], theme: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    shown = {REFERENCE: "eager reference"}
    figure.legend(
        handles,
        [shown.get(label, label) for label in labels],
        loc="outside lower left",
        ncols=max(1, min(4, len(names))),
        frameon=False,
        fontsize=8.5,
        labelcolor=COLOURS[theme]["ink"],
    )
