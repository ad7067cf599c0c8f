"""The batch-similarity oracle against SciPy and mpmath, and its derivatives against differences."""

from functools import partial

import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.reference import batch_similarity as oracle
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Features


def loss_of(case: Features, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    student, teacher = case.tensors(dtype)
    return oracle.batch_similarity_loss(student, teacher, temperature=case.temperature, mask=None)


@given(case=strategies.features())
def test_loss_equals_scipy(case: Features) -> None:
    expected = truth.batch_similarity(case.student, case.teacher, temperature=case.temperature)
    # Both sides round; SciPy's half of the allowance is as large as ours.
    bound = 2 * tolerances.similarity_bound(case, torch.float64)
    assert abs(loss_of(case).item() - expected) <= bound


def _pair(items: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    student = torch.randn(items, width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(items, width, dtype=torch.float64, requires_grad=True)
    return student, teacher


SHAPES = pytest.mark.parametrize("shape", [(4, 5), (1, 5), (2, 3), (3, 1)], ids=str)


@SHAPES
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gradient_equals_differences(shape: tuple[int, int], temperature: float) -> None:
    function = partial(oracle.batch_similarity_loss, temperature=temperature, mask=None)
    assert gradcheck(function, _pair(*shape))


@SHAPES
def test_second_derivative_equals_differences(shape: tuple[int, int]) -> None:
    function = partial(oracle.batch_similarity_loss, temperature=0.5, mask=None)
    assert gradgradcheck(function, _pair(*shape))


def test_derivatives_equal_differences_under_a_mask() -> None:
    mask = torch.tensor([True, False, True, True])
    function = partial(oracle.batch_similarity_loss, temperature=0.5, mask=mask)
    assert gradcheck(function, _pair(4, 5))
    assert gradgradcheck(function, _pair(4, 5))


def test_second_derivative_is_finite_beside_zero_rows() -> None:
    student, teacher = _pair(4, 5)
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    zeroed = (student.detach() * kept).requires_grad_()
    loss = oracle.batch_similarity_loss(zeroed, teacher * kept, temperature=0.5, mask=None)
    (gradient,) = torch.autograd.grad(loss, zeroed, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), (zeroed, teacher))
    assert all(part.isfinite().all() for part in second)
