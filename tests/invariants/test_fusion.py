"""What is true of the bounded shift whatever the vectors: in every backend and dtype.

``reference`` is the function itself, the others are what a head's gate and shift are computed by,
with a gate that lets everything through. Each function is one invariant; a test tries all of them
on what it draws.
"""

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from telme_kd.functional import bounded_shift
from telme_kd.kernels import fusion
from telme_kd.reference import fusion as reference
from tests.helpers import strategies, tolerances, truth
from tests.helpers.places import INTERPRETED_HALVES, PLACES, Place, bad_numbers
from tests.helpers.strategies import Shift

Array = NDArray[np.float64]

EPS = st.sampled_from([None, 1e-6])


class Trial:
    """Vectors in a place, and what several invariants want to know of them."""

    def __init__(self, place: Place, case: Shift, eps: float | None, *, seed: int = 0) -> None:
        self.place, self.eps, self.seed = place, eps, seed
        self.anchor, self.displacement = case.tensors(place.dtype)
        if place.is_interpreted:  # a program per row; rows are independent
            self.anchor, self.displacement = self.anchor[:2], self.displacement[:2]
        self.threshold = case.threshold
        self.upstream = torch.tensor(self.rng.normal(size=self.anchor.shape)).to(place.dtype)

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def is_exact(self) -> bool:
        """Whether the place's operations are those of the formula, one by one."""
        return self.place.backend == "reference"

    def shift(
        self, anchor: Tensor, displacement: Tensor, *, threshold: float | None = None
    ) -> Tensor:
        threshold = self.threshold if threshold is None else threshold
        if self.is_exact:
            return bounded_shift(anchor, displacement, threshold=threshold, eps=self.eps)
        options: Any = {
            "threshold": threshold,
            "eps": self.eps,
            "norm_eps": None,
            "rate": 0.0,
            "output_dtype": anchor.dtype,
            "backend": self.place.backend,
        }
        gate = torch.ones_like(displacement)
        shifted = fusion.gate_and_shift(anchor, gate, displacement, *[None] * 4, **options)
        assert shifted.dtype is anchor.dtype
        return shifted

    @cached_property
    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the gradients of its product with ``upstream``, in float64."""
        inputs = [x.clone().requires_grad_() for x in (self.anchor, self.displacement)]
        shifted = self.shift(*inputs)
        gradients = torch.autograd.grad(shifted, inputs, self.upstream)
        return shifted.detach().double(), gradients[0].double(), gradients[1].double()

    @property
    def shifted(self) -> Tensor:
        return self.found[0]

    @cached_property
    def allowed(self) -> Tensor:
        """How long the shift of each row may be."""
        return torch.minimum(self.threshold * lengths(self.anchor), lengths(self.displacement))

    def lost(self, vectors: Tensor) -> Tensor:
        """By how much each row changes where it is stored."""
        sizes, width = lengths(vectors), vectors.shape[-1]
        return torch.tensor(
            [self.place.lost_in_storage(float(size), width) for size in sizes], dtype=torch.float64
        )


def lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors.double(), dim=-1)


def shift_is_no_longer_than_its_bounds(trial: Trial) -> None:
    u = trial.place.unit
    moved = lengths(trial.shifted - trial.anchor.double())
    rounding = 4 * u * (lengths(trial.shifted) + lengths(trial.anchor)) + trial.lost(trial.shifted)
    assert (moved <= trial.allowed * (1 + 8 * u) + rounding).all()


def shift_equals_numpy(trial: Trial) -> None:
    if trial.eps is not None:
        return
    expected = torch.tensor(
        truth.bounded_shift(
            trial.anchor.double().numpy(),
            trial.displacement.double().numpy(),
            threshold=trial.threshold,
        )
    )
    units = tolerances.units("bounded_shift", trial.place.computed_in)
    rounding = units * (trial.allowed + 2 * lengths(trial.anchor)) + trial.lost(expected)
    assert (lengths(trial.shifted - expected) <= rounding).all()


def gradients_equal_the_definition_in_float64_and_are_bounded(trial: Trial) -> None:
    inputs = [x.double().requires_grad_() for x in (trial.anchor, trial.displacement)]
    exact = reference.bounded_shift(*inputs, threshold=trial.threshold, eps=trial.eps)
    gradients = torch.autograd.grad(exact, inputs, trial.upstream.double())
    norm_f, norm_h, size = map(lengths, (trial.anchor, trial.displacement, trial.upstream))
    # On the edge between bounded and free the gradient jumps: either side is right.
    reach = norm_h if trial.eps is None else norm_h + trial.eps
    edge = (trial.threshold * norm_f - reach).abs() <= 1e-5 * reach
    u = tolerances.units("bounded_shift", trial.place.computed_in)
    # dZ/dF = I + theta h f', of unit vectors; dZ/dH = lambda (I - h h') or I.
    for mine, theirs, most in zip(
        trial.found[1:], gradients, ((1 + trial.threshold) * size, size), strict=True
    ):
        rounding = u * most + trial.lost(theirs) + torch.finfo(trial.place.computed_in).tiny
        off = lengths(mine - theirs)
        assert (off <= torch.where(edge, 2 * most + rounding, rounding)).all()
        assert (lengths(mine) <= most + rounding).all()


def inputs_are_never_modified(trial: Trial) -> None:
    copies = trial.anchor.clone(), trial.displacement.clone()
    trial.shift(trial.anchor, trial.displacement)
    assert torch.equal(trial.anchor, copies[0])
    assert torch.equal(trial.displacement, copies[1])


def anchor_is_kept_to_the_bit_without_threshold_or_displacement(trial: Trial) -> None:
    for shifted in (
        trial.shift(trial.anchor, trial.displacement, threshold=0.0),
        trial.shift(trial.anchor, torch.zeros_like(trial.anchor)),
    ):
        assert torch.equal(shifted, trial.anchor)


def displacement_is_added_in_full_under_a_generous_threshold(trial: Trial) -> None:
    # A zero anchor allows no shift.
    anchor = trial.anchor + (lengths(trial.anchor) == 0)[:, None].to(trial.anchor)
    wide = anchor.to(trial.place.computed_in), trial.displacement.to(trial.place.computed_in)
    shifted = trial.shift(anchor, trial.displacement, threshold=1e30)
    off = (shifted.double() - (wide[0] + wide[1]).double()).norm().item()
    assert off <= trial.place.lost_in_storage((wide[0] + wide[1]).norm().item(), anchor.numel())


def zero_anchor_allows_no_shift(trial: Trial) -> None:
    if trial.eps is not None:
        return
    zeros = torch.zeros_like(trial.displacement)
    assert torch.equal(trial.shift(zeros, trial.displacement), zeros)


def longer_thresholds_shift_no_less(trial: Trial) -> None:
    less, more = (
        lengths(
            trial.shift(trial.anchor, trial.displacement, threshold=threshold).double()
            - trial.anchor.double()
        )
        for threshold in sorted(trial.rng.uniform(0, 100, 2))
    )
    size = lengths(trial.anchor) + lengths(trial.displacement)
    stored = tolerances.UNIT[trial.place.dtype] * (2 if trial.place.is_interpreted else 1)
    assert (less <= more + 16 * max(trial.place.unit, stored) * size).all()


def rows_are_independent_to_the_bit(trial: Trial) -> None:
    order = torch.tensor(trial.rng.permutation(len(trial.anchor)))
    permuted = trial.shift(trial.anchor[order], trial.displacement[order])
    assert torch.equal(permuted.double(), trial.shifted[order])
    index = int(order[0])
    alone = trial.shift(trial.anchor[index : index + 1], trial.displacement[index : index + 1])
    assert torch.equal(alone.double()[0], trial.shifted[index])


def scaling_both_scales_the_result(trial: Trial) -> None:
    if trial.eps is not None or trial.threshold > 1e3:
        return
    most = 2 if trial.place.dtype is torch.float16 else 30
    factor = 2.0 ** float(trial.rng.integers(-most, most + 1))
    sides = [x.double() * factor for x in (trial.anchor, trial.displacement)]
    given = [x.to(trial.place.dtype) for x in sides]
    normal = torch.finfo(trial.place.dtype).smallest_normal
    for x in (*sides, trial.anchor.double(), trial.displacement.double(), trial.shifted):
        if ((x != 0) & (x.abs() < normal * 2.0**most)).any():
            return
    scaled = trial.shift(*given).double()
    if trial.is_exact:
        assert torch.equal(scaled, factor * trial.shifted)
    units = tolerances.units("bounded_shift", trial.place.computed_in)
    rounding = 2 * factor * (units * (trial.allowed + 2 * lengths(trial.anchor)))
    rounding += 2 * factor * trial.lost(trial.shifted)
    assert (lengths(scaled - factor * trial.shifted) <= rounding).all()


def rotating_both_rotates_the_result(trial: Trial) -> None:
    if trial.place.dtype is not trial.place.computed_in:
        return  # rounded again, the vectors are others
    width = trial.anchor.shape[-1]
    matrix = torch.tensor(trial.rng.normal(size=(width, width)))
    rotation = torch.linalg.qr(matrix).Q
    sides = ((x.double() @ rotation).to(x.dtype) for x in (trial.anchor, trial.displacement))
    rotated = trial.shift(*sides).double()
    size = lengths(trial.anchor) + lengths(trial.displacement)
    rounding = 16 * width * trial.place.unit * size
    assert (lengths(rotated - trial.shifted @ rotation) <= rounding).all()


def layout_in_memory_does_not_matter(trial: Trial) -> None:
    layouts = (
        lambda x: x.T.contiguous().T,
        lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
        lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
    )
    rng = trial.rng
    of_anchor, of_displacement, of_upstream = (layouts[i] for i in rng.integers(3, size=3))
    inputs = [of_anchor(trial.anchor), of_displacement(trial.displacement)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    shifted = trial.shift(*inputs)
    gradients = torch.autograd.grad(shifted, inputs, of_upstream(trial.upstream))
    units = 2 * tolerances.units("bounded_shift", trial.place.computed_in)
    size = lengths(trial.upstream)
    sizes = lengths(trial.anchor) + trial.allowed, (1 + trial.threshold) * size, size
    for mine, theirs, most in zip((shifted, *gradients), trial.found, sizes, strict=True):
        assert (lengths(mine.detach().double() - theirs) <= units * most + trial.lost(theirs)).all()


def nan_stays_in_its_row_and_is_seen(trial: Trial) -> None:
    rng = trial.rng
    row, column = (int(rng.integers(size)) for size in trial.anchor.shape)
    others = torch.arange(len(trial.anchor)) != row
    with bad_numbers():
        for side in (0, 1):
            pair = [trial.anchor.clone(), trial.displacement.clone()]
            pair[side][row, column] = math.nan
            shifted = trial.shift(*pair).double()
            assert torch.equal(shifted[others], trial.shifted[others])
            assert shifted[row, column].isnan()


OF_ONE_CALL = (
    shift_is_no_longer_than_its_bounds,
    shift_equals_numpy,
    gradients_equal_the_definition_in_float64_and_are_bounded,
    inputs_are_never_modified,
)
OF_ANY_VECTORS = (
    *OF_ONE_CALL,
    anchor_is_kept_to_the_bit_without_threshold_or_displacement,
    displacement_is_added_in_full_under_a_generous_threshold,
    zero_anchor_allows_no_shift,
    longer_thresholds_shift_no_less,
    rows_are_independent_to_the_bit,
    scaling_both_scales_the_result,
    rotating_both_rotates_the_result,
    layout_in_memory_does_not_matter,
    nan_stays_in_its_row_and_is_seen,
)

VECTORS = strategies.shifts(thresholds=(0.0, 1e-6, 0.01, 0.1, 0.2, 1.0, 10.0, 1e3))


@PLACES
@given(case=VECTORS, seed=strategies.seeds, eps=EPS)
def test_any_vectors(place: Place, case: Shift, seed: int, eps: float | None) -> None:
    trial = Trial(place, case, eps, seed=seed)
    for invariant in OF_ANY_VECTORS if place.tries(seed) else OF_ONE_CALL:
        invariant(trial)


@INTERPRETED_HALVES
@given(case=VECTORS, eps=EPS)
def test_half_precision_is_float32_of_the_same_numbers_in_the_interpreter(
    place: Place, case: Shift, eps: float | None
) -> None:
    """So what holds for float32, which is tried above, holds for it."""
    half = Trial(place, case, eps)
    anchor, displacement = half.anchor.float(), half.displacement.float()
    single = half.shift(anchor, displacement).double()
    assert (lengths(half.shifted - single) <= half.lost(single)).all()
