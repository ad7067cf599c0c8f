"""The hard set: a thousand ill-conditioned cases of each operator, and the truth to 60 digits.

``python -m tests.helpers.hard`` computes the files under ``tests/golden`` anew, in minutes. Inputs
are numbers that float32 holds. Condition numbers are log-uniform up to 10^6: of DIST |p| / |a|, a
vector's norm over its centred norm; of batch similarity one over the temperature; of the bounded
shift the ratio of the two norms.
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf
from numpy.typing import NDArray

from tests.helpers import truth
from tests.helpers.golden import COMMITTED
from tests.helpers.strategies import Features, Logits, Shift

Array = NDArray[np.float64]

CASES = 1_000
WORST = 1e6
FLOOR, PULL = 1e-3, 0.1
"""What the documentation of ``eps=None`` defines; written down here, as truth asks no package."""

EPS: dict[str, float | None] = {"released": 1e-8, "scale_free": None}


class HardDist(NamedTuple):
    """Logits, their condition number, and by definition the loss and the student's gradient."""

    kind: str
    condition: float
    case: Logits
    loss: dict[str, float]
    gradient: dict[str, Array]


class HardSimilarity(NamedTuple):
    """Features, the loss and the student's gradient."""

    case: Features
    loss: float
    gradient: Array


class HardShift(NamedTuple):
    """Anchor and displacement, the result, and the gradients of its product with ``upstream``."""

    case: Shift
    upstream: Array
    shifted: Array
    to_anchor: Array
    to_displacement: Array


# --- cases ----------------------------------------------------------------------------------------


def _in_float32(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def _near_constant_rows(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    return rng.normal(size=(shape[0], 1)) + size * rng.normal(size=shape)


def _near_constant_columns(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    return rng.normal(size=(1, shape[1])) + size * rng.normal(size=shape)


def _offset(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    return rng.normal(size=shape) + 10.0 ** rng.uniform(0, 4) * rng.choice([-1, 1], (shape[0], 1))


def _ordinary(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    return rng.normal(size=shape)


def _one_class_leads(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    logits = rng.normal(size=shape)
    logits[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] -= math.log(size) - 1.0
    return logits


def _without_classes(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Array:
    logits = rng.normal(size=(1, shape[1])) + size * rng.normal(size=shape)
    out = rng.random(shape) < 0.3
    out[:, int(rng.integers(shape[1]))] = False  # never a whole row
    return np.where(out, -np.inf, logits)


KINDS = {
    "near-constant rows": (_near_constant_rows, _ordinary),
    "near-constant columns": (_near_constant_columns, _ordinary),
    "near-constant on both sides": (_near_constant_columns, _near_constant_rows),
    "nearly collinear": (_ordinary, None),
    "offset rows": (_offset, _offset),
    "one class leads": (_one_class_leads, _one_class_leads),
    "classes at -inf": (_without_classes, _without_classes),
    "constant teacher": (_ordinary, _near_constant_rows),
}


def dist_case(index: int) -> tuple[str, Logits]:
    """The index-th case, which its index alone decides."""
    rng = np.random.default_rng((2401_12987, index))
    kind = tuple(KINDS)[index % len(KINDS)]
    of_student, of_teacher = KINDS[kind]
    shape = int(rng.integers(1, 5)), int(rng.integers(2, 6))
    size = 1 / WORST ** rng.uniform(0, 1)
    # Temperatures from 1e-3, under which few classes are left, to 100, under which all are alike.
    temperature = float(10.0 ** rng.choice([0.0, rng.uniform(-3, 2)]))
    student = temperature * of_student(rng, shape, size)
    if of_teacher is not None:
        teacher = temperature * of_teacher(rng, shape, size)
    else:
        teacher = student + temperature * size * rng.normal(size=shape)
    weights = [float(rng.choice([0.5, 1.0, 2.0])) for _ in range(2)]
    return kind, Logits(_in_float32(student), _in_float32(teacher), temperature, *weights)


def condition(case: Logits) -> float:
    """The largest |p| / |a| of a row or column that varies at all, of either side."""
    largest = 1.0
    for logits in (case.student, case.teacher):
        p = truth.probabilities(logits, case.temperature)
        for axis in (0, 1):
            norm = np.linalg.norm(p, axis=axis)
            centred = np.linalg.norm(p - p.mean(axis, keepdims=True), axis=axis)
            varies = centred > 1e-12 * norm
            largest = max([largest, *(norm[varies] / centred[varies])])
    return float(largest)


def similarity_case(index: int) -> Features:
    """Rows nearly parallel, of sizes 1e-12 to 1e12 side by side, some of them zero."""
    rng = np.random.default_rng((13_15, index))
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    student, teacher = (
        (rng.normal(size=(1, shape[1])) + 10.0 ** rng.uniform(-6, 1) * rng.normal(size=shape))
        * 10.0 ** rng.uniform(-12, 12, size=(shape[0], 1))
        * (rng.random((shape[0], 1)) > 0.05)
        for _ in range(2)
    )
    if index % 4 == 0:  # a student that has learnt
        student = teacher * (1 + 10.0 ** rng.uniform(-6, -1) * rng.normal(size=shape))
    temperature = 1 / WORST ** rng.uniform(-0.2, 1)
    return Features(_in_float32(student), _in_float32(teacher), temperature)


def shift_case(index: int) -> tuple[Shift, Array]:
    """Vectors of sizes 1e-12 to 1e12; ``threshold`` bounds the shift now and then."""
    rng = np.random.default_rng((18_19, index))
    shape = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    anchor = 10.0 ** rng.uniform(-12, 12, size=(shape[0], 1)) * rng.normal(size=shape)
    ratio = WORST ** rng.uniform(-1, 1, size=(shape[0], 1))
    displacement = ratio * np.linalg.norm(anchor, axis=1, keepdims=True) * rng.normal(size=shape)
    if index % 10 == 0:
        displacement[0] = 0.0
    threshold = float(10.0 ** rng.uniform(-6, 1))
    upstream = _in_float32(rng.normal(size=shape))
    return Shift(_in_float32(anchor), _in_float32(displacement), threshold), upstream


# --- truth ----------------------------------------------------------------------------------------


def true_dist(kind: str, case: Logits) -> HardDist:
    """The case with its loss and gradient, by both definitions."""
    student, teacher = truth.matrix(case.student), truth.matrix(case.teacher)
    losses, gradients = {}, {}
    for name, eps in EPS.items():
        loss = partial(
            truth.mp_dist, teacher=teacher, eps=eps, floor=FLOOR, pull=PULL, **case.options
        )
        losses[name] = float(loss(student))
        gradients[name] = truth.mp_gradient(loss, student)
    return HardDist(kind, condition(case), case, losses, gradients)


def true_similarity(case: Features) -> HardSimilarity:
    """The case with its loss and gradient; that of a zero row is zero, as documented."""
    student, teacher = truth.matrix(case.student), truth.matrix(case.teacher)
    loss = partial(truth.mp_batch_similarity, teacher=teacher, temperature=case.temperature)
    # It bends within the temperature's share of a row's length.
    lengths = np.linalg.norm(case.student, axis=1)
    steps = [mpf(10) ** -20 * mpf(min(1.0, case.temperature)) * mpf(length) for length in lengths]
    gradient = truth.mp_gradient(loss, student, steps)
    return HardSimilarity(case, float(loss(student)), gradient)


def true_shift(case: Shift, upstream: Array) -> HardShift:
    """The case with its result and gradients; a zero displacement gets the upstream gradient."""
    with mp.workdps(120):  # rows whose sizes differ by 10^24 add up
        return _true_shift(case, upstream)


def _true_shift(case: Shift, upstream: Array) -> HardShift:
    anchor, displacement = truth.matrix(case.anchor), truth.matrix(case.displacement)
    shift = partial(truth.mp_bounded_shift, threshold=case.threshold)
    shifted = np.array(shift(anchor, displacement), dtype=np.float64)

    def projected(first: truth.Matrix, second: truth.Matrix) -> mpf:
        rows = zip(shift(first, second), upstream.tolist(), strict=True)
        return sum(x * mpf(y) for row, along in rows for x, y in zip(row, along, strict=True))

    def steps(rows: Array) -> list[mpf]:
        return [mpf(10) ** -20 * mpf(float(norm) or 1.0) for norm in np.linalg.norm(rows, axis=1)]

    to_anchor = truth.mp_gradient(
        lambda at: projected(at, displacement), anchor, steps(case.anchor)
    )
    to_displacement = truth.mp_gradient(
        lambda at: projected(anchor, at), displacement, steps(case.displacement)
    )
    zero = (case.displacement == 0).all(axis=1)
    to_displacement[zero] = upstream[zero]
    return HardShift(case, upstream, shifted, to_anchor, to_displacement)


# --- files: numbers of all cases end to end -------------------------------------------------------


def _flat(arrays: list[Array], dtype: Any = np.float64) -> NDArray[Any]:
    return np.concatenate([array.reshape(-1) for array in arrays]).astype(dtype)


def _cut(flat: NDArray[Any], shapes: NDArray[np.int64]) -> Iterator[Array]:
    start = 0
    for items, width in shapes:
        stop = start + items * width
        yield flat[start:stop].reshape(items, width).astype(np.float64)
        start = stop


def write_dist(directory: Path) -> None:
    """Compute the truth of all cases of DIST and store it."""
    dist = [true_dist(*dist_case(index)) for index in range(CASES)]
    columns: dict[str, Any] = {
        "shape": np.array([hard.case.student.shape for hard in dist], dtype=np.uint8),
        "kind": np.array([tuple(KINDS).index(hard.kind) for hard in dist], dtype=np.uint8),
        "condition": np.array([hard.condition for hard in dist]),
        "options": np.array([tuple(hard.case.options.values()) for hard in dist]),
        "student": _flat([hard.case.student for hard in dist], np.float32),
        "teacher": _flat([hard.case.teacher for hard in dist], np.float32),
    }
    for name in EPS:
        columns[f"loss/{name}"] = np.array([hard.loss[name] for hard in dist])
        columns[f"gradient/{name}"] = _flat([hard.gradient[name] for hard in dist])
    np.savez_compressed(directory / "hard_dist.npz", **columns)


def write_similarity(directory: Path) -> None:
    """Compute the truth of all cases of batch similarity and store it."""
    similarity = [true_similarity(similarity_case(index)) for index in range(CASES)]
    np.savez_compressed(
        directory / "hard_batch_similarity.npz",
        shape=np.array([hard.case.student.shape for hard in similarity], dtype=np.uint8),
        temperature=np.array([hard.case.temperature for hard in similarity]),
        student=_flat([hard.case.student for hard in similarity], np.float32),
        teacher=_flat([hard.case.teacher for hard in similarity], np.float32),
        loss=np.array([hard.loss for hard in similarity]),
        gradient=_flat([hard.gradient for hard in similarity]),
    )


def write_shift(directory: Path) -> None:
    """Compute the truth of all cases of the bounded shift and store it."""
    shift = [true_shift(*shift_case(index)) for index in range(CASES)]
    np.savez_compressed(
        directory / "hard_bounded_shift.npz",
        shape=np.array([hard.upstream.shape for hard in shift], dtype=np.uint8),
        threshold=np.array([hard.case.threshold for hard in shift]),
        anchor=_flat([hard.case.anchor for hard in shift], np.float32),
        displacement=_flat([hard.case.displacement for hard in shift], np.float32),
        upstream=_flat([hard.upstream for hard in shift], np.float32),
        shifted=_flat([hard.shifted for hard in shift]),
        to_anchor=_flat([hard.to_anchor for hard in shift]),
        to_displacement=_flat([hard.to_displacement for hard in shift]),
    )


def load_dist(directory: Path = COMMITTED) -> list[HardDist]:
    """Every case of the file."""
    with np.load(directory / "hard_dist.npz") as file:
        shapes = file["shape"].astype(np.int64)
        sides = zip(_cut(file["student"], shapes), _cut(file["teacher"], shapes), strict=True)
        gradients = {name: list(_cut(file[f"gradient/{name}"], shapes)) for name in EPS}
        losses = {name: file[f"loss/{name}"].tolist() for name in EPS}
        return [
            HardDist(
                tuple(KINDS)[file["kind"][index]],
                float(file["condition"][index]),
                Logits(student, teacher, *options),
                {name: losses[name][index] for name in EPS},
                {name: gradients[name][index] for name in EPS},
            )
            for index, ((student, teacher), options) in enumerate(
                zip(sides, file["options"].tolist(), strict=True)
            )
        ]


def load_similarity(directory: Path = COMMITTED) -> list[HardSimilarity]:
    """Every case of the file."""
    with np.load(directory / "hard_batch_similarity.npz") as file:
        shapes = file["shape"].astype(np.int64)
        student, teacher, gradient = (
            list(_cut(file[name], shapes)) for name in ("student", "teacher", "gradient")
        )
        return [
            HardSimilarity(Features(s, t, temperature), loss, of_student)
            for s, t, temperature, loss, of_student in zip(
                student,
                teacher,
                file["temperature"].tolist(),
                file["loss"].tolist(),
                gradient,
                strict=True,
            )
        ]


def load_shift(directory: Path = COMMITTED) -> list[HardShift]:
    """Every case of the file."""
    with np.load(directory / "hard_bounded_shift.npz") as file:
        shapes = file["shape"].astype(np.int64)
        names = ("anchor", "displacement", "upstream", "shifted", "to_anchor", "to_displacement")
        columns = zip(*(_cut(file[name], shapes) for name in names), strict=True)
        return [
            HardShift(Shift(anchor, displacement, threshold), *others)
            for (anchor, displacement, *others), threshold in zip(
                columns, file["threshold"].tolist(), strict=True
            )
        ]


FILES = {"dist": write_dist, "batch_similarity": write_similarity, "bounded_shift": write_shift}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(FILES)}; all if none")
    parser.add_argument("--output", type=Path, default=COMMITTED)
    arguments = parser.parse_args()
    for name in arguments.operators or FILES:
        FILES[name](arguments.output)
