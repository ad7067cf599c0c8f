"""How far a result may lie from the truth: one table, operator by dtype, with the reasons.

An entry counts unit roundoffs u of the dtype that the operator *computes* in (float32 for half
precision). The bounds below turn it into a number by what the inputs' conditioning magnifies.
Nothing here is to be loosened to make a test pass.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tests.helpers import truth
from tests.helpers.strategies import Features, Logits

Array = NDArray[np.float64]

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Unit roundoff: half the distance from 1 to the next number."""


@dataclass(frozen=True)
class Tolerance:
    """A count of unit roundoffs and why it is that many."""

    units: float
    reason: str


_DIST = Tolerance(
    16,
    "twice the worst constant, 7.9, of 6,000 float32 draws with constant vectors among them; the "
    "softmax, two centrings, three sums and a division each add about one",
)
_DIST_GRADIENT = Tolerance(
    16,
    "the value's: b / |a| and rho a / |a| are as far off as rho, relative to their size; the "
    "softmax's backward adds one product and one subtraction",
)
_SIMILARITY = Tolerance(
    16,
    "cosines are off by a few u, over the temperature; the logarithms by u times their size, 2/t "
    "plus log B at most",
)
_SIMILARITY_GRADIENT = Tolerance(
    16, "the value's: Q - P is as far off as either, and projecting it off the row adds a few u"
)
_SHIFT = Tolerance(8, "two norms (their sums of up to 24 squares: 2 u), a ratio and a product")
_HEAD = Tolerance(
    16,
    "matrix products choose their order of summation by shape, so one row alone and the same row "
    "in a batch differ by a few u of the sums",
)
_STORED = Tolerance(1, "computed in float32, then rounded once to be stored")

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    (operator, dtype): tolerance
    for operator, tolerance in (
        ("dist_loss", _DIST),
        ("dist_loss gradient", _DIST_GRADIENT),
        ("batch_similarity_loss", _SIMILARITY),
        ("batch_similarity_loss gradient", _SIMILARITY_GRADIENT),
        ("bounded_shift", _SHIFT),
        ("fusion head", _HEAD),
    )
    for dtype in (torch.float64, torch.float32)
} | {("bounded_shift", dtype): _STORED for dtype in (torch.float16, torch.bfloat16)}

GOLDEN = 1e-10
"""Relative, of the loss and of the gradient's norm: the parity that the project promises."""

GOLDEN_WELL_CONDITIONED = 1e-12
"""The same where no correlation is near 0 / 0: two float64 codes, a few hundred roundings apart."""


def units(operator: str, dtype: torch.dtype) -> float:
    """The allowance in absolute terms, for a quantity of size one."""
    return TOLERANCES[operator, dtype].units * UNIT[dtype]


def dist_conditions(case: Logits, eps: float | None, unit: float) -> tuple[Array, Array]:
    """kappa of every row's and every column's correlation."""
    p, q = _probabilities(case)
    return truth.condition(p, q, 1, eps, unit), truth.condition(p, q, 0, eps, unit)


def dist_bound(case: Logits, eps: float | None, dtype: torch.dtype) -> float:
    """16 u tau^2 [beta (1 + mean kappa_row) + gamma (1 + mean kappa_col)] (1 + range / 2 tau)."""
    rows, columns = dist_conditions(case, eps, UNIT[dtype])
    magnified = case.inter_weight * (1 + rows.mean()) + case.intra_weight * (1 + columns.mean())
    return float(
        units("dist_loss", dtype) * case.temperature**2 * magnified * _exponent_growth(case)
    )


def dist_gradient_size(case: Logits, eps: float | None) -> float:
    """(tau / 2) [(beta / B) |m_row| + (gamma / C) |m_col|] with m = |b| / (|a||b| + eps).

    No gradient of the loss is larger: a softmax's Jacobian has norm 1/2 at most. For ``eps=None``,
    m is three times one over the larger of |a| and 0.1 % of |p|, and the probabilities of a column
    count in units of its largest, so that their Jacobian has norm sqrt(2).
    """
    p, q = _probabilities(case)
    if eps is None:
        rows, columns = (_scale_free_slope(_column_units(p, axis), axis) for axis in (1, 0))
    else:
        rows, columns = (_released_slope(p, q, axis, eps) for axis in (1, 0))
    return _through_softmax(case, eps, rows, columns)


def dist_gradient_bound(case: Logits, eps: float | None, dtype: torch.dtype) -> float:
    """How far the gradient may lie from the truth, in the Euclidean norm.

    Each slope m is off by kappa u of itself, and b, which gives its direction, by u |q|.
    """
    p, q = _probabilities(case)
    slopes = []
    for axis, kappa in zip((1, 0), dist_conditions(case, eps, UNIT[dtype]), strict=True):
        if eps is None:
            u, v = _column_units(p, axis), _column_units(q, axis)
            slope, norm_v = _scale_free_slope(u, axis), np.linalg.norm(v, axis=axis)
            direction = slope * norm_v / _floored_norm(v, axis)
        else:
            slope = _released_slope(p, q, axis, eps)
            norm_a, norm_b = (np.linalg.norm(_centred(x, axis), axis=axis) for x in (p, q))
            direction = np.linalg.norm(q, axis=axis) / (norm_a * norm_b + eps)
        slopes.append((1 + kappa) * slope + direction)
    size = _through_softmax(case, eps, *slopes)
    return units("dist_loss gradient", dtype) * _exponent_growth(case) * size


def similarity_bound(case: Features, dtype: torch.dtype) -> float:
    """16 u (1 + 1/t + log B)."""
    items = len(case.student)
    return units("batch_similarity_loss", dtype) * (1 + 1 / case.temperature + math.log(items))


def similarity_gradient_size(case: Features) -> Array:
    """What the gradient of each row is at most: 1 / (t |s_j|)."""
    norms = np.linalg.norm(case.student, axis=1)
    return np.divide(1.0, case.temperature * norms, out=np.zeros_like(norms), where=norms != 0)


def similarity_gradient_bound(case: Features, dtype: torch.dtype) -> Array:
    """How far the gradient of each row may lie from the truth."""
    relative = units("batch_similarity_loss gradient", dtype) * (1 + 1 / case.temperature)
    return relative * similarity_gradient_size(case)


def _exponent_growth(case: Logits) -> float:
    """An exponential magnifies the rounding of its argument by the argument's size."""
    finite = [np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in (case.student, case.teacher)]
    return float(1 + sum(finite) / (2 * case.temperature))


def _probabilities(case: Logits) -> tuple[Array, Array]:
    p = truth.probabilities(case.student, case.temperature)
    return p, truth.probabilities(case.teacher, case.temperature)


def _through_softmax(case: Logits, eps: float | None, rows: Array, columns: Array) -> float:
    """The norm of the loss's gradient, given those of its correlations by the probabilities."""
    items, classes = case.student.shape
    inter = 0.5 * case.inter_weight / items * np.linalg.norm(rows)
    jacobian = 0.5 if eps is not None else math.sqrt(2)
    intra = jacobian * case.intra_weight / classes * np.linalg.norm(columns)
    return float(case.temperature * (inter + intra))


def _column_units(p: Array, axis: int) -> Array:
    """Columns in units of their largest entry; rows as they are."""
    if axis == 1:
        return p
    largest = p.max(axis=0)
    return p / np.where(largest == 0, 1.0, largest)


def _centred(p: Array, axis: int) -> Array:
    return p - p.mean(axis, keepdims=True)


def _released_slope(p: Array, q: Array, axis: int, eps: float) -> Array:
    norm_a, norm_b = (np.linalg.norm(_centred(x, axis), axis=axis) for x in (p, q))
    return norm_b / (norm_a * norm_b + eps)


def _scale_free_slope(p: Array, axis: int) -> Array:
    return 3.0 * (1 + 1e-3) / _floored_norm(p, axis)


def _floored_norm(p: Array, axis: int) -> Array:
    """|a|, or 0.1 % of |p| if that is more, or 1 for a vector of zeros."""
    centred = np.linalg.norm(_centred(p, axis), axis=axis)
    norm = np.maximum(centred, 1e-3 * np.linalg.norm(p, axis=axis))
    return np.where(norm == 0, 1.0, norm)
