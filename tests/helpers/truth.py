"""Answers from outside the package: SciPy and NumPy in float64, mpmath with 60 digits.

Nothing here imports telme_kd. The mpmath half takes numbers as they are (a float64 is exact) and
computes each equation of the paper literally, so a result is right to all the digits of a float64.
"""

from collections.abc import Callable, Sequence

import mpmath
import numpy as np
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]
Matrix = list[list[mpf]]

mp.dps = 60


# --- SciPy and NumPy, float64 -------------------------------------------------------------------


def probabilities(logits: Array, temperature: float) -> Array:
    return special.softmax(logits / temperature, axis=1)


def exact_dist(
    student: Array,
    teacher: Array,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
) -> float:
    """Eq. 10-12 with ``scipy.stats.pearsonr``, for rows and columns that all vary."""
    p, q = probabilities(student, temperature), probabilities(teacher, temperature)
    rows = [1.0 - stats.pearsonr(u, v).statistic for u, v in zip(p, q, strict=True)]
    columns = [1.0 - stats.pearsonr(u, v).statistic for u, v in zip(p.T, q.T, strict=True)]
    return temperature**2 * float(inter_weight * np.mean(rows) + intra_weight * np.mean(columns))


def released_dist(
    student: Array,
    teacher: Array,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float,
) -> float:
    """Eq. 10-12 with rho = <a, b> / (|a| |b| + eps)."""
    p, q = probabilities(student, temperature), probabilities(teacher, temperature)
    inter, intra = (np.mean(1.0 - released_rho(p, q, axis, eps)) for axis in (1, 0))
    return temperature**2 * float(inter_weight * inter + intra_weight * intra)


def released_rho(p: Array, q: Array, axis: int, eps: float) -> Array:
    a, b = p - p.mean(axis, keepdims=True), q - q.mean(axis, keepdims=True)
    norms = np.linalg.norm(a, axis=axis) * np.linalg.norm(b, axis=axis)
    return (a * b).sum(axis) / (norms + eps)


def batch_similarity(student: Array, teacher: Array, *, temperature: float) -> float:
    """Eq. 13-15; a zero row has similarity 0 to all."""
    s, t = unit_rows(student), unit_rows(teacher)
    log_p = special.log_softmax(t @ t.T / temperature, axis=1)
    log_q = special.log_softmax(t @ s.T / temperature, axis=1)
    return float((np.exp(log_p) * (log_p - log_q)).sum() / len(s))


def unit_rows(features: Array) -> Array:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms != 0)


def bounded_shift(anchor: Array, displacement: Array, *, threshold: float) -> Array:
    """Eq. 18-19, any number of axes."""
    length = np.linalg.norm(displacement, axis=-1, keepdims=True)
    allowed = threshold * np.linalg.norm(anchor, axis=-1, keepdims=True)
    ratio = np.divide(allowed, length, out=np.ones_like(length), where=length != 0)
    return anchor + np.minimum(ratio, 1.0) * displacement


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> float:
    return float(-special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


# --- how much rounding a correlation magnifies ---------------------------------------------------


def condition(p: Array, q: Array, axis: int, eps: float | None, unit: float) -> Array:
    """kappa of each correlation: (|p||b| + |q||a| + u|p||q|) / (|a||b| + eps).

    For ``eps=None`` a norm below 0.1 % of the vector counts as 0.1 % of it: what is divided by.
    """
    a, b = p - p.mean(axis, keepdims=True), q - q.mean(axis, keepdims=True)
    norm_p, norm_q, norm_a, norm_b = (np.linalg.norm(x, axis=axis) for x in (p, q, a, b))
    if eps is None:
        divisor = np.maximum(norm_a, 1e-3 * norm_p) * np.maximum(norm_b, 1e-3 * norm_q)
        divisor = np.where(divisor == 0, 1.0, divisor)
    else:
        divisor = norm_a * norm_b + eps
    return (norm_p * norm_b + norm_q * norm_a + unit * norm_p * norm_q) / divisor


# --- mpmath, 60 digits ----------------------------------------------------------------------------


def matrix(values: Array) -> Matrix:
    return [[mpf(float(value)) for value in row] for row in values]


def mp_softmax(row: Sequence[mpf], temperature: mpf) -> list[mpf]:
    exponentials = [mpmath.exp((value - max(row)) / temperature) for value in row]
    total = mpmath.fsum(exponentials)
    return [value / total for value in exponentials]


def mp_rho(
    u: Sequence[mpf],
    v: Sequence[mpf],
    eps: float | None,
    floor: float | None = None,
    pull: float | None = None,
) -> mpf:
    """Correlation of two vectors.

    With a number for ``eps``, the released formula. With None, what the documentation of
    ``eps=None`` defines: the usual correlation, times for each vector an attenuation that is 1 from
    a relative variation of ``floor`` on and, for the share x below it, x (s + (1 - s) x^2) with
    s = floor / pull.
    """
    a, b = (_centred(w) for w in (u, v))
    norm_a, norm_b = _norm(a), _norm(b)
    covariance = mpmath.fsum(x * y for x, y in zip(a, b, strict=True))
    if eps is not None:
        return covariance / (norm_a * norm_b + mpf(eps))
    if norm_a == 0 or norm_b == 0:
        return mpf(0)
    assert floor is not None
    assert pull is not None
    rho = covariance / (norm_a * norm_b)
    for centred, uncentred in ((norm_a, _norm(u)), (norm_b, _norm(v))):
        share = centred / (mpf(floor) * uncentred)
        if share < 1:
            slope = mpf(floor) / mpf(pull)
            rho *= share * (slope + (1 - slope) * share**2)
    return rho


def mp_dist(
    student: Matrix,
    teacher: Matrix,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    floor: float | None = None,
    pull: float | None = None,
) -> mpf:
    """Eq. 10-12 over matrices of mpf."""
    tau = mpf(temperature)
    p = [mp_softmax(row, tau) for row in student]
    q = [mp_softmax(row, tau) for row in teacher]
    loss = mpf(0)
    for weight, us, vs in (
        (inter_weight, p, q),
        (intra_weight, _transposed(p), _transposed(q)),
    ):
        if weight:
            rhos = [mp_rho(u, v, eps, floor, pull) for u, v in zip(us, vs, strict=True)]
            loss += mpf(weight) * tau**2 * mpmath.fsum(1 - rho for rho in rhos) / len(rhos)
    return loss


def mp_batch_similarity(student: Matrix, teacher: Matrix, *, temperature: float) -> mpf:
    """Eq. 13-15 over matrices of mpf."""
    tau = mpf(temperature)
    s, t = ([_unit(row) for row in rows] for rows in (student, teacher))
    loss = mpf(0)
    for anchor in t:
        target = mp_softmax([_dot(anchor, other) for other in t], tau)
        prediction = mp_softmax([_dot(anchor, other) for other in s], tau)
        loss += mpmath.fsum(p * mpmath.log(p / q) for p, q in zip(target, prediction, strict=True))
    return loss / len(t)


def mp_bounded_shift(anchor: Matrix, displacement: Matrix, *, threshold: float) -> Matrix:
    """Eq. 18-19 over matrices of mpf."""
    shifted = []
    for f, h in zip(anchor, displacement, strict=True):
        length, allowed = _norm(h), mpf(threshold) * _norm(f)
        ratio = allowed / length if length > allowed else mpf(1)
        shifted.append([x + ratio * y for x, y in zip(f, h, strict=True)])
    return shifted


def mp_gradient(
    function: Callable[[Matrix], mpf], at: Matrix, steps: Sequence[mpf] | None = None
) -> Array:
    """Central differences, right to all digits of a float64.

    Args:
        function: of a matrix, which it is given with one entry moved.
        at: where its gradient is asked for.
        steps: one per row, much smaller than what the function bends within; 0 for no derivative,
            which is given as 0. 1e-20 if not told.
    """
    gradient = np.zeros((len(at), len(at[0])))
    for i, row in enumerate(at):
        step = mpf(10) ** -20 if steps is None else steps[i]
        if step == 0:
            continue
        for j, value in enumerate(row):
            row[j] = value + step
            above = function(at)
            row[j] = value - step
            below = function(at)
            row[j] = value
            gradient[i, j] = float((above - below) / (2 * step))
    return gradient


def _centred(values: Sequence[mpf]) -> list[mpf]:
    mean = mpmath.fsum(values) / len(values)
    return [value - mean for value in values]


def _norm(values: Sequence[mpf]) -> mpf:
    return mpmath.sqrt(mpmath.fsum(value * value for value in values))


def _unit(values: Sequence[mpf]) -> list[mpf]:
    norm = _norm(values)
    return [value / norm for value in values] if norm else list(values)


def _dot(u: Sequence[mpf], v: Sequence[mpf]) -> mpf:
    return mpmath.fsum(x * y for x, y in zip(u, v, strict=True))


def _transposed(rows: Matrix) -> Matrix:
    return [list(column) for column in zip(*rows, strict=True)]
