import json
from pathlib import Path
from typing import Any

import pytest

from examples.erc.errors import InputError
from examples.erc.results import read

FABRICATED = Path(__file__).with_name("results.json").read_text(encoding="utf-8")


@pytest.fixture
def results() -> Any:
    return json.loads(FABRICATED)


def test_reads_every_system_with_its_runs(results: Any) -> None:
    read_back = read(results)

    assert [system.key for system in read_back.systems] == [s["key"] for s in results["systems"]]
    run = read_back.systems[0].runs[1]
    assert (run.seed, run.selected_epoch, run.seconds) == (5, 2, 5.0)
    assert run.test.weighted_f1 == 0.62
    assert run.dev.macro_f1 == 0.52
    assert run.per_class_f1 == (0.72, 0.62, 0.25)
    assert run.confusion == ((5, 0, 0), (1, 2, 0), (0, 1, 1))
    assert [epoch.number for epoch in run.history] == [1, 2, 3]
    assert read_back.counts == {"train": 80, "dev": 10, "test": 10}


def test_puts_the_groups_in_the_order_of_the_story(results: Any) -> None:
    results["systems"].reverse()

    groups = [system.group for system in read(results).systems]

    assert groups == ["teacher"] + ["student"] * 4 + ["fusion"] * 5


def test_finds_the_systems_that_the_report_is_about(results: Any) -> None:
    found = read(results)

    assert found.everything == ("text", "audio", "visual")
    assert found.teacher is not None
    assert found.method is not None
    assert found.plain is not None
    assert found.teacher.key == "text"
    assert found.method.key == "text+audio+visual/shifting/response+feature"
    assert found.plain.key == "text+audio+visual/concatenation/none"
    assert found.untaught(found.method) == found.fused(found.everything, "shifting", "none")
    assert found.untaught(found.teacher) is None


def test_without_visual_the_method_is_the_fusion_of_text_and_audio(results: Any) -> None:
    results["systems"] = [s for s in results["systems"] if "visual" not in s["modalities"]]

    method = read(results).method

    assert method is not None
    assert method.key == "text+audio/shifting/response+feature"


def test_without_a_fusion_there_is_no_method(results: Any) -> None:
    results["systems"] = [s for s in results["systems"] if s["group"] != "fusion"]

    found = read(results)

    assert found.everything == ()
    assert found.method is None
    assert found.plain is None


def test_tuples_are_as_good_as_lists(results: Any) -> None:
    results["labels"] = tuple(results["labels"])
    results["seeds"] = tuple(results["seeds"])

    assert read(results).document == json.loads(FABRICATED)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("title", "", r"results\['title'\]: expected one line of text, got \"\""),
        ("title", "two\nlines", r"results\['title'\]: expected one line of text"),
        ("labels", ["joy"], r"results\['labels'\]: expected two or more different labels"),
        ("labels", ["joy", "joy", "fear"], r"results\['labels'\]: expected two or more different"),
        ("labels", "joy", r"results\['labels'\]: expected a list of one or more entries"),
        ("seeds", [3, 3], r"results\['seeds'\]: expected different seeds, got \[3, 3\]"),
        ("seeds", [3, True], r"results\['seeds'\]\[1\]: expected a whole number"),
        ("seeds", [3], r"\['runs'\]: expected one run for each of the seeds \[3\], or for some"),
        ("counts", {"train": 1}, r"results\['counts'\]\['dev'\]: expected this key, got only tra"),
        ("counts.test", 11, r"\['confusion'\]: expected counts that add up to .* 11, not 10"),
        ("systems", [], r"results\['systems'\]: expected a list of one or more entries"),
        ("systems.0", "text", r"results\['systems'\]\[0\]: expected an object, got \"text\""),
        ("systems.0.group", "student", r"\['distillation'\]: expected one of \"none\", \"resp"),
        ("systems.0.group", "pupil", r"\['group'\]: expected one of .*\"teacher\""),
        ("systems.0.fusion", "shifting", r"\['fusion'\]: expected one of null, got \"shifting\""),
        ("systems.0.modalities", ["text", "audio"], r"\['modalities'\]: expected two or more .*"),
        ("systems.0.modalities", ["../text"], r"\['modalities'\]\[0\]: expected one of \"text\""),
        ("systems.5.modalities", ["text"], r"\['modalities'\]: expected two or more different"),
        ("systems.5.distillation", None, r"\['distillation'\]: expected one of \"none\""),
        ("systems.0.runs.0.seed", 5, r"\['runs'\]: expected one run for each of the seeds"),
        ("systems.0.runs.0.test.accuracy", 61.0, r"\['accuracy'\]: .* got 61.0; divide percent"),
        ("systems.0.runs.0.test.accuracy", "0.6", r"\['accuracy'\]: expected a number, got \"0.6"),
        ("systems.0.runs.0.dev.macro_f1", -0.1, r"\['dev'\]\['macro_f1'\]: expected a fraction"),
        ("systems.0.runs.0.test.per_class_f1", [0.5], r"\['per_class_f1'\]: expected a list of 3"),
        ("systems.0.runs.0.test.confusion", [[1] * 3] * 2, r"\['confusion'\]: expected a list of"),
        ("systems.0.runs.0.test.confusion.0.0", -1, r"\['confusion'\]\[0\]\[0\]: expected a whole"),
        ("systems.0.runs.0.history", [], r"\['history'\]: expected a list of one or more"),
        ("systems.0.runs.0.history.1.loss", float("nan"), r"\[1\]\['loss'\]: .*finite.* diverged"),
        ("systems.0.runs.0.selected_epoch", 9, r"\['selected_epoch'\]: .* in the history, got 9"),
        ("systems.1.key", "text", r"expected systems that differ, got 'text' beside 'text'"),
        ("systems.1.distillation", "response+feature", r"got 'audio/response\+feature' beside"),
        ("source", {"digest": b"00"}, r"results\['source'\]\['digest'\]: .* got a bytes; convert"),
        ("versions", {"torch": 2}, r"results\['versions'\]\['torch'\]: expected one line of text"),
        ("seconds", None, r"results\['seconds'\]: expected a number, got null"),
    ],
)
def test_refuses_what_does_not_hold_together(
    results: Any, path: str, value: object, message: str
) -> None:
    *parents, last = (int(step) if step.isdigit() else step for step in path.split("."))
    held = results
    for step in parents:
        held = held[step]
    held[last] = value

    with pytest.raises(InputError, match=message):
        read(results)


@pytest.mark.parametrize("key", list(json.loads(FABRICATED)))
def test_names_a_missing_key(results: Any, key: str) -> None:
    del results[key]

    with pytest.raises(InputError, match=rf"results\['{key}'\]: expected this key"):
        read(results)


def test_a_long_value_is_cut_in_the_message(results: Any) -> None:
    results["labels"] = {"joy": "x" * 500}

    with pytest.raises(InputError, match=r"got \{.*\.\.\.;") as caught:
        read(results)
    assert len(str(caught.value)) < 250
