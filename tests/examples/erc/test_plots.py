import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.erc import plots
from examples.erc.results import read

FABRICATED = Path(__file__).with_name("results.json").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Draw fewer pixels, which is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DENSITY", 1)
        yield


@pytest.fixture(scope="module")
def galleries() -> list[plots.Gallery]:
    return plots.galleries(read(json.loads(FABRICATED)))


@pytest.fixture(scope="module")
def pictures(galleries: list[plots.Gallery]) -> dict[str, plots.Picture]:
    return {picture.name: picture for gallery in galleries for picture in gallery.pictures}


@pytest.fixture
def document() -> Any:
    return json.loads(FABRICATED)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def hexadecimal(colour: Any) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def colours(png: bytes) -> set[str]:
    found = opened(png).convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {hexadecimal(colour) for _, colour in found}


def test_everything_is_drawn_in_the_order_of_the_report(galleries: list[plots.Gallery]) -> None:
    assert [gallery.title for gallery in galleries] == [
        "Seed by seed",
        "Differences",
        "Confusions",
        "Training",
    ]
    assert [picture.name for gallery in galleries for picture in gallery.pictures] == [
        "systems",
        "differences",
        "confusion-telme",
        "confusion-teacher",
        "confusion-concatenation",
        "training-text",
        "training-audio",
        "training-visual",
        "training-text-audio-visual-concatenation",
        "training-text-audio-visual-shifting",
        "training-text-audio-shifting",
    ]
    assert all(gallery.note for gallery in galleries)


def test_a_teacher_alone_has_nothing_to_differ_from(document: Any) -> None:
    del document["systems"][1:]

    names = [p.name for gallery in plots.galleries(read(document)) for p in gallery.pictures]

    assert names == ["systems", "confusion-teacher", "training-text"]


def test_a_picture_is_drawn_on_the_paper_of_either_page(
    document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "DENSITY", 2)
    del document["systems"][1:]

    for gallery in plots.galleries(read(document)):
        for picture in gallery.pictures:
            for png, theme in ((picture.light, plots.LIGHT), (picture.dark, plots.DARK)):
                image = opened(png)
                assert image.format == "PNG"
                assert image.size == (2 * picture.width, 2 * picture.height)
                assert hexadecimal(image.convert("RGB").getpixel((0, 0))) == theme.paper


def test_each_distillation_has_its_colour(pictures: dict[str, plots.Picture]) -> None:
    found = colours(pictures["systems"].light)

    marks = plots.LIGHT.marks
    assert {marks["teacher"], marks["none"], marks["response+feature"]} <= found
    assert marks["response"] not in found


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_the_paper(theme: plots.Theme) -> None:
    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str) -> float:
        dark, light = sorted((luminance(colour), luminance(theme.paper)))
        return (light + 0.05) / (dark + 0.05)

    # The thresholds of the Web Content Accessibility Guidelines 2.2, 1.4.3 and 1.4.11.
    assert min(contrast(theme.ink), contrast(theme.muted)) >= 4.5
    assert min(map(contrast, theme.marks.values())) >= 3
    assert len(set(plots.MARKERS.values())) == len(theme.marks)


def test_the_words_beside_the_scores_name_the_extremes(
    pictures: dict[str, plots.Picture],
) -> None:
    alt = pictures["systems"].alt

    assert "10 systems" in alt
    assert "Text + audio + visual by concatenation, response + feature, 64.00 ± 2.83" in alt
    assert "Lowest mean: Visual student, not distilled, 30.50 ± 0.71" in alt


def test_the_words_beside_the_differences_count_the_gains(
    pictures: dict[str, plots.Picture],
) -> None:
    alt = pictures["differences"].alt

    assert "fusion less text teacher: 3 of 5 means are above zero" in alt
    assert "concatenation of the same students: 1 of 2 means are above zero" in alt


def test_the_words_beside_a_confusion_matrix_give_the_share_found(
    pictures: dict[str, plots.Picture],
) -> None:
    alt = pictures["confusion-teacher"].alt

    assert alt.endswith("that was found: neutral 90%, joy 67%, fear 50%.")


def test_the_words_beside_the_curves_give_the_selected_epochs(
    pictures: dict[str, plots.Picture],
) -> None:
    teacher = pictures["training-text"].alt

    assert "Text teacher: dev weighted F1 of 62.50 ± 0.71 at epochs 3, 2" in teacher
    assert pictures["training-audio"].alt.count("at epochs") == 2


def test_a_matrix_is_coloured_by_the_share_of_its_row(document: Any) -> None:
    for run in document["systems"][0]["runs"]:
        run["test"]["confusion"] = [[8, 0, 0], [0, 1, 0], [0, 1, 0]]
    del document["systems"][1:]

    (picture,) = plots.confusions(read(document)).pictures

    # Eight of eight and one of one are both all of their row.
    image = opened(picture.light).convert("RGB")
    counted = {hexadecimal(colour): count for count, colour in image.getcolors(1 << 24) or []}
    full, empty = "#fee838", "#00224e"  # the ends of cividis, up to the rounding of a palette
    area = {
        name: sum(count for colour, count in counted.items() if near(colour, name))
        for name in (full, empty)
    }
    assert area[full] == pytest.approx(area[empty] / 2, rel=0.1)


def near(colour: str, other: str) -> bool:
    return all(abs(int(colour[i : i + 2], 16) - int(other[i : i + 2], 16)) <= 8 for i in (1, 3, 5))


def test_a_class_without_test_utterances_is_drawn_empty(document: Any) -> None:
    del document["systems"][1:]
    for system in document["systems"]:
        for run in system["runs"]:
            run["test"]["confusion"] = [[10, 0, 0], [0, 0, 0], [0, 0, 0]]

    pictures = plots.confusions(read(document)).pictures

    assert "joy 0%" in pictures[0].alt


@pytest.mark.parametrize("group", ["scores", "differences", "confusions", "curves"])
def test_pictures_follow_the_runs(document: Any, group: str) -> None:
    draw = getattr(plots, group)
    document["systems"] = [document["systems"][0], document["systems"][8]]
    before = draw(read(document)).pictures[0]
    method = document["systems"][1]["runs"][0]
    method["test"]["weighted_f1"] = 0.7
    method["test"]["confusion"] = [[0, 5, 0], [1, 2, 0], [1, 0, 1]]
    document["systems"][0]["runs"][0]["history"][0]["loss"] = 2.5
    after = draw(read(document)).pictures[0]

    assert before.light != after.light
    assert before.dark != after.dark


def test_drawing_twice_gives_the_same_bytes(
    document: Any, pictures: dict[str, plots.Picture]
) -> None:
    assert plots.differences(read(document)).pictures == (pictures["differences"],)


def test_titles_may_be_long_and_hold_any_sign(document: Any) -> None:
    document["systems"][0]["title"] = r"Teacher $\frac{1}{2$ of 100 % & <more>, " + "word " * 60
    document["labels"][1] = r"joy_$^{$"
    del document["systems"][1:]

    assert len(plots.galleries(read(document))) == 3


def test_one_seed_has_no_whisker_to_explain(document: Any) -> None:
    document["seeds"] = [3]
    del document["systems"][1:]
    del document["systems"][0]["runs"][1]

    assert "whisker" not in plots.scores(read(document)).note


def test_systems_side_by_side_are_told_panel_by_panel(document: Any) -> None:
    results = read(document)
    teacher, student = results.systems[0], results.group("student")[0]

    picture = plots.side_by_side(
        "pair", [("Both", [teacher, student], teacher), ("One", [student], None)]
    )

    assert picture.name == "pair"
    assert picture.alt.startswith(
        "Dot plot of weighted F1 on test in percent, one dot per seed: Text"
    )
    assert picture.alt.count(student.title) == 2
    assert plots.LIGHT.marks["teacher"] in colours(picture.light)
