import json
from pathlib import Path
from typing import Any

import pytest

from examples.erc.findings import findings
from examples.erc.results import read

FABRICATED = Path(__file__).with_name("results.json").read_text(encoding="utf-8")
METHOD = "Text + audio + visual by shifting, response + feature"


@pytest.fixture
def results() -> Any:
    return json.loads(FABRICATED)


def test_says_what_the_figures_say(results: Any) -> None:
    assert findings(read(results)) == [
        f"TelME (“{METHOD}”) reaches a weighted F1 of 63.50 ± 0.71.",
        "The highest mean of the 10 systems is that of “Text + audio + visual by concatenation, "
        "response + feature”: 64.00 ± 2.83.",
        "TelME is ahead of “Text teacher” by 2.50 ± 0.71 points over 2 seeds, beyond the spread.",
        "“Text + audio + visual by concatenation, not distilled” is behind “Text teacher” by "
        "1.00 ± 0.00 points over 2 seeds, beyond the spread.",
        "TelME is behind “Text + audio + visual by concatenation, response + feature” by "
        "0.50 ± 2.12 points over 2 seeds, within the spread.",
        "TelME is ahead of “Text + audio + visual by shifting, not distilled” by 3.00 ± 1.41 "
        "points over 2 seeds, beyond the spread.",
        "“Audio student, response + feature” is ahead of “Audio student, not distilled” by "
        "3.50 ± 2.12 points over 2 seeds, beyond the spread.",
        "“Visual student, response + feature” is level with “Visual student, not distilled” over "
        "2 seeds.",
        "2 of 10 systems have an F1 of zero for fear in every run.",
    ]


def test_says_so_when_the_method_is_the_best(results: Any) -> None:
    for run in results["systems"][8]["runs"]:
        run["test"]["weighted_f1"] = 0.9

    assert "None of the 10 systems has a higher mean." in findings(read(results))


def test_says_so_when_the_method_loses(results: Any) -> None:
    for run in results["systems"][8]["runs"]:
        run["test"]["weighted_f1"] -= 0.1

    assert (
        "TelME is behind “Text teacher” by 7.50 ± 0.71 points over 2 seeds, beyond the spread."
        in findings(read(results))
    )


def test_one_seed_gives_no_spread(results: Any) -> None:
    results["seeds"] = [5]
    for system in results["systems"]:
        del system["runs"][0]

    told = findings(read(results))

    assert "TelME is ahead of “Text teacher” by 2.00 points on one seed." in told
    assert not any("spread" in sentence or "±" in sentence for sentence in told)


def test_a_teacher_alone_is_compared_with_nothing(results: Any) -> None:
    del results["systems"][1:]

    assert findings(read(results)) == ["“Text teacher” reaches a weighted F1 of 61.00 ± 1.41."]


def test_a_class_found_in_one_run_is_not_a_blind_spot(results: Any) -> None:
    results["systems"][1]["runs"][1]["test"]["per_class_f1"][2] = 0.1

    told = findings(read(results))

    assert told[-1] == "1 of 10 systems has an F1 of zero for fear in every run."
