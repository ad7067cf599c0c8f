"""What is true of batch similarity whatever the features: in every backend and dtype.

Each function is one invariant; a test tries all of them on what it draws.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from telme_kd.functional import batch_similarity_loss
from tests.helpers import strategies, tolerances, truth
from tests.helpers.places import INTERPRETED_HALVES, PLACES, Place, bad_numbers
from tests.helpers.strategies import Features

Array = NDArray[np.float64]

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

JUNK = st.sampled_from([0.0, 7.0, 1e300, math.inf, -math.inf, math.nan])


class Outcome(NamedTuple):
    """The loss as it is, and the gradients as they are stored, in float64."""

    loss: Tensor
    student: Tensor
    teacher: Tensor | None


def outcome(
    student: Tensor,
    teacher: Tensor,
    *,
    teacher_gradient: bool = False,
    upstream: float = 1.0,
    **options: Any,
) -> Outcome:
    """Loss and gradients; ``upstream`` is a power of two that is divided out again."""
    student, teacher = student.detach(), teacher.detach()  # with their strides
    inputs = [student, teacher] if teacher_gradient else [student]
    for tensor in inputs:
        tensor.requires_grad_()
    loss = batch_similarity_loss(student, teacher, **options)
    stored = torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))
    assert all(gradient.dtype is student.dtype for gradient in stored)
    gradients = [gradient.double() / upstream for gradient in stored]
    return Outcome(loss.detach(), gradients[0], gradients[1] if teacher_gradient else None)


class Trial:
    """Features in a place, and what several invariants want to know of them."""

    def __init__(
        self, place: Place, case: Features, *, seed: int = 0, junk: float = math.nan
    ) -> None:
        self.place, self.seed, self.junk = place, seed, junk
        self.student, self.teacher = case.tensors(place.dtype)
        sides = (x.double().numpy() for x in (self.student, self.teacher))
        self.case = Features(*sides, case.temperature)
        self.options = {"temperature": case.temperature, "backend": place.backend}

    def outcome(self, student: Tensor, teacher: Tensor, **changes: Any) -> Outcome:
        changed: Any = {**self.options, "upstream": self.upstream, **changes}
        return outcome(student, teacher, **changed)

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def is_exact(self) -> bool:
        """Whether the place's operations are those of the formula, one by one."""
        return self.place.backend == "reference"

    @cached_property
    def upstream(self) -> float:
        """What scales gradients into float16's range, as a gradient scaler does; else 1."""
        if self.place.dtype is not torch.float16:
            return 1.0
        norms = np.concatenate((row_norms(self.case.student), row_norms(self.case.teacher)))
        shortest = np.where(norms == 0, 1.0, norms).min()
        largest = 4 * len(self.student) / (self.case.temperature * shortest)
        return 2.0 ** -max(0, math.ceil(math.log2(largest / 2.0**14)))

    @cached_property
    def found(self) -> Outcome:
        return self.outcome(self.student, self.teacher, teacher_gradient=True)

    @cached_property
    def gradient(self) -> Tensor:
        return self.found.student

    @cached_property
    def bound(self) -> float:
        """How far the loss may lie from the truth."""
        return tolerances.similarity_bound(self.case, self.place.computed_in)

    @cached_property
    def gradient_bound(self) -> Array:
        """How far the gradient of each row may lie from the truth before it is stored."""
        return gradient_bound(self.case, self.place)

    @property
    def magnified(self) -> float:
        """How many times its computation's is the rounding of the place's dtype."""
        return tolerances.UNIT[self.place.dtype] / self.place.unit

    def lost(self, gradient: Tensor) -> Array:
        """By how much each row of a gradient changes where it is stored."""
        width, sizes = gradient.shape[1], row_norms(gradient.numpy()) * self.upstream
        stored = [self.place.lost_in_storage(float(size), width) for size in sizes]
        return np.array(stored) / self.upstream


def gradient_bound(case: Features, place: Place) -> Array:
    """How far the gradient of each row may lie from the truth before it is stored."""
    bound = tolerances.similarity_gradient_bound(case, place.computed_in)
    if place == Place("triton", torch.bfloat16):
        # Softmax weights are multiplied with features as two halves, together 2 x 8 bits.
        bound += 2.0**-17 * tolerances.similarity_gradient_size(case)
    return bound


def row_norms(rows: Array) -> Array:
    norms: Array = np.linalg.norm(rows, axis=1)
    return norms


def definition(case: Features, *, teacher_gradient: bool = False) -> Outcome:
    """The definition in float64."""
    options: Any = {"temperature": case.temperature, "backend": "reference"}
    return outcome(*case.tensors(), teacher_gradient=teacher_gradient, **options)


def loss_stays_within_its_bounds(trial: Trial) -> None:
    loss, t, items = trial.found.loss, trial.case.temperature, len(trial.student)
    most = min(4 / t, 2 / t**2, 2 / t + math.log(items))
    assert loss.dtype is trial.place.computed_in
    assert loss.shape == ()
    assert -trial.bound <= loss.item() <= most + trial.bound


def loss_and_gradients_equal_the_definition_in_float64(trial: Trial) -> None:
    """And that equals SciPy. Either side rounds; float64 by no more than its own bound."""
    case, found = trial.case, trial.found
    exact = definition(case, teacher_gradient=True)
    expected = truth.batch_similarity(case.student, case.teacher, temperature=case.temperature)
    of_double = tolerances.similarity_bound(case, torch.float64)
    for other in (exact.loss.item(), expected):
        assert abs(found.loss.item() - other) <= trial.bound + of_double
    swapped = Features(case.teacher, case.student, case.temperature)
    # A teacher's row is a column, as a student's is, and an anchor; the sums of its anchors' pulls
    # add up over the batch.
    for mine, theirs, side, times in (
        (found.student, exact.student, case, 1),
        (found.teacher, exact.teacher, swapped, 4 * len(case.student)),
    ):
        assert mine is not None
        assert theirs is not None
        allowed = gradient_bound(side, trial.place)
        allowed += tolerances.similarity_gradient_bound(side, torch.float64)
        assert (row_norms((mine - theirs).numpy()) <= times * allowed + trial.lost(theirs)).all()


def zero_rows_get_no_gradient(trial: Trial) -> None:
    for features, gradient in (
        (trial.student, trial.found.student),
        (trial.teacher, trial.found.teacher),
    ):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient[(features == 0).all(dim=1)] == 0).all()


def teacher_gets_a_gradient_only_if_it_requires_one(trial: Trial) -> None:
    alone = trial.outcome(trial.student, trial.teacher)
    assert torch.equal(alone.loss, trial.found.loss)
    assert alone.teacher is None
    if not trial.place.is_interpreted:
        assert torch.equal(alone.student, trial.gradient)
    off = row_norms((alone.student - trial.gradient).numpy())
    assert (off <= 2 * (trial.gradient_bound + trial.lost(trial.gradient))).all()


def gradient_is_orthogonal_to_its_row_and_bounded(trial: Trial) -> None:
    norms, rounding = row_norms(trial.case.student), trial.gradient_bound
    rounding = rounding + trial.lost(trial.gradient)
    along = np.abs((trial.gradient.numpy() * trial.case.student).sum(axis=1))
    assert (along <= rounding * norms).all()
    largest = np.divide(
        1, trial.case.temperature * norms, out=np.zeros_like(norms), where=norms != 0
    )
    assert (row_norms(trial.gradient.numpy()) <= largest + rounding).all()


def scaling_rows_by_powers_of_two_keeps_the_loss(trial: Trial) -> None:
    """To the bit, where the operations are the formula's and no entry leaves the normal numbers."""
    items = (len(trial.student), 1)
    most = 2 if trial.place.dtype is torch.float16 else 60
    scaled = []
    for features in (trial.student, trial.teacher):
        factor = torch.tensor(2.0 ** trial.rng.integers(-most, most + 1, items))
        moved = (features.double() * factor).to(features.dtype)
        tiny = torch.finfo(features.dtype).smallest_normal
        if (
            not torch.equal(moved.double(), features.double() * factor)
            or ((features != 0) & ((features.abs() < tiny) | (moved.abs() < tiny))).any()
        ):
            return
        scaled.append(moved)
    loss = trial.outcome(*scaled).loss
    allowed = 0.0 if trial.is_exact else 2 * trial.bound
    assert abs(loss.item() - trial.found.loss.item()) <= allowed


def scaling_rows_keeps_the_loss_and_divides_the_gradient(trial: Trial) -> None:
    factor = torch.tensor(trial.rng.uniform(0.25, 4, (len(trial.student), 1)))
    student = (trial.student.double() * factor).to(trial.place.dtype)
    teacher = (trial.teacher.double() / factor).to(trial.place.dtype)
    if _is_subnormal_somewhere(student) or _is_subnormal_somewhere(teacher):
        return
    moved = Trial(trial.place, Features(*_arrays(student, teacher), trial.case.temperature))
    once = 1 + trial.magnified  # a row's direction is rounded where it is scaled, too
    assert abs(moved.found.loss.item() - trial.found.loss.item()) <= 2 * once * trial.bound
    off = row_norms((moved.gradient * factor - trial.gradient).numpy())
    lost = trial.lost(trial.gradient) + moved.lost(moved.gradient) * factor.numpy()[:, 0]
    assert (off <= 2 * once * trial.gradient_bound + 2 * lost).all()


def _arrays(*tensors: Tensor) -> tuple[Array, ...]:
    return tuple(tensor.double().numpy() for tensor in tensors)


def _is_subnormal_somewhere(features: Tensor) -> bool:
    tiny = torch.finfo(features.dtype).smallest_normal
    return bool(((features != 0) & (features.abs() < tiny)).any())


def rotating_both_sides_keeps_the_loss(trial: Trial) -> None:
    width = trial.student.shape[1]
    matrix = torch.tensor(trial.rng.normal(size=(width, width)))
    rotation = torch.linalg.qr(matrix).Q
    sides = [(x.double() @ rotation).to(x.dtype) for x in (trial.student, trial.teacher)]
    if any(map(_is_subnormal_somewhere, (*sides, trial.student, trial.teacher))):
        return
    rotated = trial.outcome(*sides).loss
    # Rotating rounds each entry by a few u of its row, as often as there are columns.
    allowed = 2 * width * (1 + trial.magnified) * trial.bound
    assert abs(rotated.item() - trial.found.loss.item()) <= allowed


def permuting_items_permutes_the_gradient(trial: Trial) -> None:
    order = torch.tensor(trial.rng.permutation(len(trial.student)))
    permuted = trial.outcome(trial.student[order], trial.teacher[order])
    assert abs(permuted.loss.item() - trial.found.loss.item()) <= 2 * trial.bound
    off = row_norms((permuted.student - trial.gradient[order]).numpy())
    allowed = 2 * (trial.gradient_bound + trial.lost(trial.gradient))
    assert (off <= allowed[order.numpy()]).all()


def equal_sides_give_zero(trial: Trial) -> None:
    equal = trial.outcome(trial.student, trial.student)
    assert abs(equal.loss.item()) <= trial.bound
    assert (
        row_norms(equal.student.numpy()) <= trial.gradient_bound + trial.lost(equal.student)
    ).all()


def one_item_gives_zero_and_no_gradient(trial: Trial) -> None:
    one = trial.outcome(trial.student[:1], trial.teacher[:1])
    assert one.loss.item() == 0
    assert (one.student == 0).all()


def _masked(trial: Trial, junk: float) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = trial.student.clone(), trial.teacher.clone()
    rng = trial.rng
    mask = torch.tensor(rng.random(len(student)) < 0.6)
    mask[int(rng.integers(len(mask)))] = True
    student[~mask], teacher[~mask] = (torch.tensor(x).to(student) for x in (junk, -junk))
    return student, teacher, mask


def masked_items_are_absent_whatever_they_hold(trial: Trial) -> None:
    *pair, mask = _masked(trial, trial.junk)
    masked = trial.outcome(*pair, mask=mask, teacher_gradient=True)
    *clean, _ = _masked(trial, 0.0)
    plain = trial.outcome(*clean, mask=mask, teacher_gradient=True)
    assert torch.equal(masked.loss, plain.loss)
    assert torch.equal(masked.student, plain.student)
    assert masked.teacher is not None
    assert masked.teacher[mask].isfinite().all()
    assert all((gradient[~mask] == 0).all() for gradient in (masked.student, masked.teacher))
    case = trial.case
    sides = (x[mask.numpy()] for x in (case.student, case.teacher))
    kept = Features(*sides, case.temperature)
    exact = definition(kept)
    units = (trial.place.computed_in, torch.float64)
    allowed = sum(tolerances.similarity_bound(kept, dtype) for dtype in units)
    assert abs(masked.loss.item() - exact.loss.item()) <= allowed
    rows = sum(tolerances.similarity_gradient_bound(kept, dtype) for dtype in units)
    off = row_norms((masked.student[mask] - exact.student).numpy())
    assert (off <= rows + trial.lost(exact.student)).all()


def all_masked_gives_zero_and_no_gradient(trial: Trial) -> None:
    student = trial.student.clone()
    student[0] = torch.tensor(trial.junk).to(student)
    none = torch.zeros(len(student), dtype=torch.bool)
    masked = trial.outcome(student, trial.teacher, mask=none, teacher_gradient=True)
    assert masked.loss.item() == 0
    assert masked.teacher is not None
    assert all((gradient == 0).all() for gradient in (masked.student, masked.teacher))


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.T.contiguous().T,
    lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
    lambda x: torch.repeat_interleave(x, 2, dim=0)[1::2],
    lambda x: torch.cat((x[:1], x))[1:],
    lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
)


def layout_in_memory_does_not_matter(trial: Trial) -> None:
    of_student, of_teacher = (LAYOUTS[i] for i in trial.rng.integers(len(LAYOUTS), size=2))
    found = trial.outcome(of_student(trial.student), of_teacher(trial.teacher))
    assert abs(found.loss.item() - trial.found.loss.item()) <= 2 * trial.bound
    off = row_norms((found.student - trial.gradient).numpy())
    assert (off <= 2 * (trial.gradient_bound + trial.lost(trial.gradient))).all()


def inputs_are_never_modified(trial: Trial) -> None:
    assert trial.found
    for features, original in zip(
        (trial.student, trial.teacher), trial.case.tensors(trial.place.dtype), strict=True
    ):
        assert torch.equal(features, original)


def nan_and_infinity_are_never_laundered(trial: Trial) -> None:
    rng = trial.rng
    position = tuple(int(rng.integers(size)) for size in trial.student.shape)
    pair = [trial.student.clone(), trial.teacher.clone()]
    bad = float(rng.choice([math.nan, math.inf, -math.inf]))
    pair[int(rng.integers(2))][position] = bad
    with bad_numbers():
        found = trial.outcome(*pair, teacher_gradient=True)
    assert found.loss.isnan()
    for features, gradient in zip(pair, (found.student, found.teacher), strict=True):
        assert gradient is not None
        # A zero row has no gradient, whatever the others are.
        assert gradient.isnan().any() or not features.any()


OF_ONE_CALL = (
    loss_stays_within_its_bounds,
    loss_and_gradients_equal_the_definition_in_float64,
    zero_rows_get_no_gradient,
    gradient_is_orthogonal_to_its_row_and_bounded,
    inputs_are_never_modified,
)
OF_ANY_FEATURES = (
    *OF_ONE_CALL,
    teacher_gets_a_gradient_only_if_it_requires_one,
    scaling_rows_by_powers_of_two_keeps_the_loss,
    scaling_rows_keeps_the_loss_and_divides_the_gradient,
    rotating_both_sides_keeps_the_loss,
    permuting_items_permutes_the_gradient,
    equal_sides_give_zero,
    one_item_gives_zero_and_no_gradient,
    masked_items_are_absent_whatever_they_hold,
    all_masked_gives_zero_and_no_gradient,
    layout_in_memory_does_not_matter,
    nan_and_infinity_are_never_laundered,
)


@PLACES
@given(case=strategies.features(), seed=strategies.seeds, junk=JUNK)
def test_any_features(place: Place, case: Features, seed: int, junk: float) -> None:
    trial = Trial(place, case, seed=seed, junk=junk)
    for invariant in OF_ANY_FEATURES if place.tries(seed) else OF_ONE_CALL:
        invariant(trial)


@INTERPRETED_HALVES
@given(case=strategies.features())
def test_any_features_in_half_precision_in_the_interpreter(place: Place, case: Features) -> None:
    """Its products are of two halves, so what holds for float32 has to be tried again."""
    trial = Trial(place, case)
    for invariant in OF_ONE_CALL:
        invariant(trial)
