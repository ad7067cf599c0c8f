"""The batch-similarity oracle against SciPy and mpmath, and its derivatives against differences."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.reference import batch_similarity as oracle
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Features

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def loss_of(case: Features, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    student, teacher = case.tensors(dtype)
    return oracle.batch_similarity_loss(student, teacher, temperature=case.temperature, mask=None)


def hard_cases(count: int) -> list[Features]:
    """Rows nearly parallel, nearly zero and of sizes 1e-12 to 1e12 side by side."""
    rng = np.random.default_rng(13_15)
    cases = []
    for _ in range(count):
        items, width = rng.integers(1, 6), rng.integers(1, 7)
        student, teacher = (
            (
                rng.normal(size=(1, width))
                + 10.0 ** rng.uniform(-6, 2) * rng.normal(size=(items, width))
            )
            * 10.0 ** rng.uniform(-12, 12, size=(items, 1))
            * (rng.random((items, 1)) > 0.1)
            for _ in range(2)
        )
        cases.append(Features(student, teacher, float(rng.choice([0.05, 0.1, 0.5, 1.0, 4.0]))))
    return cases


def rounded(case: Features, dtype: torch.dtype) -> Features:
    student, teacher = (tensor.double().numpy() for tensor in case.tensors(dtype))
    return Features(student, teacher, case.temperature)


@given(case=strategies.features())
def test_loss_equals_scipy(case: Features) -> None:
    expected = truth.batch_similarity(case.student, case.teacher, temperature=case.temperature)
    # Both sides round; SciPy's half of the allowance is as large as ours.
    bound = 2 * tolerances.similarity_bound(case, torch.float64)
    assert abs(loss_of(case).item() - expected) <= bound


@PRECISIONS
def test_loss_equals_sixty_digits_on_the_hard_set(dtype: torch.dtype) -> None:
    for case in hard_cases(200):
        case = rounded(case, dtype)
        expected = truth.mp_batch_similarity(
            truth.matrix(case.student), truth.matrix(case.teacher), temperature=case.temperature
        )
        bound = tolerances.similarity_bound(case, dtype)
        assert abs(loss_of(case, dtype).item() - float(expected)) <= bound, case


@PRECISIONS
def test_gradient_equals_sixty_digits_on_the_hard_set(dtype: torch.dtype) -> None:
    for case in hard_cases(50):
        # A step of 1e-20 must be small beside a row, and a zero row has no derivative at all.
        student = np.where(case.student == 0, 1.0, case.student)
        student /= np.abs(student).max(axis=1, keepdims=True)
        case = rounded(Features(student, case.teacher, case.temperature), dtype)
        inputs = case.tensors(dtype)
        inputs[0].requires_grad_()
        loss = oracle.batch_similarity_loss(*inputs, temperature=case.temperature, mask=None)
        (gradient,) = torch.autograd.grad(loss, inputs[0])
        expected = truth.mp_gradient(
            partial(
                truth.mp_batch_similarity,
                teacher=truth.matrix(case.teacher),
                temperature=case.temperature,
            ),
            truth.matrix(case.student),
        )
        error = np.linalg.norm(gradient.double().numpy() - expected, axis=1)
        assert (error <= tolerances.similarity_gradient_bound(case, dtype)).all(), case


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
