from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.erc.errors import InputError, TrainingError
from examples.erc.objectives import Classification
from examples.erc.recipe import ClassificationRecipe, Optimisation
from examples.erc.training import (
    SMALLEST_BATCH,
    Hardware,
    Trained,
    compute,
    draw_batches,
    rate_share,
    train,
)

PLAIN = Optimisation(
    learning_rate=0.05,
    epochs=4,
    batch_size=8,
    warmup=0.25,
    weight_decay=0.0,
    max_gradient_norm=1.0,
    patience=None,
)


class Logits(NamedTuple):
    logits: Tensor


class Points:
    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"points": self.points[rows]}


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, points: Tensor) -> Logits:
        return Logits(self.layer(self.dropout(points)))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate remembers the precision of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def points() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        split: torch.randn(count, 2, generator=generator)
        for split, count in (("train", 50), ("dev", 30), ("test", 20))
    }


def labels(points: Tensor) -> Tensor:
    return (points[:, 0] + 0.3 * points[:, 1] > 0).long()


def fit(
    points: dict[str, Tensor],
    optimisation: Optimisation = PLAIN,
    seed: int = 0,
    hardware: Hardware | None = None,
) -> Trained:
    truth = labels(points["train"])
    return train(
        Line,
        Classification(truth, 2, ClassificationRecipe()),
        {split: Points(values) for split, values in points.items()},
        labels(points["dev"]),
        optimisation,
        seed=seed,
        hardware=hardware or Hardware("cpu"),
        title="line",
    )


@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 3))
def test_draw_batches_takes_every_row_once(count: int, size: int, seed: int) -> None:
    batches = draw_batches(count, size, torch.Generator().manual_seed(seed))
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == 1 or min(SMALLEST_BATCH, size) <= len(batches[-1]) < size + 3


@pytest.mark.parametrize(("count", "last"), [(41, 6), (42, 7), (43, 3), (45, 5)])
def test_draw_batches_never_leaves_one_or_two_rows(count: int, last: int) -> None:
    batches = draw_batches(count, 5, torch.Generator().manual_seed(0))
    assert len(batches[-1]) == last


@given(steps=st.integers(2, 200), warmup=st.floats(0, 1))
def test_rate_share_rises_to_one_and_falls(steps: int, warmup: float) -> None:
    shares = [rate_share(step, steps, warmup) for step in range(steps)]
    assert max(shares) == 1.0
    assert min(shares) > 0
    peak = shares.index(1.0)
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert abs(peak + 1 - max(1, round(warmup * steps))) <= 1


def test_rate_share_counts_optimiser_steps(points: dict[str, Tensor]) -> None:
    assert [rate_share(step, 10, 0.2) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


def test_train_learns(points: dict[str, Tensor]) -> None:
    trained = fit(points)
    assert trained.history[-1].loss < trained.history[0].loss
    right = (trained.outputs["test"]["logits"].argmax(1) == labels(points["test"])).float().mean()
    assert right > 0.8


def test_train_gives_the_same_again_for_the_same_seed(points: dict[str, Tensor]) -> None:
    first = fit(points)
    torch.rand(7)  # what came before a stage must not matter
    again, other = fit(points), fit(points, seed=1)
    assert first.history == again.history
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert not torch.equal(first.weights["layer.weight"], other.weights["layer.weight"])


def test_train_keeps_the_best_epoch_and_its_outputs(points: dict[str, Tensor]) -> None:
    trained = fit(points, replace(PLAIN, learning_rate=2.0, epochs=8))
    scores = [epoch.dev_weighted_f1 for epoch in trained.history]
    assert len(set(scores)) > 1
    assert trained.selected_epoch == 1 + scores.index(max(scores))
    model = Line()
    model.load_state_dict(trained.weights)
    for split, values in points.items():
        expected = compute(model, Points(values), 8)["logits"]
        assert torch.equal(trained.outputs[split]["logits"], expected)
        assert len(expected) == len(values)


def test_train_stops_when_patience_is_over(points: dict[str, Tensor]) -> None:
    still = replace(PLAIN, learning_rate=1e-9, epochs=9, patience=3)
    trained = fit(points, still)
    assert trained.selected_epoch == 1
    assert len(trained.history) == 4


def test_train_clips_gradients(points: dict[str, Tensor]) -> None:
    clipped = fit(points, replace(PLAIN, max_gradient_norm=1e-12, epochs=1))
    torch.manual_seed(0)
    # AdamW divides by the gradient's size plus 1e-8, so gradients of 1e-12 move nothing.
    assert torch.allclose(clipped.weights["layer.weight"], Line().layer.weight, atol=1e-3)
    moved = fit(points, replace(PLAIN, epochs=1)).weights["layer.weight"]
    assert (moved - clipped.weights["layer.weight"]).abs().max() > 1e-2


def test_train_refuses_a_loss_that_is_not_finite(points: dict[str, Tensor]) -> None:
    points["train"][3] = float("nan")
    with pytest.raises(TrainingError, match="the loss of epoch 1 is nan; lower the learning rate"):
        fit(points)


def test_mixed_precision_leaves_float32_outputs(points: dict[str, Tensor]) -> None:
    full = fit(points)
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = fit(points, hardware=Hardware("cpu", "bf16"))
    logits = mixed.outputs["test"]["logits"]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, full.outputs["test"]["logits"])
    assert torch.equal(logits, logits.bfloat16().float())


def test_hardware_refuses_what_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"--device: .* got cuda, .* choose cpu"):
        Hardware("cuda")
    with pytest.raises(InputError, match=r"--mixed-precision: .* got fp16; choose bf16"):
        Hardware("cpu", "fp16")
