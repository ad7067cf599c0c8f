"""What is true of DIST whatever the logits: in every backend and dtype, by either definition.

Each function is one invariant. A test draws logits and tries all invariants of their kind on them,
so that what they have in common is computed once.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from telme_kd.functional import dist_loss
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR, pearson
from tests.helpers import strategies, tolerances, truth
from tests.helpers.places import INTERPRETED_HALVES, PLACES, Place, bad_numbers
from tests.helpers.strategies import Logits

Array = NDArray[np.float64]

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

EPS = (1e-8, None)
DEFINITIONS = st.sampled_from(EPS)
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
    loss = dist_loss(student, teacher, **options)
    stored = torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))
    assert all(gradient.dtype is student.dtype for gradient in stored)
    gradients = [gradient.double() / upstream for gradient in stored]
    return Outcome(loss.detach(), gradients[0], gradients[1] if teacher_gradient else None)


class Trial:
    """Logits in a place, under a definition, and what several invariants want to know of them."""

    def __init__(
        self,
        place: Place,
        case: Logits,
        eps: float | None,
        *,
        seed: int = 0,
        junk: float = math.nan,
    ) -> None:
        self.place, self.eps, self.seed, self.junk = place, eps, seed, junk
        self.case = case.rounded(place.dtype)
        self.student, self.teacher = self.case.tensors(place.dtype)
        self.options = {"eps": eps, "backend": place.backend, **case.options}

    def loss(self, student: Tensor, teacher: Tensor, **changes: Any) -> float:
        value = dist_loss(student, teacher, **(self.options | changes))
        assert value.dtype is self.place.computed_in
        assert value.shape == ()
        return value.item()

    def outcome(self, student: Tensor, teacher: Tensor, **changes: Any) -> Outcome:
        changed = {**self.options, "upstream": self.upstream, **changes}
        return outcome(student, teacher, **changed)

    @cached_property
    def upstream(self) -> float:
        """What scales gradients into float16's range, as a gradient scaler does; else 1."""
        if self.place.dtype is not torch.float16:
            return 1.0
        largest = max(
            tolerances.dist_gradient_size(side, self.eps) for side in (self.case, self.swapped)
        )
        return 2.0 ** -max(0, math.ceil(math.log2(max(largest, 1.0) / 2.0**13)))

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def is_exact(self) -> bool:
        """Whether the place's operations are those of the formula, one by one."""
        return self.place.backend == "reference"

    @cached_property
    def value(self) -> float:
        """The loss where nobody wants a gradient."""
        return self.loss(self.student, self.teacher)

    @cached_property
    def found(self) -> Outcome:
        return self.outcome(self.student, self.teacher, teacher_gradient=True)

    @cached_property
    def gradient(self) -> Tensor:
        return self.found.student

    @cached_property
    def swapped(self) -> Logits:
        return swapped(self.case)

    @cached_property
    def bound(self) -> float:
        """How far the loss may lie from the truth."""
        return bound(self.case, self.eps, self.place)

    @cached_property
    def gradient_bound(self) -> float:
        """How far the gradient may lie from the truth before it is stored."""
        return gradient_bound(self.case, self.eps, self.place)

    @property
    def input_rounding(self) -> float:
        """What rounding the logits to the place's dtype does to the loss.

        A bound counts roundings of the computation; those of the inputs are magnified alike.
        """
        return self.bound * tolerances.UNIT[self.place.dtype] / self.place.unit

    def lost(self, gradient: Tensor) -> float:
        """By how much a gradient changes where it is stored, in the Euclidean norm."""
        size = gradient.norm().item() * self.upstream
        return self.place.lost_in_storage(size, gradient.numel()) / self.upstream


def trial_of(trial: Trial, student: Array, teacher: Array, **changes: float) -> Trial:
    """Other logits in the same place; array entries are rounded to its dtype."""
    case = Logits(student, teacher, **(trial.case.options | changes))
    return Trial(trial.place, case, trial.eps, seed=trial.seed)


def swapped(case: Logits) -> Logits:
    return Logits(case.teacher, case.student, **case.options)


def bound(case: Logits, eps: float | None, place: Place) -> float:
    return tolerances.dist_bound(case, eps, place.computed_in)


def gradient_bound(case: Logits, eps: float | None, place: Place) -> float:
    return tolerances.dist_gradient_bound(case, eps, place.computed_in)


def definition(case: Logits, eps: float | None, *, teacher_gradient: bool = False) -> Outcome:
    """The definition in float64."""
    options: Any = {"eps": eps, "backend": "reference", **case.options}
    return outcome(*case.tensors(), teacher_gradient=teacher_gradient, **options)


def everything_varies(case: Logits) -> bool:
    """Every row and column of both sides by clearly more than the relative floor."""
    for logits in (case.student, case.teacher):
        p = truth.probabilities(logits, case.temperature)
        for axis in (0, 1):
            centred = np.linalg.norm(p - p.mean(axis, keepdims=True), axis=axis)
            if (centred < 1.01 * RELATIVE_FLOOR * np.linalg.norm(p, axis=axis)).any():
                return False
    return True


def released_loss_of_equals(p: Array, axis: int) -> float:
    """mean of eps / (|a|^2 + eps): by how much the released correlation of equals misses 1."""
    squared = (p - p.mean(axis, keepdims=True)) ** 2
    return float((1e-8 / (squared.sum(axis) + 1e-8)).mean())


# --- any logits -----------------------------------------------------------------------------------


def loss_stays_within_its_bounds(trial: Trial) -> None:
    loss, scale, u = trial.found.loss, trial.case.scale, trial.place.unit
    assert loss.dtype is trial.place.computed_in
    assert loss.shape == ()
    assert -8 * u * scale <= loss.item() <= 2 * scale * (1 + 8 * u)


def loss_and_gradients_equal_the_definition_in_float64(trial: Trial) -> None:
    """And that equals NumPy. Either side rounds; float64 by no more than its own bound."""
    case, eps, place = trial.case, trial.eps, trial.place
    exact = definition(case, eps, teacher_gradient=True)
    found = trial.found
    of_double = tolerances.dist_bound(case, eps, torch.float64)
    assert abs(found.loss.item() - exact.loss.item()) <= trial.bound + of_double
    if eps is not None:
        expected = truth.released_dist(case.student, case.teacher, eps=eps, **case.options)
        assert abs(found.loss.item() - expected) <= trial.bound + of_double
    for side, mine, theirs in (
        (case, found.student, exact.student),
        (trial.swapped, found.teacher, exact.teacher),
    ):
        assert mine is not None
        assert theirs is not None
        allowed = gradient_bound(side, eps, place) + trial.lost(theirs)
        allowed += tolerances.dist_gradient_bound(side, eps, torch.float64)
        assert (mine - theirs).norm().item() <= allowed


def teacher_gets_a_gradient_only_if_it_requires_one(trial: Trial) -> None:
    alone = trial.outcome(trial.student, trial.teacher)
    assert torch.equal(alone.loss, trial.found.loss)
    assert torch.equal(alone.student, trial.found.student)
    assert alone.teacher is None
    assert trial.found.teacher is not None


def inputs_are_never_modified(trial: Trial) -> None:
    assert trial.found
    student, teacher = trial.case.tensors(trial.place.dtype)
    assert torch.equal(trial.student, student)
    assert torch.equal(trial.teacher, teacher)


def loss_is_symmetric(trial: Trial) -> None:
    mirrored = trial.loss(trial.teacher, trial.student)
    if trial.is_exact and trial.eps is not None:
        assert mirrored == trial.found.loss.item()
        return
    # Three factors are multiplied from left to right, so the last bits may differ; what is fused
    # may take another way if the other side hardly varies.
    allowed = 8 * trial.place.unit * trial.case.scale if trial.is_exact else 2 * trial.bound
    assert abs(mirrored - trial.found.loss.item()) <= allowed


def doubling_logits_and_temperature_quadruples_the_loss(trial: Trial) -> None:
    temperature = 2 * trial.case.temperature
    doubled = trial.outcome(2 * trial.student, 2 * trial.teacher, temperature=temperature)
    off = (doubled.student - 2 * trial.gradient).norm().item()
    if not trial.is_exact:
        assert abs(doubled.loss.item() - 4 * trial.found.loss.item()) <= 8 * trial.bound
        assert off <= 4 * trial.gradient_bound + 2 * trial.lost(2 * trial.gradient)
        return
    assert torch.equal(doubled.loss, 4 * trial.found.loss)
    if truth.probabilities(trial.case.student, trial.case.temperature).min() > 1e-9:
        # Nothing underflows where it is computed, but may where it is stored.
        assert off <= 2 * trial.lost(torch.zeros_like(trial.gradient))


def permuting_items_and_classes_permutes_the_gradient(trial: Trial) -> None:
    items, classes = (torch.tensor(trial.rng.permutation(n)) for n in trial.student.shape)
    permuted = trial.outcome(trial.student[items][:, classes], trial.teacher[items][:, classes])
    assert abs(permuted.loss.item() - trial.found.loss.item()) <= 2 * trial.bound
    off = (permuted.student - trial.gradient[items][:, classes]).norm().item()
    assert off <= 2 * (trial.gradient_bound + trial.lost(trial.gradient))


def duplicating_the_batch_keeps_the_loss(trial: Trial) -> None:
    case = trial.case
    twice = trial.loss(*(torch.cat((x, x)) for x in (trial.student, trial.teacher)))
    allowed = 2 * trial.bound
    if trial.eps is not None:
        p, q = (truth.probabilities(x, case.temperature) for x in (case.student, case.teacher))
        a, b = (np.linalg.norm(x - x.mean(0), axis=0) for x in (p, q))
        share = (trial.eps / (2 * (a * b + trial.eps))).mean()
        allowed += case.temperature**2 * case.intra_weight * share
    assert abs(twice - trial.found.loss.item()) <= allowed


def loss_is_the_sum_of_its_terms(trial: Trial) -> None:
    case = trial.case
    inter = trial.loss(trial.student, trial.teacher, intra_weight=0.0)
    intra = trial.loss(trial.student, trial.teacher, inter_weight=0.0)
    # A term alone may be computed another way than beside one with a vector that hardly varies.
    assert abs(trial.found.loss.item() - inter - intra) <= 2 * trial.bound
    if case.inter_weight == 0:
        assert inter == 0
    if case.intra_weight == 0:
        assert intra == 0


def gradient_rows_sum_to_zero(trial: Trial) -> None:
    # The softmax's backward takes p_j times one sum off each of C entries; all are of this size.
    size = tolerances.dist_gradient_size(trial.case, trial.eps) + trial.gradient_bound
    root = math.sqrt(trial.gradient.shape[1])
    allowed = tolerances.units("dist_loss gradient", trial.place.computed_in) * size * root
    sums = trial.gradient.sum(dim=1).abs().max().item()
    assert sums <= allowed + root * trial.lost(trial.gradient)


def gradient_is_bounded(trial: Trial) -> None:
    size = tolerances.dist_gradient_size(trial.case, trial.eps)
    norm = trial.gradient.norm().item()
    assert norm <= size + trial.gradient_bound + trial.lost(trial.gradient)


def loss_is_homogeneous_in_logits_and_temperature(trial: Trial) -> None:
    """Euler's relation: dL/dtau = 2 L / tau - (<g_s, s> + <g_t, t>) / tau."""
    case, eps, place = trial.case, trial.eps, trial.place
    tau = torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)
    slope = _differentiable_in_temperature(case, eps, tau)
    sides = ((case, trial.found.student), (trial.swapped, trial.found.teacher))
    homogeneity, allowed = 0.0, 2 * trial.bound
    for side, gradient in sides:
        assert gradient is not None
        logits = torch.tensor(side.student)
        homogeneity += (gradient * logits).sum().item()
        off = gradient_bound(side, eps, place) + trial.lost(gradient)
        off += tolerances.dist_gradient_bound(side, eps, torch.float64)
        allowed += off * logits.norm().item()
    expected = (2 * trial.found.loss.item() - homogeneity) / case.temperature
    assert abs(slope - expected) <= allowed / case.temperature


def _differentiable_in_temperature(case: Logits, eps: float | None, tau: Tensor) -> float:
    """dL/dtau of the definition in float64, which takes a tensor where it expects a number."""
    from telme_kd.reference.dist import dist_loss as by_formula

    options: Any = {**case.options, "temperature": tau}
    loss = by_formula(*case.tensors(), mask=None, eps=eps, **options)
    if not loss.requires_grad:  # both weights are zero
        return 0.0
    (slope,) = torch.autograd.grad(loss, tau)
    return slope.item()


def _masked(trial: Trial, junk: float) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = trial.student.clone(), trial.teacher.clone()
    rng = trial.rng
    mask = torch.tensor(rng.random(len(student)) < 0.6)
    mask[int(rng.integers(len(mask)))] = True
    student[~mask], teacher[~mask] = (torch.tensor(x).to(student) for x in (junk, -junk))
    return student, teacher, mask


def masked_items_are_absent_whatever_they_hold(trial: Trial) -> None:
    *pair, mask = _masked(trial, trial.junk)
    masked = trial.outcome(*pair, mask=mask)
    *clean, _ = _masked(trial, 0.0)
    plain = trial.outcome(*clean, mask=mask)
    assert torch.equal(masked.loss, plain.loss)
    assert torch.equal(masked.student, plain.student)
    assert (masked.student[~mask] == 0).all()
    case = trial.case
    kept = Logits(case.student[mask.numpy()], case.teacher[mask.numpy()], **case.options)
    exact, double = definition(kept, trial.eps), Place("reference", torch.float64)
    allowed = bound(kept, trial.eps, trial.place) + bound(kept, trial.eps, double)
    assert abs(masked.loss.item() - exact.loss.item()) <= allowed
    allowed = gradient_bound(kept, trial.eps, trial.place) + trial.lost(exact.student)
    allowed += gradient_bound(kept, trial.eps, double)
    largest = exact.student.abs().max().item() * trial.upstream
    if largest <= torch.finfo(trial.place.dtype).max:  # or it is stored as infinity
        assert (masked.student[mask] - exact.student).norm().item() <= allowed


def all_masked_gives_zero_and_no_gradient(trial: Trial) -> None:
    student = trial.student.clone()
    student[0] = torch.tensor(trial.junk).to(student)
    none = torch.zeros(len(student), dtype=torch.bool)
    masked = trial.outcome(student, trial.teacher, mask=none)
    assert masked.loss.item() == 0
    assert (masked.student == 0).all()


def mask_that_keeps_all_is_no_mask(trial: Trial) -> None:
    everything = torch.ones(len(trial.student), dtype=torch.bool)
    masked = trial.loss(trial.student, trial.teacher, mask=everything)
    assert abs(masked - trial.found.loss.item()) <= 2 * trial.bound


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.T.contiguous().T,
    lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
    lambda x: torch.repeat_interleave(x, 2, dim=0)[1::2],
    lambda x: torch.cat((x[:1], x))[1:],
    lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
)


def layout_in_memory_does_not_matter(trial: Trial) -> None:
    rng = trial.rng
    of_student, of_teacher = (LAYOUTS[index] for index in rng.integers(len(LAYOUTS), size=2))
    found = trial.outcome(of_student(trial.student), of_teacher(trial.teacher))
    assert abs(found.loss.item() - trial.found.loss.item()) <= 2 * trial.bound
    off = (found.student - trial.gradient).norm().item()
    assert off <= 2 * (trial.gradient_bound + trial.lost(trial.gradient))


def shifting_rows_changes_nothing(trial: Trial) -> None:
    """No bit, where the operations are the formula's: these logits and shifts lose none."""
    rng, shape = trial.rng, trial.student.shape
    sides = [rng.integers(-64, 65, shape) / 8.0 for _ in "12"]
    temperature = float(rng.choice([0.25, 0.5, 1.0, 2.0, 4.0]))
    before = trial_of(trial, *sides, temperature=temperature)
    moved = [side + rng.integers(-9, 10, (len(side), 1)) for side in sides]
    after = trial_of(trial, *moved, temperature=temperature)
    if trial.is_exact:
        assert torch.equal(after.found.loss, before.found.loss)
        assert torch.equal(after.gradient, before.gradient)
    assert abs(after.found.loss.item() - before.found.loss.item()) <= 2 * after.bound
    off = (after.gradient - before.gradient).norm().item()
    assert off <= 2 * (after.gradient_bound + after.lost(before.gradient))


def classes_at_minus_infinity_are_left_out(trial: Trial) -> None:
    classes = trial.student.shape[1]
    if classes == 1:
        return
    rng, sides = trial.rng, [trial.case.student.copy(), trial.case.teacher.copy()]
    for logits in sides:
        out = rng.random(logits.shape) < 0.3
        out[:, int(rng.integers(classes))] = False  # never a whole row
        logits[out] = -math.inf
    left = trial_of(trial, *sides)
    u, scale = trial.place.unit, trial.case.scale
    assert -8 * u * scale <= left.found.loss.item() <= 2 * scale * (1 + 8 * u)
    assert left.gradient.isfinite().all()
    assert (left.gradient[left.student == -math.inf] == 0).all()


def nan_and_infinity_are_never_laundered(trial: Trial) -> None:
    rng = trial.rng
    position = tuple(int(rng.integers(size)) for size in trial.student.shape)
    pair = [trial.student.clone(), trial.teacher.clone()]
    pair[int(rng.integers(2))][position] = float(rng.choice([math.nan, math.inf]))
    with bad_numbers():
        found = trial.outcome(*pair, teacher_gradient=True)
    seen = bool(trial.case.inter_weight or trial.case.intra_weight)  # by a term that counts
    assert math.isnan(found.loss.item()) is seen
    for gradient in (found.student, found.teacher):
        assert gradient is not None
        assert bool(gradient[position[0]].isnan().any()) is seen


def a_row_of_minus_infinity_gives_nan(trial: Trial) -> None:
    student = trial.student.clone()
    student[int(trial.rng.integers(len(student)))] = -math.inf
    with bad_numbers():
        value = trial.loss(student, trial.teacher)
    assert math.isnan(value) is bool(trial.case.inter_weight or trial.case.intra_weight)


OF_ONE_CALL = (
    loss_stays_within_its_bounds,
    loss_and_gradients_equal_the_definition_in_float64,
    loss_is_homogeneous_in_logits_and_temperature,
    gradient_rows_sum_to_zero,
    gradient_is_bounded,
    inputs_are_never_modified,
)
OF_ANY_LOGITS = (
    *OF_ONE_CALL,
    teacher_gets_a_gradient_only_if_it_requires_one,
    loss_is_symmetric,
    doubling_logits_and_temperature_quadruples_the_loss,
    permuting_items_and_classes_permutes_the_gradient,
    duplicating_the_batch_keeps_the_loss,
    loss_is_the_sum_of_its_terms,
    masked_items_are_absent_whatever_they_hold,
    all_masked_gives_zero_and_no_gradient,
    mask_that_keeps_all_is_no_mask,
    layout_in_memory_does_not_matter,
    shifting_rows_changes_nothing,
    classes_at_minus_infinity_are_left_out,
    nan_and_infinity_are_never_laundered,
    a_row_of_minus_infinity_gives_nan,
)


@PLACES
@given(case=strategies.logits(), seed=strategies.seeds, junk=JUNK, eps=DEFINITIONS)
def test_any_logits(place: Place, case: Logits, seed: int, junk: float, eps: float | None) -> None:
    trial = Trial(place, case, eps, seed=seed, junk=junk)
    for invariant in OF_ANY_LOGITS if place.tries(seed) else OF_ONE_CALL:
        invariant(trial)


@INTERPRETED_HALVES
@given(case=strategies.logits(), eps=DEFINITIONS)
def test_half_precision_is_float32_of_the_same_numbers_in_the_interpreter(
    place: Place, case: Logits, eps: float | None
) -> None:
    """So what holds for float32, which is tried above, holds for it."""
    half = Trial(place, case, eps)
    single = half.outcome(half.student.float(), half.teacher.float())
    assert torch.equal(half.found.loss, single.loss)
    off = (half.gradient - single.student).abs().max().item()
    largest = single.student.abs().max().item() * half.upstream
    assert off <= place.lost_in_storage(largest, 1) / half.upstream


# --- logits of ordinary size, whose rows and columns vary -----------------------------------------


def loss_of_opposite_probabilities_reaches_the_upper_bound(trial: Trial) -> None:
    # p_t = 2/C - p_s: positive because p_s <= 1/C (1 + small) here
    logits, classes = trial.case.student, trial.case.student.shape[1]
    p = 1 / classes + 0.5 / classes * np.tanh(logits - logits.mean(1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    q = 2 / classes - p
    opposite = trial_of(trial, np.log(p), np.log(np.abs(q)), temperature=1.0)
    if (q <= 0).any() or not everything_varies(opposite.case):
        return
    case, short = opposite.case, 0.0
    if trial.eps is not None:
        rows, columns = (released_loss_of_equals(p, axis) for axis in (1, 0))
        short = case.inter_weight * rows + case.intra_weight * columns
    off = abs(opposite.value - (2 * case.scale - short))
    assert off <= 2 * opposite.bound + opposite.input_rounding


def loss_is_zero_for_a_teacher_mixed_with_uniform(trial: Trial) -> None:
    case = trial.case
    share = float(trial.rng.choice([0.05, 0.3, 0.7, 1.0]))
    q = truth.probabilities(case.teacher, case.temperature)
    student = case.temperature * np.log(share * q + (1 - share) / q.shape[1])
    mixed = trial_of(trial, student, case.teacher)
    if not everything_varies(mixed.case):
        return
    allowed = 2 * mixed.bound + mixed.input_rounding
    if trial.eps is not None:  # eps / (|a||b| + eps), and |a| = share |b|
        rows, columns = (released_loss_of_equals(math.sqrt(share) * q, axis) for axis in (1, 0))
        allowed += case.temperature**2 * (case.inter_weight * rows + case.intra_weight * columns)
    assert abs(mixed.value) <= allowed


def rare_classes_count_as_much_scale_free(trial: Trial) -> None:
    # A class far below the others leaves their probabilities alone but for 2^-k; its own column is
    # scaled as a whole, which no correlation sees.
    if trial.eps is not None or trial.place.dtype is not trial.place.computed_in:
        return  # half precision has no digits left for logits that are so far away
    case = trial.case
    rare = np.zeros(case.student.shape[1])
    rare[0] = case.temperature * (-70.0 - trial.seed % 61)
    once, further = (
        trial_of(trial, case.student + k * rare, case.teacher + k * rare, inter_weight=0.0)
        for k in (1, 2)
    )
    off = abs(once.value - further.value)
    assert off <= once.bound + further.bound + once.input_rounding + further.input_rounding


def loss_tends_to_its_scale_as_temperature_grows(trial: Trial) -> None:
    case = trial.case
    hot = trial_of(trial, case.student, case.teacher, temperature=1e8)
    assert abs(hot.found.loss.item() - hot.case.scale) <= 1e-6 * hot.case.scale + hot.bound
    assert hot.gradient.isfinite().all()


def bare_correlation_tends_to_that_of_centred_logits(trial: Trial) -> None:
    # Bare, with eps=0, the difference is O(1 / tau). With eps=None everything varies by less than
    # 0.1 % at such a temperature; where it varies by more, SciPy's correlation is the test.
    s, t = (x - x.mean(axis=1, keepdims=True) for x in (trial.case.student, trial.case.teacher))
    if min(np.linalg.norm(x - x.mean(0), axis=0).min() for x in (s, t)) <= 0.2:
        return
    if min(np.linalg.norm(x, axis=1).min() for x in (s, t)) <= 0.2:
        return
    size = np.abs(trial.case.student).max() + np.abs(trial.case.teacher).max()
    for tau in (1e4, 1e6):
        if trial.place.computed_in is torch.float32 and tau > 1e4:
            continue  # probabilities that differ in the sixth digit have one digit left
        for weights, axis in (((1.0, 0.0), 1), ((0.0, 1.0), 0)):
            options = dict(zip(("inter_weight", "intra_weight"), weights, strict=True))
            case = Logits(trial.case.student, trial.case.teacher, tau, **options)
            limit = 1 - truth.released_rho(s, t, axis, 0.0).mean()
            with np.errstate(divide="ignore", invalid="ignore"):  # of what pads a tile
                value = Trial(trial.place, case, 0.0).value / tau**2
            assert abs(value - limit) <= 10 * size**2 / tau + bound(case, 0.0, trial.place) / tau**2


def loss_vanishes_and_probabilities_are_one_hot_as_temperature_falls(trial: Trial) -> None:
    sides, tau = (trial.case.student, trial.case.teacher), 1e-4
    if min(np.diff(np.sort(x, axis=1)[:, -2:]).min() for x in sides) <= 1e-2:
        return
    classes = trial.case.student.shape[1]
    hot_s, hot_t = (np.eye(classes)[x.argmax(axis=1)] for x in sides)
    cold = trial_of(trial, *sides, temperature=tau, inter_weight=1.0, intra_weight=0.0)
    expected = 1 - truth.released_rho(hot_s, hot_t, 1, 0.0).mean()
    assert cold.value / tau**2 == pytest.approx(expected, abs=1e-6)
    assert cold.gradient.isfinite().all()
    cold = trial_of(trial, *sides, temperature=tau, inter_weight=0.0, intra_weight=1.0)
    assert cold.gradient.isfinite().all()
    if trial.eps is not None:
        rho = truth.released_rho(hot_s, hot_t, 0, trial.eps).mean()
        assert cold.value / tau**2 == pytest.approx(1 - rho, abs=1e-6)


def two_items_or_two_classes_correlate_fully(trial: Trial) -> None:
    for axis, weights in ((1, (1.0, 0.0)), (0, (0.0, 1.0))):
        sides = (trial.case.student, trial.case.teacher)
        student, teacher = (x[:, :2] if axis else x[:2] for x in sides)
        options = dict(zip(("inter_weight", "intra_weight"), weights, strict=True))
        tau = min(max(trial.case.temperature, 0.5), 2.0)
        _assert_full_correlation(
            trial_of(trial, student, teacher, temperature=tau, **options), axis
        )


def _assert_full_correlation(trial: Trial, axis: int) -> None:
    case, eps = trial.case, trial.eps
    p, q = (truth.probabilities(x, case.temperature) for x in (case.student, case.teacher))
    product = np.diff(p, axis=axis) * np.diff(q, axis=axis) / 2  # <a, b>; |a||b| is its size
    # Clear of 0 / 0 in either mode: else the spike at equal probabilities begins.
    if not (everything_varies(case) if eps is None else (np.abs(product) > 1e-5).all()):
        return
    expected = case.temperature**2 * (1 - np.sign(product)).mean()
    off, slope = trial.bound, trial.gradient_bound
    if eps is not None:  # rho = +-n / (n + eps): short of 1 by eps / n, and so is its slope
        off += case.temperature**2 * (eps / np.abs(product)).max()
        slope += tolerances.dist_gradient_size(case, eps) * (eps / np.abs(product)).max()
    assert abs(trial.found.loss.item() - expected) <= off
    assert trial.gradient.norm().item() <= slope + trial.lost(trial.gradient)


OF_VARIED_LOGITS = (
    loss_of_opposite_probabilities_reaches_the_upper_bound,
    loss_is_zero_for_a_teacher_mixed_with_uniform,
    rare_classes_count_as_much_scale_free,
    loss_tends_to_its_scale_as_temperature_grows,
    bare_correlation_tends_to_that_of_centred_logits,
    loss_vanishes_and_probabilities_are_one_hot_as_temperature_falls,
    two_items_or_two_classes_correlate_fully,
)


@PLACES
@given(case=strategies.varied_logits(), seed=strategies.seeds, eps=DEFINITIONS)
def test_varied_logits(place: Place, case: Logits, seed: int, eps: float | None) -> None:
    trial = Trial(place, case, eps, seed=seed)
    for invariant in OF_VARIED_LOGITS if place.tries(seed) else ():
        invariant(trial)


# --- equal and constant logits, one or two of a kind ----------------------------------------------


def equal_logits_give_the_share_of_eps_or_zero(trial: Trial) -> None:
    case = trial.case
    equal = trial_of(trial, case.student, case.student)
    if trial.eps is not None:
        p = truth.probabilities(equal.case.student, case.temperature)
        rows, columns = (released_loss_of_equals(p, axis) for axis in (1, 0))
        expected = case.temperature**2 * (case.inter_weight * rows + case.intra_weight * columns)
        assert abs(equal.found.loss.item() - expected) <= 2 * equal.bound
    elif everything_varies(equal.case):
        u = trial.place.unit
        assert abs(equal.found.loss.item()) <= 8 * u * case.scale
        least = 8 * u * tolerances.dist_gradient_size(equal.case, None)
        assert equal.gradient.abs().max().item() <= least + equal.lost(equal.gradient)


def a_constant_student_gets_a_small_gradient_scale_free(trial: Trial) -> None:
    # At an exact constant the slope is 1 / (0.1 |p|): a zero-initialised head takes measured steps.
    if trial.eps is not None:
        return
    case, (items, classes) = trial.case, trial.case.student.shape
    teacher = trial.rng.normal(size=(items, classes))
    constant = trial_of(trial, np.full_like(teacher, case.student[0, 0]), teacher)
    rows = case.inter_weight / math.sqrt(items * classes)
    columns = math.sqrt(2 / items) * case.intra_weight
    largest = case.temperature / CONSTANT_GRADIENT_LIKE * (rows + columns)
    allowed = largest * (1 + 1e-3) + constant.lost(constant.gradient)
    assert constant.gradient.norm().item() <= allowed


def constant_vectors_correlate_with_nothing_scale_free(trial: Trial) -> None:
    if trial.eps is not None:
        return
    student, allowed = trial.student, 8 * trial.place.unit * trial.case.temperature**2
    varied = torch.tensor(trial.rng.normal(size=student.shape)).to(student)
    for constant, weight in (
        (student[:, :1].expand_as(student), {"inter_weight": 1.0, "intra_weight": 0.0}),
        (student[:1].expand_as(student), {"inter_weight": 0.0, "intra_weight": 1.0}),
    ):
        for pair in ((constant, varied), (varied, constant)):
            loss = trial.loss(*pair, **weight)
            assert abs(loss - trial.case.temperature**2) <= allowed


def one_item_leaves_a_constant_intra_class_term(trial: Trial) -> None:
    case = trial.case
    one = trial_of(trial, case.student[:1], case.teacher[:1], inter_weight=0.0, intra_weight=1.0)
    loss = one.found.loss.item()
    assert loss == pytest.approx(case.temperature**2, rel=8 * trial.place.unit)
    assert loss == case.temperature**2 or not trial.is_exact
    assert (one.gradient == 0).all()


def one_class_leaves_a_constant_loss(trial: Trial) -> None:
    case = trial.case
    one = trial_of(trial, case.student[:, :1], case.teacher[:, :1])
    assert one.found.loss.item() == pytest.approx(case.scale, rel=8 * trial.place.unit)
    assert (one.gradient == 0).all()


OF_CONSTANTS = (
    equal_logits_give_the_share_of_eps_or_zero,
    a_constant_student_gets_a_small_gradient_scale_free,
    constant_vectors_correlate_with_nothing_scale_free,
    one_item_leaves_a_constant_intra_class_term,
    one_class_leaves_a_constant_loss,
)


@PLACES
@given(case=strategies.logits(), seed=strategies.seeds, eps=DEFINITIONS)
def test_equal_and_constant_logits(
    place: Place, case: Logits, seed: int, eps: float | None
) -> None:
    trial = Trial(place, case, eps, seed=seed)
    for invariant in OF_CONSTANTS if place.tries(seed) else ():
        invariant(trial)


# --- logits of any size ---------------------------------------------------------------------------


@PLACES
@given(
    case=strategies.logits(scale=(1e-30, 1e4), temperatures=(0.01, 1.0, 4.0, 1e4)),
)
def test_scale_free_gradient_is_bounded_whatever_the_logits(place: Place, case: Logits) -> None:
    # Per correlation at most 3 / (floor |p|) of its vector p, and a little for |p| itself. Through
    # the softmax that is 3 / (floor tau) for a row, whose Jacobian is no larger than |p|, and
    # sqrt(2) times it for a column, measured in units of its largest entry.
    largest = np.finfo(np.float16).max if place.dtype is torch.float16 else np.inf
    student, teacher = (np.clip(x, -largest, largest) for x in (case.student, case.teacher))
    trial = Trial(place, Logits(student, teacher, **case.options), None)
    steepest = 3 * (1 + RELATIVE_FLOOR) / RELATIVE_FLOOR
    rows = case.inter_weight / math.sqrt(len(case.student))
    most = case.temperature * steepest * (rows + math.sqrt(2) * case.intra_weight)
    assert trial.gradient.norm().item() <= most * (1 + 1e-3) + trial.lost(trial.gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(case=strategies.varied_logits(), seed=strategies.seeds)
def test_bare_correlation_sees_neither_scale_nor_offset_but_the_sign(
    dtype: torch.dtype, case: Logits, seed: int
) -> None:
    """Of plain vectors, with ``eps=0`` and scale-free: rho(a x + c, y) = sign(a) rho(x, y)."""
    rng = np.random.default_rng(seed)
    student, teacher = case.tensors(dtype)
    factor, offset = 2.0 ** float(rng.integers(-3, 4)), float(rng.normal())
    for dim in (0, 1):
        assume(all((np.std(x, axis=dim) > 0.1).all() for x in (case.student, case.teacher)))
        for eps in (0.0, None):
            rho = pearson(student, teacher, dim=dim, eps=eps)
            # An offset is rounded with what it is added to, and taken off again.
            size = (student.abs().max() * factor + abs(offset)) / (0.1 * factor)
            allowed = 16 * tolerances.UNIT[dtype] * (1 + size)
            for sign in (1.0, -1.0):
                moved = pearson(sign * factor * student + offset, teacher, dim=dim, eps=eps)
                assert ((moved - sign * rho).abs() <= allowed).all()
