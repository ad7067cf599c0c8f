"""The DIST oracle against SciPy, NumPy and mpmath, and its derivatives against differences."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.reference import dist as oracle
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Logits

MODES = pytest.mark.parametrize("eps", [1e-8, None], ids=["released", "scale-free"])
FLOOR, PULL = oracle.RELATIVE_FLOOR, oracle.CONSTANT_GRADIENT_LIKE


def loss_of(case: Logits, eps: float | None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    student, teacher = case.tensors(dtype)
    return oracle.dist_loss(student, teacher, mask=None, eps=eps, **case.options)


@given(case=strategies.logits())
def test_released_formula_equals_numpy(case: Logits) -> None:
    expected = truth.released_dist(case.student, case.teacher, eps=1e-8, **case.options)
    # Both sides round; NumPy's half of the allowance is as large as ours.
    bound = 2 * tolerances.dist_bound(case, 1e-8, torch.float64)
    assert abs(loss_of(case, 1e-8).item() - expected) <= bound


@given(case=strategies.varied_logits())
def test_scale_free_formula_equals_scipy_pearson_where_all_vary(case: Logits) -> None:
    assume(_everything_varies(case))
    expected = truth.exact_dist(case.student, case.teacher, **case.options)
    bound = 2 * tolerances.dist_bound(case, None, torch.float64)
    assert abs(loss_of(case, None).item() - expected) <= bound


def test_scale_free_floor_is_what_the_documentation_says() -> None:
    assert oracle.RELATIVE_FLOOR == 1e-3  # "varies by more than 0.1 % of its norm"
    assert oracle.CONSTANT_GRADIENT_LIKE == 0.1


def _everything_varies(case: Logits) -> bool:
    """Every row and column of both sides by clearly more than the relative floor."""
    for logits in (case.student, case.teacher):
        p = truth.probabilities(logits, case.temperature)
        for axis in (0, 1):
            centred = np.linalg.norm(p - p.mean(axis, keepdims=True), axis=axis)
            if (centred < 1.01e-3 * np.linalg.norm(p, axis=axis)).any():
                return False
    return True


# --- derivatives ----------------------------------------------------------------------------------

DERIVATIVE_CASES = {
    "ordinary": (4, 5, 1.0),
    "one item": (1, 5, 1.0),
    "two items": (2, 4, 1.0),
    "one class": (4, 1, 1.0),
    "two classes": (4, 2, 1.0),
    "near-constant": (3, 4, 1e-2),
}


def _pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    items, classes, scale = DERIVATIVE_CASES[name]
    torch.manual_seed(7)
    student = scale * torch.randn(items, classes, dtype=torch.float64)
    teacher = torch.randn(items, classes, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


def _options(**changes: object) -> dict[str, object]:
    options = {"temperature": 2.0, "inter_weight": 1.0, "intra_weight": 0.5, "mask": None}
    return options | changes


@MODES
@pytest.mark.parametrize("name", DERIVATIVE_CASES)
def test_gradient_equals_differences(name: str, eps: float | None) -> None:
    assert gradcheck(partial(oracle.dist_loss, eps=eps, **_options()), _pair(name))


@MODES
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], ids=str)
def test_gradient_equals_differences_of_one_term(
    weights: tuple[float, float], eps: float | None
) -> None:
    options = _options(inter_weight=weights[0], intra_weight=weights[1])
    assert gradcheck(partial(oracle.dist_loss, eps=eps, **options), _pair("ordinary"))


@MODES
def test_gradient_equals_differences_under_a_mask(eps: float | None) -> None:
    options = _options(mask=torch.tensor([True, False, True, True]))
    assert gradcheck(partial(oracle.dist_loss, eps=eps, **options), _pair("ordinary"))


def test_gradient_equals_differences_at_constant_student() -> None:
    student = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    _, teacher = _pair("ordinary")
    function = partial(oracle.dist_loss, eps=None, **_options())
    # The attenuation is cubic over 0.1 % of a vector's norm: differences must stay well inside.
    assert gradcheck(function, (student, teacher), eps=1e-7, atol=1e-4)


@MODES
@pytest.mark.parametrize("name", ["ordinary", "two items", "two classes"])
def test_second_derivative_equals_differences(name: str, eps: float | None) -> None:
    assert gradgradcheck(partial(oracle.dist_loss, eps=eps, **_options()), _pair(name))


@MODES
def test_second_derivative_equals_differences_under_a_mask(eps: float | None) -> None:
    options = _options(mask=torch.tensor([True, False, True, True]))
    assert gradgradcheck(partial(oracle.dist_loss, eps=eps, **options), _pair("ordinary"))


def test_second_derivative_is_finite_at_constant_student() -> None:
    student = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    _, teacher = _pair("ordinary")
    loss = oracle.dist_loss(student, teacher, eps=None, **_options())
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.isfinite().all()
