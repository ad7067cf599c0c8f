import json
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from benchmarks.bench_recommended_recipe import CHANGES, ERRORS, mark_taken, row
from benchmarks.results import RESULTS
from examples.erc.recipe import Recipe


def found(change: str, gain: float, error: float = 0.1) -> dict[str, Any]:
    return {"change": change, "gain": gain, "standard_error": error}


def taken(*rows: dict[str, Any]) -> list[str]:
    mark_taken(list(rows))
    return [each["change"] for each in rows if each["taken"]]


def test_a_row_has_gains_seed_by_seed() -> None:
    measured = row("a change", [0.5, 0.7, 0.6], [0.4, 0.65, 0.6])
    assert measured["mean"] == pytest.approx(0.6)
    assert measured["gain"] == pytest.approx(0.05)
    assert measured["standard_error"] == pytest.approx(0.05 / 3**0.5)


def test_what_gains_too_little_is_not_taken() -> None:
    assert taken(found("released", 0.0, 0.0), found("threshold 0.1", 0.15)) == []


def test_of_several_values_the_first_that_is_about_as_good_is_taken() -> None:
    rows = [found("threshold 0.1", 0.3), found("threshold 0.2", 0.55), found("threshold 0.5", 0.6)]
    assert taken(*rows, found("focal gamma 1.0", -0.4)) == ["threshold 0.2"]


def test_each_number_is_judged_alone() -> None:
    rows = [found("threshold 0.1", 0.4), found("class balance 0.5", 0.9)]
    assert taken(*rows, found("recommended", 1.1)) == [
        "threshold 0.1",
        "class balance 0.5",
        "recommended",
    ]


@pytest.mark.parametrize("corpus", ["meld", "iemocap"])
def test_the_recipe_is_what_the_committed_experiment_shows(corpus: str) -> None:
    document = json.loads((RESULTS / f"recommended_recipe--{corpus}.json").read_text())
    rows = {each["change"]: each for each in document["rows"]}
    recipes: dict[str, Recipe] = import_module(f"examples.{corpus}.recipes").RECIPES
    expected = recipes["released"]
    for name, each in rows.items():
        if each["taken"] and name in CHANGES:
            expected = CHANGES[name](expected)
    assert replace(expected, name="recommended") == recipes["recommended"]
    together = rows["recommended"]
    assert together["gain"] > ERRORS * together["standard_error"]
