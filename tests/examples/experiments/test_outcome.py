from typing import Any

import pytest

from examples.erc.errors import InputError
from examples.experiments.outcome import read


def test_results_are_read_as_they_were_written(document: Any) -> None:
    outcome = read(document)
    assert outcome.name == "all"
    assert outcome.modalities == ("text", "audio", "visual")
    assert [experiment.name for experiment in outcome.experiments] == document["experiments"]
    assert list(outcome.left_out) == ["prompt"]
    assert outcome.classes["train"] == {"glad": 14, "sad": 13, "calm": 13}
    led = outcome.system("audio+text+visual/shifting/response+feature/by-audio")
    assert (led.taught_by, led.prompt, len(led.runs)) == ("audio", True, 2)
    entry = document["significance"][0]
    test = outcome.significance[entry["system"], entry["baseline"]]
    assert (test.seeds, test.dialogues) == (entry["seeds"], entry["dialogues"])


def spoil(document: Any, path: str, value: object) -> None:
    *steps, last = path.split(".")
    for step in steps:
        document = document[int(step) if step.isdigit() else step]
    document[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modalities", [], r"\['modalities'\]: expected a list of one or more entries"),
        ("modalities.0", "smell", r"\['modalities'\]\[0\]: expected one of \"text\""),
        ("experiments.0", "luck", r"\['experiments'\]\[0\]: expected one of \"comparison\""),
        ("left_out", [], r"\['left_out'\]: expected an object"),
        ("classes.dev.sad", 8, r"\['classes'\]\['dev'\]: expected counts that add up to .* = 19"),
        ("classes.dev", {"sad": 19}, r"\['dev'\]\['glad'\]: expected this key"),
        ("significance.0.seeds", 1.5, r"\['seeds'\]: expected a fraction in \[0, 1\]"),
        ("significance.0.dialogues", None, r"\['dialogues'\]: expected a number, got null"),
        ("significance", [], r"\['significance'\]: expected a test of .* against text too"),
        ("systems.0.taught_by", "smell", r"\['taught_by'\]: expected one of \"text\""),
        ("systems.0.prompt", "no", r"\['prompt'\]: expected one of true, false"),
        ("systems.3.runs.0.test.accuracy", 50, r"\['accuracy'\]: expected a fraction"),
    ],
)
def test_what_does_not_hold_together_is_refused(
    document: Any, path: str, value: object, message: str
) -> None:
    spoil(document, path, value)
    with pytest.raises(InputError, match=message):
        read(document)


def test_a_missing_system_is_refused(document: Any) -> None:
    gone = document["systems"].pop()["key"]
    with pytest.raises(InputError, match=r"\['systems'\]: expected the system .* too"):
        read(document)
    assert gone


def test_the_distribution_of_classes_needs_no_system(document: Any) -> None:
    document |= {"systems": [], "experiments": ["classes"], "significance": []}
    assert read(document).results.systems == ()
