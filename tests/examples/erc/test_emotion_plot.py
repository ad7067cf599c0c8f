import io
from typing import Any

import pytest
from PIL import Image

from examples.erc import emotion_plot
from examples.erc.emotion_plot import draw
from examples.erc.prediction import Answer
from examples.erc.source import Line
from examples.erc.systems import TEACHER

LABELS = ("joy", "neutral", "mirth")


def answers(count: int, text: str | None = "Well.") -> list[Answer]:
    shares = ((0.7, 0.2, 0.1), (0.1, 0.1, 0.8))
    return [
        Answer(Line("0", str(row), "Ada", text), ("text",), TEACHER, {TEACHER: shares[row % 2]})
        for row in range(count)
    ]


def colours(picture: Image.Image) -> dict[Any, int]:
    found = picture.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {colour: count for count, colour in found}


def test_bars_have_the_lengths_of_the_probabilities() -> None:
    ((name, data),) = draw("dialogue-1", "A dialogue", answers(8), LABELS)
    assert name == "dialogue-1.png"
    found = colours(Image.open(io.BytesIO(data)))
    # Joy, neutral, and the first colour for an emotion that has none; names cover a little.
    joy, neutral, mirth = (
        found[colour] for colour in ((242, 207, 59), (195, 202, 211), (204, 121, 167))
    )
    assert 0.9 < joy / (joy + neutral + mirth) / 0.4 < 1.1
    assert 0.9 < mirth / (joy + neutral + mirth) / 0.45 < 1.1


def test_a_long_dialogue_takes_several_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emotion_plot, "MOST_ROWS", 3)
    drawn = dict(draw("d", "A dialogue", answers(7), LABELS))
    assert [*drawn] == ["d-part-1.png", "d-part-2.png", "d-part-3.png"]
    heights = [Image.open(io.BytesIO(data)).height for data in drawn.values()]
    assert heights[0] == heights[1] > heights[2]


@pytest.mark.parametrize(
    "text", [None, "", "\u4f60\u597d \U0001f600 $x$ $", "x" * 5000, "\x1b[2J\n"]
)
def test_any_text_can_be_drawn(text: str | None) -> None:
    nobody = Answer(Line("0", "9", "\u4f60$", text), (), None, {})
    ((_, data),) = draw("d", "$" + (text or "")[:300], [*answers(1, text), nobody], LABELS)
    assert Image.open(io.BytesIO(data)).width == 2304


def test_no_two_emotions_look_alike() -> None:
    labels = [f"emotion {number}" for number in range(6)] + ["joy", "happiness"]
    assert len({*emotion_plot._colours(labels).values()}) == len(labels)
