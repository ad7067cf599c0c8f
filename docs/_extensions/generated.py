"""What generated pages are made of: tables, numbers, pictures in two themes, files."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "light": {
        "ink": "#1d2129",
        "muted": "#5b6675",
        "grid": "#e1e5ea",
        "mark": "#0072b2",
        "other": "#d55e00",
    },
    "dark": {
        "ink": "#e7eaef",
        "muted": "#a0abba",
        "grid": "#3a434f",
        "mark": "#56b4e9",
        "other": "#e69f00",
    },
}


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """A list table; the columns after the first ``words`` hold numbers."""
    lines = [
        f".. list-table:: {title}".rstrip(),
        "   :header-rows: 1",
        f"   :class: numbers-from-{words + 1}",
        "",
    ]
    for row in (heads, *rows):
        lines += [f"   {' ' if index else '*'} - {cell}".rstrip() for index, cell in enumerate(row)]
    return "\n".join([*lines, ""])


def picture(name: str, theme: str, alternative: str) -> str:
    """An image that one of the two themes shows."""
    return "\n".join(
        [
            f".. image:: /_generated/{name}",
            f"   :alt: {alternative}",
            f"   :class: only-{theme}",
            "",
        ]
    )


def short(value: float) -> str:
    """A number to three figures, or two and a power of ten where it is far from one."""
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.3g}"
    if 100 <= abs(value) < 1e4:
        return f"{float(f'{value:.3g}'):,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}\N{MULTIPLICATION SIGN}10\\ :sup:`{int(exponent)}`".replace(
        "-", "\N{MINUS SIGN}"
    )


def dress(axes: Axes, colours: dict[str, str]) -> None:
    """Give a panel the look of the pages."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.grid(color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=colours["ink"])


def svg(figure: Figure) -> bytes:
    """A figure as a file that is the same whenever it is drawn again."""
    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "telme-kd"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and only if its content changes."""
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
