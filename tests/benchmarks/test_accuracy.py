import math
from typing import Any

import pytest
import torch

from benchmarks import accuracy
from tests.benchmarks import toy


def toy_errors(**options: Any) -> dict[str, Any]:
    case = toy.CASES[0]
    generator = torch.Generator().manual_seed(0)
    tensors = toy.draw(case, generator)
    works = {name: toy.work(case, name, tensors) for name in ("reference", "cpu")}
    works["failing"] = works["cpu"]._replace(leaves=(torch.zeros(1),))
    return accuracy.errors(toy.BENCHMARK, case, tensors, works, generator, **options)


def test_relative_error_is_of_norms() -> None:
    assert accuracy.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == 4 / 3
    assert accuracy.relative_error(torch.tensor([3.0]), torch.tensor([0.0])) == 3


def test_an_error_of_a_thousandth_is_found_in_output_and_gradient() -> None:
    found = toy_errors(draws=5, budget=60.0)
    assert found["cpu"]["draws"] == 5
    for part in ("output", "gradient"):
        for kind in ("max", "rms"):
            assert found["cpu"][part][kind] == pytest.approx(1e-3, rel=1e-3)
            assert found["reference"][part][kind] < 1e-6


def test_draws_end_with_the_budget_but_not_before_the_fewest() -> None:
    times = iter(range(100))
    assert toy_errors(budget=0.0)["cpu"]["draws"] == accuracy.FEWEST_DRAWS
    found = toy_errors(budget=4.0, now=lambda: float(next(times)))
    assert found["cpu"]["draws"] == accuracy.FEWEST_DRAWS + 3


def test_a_provider_that_fails_has_a_reason() -> None:
    assert "reason" in toy_errors(budget=0.0)["failing"]


def test_root_mean_square_and_largest() -> None:
    found = accuracy._summary([(3.0, 0.0), (4.0, 2.0)])
    assert found["output"] == {"max": 4.0, "rms": math.sqrt(12.5)}
    assert found["gradient"]["max"] == 2.0
