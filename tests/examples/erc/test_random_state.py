import random

import numpy as np
import pytest
import torch

from examples.erc import random_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_restored_generators_draw_the_same(before: int) -> None:
    random_state.seed(7, 0)
    for _ in range(before):  # an odd number leaves half of a pair of Gaussian numbers behind
        draw()
    state = random_state.read(CPU)
    expected = [draw() for _ in range(5)]
    random_state.seed(8, 0)
    random_state.restore(state, CPU)
    assert [draw() for _ in range(5)] == expected


def test_reading_draws_nothing() -> None:
    random_state.seed(7, 0)
    expected = draw()
    random_state.seed(7, 0)
    random_state.read(CPU)
    assert draw() == expected


@pytest.mark.parametrize("name", ["python", "python_gauss", "numpy", "numpy_gauss", "torch"])
def test_a_missing_state_is_an_error_and_changes_nothing(name: str) -> None:
    random_state.seed(7, 0)
    state = random_state.read(CPU)
    del state[name]
    random_state.seed(8, 0)
    expected = draw()
    random_state.seed(8, 0)
    with pytest.raises(KeyError, match=name):
        random_state.restore(state, CPU)
    assert draw() == expected


def test_parts_draw_differently_and_the_first_has_the_seed() -> None:
    drawn = []
    for part in range(4):
        random_state.seed(7, part)
        drawn.append(draw())
    assert len({tuple(numbers) for numbers in drawn}) == 4
    torch.manual_seed(7)
    assert torch.rand(()).item() == drawn[0][4]
