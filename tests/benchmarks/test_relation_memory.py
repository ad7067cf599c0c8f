import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from scipy import stats

from benchmarks.bench_relation_memory import (
    BATCH_SIZES,
    MEMORY_SIZES,
    RATES,
    SEED_OF_RATES,
    SEEDS,
    Classroom,
    Setting,
    admit,
    best,
    choose_rates,
    document,
    fill,
    settings,
    summarise,
)
from benchmarks.results import RESULTS


class Pretending:
    """A classroom whose scores tell what was asked for."""

    def __init__(self, seed: int, asked: list[Any]) -> None:
        self.seed, self.asked = seed, asked

    def scores(self, setting: Setting, learning_rate: float) -> dict[str, float]:
        self.asked.append((self.seed, setting, learning_rate))
        dev = (setting.memory_size % 7 + self.seed * (1 + setting.memory_size % 3)) / 100
        closeness = -abs(learning_rate - RATES[setting.batch_size % 3])
        return {"dev": closeness if self.seed == SEED_OF_RATES else dev, "test": dev / 2}


def measured() -> tuple[dict[str, Any], list[Any], Callable[[int], Classroom]]:
    asked: list[Any] = []

    def classroom(seed: int) -> Classroom:
        return Pretending(seed, asked)  # type: ignore[return-value]

    found = document("meld", ["audio", "visual"])
    choose_rates(found, classroom, lambda: None)
    admit(found, commonest=-1.0)
    fill(found, classroom, lambda: None)
    return found, asked, classroom


def test_every_setting_has_every_seed_at_its_own_rate() -> None:
    found, asked, classroom = measured()
    assert len(found["rows"]) == 2 * len(BATCH_SIZES) * (len(MEMORY_SIZES) + 1)
    for row in found["rows"]:
        assert [run["seed"] for run in row["runs"]] == [*range(SEEDS)]
    for _, setting, rate in asked[-len(found["rows"]) * SEEDS :]:
        assert best(found, setting.modality, setting.batch_size) == (rate, 0.0)
        assert rate == RATES[setting.batch_size % 3]
    assert {setting.memory_size for seed, setting, _ in asked if seed == SEED_OF_RATES} == {0}
    before = copy.deepcopy(found), len(asked)
    choose_rates(found, classroom, lambda: None)
    fill(found, classroom, lambda: None)
    assert (found, len(asked)) == before


def test_an_interrupted_measurement_goes_on() -> None:
    whole, asked, classroom = measured()
    left = copy.deepcopy(whole)
    for row in left["rows"][3:]:
        del row["runs"][4:]
    asked.clear()
    fill(left, classroom, lambda: None)
    assert left == whole
    assert {seed for seed, *_ in asked} == {*range(4, SEEDS)}


def test_gains_are_those_of_a_paired_t_test() -> None:
    found, *_ = measured()
    summarise(found)
    rows = {Setting(*(row[n] for n in Setting.__dataclass_fields__)): row for row in found["rows"]}
    plain, row = rows[Setting("audio", 4)], rows[Setting("audio", 4, memory_size=64)]
    assert plain["dev"]["gain"] == plain["dev"]["interval"] == 0
    scores = [[run["test"] for run in each["runs"]] for each in (row, plain)]
    low, high = stats.ttest_rel(*scores).confidence_interval(0.95)
    assert row["test"]["gain"] - row["test"]["interval"] == pytest.approx(low, rel=1e-9)
    assert row["test"]["gain"] + row["test"]["interval"] == pytest.approx(high, rel=1e-9)
    assert row["seeds"] == SEEDS
    plain["runs"] = plain["runs"][:7]
    summarise(found)
    scores = [values[:7] for values in scores]
    assert row["test"]["mean"] == pytest.approx(sum(scores[0]) / 7)
    assert row["test"]["gain"] == pytest.approx((sum(scores[0]) - sum(scores[1])) / 7)
    others = {each["modality"]: each["seeds"] for each in found["rows"]}
    assert others == {"audio": 7, "visual": SEEDS}


def test_who_learns_nothing_at_any_rate_is_left_out() -> None:
    found, *_ = measured()
    for row in found["rates"]:
        if (row["modality"], row["batch_size"]) == ("visual", 4):
            row["dev"] = dict.fromkeys(row["dev"], 0.25)
        else:
            row["dev"] = {rate: 0.2 + index for index, rate in enumerate(row["dev"])}
    admit(found, commonest=0.25)
    assert {row["modality"] for row in found["rows"]} == {"audio"}
    assert found["commonest"] == 0.25


def test_settings_lead_with_what_they_are_compared_with() -> None:
    first, *others = settings(["audio"])
    assert first == Setting("audio", BATCH_SIZES[0])
    assert all(setting != first for setting in others)


@pytest.mark.parametrize("corpus", ["meld", "iemocap"])
def test_what_is_committed_follows_from_its_runs(corpus: str) -> None:
    found = json.loads((RESULTS / f"relation_memory--{corpus}.json").read_text())
    again = copy.deepcopy(found)
    summarise(again)
    assert again == found
