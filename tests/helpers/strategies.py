"""Hypothesis inputs: every shape and structure at which the operators have gone wrong somewhere.

Arrays come from a drawn seed, not entry by entry: that is fast, shrinks to small shapes and simple
structures, and is all the invariants need. Everything is float64; tests cast.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 10.0, 64.0)
WEIGHTS = (0.0, 0.1, 0.5, 1.0, 2.0)
"""Drawn from a list: subnormal weights break the scaling law, and mean nothing."""


@dataclass(frozen=True)
class Logits:
    """Student and teacher logits (B, C) and the options of a DIST loss."""

    student: Array
    teacher: Array
    temperature: float
    inter_weight: float
    intra_weight: float

    @property
    def options(self) -> dict[str, float]:
        return {
            "temperature": self.temperature,
            "inter_weight": self.inter_weight,
            "intra_weight": self.intra_weight,
        }

    @property
    def scale(self) -> float:
        """S = tau^2 (beta + gamma): half the largest value the loss can take."""
        return self.temperature**2 * (self.inter_weight + self.intra_weight)

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.student, dtype=dtype), torch.tensor(self.teacher, dtype=dtype)

    def rounded(self, dtype: torch.dtype) -> "Logits":
        """The case whose numbers ``dtype`` holds exactly, in float64 again."""
        student, teacher = (tensor.double().numpy() for tensor in self.tensors(dtype))
        return replace(self, student=student, teacher=teacher)


@dataclass(frozen=True)
class Features:
    """Student and teacher features (B, d) and the temperature of a batch-similarity loss."""

    student: Array
    teacher: Array
    temperature: float

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.student, dtype=dtype), torch.tensor(self.teacher, dtype=dtype)


@dataclass(frozen=True)
class Shift:
    """Anchor and displacement (B, d) and the threshold of a bounded shift."""

    anchor: Array
    displacement: Array
    threshold: float

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.anchor, dtype=dtype), torch.tensor(self.displacement, dtype=dtype)


def _random(rng: np.random.Generator, items: int, classes: int) -> Array:
    return rng.normal(size=(items, classes))


def _constant_rows(rng: np.random.Generator, items: int, classes: int) -> Array:
    return np.repeat(rng.normal(size=(items, 1)), classes, axis=1)


def _constant_columns(rng: np.random.Generator, items: int, classes: int) -> Array:
    return np.repeat(rng.normal(size=(1, classes)), items, axis=0)


def _constant(rng: np.random.Generator, items: int, classes: int) -> Array:
    return np.full((items, classes), rng.normal())


def _near_constant_columns(rng: np.random.Generator, items: int, classes: int) -> Array:
    wobble = 10.0 ** rng.uniform(-9, -1)
    return rng.normal(size=(1, classes)) + wobble * rng.normal(size=(items, classes))


def _one_class_leads(rng: np.random.Generator, items: int, classes: int) -> Array:
    logits = rng.normal(size=(items, classes))
    logits[np.arange(items), rng.integers(classes, size=items)] += 20.0
    return logits


def _ties(rng: np.random.Generator, items: int, classes: int) -> Array:
    return rng.integers(-1, 2, size=(items, classes)).astype(np.float64)


_STRUCTURES = {
    "random": _random,
    "constant rows": _constant_rows,
    "constant columns": _constant_columns,
    "constant": _constant,
    "near-constant columns": _near_constant_columns,
    "one class leads": _one_class_leads,
    "ties": _ties,
}
ANY_STRUCTURE = tuple(_STRUCTURES)
VARIED = ("random",)


def _log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(np.log10(low), np.log10(high)).map(lambda exponent: 10.0**exponent)


seeds = st.integers(0, 2**32 - 1)


def logits(
    *,
    items: tuple[int, int] = (1, 16),
    classes: tuple[int, int] = (1, 20),
    scale: tuple[float, float] = (1e-6, 300.0),
    structures: tuple[str, ...] = ANY_STRUCTURE,
    temperatures: tuple[float, ...] = TEMPERATURES,
    weights: tuple[float, ...] = WEIGHTS,
) -> st.SearchStrategy[Logits]:
    """Pairs of logits: any structure for either side, any scale, equal sides now and then."""
    side = st.tuples(_log_uniform(*scale), st.sampled_from(structures))
    shape = st.tuples(st.integers(*items), st.integers(*classes))
    of_loss = (st.sampled_from(values) for values in (temperatures, weights, weights))
    return st.builds(_make_logits, shape, seeds, side, side, st.tuples(*of_loss))


def _make_logits(
    shape: tuple[int, int],
    seed: int,
    of_student: tuple[float, str],
    of_teacher: tuple[float, str],
    options: tuple[float, float, float],
) -> Logits:
    rng = np.random.default_rng(seed)
    student, teacher = (
        scale * _STRUCTURES[structure](rng, *shape) for scale, structure in (of_student, of_teacher)
    )
    return Logits(student, teacher, *options)


def varied_logits(
    *, items: tuple[int, int] = (3, 16), classes: tuple[int, int] = (3, 20)
) -> st.SearchStrategy[Logits]:
    """Logits of ordinary size, whose rows and columns all vary: nothing degenerate."""
    return logits(items=items, classes=classes, scale=(0.3, 3.0), structures=VARIED)


def features(
    *,
    items: tuple[int, int] = (1, 16),
    widths: tuple[int, int] = (1, 24),
    scale: tuple[float, float] = (1e-6, 300.0),
    structures: tuple[str, ...] = ("random", "equal", "zero rows", "parallel", "ties"),
    temperatures: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0, 4.0, 64.0),
) -> st.SearchStrategy[Features]:
    """Pairs of features: equal sides, zero rows, rows along one line, ties."""
    return st.builds(
        _make_features,
        st.tuples(st.integers(*items), st.integers(*widths)),
        seeds,
        st.sampled_from(structures),
        st.tuples(_log_uniform(*scale), _log_uniform(*scale)),
        st.sampled_from(temperatures),
    )


def _make_features(
    shape: tuple[int, int],
    seed: int,
    structure: str,
    scales: tuple[float, float],
    temperature: float,
) -> Features:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=shape), rng.normal(size=shape)
    if structure == "equal":
        student = teacher.copy()
    elif structure == "zero rows":
        student[rng.random(shape[0]) < 0.5] = 0.0
        teacher[rng.random(shape[0]) < 0.3] = 0.0
    elif structure == "parallel":
        student = rng.normal(size=(shape[0], 1)) * student[:1]
    elif structure == "ties":
        student, teacher = (rng.integers(-1, 2, size=shape) * 1.0 for _ in range(2))
    return Features(scales[0] * student, scales[1] * teacher, temperature)


def shifts(
    *,
    items: tuple[int, int] = (1, 8),
    widths: tuple[int, int] = (1, 24),
    scale: tuple[float, float] = (1e-6, 300.0),
    thresholds: tuple[float, ...] = (0.0, 1e-12, 0.01, 0.1, 0.2, 1.0, 10.0, 1e12),
) -> st.SearchStrategy[Shift]:
    """Anchors and displacements: zero rows on either side, lengths far apart and alike."""
    return st.builds(
        _make_shift,
        st.tuples(st.integers(*items), st.integers(*widths)),
        seeds,
        st.tuples(_log_uniform(*scale), _log_uniform(*scale)),
        st.booleans(),
        st.sampled_from(thresholds),
    )


def _make_shift(
    shape: tuple[int, int],
    seed: int,
    scales: tuple[float, float],
    has_zero_rows: bool,
    threshold: float,
) -> Shift:
    rng = np.random.default_rng(seed)
    anchor, displacement = (scale * rng.normal(size=shape) for scale in scales)
    if has_zero_rows:
        anchor[rng.random(shape[0]) < 0.3] = 0.0
        displacement[rng.random(shape[0]) < 0.3] = 0.0
    return Shift(anchor, displacement, threshold)
