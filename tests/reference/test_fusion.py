"""The bounded shift's oracle against NumPy and mpmath, and its derivatives against differences."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.reference import fusion as oracle
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Shift


def shift_of(case: Shift, dtype: torch.dtype = torch.float64) -> np.ndarray:
    anchor, displacement = case.tensors(dtype)
    shifted = oracle.bounded_shift(anchor, displacement, threshold=case.threshold, eps=None)
    return shifted.double().numpy()


def allowance(case: Shift, dtype: torch.dtype) -> np.ndarray:
    """Rounding of the length of the shift, and of the sum (..., 1)."""
    length = np.linalg.norm(case.displacement, axis=-1, keepdims=True)
    allowed = case.threshold * np.linalg.norm(case.anchor, axis=-1, keepdims=True)
    size = np.abs(case.anchor).max(axis=-1, keepdims=True)
    relative = tolerances.units("bounded_shift", dtype)
    return relative * np.minimum(length, allowed) + 2 * tolerances.UNIT[dtype] * size


@given(case=strategies.shifts())
def test_shift_equals_numpy(case: Shift) -> None:
    expected = truth.bounded_shift(case.anchor, case.displacement, threshold=case.threshold)
    assert (np.abs(shift_of(case) - expected) <= 2 * allowance(case, torch.float64)).all()


def test_released_formula_divides_by_norm_plus_eps() -> None:
    rng = np.random.default_rng(1)
    anchor, displacement = rng.normal(size=(6, 4)), 1e-6 * rng.normal(size=(6, 4))
    displacement[2] = 0.0
    length = np.linalg.norm(displacement, axis=1, keepdims=True)
    length[2] = 1.0  # the released code's stand-in for zero
    ratio = 1e-7 * np.linalg.norm(anchor, axis=1, keepdims=True) / (length + 1e-6)
    expected = anchor + np.minimum(ratio, 1.0) * displacement
    shifted = oracle.bounded_shift(
        torch.tensor(anchor), torch.tensor(displacement), threshold=1e-7, eps=1e-6
    )
    np.testing.assert_allclose(shifted.numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
@pytest.mark.parametrize("threshold", [0.1, 10.0], ids=["bounded", "free"])
def test_derivatives_equal_differences(threshold: float, eps: float | None) -> None:
    torch.manual_seed(3)
    anchor = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    displacement = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    function = partial(oracle.bounded_shift, threshold=threshold, eps=eps)
    assert gradcheck(function, (anchor, displacement))
    assert gradgradcheck(function, (anchor, displacement))


@pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
def test_derivatives_are_finite_at_zero_rows(eps: float | None) -> None:
    torch.manual_seed(3)
    kept = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)
    anchor = (torch.randn(4, 5, dtype=torch.float64) * kept).requires_grad_()
    displacement = (torch.randn(4, 5, dtype=torch.float64) * kept.flip(0)).requires_grad_()
    shifted = oracle.bounded_shift(anchor, displacement, threshold=0.1, eps=eps)
    first = torch.autograd.grad(shifted.square().sum(), (anchor, displacement), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (anchor, displacement))
    assert all(part.isfinite().all() for part in (*first, *second))
