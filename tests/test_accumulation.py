"""Gradients accumulated over the parts of a batch are those of the whole batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss, accumulate_gradient
from telme_kd.errors import DTypeError, ShapeError
from tests.helpers import processes

ITEMS, INPUTS, CLASSES = 17, 5, 7
X = torch.randn(ITEMS, INPUTS, dtype=torch.float64, generator=torch.manual_seed(0))
TEACHER = torch.randn(2, ITEMS, CLASSES, dtype=torch.float64, generator=torch.manual_seed(1))
LABELS = torch.arange(ITEMS) % CLASSES


class Model(nn.Module):
    """Logits and features, with dropout in between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(INPUTS, CLASSES).double()
        self.head = nn.Linear(CLASSES, CLASSES).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.dropout(self.body(x).tanh())
        return self.head(features), features

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


def objective(group: Any = None, rows: slice = slice(None)) -> Callable[[Tensor, Tensor], Tensor]:
    criterion = StudentLoss(response=DISTLoss(2.0, group=group), group=group)

    def loss(logits: Tensor, features: Tensor) -> Tensor:
        return criterion(
            logits,
            TEACHER[0, rows],
            LABELS[rows],
            student_features=features,
            teacher_features=TEACHER[1, rows],
        ).total

    return loss


@given(st.lists(st.integers(1, 6), min_size=1).map(lambda sizes: [*sizes, ITEMS]))
def test_parts_of_any_sizes_equal_the_whole_batch(sizes: list[int]) -> None:
    ends = [end for end in torch.tensor(sizes).cumsum(0).tolist() if end < ITEMS]
    parts = X.tensor_split(ends)
    whole, split = Model(), Model()
    expected = objective()(*whole(X))
    expected.backward()
    found = accumulate_gradient(parts, split, objective())
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(split.gradients(), whole.gradients(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("criterion", [DISTLoss(), BatchSimilarityLoss()])
def test_one_output_and_gradients_that_are_there_already(criterion: nn.Module) -> None:
    whole, split = (nn.Linear(INPUTS, CLASSES).double() for _ in range(2))
    split.load_state_dict(whole.state_dict())
    for _ in range(2):
        criterion(whole(X), TEACHER[0]).backward()
        accumulate_gradient(X.split(4), split, lambda z: criterion(z, TEACHER[0]))
    for found, expected in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-11, atol=1e-14)


def test_random_numbers_are_the_same_in_both_runs_and_drawn_once() -> None:
    parts = X.split(4)
    torch.manual_seed(5)
    whole = Model(dropout=0.5)
    torch.manual_seed(7)
    outputs = [whole(part) for part in parts]
    logits, features = (torch.cat(of_parts) for of_parts in zip(*outputs, strict=True))
    expected = objective()(logits, features)
    next_number = torch.rand(())
    expected.backward()

    split = Model(dropout=0.5)
    torch.manual_seed(7)
    found = accumulate_gradient(parts, split, objective())
    assert torch.equal(torch.rand(()), next_number)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(split.gradients(), whole.gradients(), rtol=1e-11, atol=1e-14)


def test_outputs_that_need_no_gradient_and_a_criterion_with_parameters() -> None:
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    model = Model()

    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        return model(X[rows])[0], TEACHER[0, rows]

    def criterion(student: Tensor, teacher: Tensor) -> Tensor:
        return DISTLoss()(student / temperature, teacher)

    accumulate_gradient(torch.arange(ITEMS).split(5), forward, criterion)
    whole = Model()
    found = temperature.grad
    temperature.grad = None
    criterion(whole(X)[0], TEACHER[0]).backward()
    torch.testing.assert_close(found, temperature.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.gradients(), whole.gradients(), rtol=1e-11, atol=1e-14)


def test_gradients_travel_with_the_last_part_alone() -> None:
    inside: list[bool] = []
    quiet = False

    @contextmanager
    def no_sync() -> Iterator[None]:
        nonlocal quiet
        quiet = True
        yield
        quiet = False

    model = Model()
    model.body.weight.register_hook(lambda gradient: inside.append(quiet))
    accumulate_gradient(X.split(5), model, objective(), no_sync=no_sync)
    assert inside == [True, True, True, False]


def under_ddp(rank: int) -> tuple[float, list[list[float]]]:
    """Parts of a shard: four processes of 1, 2, 3 and 11 items."""
    rows = (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, ITEMS))[rank]
    model = Model()
    parallel = nn.parallel.DistributedDataParallel(model)
    loss = accumulate_gradient(
        X[rows].split(4), parallel, objective("world", rows), no_sync=parallel.no_sync
    )
    return loss.item(), [gradient.tolist() for gradient in model.gradients()]


def test_parts_of_shards_equal_the_whole_batch(crew: processes.Crew) -> None:
    whole = Model()
    expected = objective()(*whole(X))
    expected.backward()
    for value, gradients in crew(under_ddp):
        assert value == pytest.approx(expected.item(), rel=1e-12)
        for found, truth in zip(gradients, whole.gradients(), strict=True):
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float64), truth, rtol=1e-11, atol=1e-14
            )


def changing(shapes: list[int]) -> Callable[[Tensor], Tensor]:
    given = iter(shapes)
    return lambda part: torch.ones(next(given), 3, requires_grad=True)


@pytest.mark.parametrize(
    ("parts", "forward", "error", "text"),
    [
        (iter(()), nn.Identity(), DTypeError, r"^parts: expected a sequence, got .*; use list"),
        ([], nn.Identity(), ShapeError, r"^parts: expected at least one, got none; skip the step"),
        ([X], lambda x: 3, DTypeError, r"^forward\(part\): expected a torch\.Tensor, got a int; "),
        ([X], lambda x: x.int(), DTypeError, r"^forward\(part\): expected a real floating dtype, "),
        ([X], lambda x: x.sum(), ShapeError, r"^forward\(part\): expected tensors .*, got a scal"),
        (
            [X], lambda x: (x, x[1:]), ShapeError,
            r"^forward\(part\): expected outputs with one number of items, got lengths \[17, 16\]",
        ),
        (
            [X, (X, X)], lambda x: x, ShapeError,
            r"^forward\(part\): expected as many outputs for each part, got \[1, 2\]; return the",
        ),
        (
            [0, 1], changing([2, 4, 3, 4]), ShapeError,
            r"^forward\(part\): expected shapes \[\(2, 3\)\] again, got \[\(3, 3\)\]; it must give",
        ),
    ],
)  # fmt: skip
def test_mistakes(parts: Any, forward: Any, error: type[Exception], text: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=text):
        accumulate_gradient(parts, forward, lambda *outputs: sum(o.sum() for o in outputs))
    assert torch.equal(torch.get_rng_state(), before)
