"""Write the scaling page's tables and picture: measured to four processes, computed beyond.

What travels is measured, call by call, and computed from formulas. The build fails where the two
differ, so that what is computed for more processes rests on what was seen.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from generated import COLOURS, dress, picture, short, svg, table, write
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

Row = dict[str, Any]

NAMES = {"dist": "DIST", "batch_similarity": "Batch similarity"}
PROVIDERS = {"shared": "``group=``", "gathered": "whole batch gathered", "part": "own part alone"}
WORLDS = (8, 64, 1024)
ALTERNATIVE = "Bytes that a process sends in a step, over the number of processes."
_REPORT = 7 * 8
_WIDTH = 4  # bytes of a float32, in which the benchmark's tensors are


class Part(NamedTuple):
    """What each process has of a batch: items, and the width of a row."""

    loss: str
    items: int
    width: int


# A classifier, a language model's tokens, and features.
PARTS = (
    Part("dist", 256, 1000),
    Part("dist", 4096, 128_256),
    Part("batch_similarity", 256, 768),
)


def generate(app: Sphinx) -> None:
    """Write every generated file; those that would not change are left alone."""
    results = (Path(app.confdir) / app.config.committed_results).resolve()
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    path = results / "distributed--cpu.json"
    if not path.is_file():
        raise ExtensionError(
            f"{path}: expected the committed result that a page shows, found no such file; "
            "run `python -m benchmarks.bench_distributed` and commit what it writes"
        )
    document: Row = json.loads(path.read_text(encoding="utf-8"))
    check(document["rows"])
    write(folder / "scaling-measured.rst", measured(document))
    pictures = [picture(f"scaling-{theme}.svg", theme, ALTERNATIVE) for theme in COLOURS]
    write(folder / "scaling-computed.rst", "\n".join([computed(), *pictures]))
    for theme in COLOURS:
        write(folder / f"scaling-{theme}.svg", drawn(theme))


# What travels ------------------------------------------------------------------------------------


def collectives(part: Part, provider: str, world: int) -> list[tuple[str, int]]:
    """The calls of a step, without masks and with a teacher that needs no gradient.

    Each with its bytes: those of the tensor that is reduced, or of all that is gathered.
    """
    if provider == "part" or (provider == "shared" and world == 1):
        return []
    whole = part.items * world
    reports = ("all_gather", _REPORT * world)
    rows = ("all_gather", whole * part.width * _WIDTH)
    if provider == "gathered":
        return [reports, rows, rows]
    if part.loss == "batch_similarity":
        return [reports, rows, ("all_reduce", 2 * whole * _WIDTH), ("all_reduce", _WIDTH)]
    at_once = importlib.import_module("telme_kd.kernels.distributed.dist")._GATHERED_NUMBERS
    statistics = world * (7 * part.width + 1)
    if statistics <= at_once:
        return [reports, ("all_gather", statistics * _WIDTH)]
    numbers = (2 * part.width, 2 * part.width, 3 * part.width + 1)
    return [reports, *(("all_reduce", count * _WIDTH) for count in numbers)]


def check(rows: Iterable[Row]) -> None:
    """Compare what travelled with the formulas.

    Raises:
        ExtensionError: they differ.
    """
    for row in rows:
        part = Part(row["loss"], row["items"] // row["world"], row["width"])
        expected = collectives(part, row["provider"], row["world"])
        found = [(call["name"], call["bytes"]) for call in row["collectives"]]
        if found != expected:
            raise ExtensionError(
                f"distributed--cpu.json: expected {expected} for {part} on {row['world']} "
                f"processes, {row['provider']}, got {found}; measure again, or correct the formula"
            )


def sent(part: Part, provider: str, world: int) -> float:
    """Bytes that a process sends in a step, if the collectives go round a ring."""
    rounds = {"all_gather": (world - 1) / world, "all_reduce": 2 * (world - 1) / world}
    return sum(rounds[name] * size for name, size in collectives(part, provider, world))


# Tables and picture ------------------------------------------------------------------------------


def measured(document: Row) -> str:
    """Milliseconds of a step by the number of processes, and what travels between the most."""
    rows = document["rows"]
    worlds = sorted({row["world"] for row in rows})
    heads = ["Loss", "Whole batch", "With", *(_processes(world) for world in worlds), "Bytes"]
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["world"]):
        batch = f"{row['items']} × {row['width']}"
        line = lines.setdefault((NAMES[row["loss"]], batch, PROVIDERS[row["provider"]]), [])
        line.append(f"{short(1e3 * row['seconds']['p50'])} ms")
        if row["world"] == worlds[-1]:
            line.append(short(sum(call["bytes"] for call in row["collectives"])))
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    machine = document["machine"]
    provenance = (
        f"Measured with ``{document['command']}`` on {machine['processors']} processors of an "
        f"{machine['name']} ({versions}); one thread a process."
    )
    title = f"Median time of a step, and bytes of its collectives for {worlds[-1]} processes"
    cells = [[*words, *numbers] for words, numbers in lines.items()]
    return "\n".join([table(title, heads, cells, words=3), provenance, ""])


def computed() -> str:
    """Bytes that a process sends in a step, for more processes than one has at home."""
    heads = ["Loss", "A process's part", "With", *(_processes(world) for world in WORLDS)]
    lines = [
        [
            NAMES[part.loss],
            f"{part.items} × {part.width}",
            PROVIDERS[provider],
            *(_bytes(sent(part, provider, world)) for world in WORLDS),
        ]
        for part in PARTS
        for provider in ("shared", "gathered")
    ]
    return table("What a process sends in a step, float32, computed", heads, lines, words=3)


def drawn(theme: str) -> bytes:
    """Draw what a process sends over the number of processes, a panel for each part."""
    colours = COLOURS[theme]
    figure = Figure(figsize=(8.6, 2.9), layout="constrained", facecolor="none")
    worlds = [2**power for power in range(1, 11)]
    panels = figure.subplots(1, len(PARTS), squeeze=False)[0]
    for axes, part in zip(panels, PARTS, strict=True):
        dress(axes, colours)
        title = f"{NAMES[part.loss]}, {part.items} × {part.width} each"
        axes.set_title(title, loc="left", size=9, color=colours["ink"])
        for provider, colour, label in (
            ("shared", "mark", "group="),
            ("gathered", "other", "gathered"),
        ):
            sizes = [sent(part, provider, world) for world in worlds]
            axes.loglog(worlds, sizes, color=colours[colour], linewidth=1.4, label=label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("Processes", size=8.5, color=colours["muted"])
    panels[0].set_ylabel("Bytes sent", size=8.5, color=colours["muted"])
    panels[0].legend(frameon=False, fontsize=8.5, labelcolor=colours["ink"])
    return svg(figure)


def _processes(world: int) -> str:
    return f"{world:,} process{'' if world == 1 else 'es'}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; where the results are is another's setting."""
    app.setup_extension("committed_results")
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
