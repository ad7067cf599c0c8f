"""Where deterministic algorithms are asked for, no operator warns or raises, and no bit moves."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from telme_kd import AttentionShiftingFusion, ShiftingFusion
from telme_kd.functional import batch_similarity_loss, dist_loss, linear_dist_loss

MASK = torch.tensor([True, True, False, True, True, True])


def _dist(backend: Any, student: Tensor, teacher: Tensor) -> Tensor:
    return dist_loss(student, teacher, temperature=2.0, mask=MASK, backend=backend)


def _batch_similarity(backend: Any, student: Tensor, teacher: Tensor) -> Tensor:
    return batch_similarity_loss(student, teacher, temperature=0.5, mask=MASK, backend=backend)


def _linear_dist(backend: Any, student: Tensor, teacher: Tensor) -> Tensor:
    weight = torch.randn(7, 5, generator=torch.manual_seed(1))
    return linear_dist_loss(student, weight, teacher, weight, mask=MASK, backend=backend)


def _fusion(backend: Any, student: Tensor, teacher: Tensor) -> Tensor:
    torch.manual_seed(1)
    head = AttentionShiftingFusion(5, (5,), 2, num_classes=3, backend=backend)
    return head(teacher, student).square().sum()


def _shift(backend: Any, student: Tensor, teacher: Tensor) -> Tensor:
    torch.manual_seed(1)
    return ShiftingFusion(5, 5, backend=backend)(teacher, student).square().sum()


LOSSES = (_dist, _batch_similarity, _linear_dist)
NAMED: Any = {"ids": lambda operator: operator.__name__[1:]}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # a warning is an error, as in every test
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("operator", [*LOSSES, _fusion], **NAMED)
def test_deterministic_algorithms_suffice(operator: Callable[..., Tensor], backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    outcomes = []
    for asked in (True, False, True):
        torch.use_deterministic_algorithms(asked)
        student, teacher = torch.randn(2, 6, 5, generator=torch.manual_seed(0))
        student.requires_grad_()
        value = operator(backend, student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.any()
        outcomes.append((value.detach(), gradient))
    for again in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, outcomes[0], strict=True))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("operator", [*LOSSES, _shift], **NAMED)
def test_second_derivatives_need_no_other(operator: Callable[..., Tensor], backend: str) -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.manual_seed(0))
    student.requires_grad_()
    value = operator(backend, student, teacher)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
