"""A thousand cases of condition numbers to 10^6 against 60 digits, in every backend.

The bounds are those of ``tests.helpers.tolerances``: the condition number times the unit roundoff
times a constant. A first-order analysis of a correlation of n numbers, each rounding counted at its
worst, has 2 (n + 4) for it: the softmax's quotient, difference, exponential, sum and division, the
mean, and the centring, on either side. The vectors here have up to five numbers, so that this is
18; the table has 16.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from telme_kd.functional import batch_similarity_loss, bounded_shift, dist_loss
from telme_kd.kernels import fusion
from tests.helpers import hard, tolerances, truth
from tests.helpers.places import PLACES_OF_FULL_PRECISION, Place
from tests.helpers.strategies import Features

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")


def value_and_gradient(loss: Any, student: Tensor, teacher: Tensor, **options: Any) -> Any:
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient.double().numpy()


@PLACES_OF_FULL_PRECISION
@pytest.mark.parametrize("definition", hard.EPS)
def test_dist_is_within_its_bound(place: Place, definition: str) -> None:
    eps = hard.EPS[definition]
    cases = hard.load_dist()
    assert len(cases) == hard.CASES
    for index, (kind, _, case, losses, gradients) in enumerate(cases):
        loss, gradient = value_and_gradient(
            dist_loss, *case.tensors(place.dtype), backend=place.backend, eps=eps, **case.options
        )
        assert math.isfinite(loss), (index, kind)
        assert np.isfinite(gradient).all(), (index, kind)
        allowed = tolerances.dist_bound(case, eps, place.dtype)
        assert abs(loss - losses[definition]) <= allowed, (index, kind)
        allowed = tolerances.dist_gradient_bound(case, eps, place.dtype)
        assert np.linalg.norm(gradient - gradients[definition]) <= allowed, (index, kind)


def _similarity_bound(case: Features, dtype: torch.dtype) -> float:
    """16 u (1 + (1 + kappa) / t + log B): at 1/t of 10^6 the last condition number counts, too.

    An error d of a teacher's cosines moves KL_i by sum_j P_ij (log P_ij / Q_ij - KL_i) d_ij / t;
    kappa is the mean over i of what that is for errors of one. With ordinary temperatures it is
    about one, and ``tolerances.similarity_bound`` leaves it out.
    """
    s, t = truth.unit_rows(case.student), truth.unit_rows(case.teacher)
    log_p, log_q = (special.log_softmax(t @ x.T / case.temperature, axis=1) for x in (t, s))
    p, ratio = np.exp(log_p), log_p - log_q
    kappa = (p * np.abs(ratio - (p * ratio).sum(1, keepdims=True))).sum(1).mean()
    of_cosines = tolerances.units("batch_similarity_loss", dtype) * kappa / case.temperature
    return tolerances.similarity_bound(case, dtype) + float(of_cosines)


@PLACES_OF_FULL_PRECISION
def test_batch_similarity_is_within_its_bound(place: Place) -> None:
    cases = hard.load_similarity()
    assert len(cases) == hard.CASES
    for index, (case, exact, exact_gradient) in enumerate(cases):
        with np.errstate(over="ignore", invalid="ignore"):  # of a series that is not taken there
            loss, gradient = value_and_gradient(
                batch_similarity_loss,
                *case.tensors(place.dtype),
                backend=place.backend,
                temperature=case.temperature,
            )
        assert math.isfinite(loss), index
        assert np.isfinite(gradient).all(), index
        assert abs(loss - exact) <= _similarity_bound(case, place.dtype), index
        off = np.linalg.norm(gradient - exact_gradient, axis=1)
        assert (off <= tolerances.similarity_gradient_bound(case, place.dtype)).all(), index


def _shift(place: Place, anchor: Tensor, displacement: Tensor, threshold: float) -> Tensor:
    """By the function, or by a backend's passes, with a gate that lets everything through."""
    if place.backend == "reference":
        return bounded_shift(anchor, displacement, threshold=threshold)
    options: Any = {
        "threshold": threshold,
        "eps": None,
        "norm_eps": None,
        "rate": 0.0,
        "output_dtype": place.dtype,
        "backend": place.backend,
    }
    gate = torch.ones_like(displacement)
    return fusion.gate_and_shift(anchor, gate, displacement, *[None] * 4, **options)


@PLACES_OF_FULL_PRECISION
def test_bounded_shift_is_within_its_bound(place: Place) -> None:
    cases = hard.load_shift()
    assert len(cases) == hard.CASES
    for index, (case, upstream, *exact) in enumerate(cases):
        anchor, displacement = (x.requires_grad_() for x in case.tensors(place.dtype))
        shifted = _shift(place, anchor, displacement, case.threshold)
        found = (
            shifted,
            *torch.autograd.grad(
                shifted, (anchor, displacement), torch.tensor(upstream, dtype=place.dtype)
            ),
        )
        norm_f, norm_h, norm_u = (
            np.linalg.norm(x, axis=1) for x in (case.anchor, case.displacement, upstream)
        )
        moved = np.minimum(case.threshold * norm_f, norm_h)
        # Z = F + lambda H; dZ/dF = I + theta h f', of unit vectors; dZ/dH = lambda (I - h h').
        sizes = norm_f + moved, (1 + case.threshold) * norm_u, norm_u
        units = tolerances.units("bounded_shift", place.dtype)
        for value, expected, size in zip(found, exact, sizes, strict=True):
            numbers = value.detach().double().numpy()
            assert np.isfinite(numbers).all(), index
            off = np.linalg.norm(numbers - expected, axis=1)
            assert (off <= units * size + torch.finfo(place.dtype).tiny).all(), index


def test_the_set_is_as_hard_as_it_says() -> None:
    cases = hard.load_dist()
    conditions = np.array([case.condition for case in cases])
    assert [case.kind for case in cases[: len(hard.KINDS)]] == list(hard.KINDS)
    for decade in range(6):  # as many in each as a log-uniform draw of a third of them has
        within = (conditions >= 10.0**decade) & (conditions < 10.0 ** (decade + 1))
        assert within.sum() >= 50, decade
    assert sum(np.isneginf(case.case.student).any() for case in cases) > 50
    temperatures = np.array([case.case.temperature for case in hard.load_similarity()])
    assert temperatures.min() < 2 / hard.WORST


@pytest.mark.parametrize("index", range(0, hard.CASES, 125))
def test_the_files_hold_what_the_generator_gives(index: int) -> None:
    """The cases up to a digit that hangs on the library of powers, their truth to the bit."""
    stored = hard.load_dist()[index], hard.load_similarity()[index], hard.load_shift()[index]
    kind, drawn = hard.dist_case(index)
    assert kind == stored[0].kind
    cases = drawn, hard.similarity_case(index), hard.shift_case(index)[0]
    for ours, theirs in zip(cases, stored, strict=True):
        for name, value in vars(ours).items():
            np.testing.assert_allclose(value, getattr(theirs.case, name), rtol=2e-7)
    again = (
        hard.true_dist(kind, stored[0].case),
        hard.true_similarity(stored[1].case),
        hard.true_shift(stored[2].case, stored[2].upstream),
    )
    assert again[0].condition == pytest.approx(stored[0].condition, rel=1e-9)
    assert again[0].loss == stored[0].loss
    for name in hard.EPS:
        np.testing.assert_array_equal(again[0].gradient[name], stored[0].gradient[name])
    for ours, theirs in zip(again[1:], stored[1:], strict=True):
        for mine, exact in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(mine, exact)
