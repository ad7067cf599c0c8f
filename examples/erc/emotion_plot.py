"""A dialogue's emotions over time: the transcript downwards, and beside each utterance a bar."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox, TransformedBbox

from examples.erc.plots import DENSITY, LIGHT, PIXELS, png
from examples.erc.prediction import Answer, emotion_of
from examples.erc.terminal import fit, plain

MOST_ROWS = 60
"""Utterances in a picture; longer dialogues take several."""

_COLOURS = {
    "ang": "#d55e00",
    "dis": "#009e73",
    "exc": "#e69f00",
    "fea": "#8f63b8",
    "fru": "#9c5a3c",
    "hap": "#f2cf3b",
    "joy": "#f2cf3b",
    "neu": "#c3cad3",
    "sad": "#0072b2",
    "sur": "#56b4e9",
}
"""The palette of Okabe and Ito, as far as it goes, by the first three letters of an emotion."""

_OTHERS = (
    "#cc79a7", "#117733", "#332288", "#999933", "#aa4499", "#44aa99", "#661100", "#6699cc",
    "#ddcc77", "#888888",
)  # fmt: skip
"""For emotions that neither corpus has."""

_WIDTH = 12.0
_ROW = 0.27
_HEAD = 0.95
_FOOT = 0.45
_LEFT, _LEFT_WITHOUT_WORDS, _RIGHT = 0.485, 0.2, 0.91
_SPEAKER, _WORDS = 13, 66
"""Letters of a name and of an utterance that there is room for."""


def draw(
    stem: str, title: str, answers: Sequence[Answer], labels: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """Draw one dialogue.

    Args:
        stem: Of the file names.
        title: What stands above.
        answers: Those of the dialogue, in order.
        labels: The C class names, in index order.

    Returns:
        File names with their PNG: one, or for a long dialogue one for each part.
    """
    parts = [answers[start : start + MOST_ROWS] for start in range(0, len(answers), MOST_ROWS)]
    for number, part in enumerate(parts, start=1):
        several = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
        figure = _figure(f"{plain(title)}{several}", part, _colours(labels))
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box.
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
            data = png(figure)
        yield f"{stem}{f'-part-{number}' if several else ''}.png", data


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each emotion, no two alike."""
    colours: dict[str, str] = {}
    others = iter(_OTHERS * (len(labels) // len(_OTHERS) + 1))
    for label in labels:
        known = _COLOURS.get(label[:3].lower())
        colours[label] = next(others) if known is None or known in colours.values() else known
    return colours


def _figure(title: str, answers: Sequence[Answer], colours: Mapping[str, str]) -> Figure:
    height = _HEAD + _ROW * len(answers) + _FOOT
    figure = Figure(
        figsize=(_WIDTH, round(8 * height) / 8), dpi=PIXELS * DENSITY, facecolor=LIGHT.paper
    )
    left = _LEFT if any(answer.line.text for answer in answers) else _LEFT_WITHOUT_WORDS
    axes = figure.add_axes((left, _FOOT / height, _RIGHT - left, 1 - (_HEAD + _FOOT) / height))
    axes.set_facecolor(LIGHT.paper)
    axes.spines[:].set_visible(False)
    for row, answer in enumerate(answers):
        _tell(axes, row, answer, left)
        _stack(axes, row, answer, colours)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(answers) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.tick_params(length=0, labelsize=8, labelcolor=LIGHT.muted)
    figure.text(
        0.012, 1 - 0.2 / height, fit(title, 110).rstrip(), size=11, weight="bold", color=LIGHT.ink,
        va="top",
    )  # fmt: skip
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="upper left", bbox_to_anchor=(0.004, 1 - 0.42 / height), ncols=len(colours),
        frameon=False, fontsize=9, handlelength=1, handleheight=1, columnspacing=1.4,
        labelcolor=LIGHT.ink,
    )  # fmt: skip
    figure.text(_RIGHT + 0.008, 1 - 0.78 / height, "seen", size=7.5, color=LIGHT.muted, va="center")
    return figure


def _tell(axes: Axes, row: int, answer: Answer, left: float) -> None:
    """Write who says what to the left of a bar, and what was seen of it to the right."""
    style: dict[str, Any] = {"va": "center", "size": 8.5, "clip_on": False}
    scale = 1 / (_RIGHT - left)
    start = (0.012 - left) * scale
    words = start + 0.092 * scale
    axes.text(
        start, row, fit(answer.line.speaker, _SPEAKER).rstrip(), weight="bold", color=LIGHT.ink,
        **style,
    )  # fmt: skip
    said = plain(answer.line.text or "") or f"utterance {plain(answer.line.utterance)}"
    told = axes.text(words, row, fit(said, _WORDS).rstrip(), color=LIGHT.ink, **style)
    # Letters differ in width, and many wide ones would reach into the bar.
    room = Bbox([[start, 0], [-0.01 * scale, 1]])
    told.set(clip_on=True, clip_box=TransformedBbox(room, axes.transAxes))
    seen = " ".join(answer.system.modalities) if answer.system else "nothing"
    axes.text(1 + 0.008 * scale, row, seen, color=LIGHT.muted, **{**style, "size": 7.5})


def _stack(axes: Axes, row: int, answer: Answer, colours: Mapping[str, str]) -> None:
    """Draw the probabilities side by side, and name the largest."""
    labels = list(colours)
    top = emotion_of(answer, labels)
    begin = 0.0
    for label, share in zip(labels, answer.shares, strict=False):
        axes.barh(row, share, 0.78, left=begin, color=colours[label], linewidth=0)
        if label == top:
            axes.text(
                begin + share / 2, row, f"{label} {100 * share:.0f}" if share > 0.2 else "•",
                ha="center", va="center", size=8, weight="bold", color=_ink_on(colours[label]),
            )  # fmt: skip
        begin += share


def _ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = to_rgb(colour)
    return LIGHT.ink if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
