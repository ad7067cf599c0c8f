"""DIST loss: every invariant, with ``eps=1e-8`` (released) and ``eps=None`` (scale-free)."""

import copy
import math
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from telme_kd import DISTLoss
from telme_kd.functional import dist_loss, inter_class_loss, intra_class_loss
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR
from tests.helpers import golden, strategies, tolerances, truth
from tests.helpers.strategies import Logits

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

MODES = pytest.mark.parametrize("eps", [1e-8, None], ids=["released", "scale-free"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

U64 = tolerances.UNIT[torch.float64]


def value_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for a copy of the student."""
    student = student.detach().clone().requires_grad_()
    loss = dist_loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def everything_varies(case: Logits) -> bool:
    """Every row and column of both sides by clearly more than the relative floor."""
    for logits in (case.student, case.teacher):
        p = truth.probabilities(logits, case.temperature)
        for axis in (0, 1):
            centred = np.linalg.norm(p - p.mean(axis, keepdims=True), axis=axis)
            if (centred < 1.01 * RELATIVE_FLOOR * np.linalg.norm(p, axis=axis)).any():
                return False
    return True


def swapped(case: Logits) -> Logits:
    return Logits(
        case.teacher, case.student, case.temperature, case.inter_weight, case.intra_weight
    )


# --- golden values --------------------------------------------------------------------------------

# Case 2 (two items, two classes): the gradient is eps over small numbers, its columns' condition
# 630; measured agreement 1.1e-11. Case 3 (one item): its columns are constant. tests/golden has the
# table. All others have conditions below 22.
ILL_CONDITIONED = {(2, 2), (1, 7)}


def assert_golden(case: golden.Case) -> None:
    loss, gradient = value_and_gradient(
        torch.tensor(case["student"]),
        torch.tensor(case["teacher"]),
        temperature=float(case["temperature"]),
        inter_weight=float(case["inter_weight"]),
        intra_weight=float(case["intra_weight"]),
        eps=1e-8,
    )
    ill = case["student"].shape in ILL_CONDITIONED
    tolerance = tolerances.GOLDEN if ill else tolerances.GOLDEN_WELL_CONDITIONED
    assert abs(loss.item() - case["loss"]) <= tolerance * abs(case["loss"])
    error = np.linalg.norm(gradient.numpy() - case["student_grad"])
    assert error <= tolerance * np.linalg.norm(case["student_grad"])


@pytest.mark.parametrize("case", golden.cases("dist"))
def test_golden_values_and_gradients(case: golden.Case) -> None:
    assert_golden(case)


def test_golden_values_and_gradients_of_all_files() -> None:
    for case in golden.load(golden.full_directory(), "dist").values():
        assert_golden(case)


# --- range ----------------------------------------------------------------------------------------


@MODES
@PRECISIONS
@given(case=strategies.logits())
def test_loss_stays_within_its_bounds(case: Logits, dtype: torch.dtype, eps: float | None) -> None:
    loss = dist_loss(*case.tensors(dtype), eps=eps, **case.options)
    u = tolerances.UNIT[dtype]
    assert loss.dtype is dtype
    assert loss.shape == ()
    assert -8 * u * case.scale <= loss.item() <= 2 * case.scale * (1 + 8 * u)


@MODES
@given(case=strategies.varied_logits())
def test_upper_bound_is_reached_by_opposite_probabilities(case: Logits, eps: float | None) -> None:
    # p_t = 2/C - p_s: positive because p_s <= 1/C (1 + small) here
    classes = case.student.shape[1]
    p = 1 / classes + 0.5 / classes * np.tanh(case.student - case.student.mean(1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    q = 2 / classes - p
    assume((q > 0).all())
    case = Logits(np.log(p), np.log(q), 1.0, case.inter_weight, case.intra_weight)
    assume(everything_varies(case))
    loss = dist_loss(*case.tensors(), eps=eps, **case.options)
    rows, columns = (_released_loss_of_equals(p, axis) for axis in (1, 0))
    short = 0.0 if eps is None else case.inter_weight * rows + case.intra_weight * columns
    expected = 2 * case.scale - short
    assert abs(loss.item() - expected) <= tolerances.dist_bound(case, eps, torch.float64)


def _released_loss_of_equals(p: np.ndarray, axis: int) -> float:
    """mean of eps / (|a|^2 + eps): by how much the released correlation of equals misses 1."""
    squared = (p - p.mean(axis, keepdims=True)) ** 2
    return float((1e-8 / (squared.sum(axis) + 1e-8)).mean())


@given(case=strategies.logits())
def test_equal_logits_give_the_share_of_eps_released(case: Logits) -> None:
    case = Logits(
        case.student, case.student, case.temperature, case.inter_weight, case.intra_weight
    )
    p = truth.probabilities(case.student, case.temperature)
    rows, columns = (_released_loss_of_equals(p, axis) for axis in (1, 0))
    expected = case.temperature**2 * (case.inter_weight * rows + case.intra_weight * columns)
    loss = dist_loss(*case.tensors(), eps=1e-8, **case.options)
    assert abs(loss.item() - expected) <= 2 * tolerances.dist_bound(case, 1e-8, torch.float64)


@PRECISIONS
@given(case=strategies.logits(items=(2, 16), classes=(2, 20), scale=(1e-3, 30)))
def test_equal_logits_give_zero_scale_free_where_all_vary(case: Logits, dtype: torch.dtype) -> None:
    case = Logits(
        case.student, case.student, case.temperature, case.inter_weight, case.intra_weight
    ).rounded(dtype)
    assume(everything_varies(case))
    loss, gradient = value_and_gradient(*case.tensors(dtype), **case.options)
    u = tolerances.UNIT[dtype]
    assert abs(loss.item()) <= 8 * u * case.scale
    assert gradient.abs().max().item() <= 8 * u * tolerances.dist_gradient_size(case, None)


@PRECISIONS
@pytest.mark.parametrize("classes", [7, 1000, 50_000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_logits_give_zero_over_any_vocabulary(
    classes: int, temperature: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(4, classes, dtype=dtype, generator=torch.manual_seed(classes))
    loss = dist_loss(logits, logits, temperature=temperature)
    assert abs(loss.item()) <= 8 * tolerances.UNIT[dtype] * 2 * temperature**2


@pytest.mark.parametrize("loss", [inter_class_loss, intra_class_loss])
def test_rounding_below_zero_is_not_hidden(loss: Callable[..., Tensor]) -> None:
    # Clamped, a correlation at its maximum would lose its gradient, and its error its sign.
    generator = torch.manual_seed(0)
    losses = []
    for _ in range(100):
        logits = torch.randn(8, 7, generator=generator)
        losses.append(loss(logits, logits, backend="reference").item())
    assert min(losses) < 0 < max(losses)
    assert max(map(abs, losses)) < 1e-6


@MODES
@given(case=strategies.varied_logits(), share=st.sampled_from([0.05, 0.3, 0.7, 1.0]))
def test_loss_is_zero_for_a_teacher_mixed_with_uniform(
    case: Logits, share: float, eps: float | None
) -> None:
    q = truth.probabilities(case.teacher, case.temperature)
    mixed = share * q + (1 - share) / q.shape[1]
    student = case.temperature * np.log(mixed)
    case = Logits(student, case.teacher, case.temperature, case.inter_weight, case.intra_weight)
    assume(everything_varies(case))
    loss = dist_loss(*case.tensors(), eps=eps, **case.options)
    allowed = tolerances.dist_bound(case, eps, torch.float64)
    if eps is not None:  # eps / (|a||b| + eps), and |a| = share |b|
        rows, columns = (_released_loss_of_equals(math.sqrt(share) * q, axis) for axis in (1, 0))
        allowed += case.temperature**2 * (case.inter_weight * rows + case.intra_weight * columns)
    assert abs(loss.item()) <= allowed


# --- symmetries -----------------------------------------------------------------------------------


@given(case=strategies.logits())
def test_loss_is_symmetric_to_the_bit_released(case: Logits) -> None:
    student, teacher = case.tensors()
    options = {"eps": 1e-8, "backend": "reference", **case.options}
    assert torch.equal(
        dist_loss(student, teacher, **options), dist_loss(teacher, student, **options)
    )


@given(case=strategies.logits())
def test_loss_is_symmetric_scale_free(case: Logits) -> None:
    # Three factors are multiplied from left to right, so the last bits may differ.
    student, teacher = case.tensors()
    forth, back = (
        dist_loss(*pair, **case.options) for pair in ((student, teacher), (teacher, student))
    )
    assert abs(forth - back).item() <= 8 * U64 * case.scale


@MODES
@PRECISIONS
@given(case=strategies.logits(scale=(1e-3, 300)))
def test_doubling_logits_and_temperature_quadruples_the_loss_to_the_bit(
    case: Logits, dtype: torch.dtype, eps: float | None
) -> None:
    student, teacher = case.tensors(dtype)
    options = {**case.options, "eps": eps, "backend": "reference"}
    loss, gradient = value_and_gradient(student, teacher, **options)
    options["temperature"] = 2 * case.temperature
    doubled, doubled_gradient = value_and_gradient(2 * student, 2 * teacher, **options)
    assert torch.equal(doubled, 4 * loss)
    if truth.probabilities(case.student, case.temperature).min() > 1e-9:  # nothing underflows
        assert torch.equal(doubled_gradient, 2 * gradient)


@MODES
@given(case=strategies.dyadic_logits(), seed=strategies.seeds)
def test_shifting_rows_changes_no_bit(case: Logits, seed: int, eps: float | None) -> None:
    student, teacher = case.tensors()
    rng = np.random.default_rng(seed)
    shift, other = (torch.tensor(rng.integers(-9, 10, (len(student), 1)) * 1.0) for _ in "12")
    options = {"eps": eps, "backend": "reference", **case.options}
    before = value_and_gradient(student, teacher, **options)
    after = value_and_gradient(student + shift, teacher + other, **options)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@MODES
@given(case=strategies.logits(), seed=strategies.seeds)
def test_permuting_items_and_classes_permutes_the_gradient(
    case: Logits, seed: int, eps: float | None
) -> None:
    student, teacher = case.tensors()
    items = torch.tensor(strategies.permutations(student.shape[0], seed))
    classes = torch.tensor(strategies.permutations(student.shape[1], seed + 1))
    loss, gradient = value_and_gradient(student, teacher, eps=eps, **case.options)
    permuted_loss, permuted_gradient = value_and_gradient(
        student[items][:, classes], teacher[items][:, classes], eps=eps, **case.options
    )
    bound = tolerances.dist_bound(case, eps, torch.float64)
    assert abs(loss - permuted_loss).item() <= bound
    error = (gradient[items][:, classes] - permuted_gradient).abs().max().item()
    assert error <= tolerances.dist_gradient_bound(case, eps, torch.float64)


@MODES
@given(case=strategies.logits())
def test_duplicating_the_batch_keeps_the_loss(case: Logits, eps: float | None) -> None:
    student, teacher = case.tensors()
    once = dist_loss(student, teacher, eps=eps, **case.options)
    twice = dist_loss(
        torch.cat((student, student)), torch.cat((teacher, teacher)), eps=eps, **case.options
    )
    allowed = 2 * tolerances.dist_bound(case, eps, torch.float64)
    if eps is not None:
        p, q = (truth.probabilities(x, case.temperature) for x in (case.student, case.teacher))
        a, b = (np.linalg.norm(x - x.mean(0), axis=0) for x in (p, q))
        share = (eps / (2 * (a * b + eps))).mean()
        allowed += case.temperature**2 * case.intra_weight * share
    assert abs(twice - once).item() <= allowed


@given(case=strategies.varied_logits(), exponent=st.integers(-60, 0))
def test_rare_classes_count_as_much_scale_free(case: Logits, exponent: int) -> None:
    # A class far below the others leaves their probabilities alone but for 2^-k; its own column is
    # scaled as a whole, which no correlation sees.
    student, teacher = case.tensors()
    rare = torch.zeros(student.shape[1], dtype=torch.float64)
    rare[0] = case.temperature * (-70 + exponent)
    column = {"temperature": case.temperature, "inter_weight": 0.0, "intra_weight": 1.0}
    once = dist_loss(student + rare, teacher + rare, **column)
    further = dist_loss(student + 2 * rare, teacher + 2 * rare, **column)
    case = Logits((student + 2 * rare).numpy(), (teacher + 2 * rare).numpy(), **column)
    assert abs(once - further).item() <= tolerances.dist_bound(case, None, torch.float64)


@MODES
@given(case=strategies.varied_logits())
def test_loss_is_the_sum_of_its_terms(case: Logits, eps: float | None) -> None:
    tensors, temperature = case.tensors(), case.temperature
    inter = inter_class_loss(*tensors, temperature=temperature, eps=eps)
    intra = intra_class_loss(*tensors, temperature=temperature, eps=eps)
    both = case.inter_weight * inter + case.intra_weight * intra
    loss = dist_loss(*tensors, eps=eps, **case.options)
    # A term alone may be computed another way than beside one with a vector that hardly varies.
    assert abs(loss - both).item() <= 2 * tolerances.dist_bound(case, eps, torch.float64)
    assert torch.equal(inter, dist_loss(*tensors, temperature=temperature, eps=eps, intra_weight=0))
    assert torch.equal(intra, dist_loss(*tensors, temperature=temperature, eps=eps, inter_weight=0))


def test_inter_class_term_treats_items_apart_and_intra_class_term_does_not() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    halves = [(student[:3], teacher[:3]), (student[3:], teacher[3:])]
    inter = sum(inter_class_loss(*half) for half in halves) / 2
    intra = sum(intra_class_loss(*half) for half in halves) / 2
    assert abs(inter - inter_class_loss(student, teacher)) < 1e-15
    assert abs(intra - intra_class_loss(student, teacher)) > 1e-2


# --- gradient -------------------------------------------------------------------------------------


@MODES
@PRECISIONS
@given(case=strategies.logits())
def test_gradient_rows_sum_to_zero(case: Logits, dtype: torch.dtype, eps: float | None) -> None:
    case = case.rounded(dtype)
    _, gradient = value_and_gradient(*case.tensors(dtype), eps=eps, **case.options)
    # The softmax's backward takes p_j times one sum off each of C entries; all are of this size.
    size = tolerances.dist_gradient_size(case, eps) + tolerances.dist_gradient_bound(
        case, eps, dtype
    )
    allowed = tolerances.units("dist_loss gradient", dtype) * size * math.sqrt(gradient.shape[1])
    assert gradient.sum(dim=1).abs().max().item() <= allowed


@MODES
@PRECISIONS
@given(case=strategies.logits())
def test_gradient_is_bounded(case: Logits, dtype: torch.dtype, eps: float | None) -> None:
    case = case.rounded(dtype)
    _, gradient = value_and_gradient(*case.tensors(dtype), eps=eps, **case.options)
    rounding = tolerances.dist_gradient_bound(case, eps, dtype)
    norm = torch.linalg.vector_norm(gradient).item()
    assert norm <= tolerances.dist_gradient_size(case, eps) + rounding


@PRECISIONS
@given(case=strategies.logits(scale=(1e-30, 1e4), temperatures=(0.01, 1.0, 4.0, 1e4)))
def test_scale_free_gradient_is_bounded_whatever_the_logits(
    case: Logits, dtype: torch.dtype
) -> None:
    # Per correlation at most 3 / (floor |p|) of its vector p, and a little for |p| itself. Through
    # the softmax that is 3 / (floor tau) for a row, whose Jacobian is no larger than |p|, and
    # sqrt(2) times it for a column, measured in units of its largest entry.
    steepest = 3 * (1 + RELATIVE_FLOOR) / RELATIVE_FLOOR
    rows = case.inter_weight / math.sqrt(len(case.student))
    bound = case.temperature * steepest * (rows + math.sqrt(2) * case.intra_weight)
    _, gradient = value_and_gradient(*case.tensors(dtype), **case.options)
    assert torch.linalg.vector_norm(gradient).item() <= bound * (1 + 1e-3)


@PRECISIONS
@given(case=strategies.logits(structures=("constant",)), seed=strategies.seeds)
def test_scale_free_gradient_of_a_constant_student_is_small(
    case: Logits, seed: int, dtype: torch.dtype
) -> None:
    # At an exact constant the slope is 1 / (0.1 |p|): a zero-initialised head takes measured steps.
    teacher = np.random.default_rng(seed).normal(size=case.student.shape)
    case = Logits(case.student, teacher, case.temperature, case.inter_weight, case.intra_weight)
    items, classes = teacher.shape
    rows = case.inter_weight / math.sqrt(items * classes)
    columns = math.sqrt(2 / items) * case.intra_weight
    bound = case.temperature / CONSTANT_GRADIENT_LIKE * (rows + columns)
    _, gradient = value_and_gradient(*case.tensors(dtype), **case.options)
    assert torch.linalg.vector_norm(gradient).item() <= bound * (1 + 1e-3)


@PRECISIONS
def test_zero_initialised_head_gets_a_bounded_gradient_and_a_released_one_of_millions(
    dtype: torch.dtype,
) -> None:
    student = torch.zeros(4, 7, dtype=dtype)
    teacher = torch.randn(4, 7, dtype=dtype, generator=torch.manual_seed(0))
    _, released = value_and_gradient(student, teacher, temperature=4.0, eps=1e-8)
    _, ours = value_and_gradient(student, teacher, temperature=4.0)
    assert 1e5 < released.abs().max().item() < 1e8
    assert 0.1 < ours.abs().max().item() < 20.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_initialised_head_trains_with_plain_sgd_and_no_clipping(dtype: torch.dtype) -> None:
    generator = torch.manual_seed(0)
    features = torch.randn(32, 16, generator=generator)
    teacher = features @ torch.randn(16, 7, generator=generator)
    head = torch.nn.Linear(16, 7)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = dist_loss(head(features).to(dtype), teacher.to(dtype), temperature=4.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(32.0)  # S: nothing is known yet
    assert losses[-1] < 0.05 * losses[0]


@MODES
@given(
    case=strategies.logits(items=(1, 4), classes=(1, 5), scale=(0.01, 30), weights=(0.5, 1.0, 2.0))
)
def test_euler_relation_holds_in_temperature(case: Logits, eps: float | None) -> None:
    student, teacher = (tensor.requires_grad_() for tensor in case.tensors())
    loss = dist_loss(student, teacher, eps=eps, **case.options)
    to_student, to_teacher = torch.autograd.grad(loss, (student, teacher))
    homogeneity = ((to_student * student).sum() + (to_teacher * teacher).sum()).item()

    def at(temperature: mpmath.mpf) -> mpmath.mpf:
        return truth.mp_dist(
            truth.matrix(case.student),
            truth.matrix(case.teacher),
            temperature=temperature,
            inter_weight=case.inter_weight,
            intra_weight=case.intra_weight,
            eps=eps,
            floor=RELATIVE_FLOOR,
            pull=CONSTANT_GRADIENT_LIKE,
        )

    tau, step = mpmath.mpf(case.temperature), mpmath.mpf(10) ** -20
    slope = float((at(tau + step) - at(tau - step)) / (2 * step))
    expected = 2 * loss.item() / case.temperature - homogeneity / case.temperature
    allowed = 2 * tolerances.dist_bound(case, eps, torch.float64) + sum(
        tolerances.dist_gradient_bound(side, eps, torch.float64) * np.abs(side.student).sum()
        for side in (case, swapped(case))
    )
    assert abs(slope - expected) <= allowed / case.temperature


@MODES
@given(case=strategies.logits(weights=(0.5, 1.0, 2.0)))
def test_teacher_gets_a_gradient_only_if_it_requires_one(case: Logits, eps: float | None) -> None:
    student, teacher = case.tensors()
    student.requires_grad_()
    dist_loss(student, teacher, eps=eps, **case.options).backward()
    alone = student.grad.clone()
    assert teacher.grad is None
    student.grad = None
    teacher.requires_grad_()
    dist_loss(student, teacher, eps=eps, **case.options).backward()
    assert torch.equal(student.grad, alone)
    _, mirrored = value_and_gradient(teacher.detach(), student.detach(), eps=eps, **case.options)
    bound = tolerances.dist_gradient_bound(swapped(case), eps, torch.float64)
    assert (teacher.grad - mirrored).abs().max().item() <= bound


@MODES
def test_upstream_gradient_is_used(eps: float | None) -> None:
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    _, gradient = value_and_gradient(student, teacher, eps=eps)
    student.requires_grad_()
    uses: list[tuple[float, Callable[[Tensor], Tensor]]] = [
        (2.0, lambda loss: 2 * loss),
        (8.0, lambda loss: loss.expand(8).sum()),
        (-0.5, lambda loss: torch.stack((loss, loss))[::2].squeeze() * -0.5),
        (0.0, lambda loss: 0 * loss),
    ]
    for factor, use in uses:
        (scaled,) = torch.autograd.grad(use(dist_loss(student, teacher, eps=eps)), student)
        assert torch.equal(scaled, factor * gradient)


def test_second_derivative_is_never_silently_wrong_at_a_constant_student() -> None:
    student = torch.zeros(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    loss = dist_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.isfinite().all()


# --- small batches and few classes ----------------------------------------------------------------


@MODES
@given(case=strategies.logits(items=(1, 1)))
def test_one_item_leaves_a_constant_intra_class_term(case: Logits, eps: float | None) -> None:
    loss, gradient = value_and_gradient(
        *case.tensors(), temperature=case.temperature, inter_weight=0.0, eps=eps
    )
    assert loss.item() == pytest.approx(case.temperature**2, rel=8 * U64)
    assert (gradient == 0).all()
    definition = dist_loss(
        *case.tensors(),
        temperature=case.temperature,
        inter_weight=0.0,
        eps=eps,
        backend="reference",
    )
    assert definition.item() == case.temperature**2


@MODES
@given(case=strategies.logits(classes=(1, 1)))
def test_one_class_leaves_a_constant_loss(case: Logits, eps: float | None) -> None:
    loss, gradient = value_and_gradient(*case.tensors(), eps=eps, **case.options)
    assert loss.item() == pytest.approx(case.scale, rel=8 * U64)
    assert (gradient == 0).all()


@MODES
@pytest.mark.parametrize("axis", ["items", "classes"])
@given(data=st.data())
def test_two_of_either_correlate_fully(data: st.DataObject, axis: str, eps: float | None) -> None:
    other = "classes" if axis == "items" else "items"
    sizes = {axis: (2, 2), other: (1, 4)}
    case = data.draw(
        strategies.logits(
            **sizes, scale=(1, 4), structures=strategies.VARIED, temperatures=(1.0, 2.0)
        )
    )
    weights = {"inter_weight": float(axis == "classes"), "intra_weight": float(axis == "items")}
    case = Logits(case.student, case.teacher, case.temperature, **weights)
    along = int(axis == "classes")
    p, q = (truth.probabilities(x, case.temperature) for x in (case.student, case.teacher))
    steps = [np.diff(x, axis=along) for x in (p, q)]
    product = steps[0] * steps[1] / 2  # <a, b>; |a||b| is its size
    # Clear of 0 / 0 in either mode: else the spike at equal probabilities begins.
    assume((np.abs(product) > 1e-5).all() if eps is not None else everything_varies(case))
    expected = case.temperature**2 * (1 - np.sign(product)).mean()
    loss, gradient = value_and_gradient(*case.tensors(), eps=eps, **case.options)
    off = tolerances.dist_bound(case, eps, torch.float64)
    slope = tolerances.dist_gradient_bound(case, eps, torch.float64)
    if eps is not None:  # rho = +-n / (n + eps): short of 1 by eps / n, and so is its slope
        off += case.temperature**2 * (eps / np.abs(product)).max()
        slope += tolerances.dist_gradient_size(case, eps) * (eps / np.abs(product)).max()
    assert abs(loss.item() - expected) <= off
    assert torch.linalg.vector_norm(gradient).item() <= slope


@PRECISIONS
@given(case=strategies.logits(structures=("constant", "constant rows", "constant columns")))
def test_constant_vectors_have_no_correlation_scale_free(case: Logits, dtype: torch.dtype) -> None:
    student, _ = case.tensors(dtype)
    rng = np.random.default_rng(0)
    varied = torch.tensor(rng.normal(size=student.shape), dtype=dtype)
    u, square = tolerances.UNIT[dtype], case.temperature**2
    constant_rows = student[:, :1].expand_as(student)
    constant_columns = student[:1].expand_as(student)
    inter = inter_class_loss(constant_rows, varied, temperature=case.temperature)
    intra = intra_class_loss(constant_columns, varied, temperature=case.temperature)
    assert abs(inter.item() - square) <= 8 * u * square
    assert abs(intra.item() - square) <= 8 * u * square
    assert abs(inter_class_loss(varied, constant_rows).item() - 1) <= 8 * u
    assert abs(intra_class_loss(varied, constant_columns).item() - 1) <= 8 * u


# --- extreme temperatures and logits --------------------------------------------------------------


@MODES
@given(case=strategies.varied_logits())
def test_loss_tends_to_its_scale_as_temperature_grows(case: Logits, eps: float | None) -> None:
    case = Logits(case.student, case.teacher, 1e8, case.inter_weight, case.intra_weight)
    loss, gradient = value_and_gradient(*case.tensors(), eps=eps, **case.options)
    assert loss.item() == pytest.approx(case.scale, rel=1e-6)
    assert gradient.isfinite().all()


@given(case=strategies.varied_logits())
def test_bare_correlation_tends_to_that_of_centred_logits(case: Logits) -> None:
    # Bare, with eps=0, the difference is O(1 / tau). With eps=None everything varies by less than
    # 0.1 % at such a temperature; where it varies by more, SciPy's correlation is the test.
    s, t = (x - x.mean(axis=1, keepdims=True) for x in (case.student, case.teacher))
    assume(all(np.linalg.norm(x - x.mean(0), axis=0).min() > 0.2 for x in (s, t)))
    assume(all(np.linalg.norm(x, axis=1).min() > 0.2 for x in (s, t)))
    student, teacher = case.tensors()
    size = (student.abs().max() + teacher.abs().max()).item()
    for tau in (1e4, 1e6):
        for loss, axis in ((inter_class_loss, 1), (intra_class_loss, 0)):
            limit = 1 - truth.released_rho(s, t, axis, 0.0).mean()
            value = loss(student, teacher, temperature=tau, eps=0.0).item() / tau**2
            assert abs(value - limit) <= 10 * size**2 / tau


@MODES
@given(case=strategies.varied_logits())
def test_loss_vanishes_and_probabilities_are_one_hot_as_temperature_falls(
    case: Logits, eps: float | None
) -> None:
    gaps = [np.diff(np.sort(x, axis=1)[:, -2:]).min() for x in (case.student, case.teacher)]
    assume(min(gaps) > 1e-2)
    tau, classes = 1e-4, case.student.shape[1]
    hot_s, hot_t = (np.eye(classes)[x.argmax(axis=1)] for x in (case.student, case.teacher))
    loss = inter_class_loss(*case.tensors(), temperature=tau, eps=eps).item()
    assert loss / tau**2 == pytest.approx(
        1 - truth.released_rho(hot_s, hot_t, 1, 0.0).mean(), abs=1e-7
    )
    if eps is not None:
        loss = intra_class_loss(*case.tensors(), temperature=tau, eps=eps).item()
        rho = truth.released_rho(hot_s, hot_t, 0, eps).mean()
        assert loss / tau**2 == pytest.approx(1 - rho, abs=1e-7)
    _, gradient = value_and_gradient(*case.tensors(), temperature=tau, eps=eps)
    assert gradient.isfinite().all()


def test_columns_of_1e_25_correlate_in_float32_scale_free() -> None:
    generator = torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 40, generator=generator)
    student[:, 20:] -= 57.5  # e^-57.5 = 1e-25: squares vanish in float32
    teacher[:, 20:] -= 57.5
    case = Logits(student.double().numpy(), teacher.double().numpy(), 1.0, 1.0, 1.0)
    assert truth.probabilities(case.student, 1.0)[:, 20:].max() < 1e-24
    expected = truth.mp_dist(
        truth.matrix(case.student),
        truth.matrix(case.teacher),
        eps=None,
        floor=RELATIVE_FLOOR,
        pull=CONSTANT_GRADIENT_LIKE,
        **case.options,
    )
    loss, gradient = value_and_gradient(student, teacher)
    bound = tolerances.dist_bound(case, None, torch.float32)
    assert abs(loss.item() - float(expected)) <= bound
    assert (gradient[:, 20:] != 0).all()
    exact = value_and_gradient(student.double(), teacher.double())[1]
    error = (gradient - exact).abs().max().item()
    assert error <= tolerances.dist_gradient_bound(case, None, torch.float32)


@MODES
@PRECISIONS
@given(case=strategies.logits(items=(2, 8), classes=(2, 8)), seed=strategies.seeds)
def test_classes_at_minus_infinity_are_left_out(
    case: Logits, seed: int, dtype: torch.dtype, eps: float | None
) -> None:
    student, teacher = case.tensors(dtype)
    rng = np.random.default_rng(seed)
    for logits in (student, teacher):
        out = torch.tensor(rng.random(logits.shape) < 0.3)
        out[:, int(rng.integers(logits.shape[1]))] = False  # never a whole row
        logits[out] = -math.inf
    loss, gradient = value_and_gradient(student, teacher, eps=eps, **case.options)
    u = tolerances.UNIT[dtype]
    assert -8 * u * case.scale <= loss.item() <= 2 * case.scale * (1 + 8 * u)
    assert gradient.isfinite().all()
    assert (gradient[student == -math.inf] == 0).all()


@MODES
def test_class_at_minus_infinity_everywhere_is_a_constant_column(eps: float | None) -> None:
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    fewer = [
        inter_class_loss(student, teacher, eps=eps),
        intra_class_loss(student, teacher, eps=eps),
    ]
    out = torch.full((5, 1), -math.inf, dtype=torch.float64)
    more = [torch.cat((x, out), dim=1) for x in (student, teacher)]
    intra = intra_class_loss(*more, eps=eps)
    assert intra.item() == pytest.approx((4 * fewer[1].item() + 1) / 5, rel=1e-12)
    assert value_and_gradient(*more, eps=eps)[1].isfinite().all()


@MODES
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", [dist_loss, inter_class_loss, intra_class_loss])
def test_nan_and_infinity_are_never_laundered(
    loss: Callable[..., Tensor], side: str, value: float, eps: float | None
) -> None:
    pair = dict(zip(("student", "teacher"), torch.randn(2, 3, 5, 4), strict=True))
    for position in ((0, 0, 0), (2, 4, 3)):
        broken = {name: tensor.clone() for name, tensor in pair.items()}
        broken[side][position] = value
        tensors = [tensor.requires_grad_() for tensor in broken.values()]
        result = loss(*tensors, eps=eps)
        assert result.isnan()
        result.backward()
        assert all(tensor.grad.isnan().any() for tensor in tensors)


@MODES
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_row_of_minus_infinity_gives_nan(side: int, eps: float | None) -> None:
    pair = torch.randn(2, 5, 4)
    pair[side, 2] = -math.inf
    assert dist_loss(*pair, eps=eps).isnan()


@MODES
def test_huge_logits_stay_finite(eps: float | None) -> None:
    student, teacher = 1e30 * torch.randn(2, 5, 4, generator=torch.manual_seed(0))
    loss, gradient = value_and_gradient(student, teacher, eps=eps)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# --- masks and shapes -----------------------------------------------------------------------------


def _masked(case: Logits, seed: int, junk: float) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = case.tensors()
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.random(len(student)) < 0.6)
    mask[int(rng.integers(len(mask)))] = True
    student[~mask], teacher[~mask] = junk, -junk
    return student, teacher, mask


JUNK = st.sampled_from([0.0, 7.0, 1e300, math.inf, -math.inf, math.nan])


@MODES
@given(case=strategies.logits(), seed=strategies.seeds, junk=JUNK)
def test_masked_items_are_absent(case: Logits, seed: int, junk: float, eps: float | None) -> None:
    student, teacher, mask = _masked(case, seed, junk)
    kept = Logits(student[mask].numpy(), teacher[mask].numpy(), **case.options)
    loss, gradient = value_and_gradient(student, teacher, mask=mask, eps=eps, **case.options)
    expected, expected_gradient = value_and_gradient(*kept.tensors(), eps=eps, **case.options)
    assert abs(loss - expected).item() <= tolerances.dist_bound(kept, eps, torch.float64)
    error = (gradient[mask] - expected_gradient).abs().max().item()
    assert error <= tolerances.dist_gradient_bound(kept, eps, torch.float64)
    assert (gradient[~mask] == 0).all()


@MODES
@given(case=strategies.logits(), seed=strategies.seeds, junk=JUNK)
def test_what_masked_items_hold_changes_no_bit(
    case: Logits, seed: int, junk: float, eps: float | None
) -> None:
    plain = _masked(case, seed, 0.0)
    junky = _masked(case, seed, junk)
    results = [
        value_and_gradient(student, teacher, mask=mask, eps=eps, **case.options)
        for student, teacher, mask in (plain, junky)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_masked_items_are_absent_with_eps_zero() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    mask = torch.tensor([True, True, False, True, True, False])
    loss, gradient = value_and_gradient(student, teacher, mask=mask, eps=0.0)
    expected, expected_gradient = value_and_gradient(student[mask], teacher[mask], eps=0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient[mask], expected_gradient, rtol=1e-9, atol=1e-12)


@MODES
@given(case=strategies.logits(), junk=JUNK)
def test_all_masked_gives_zero_and_no_gradient(
    case: Logits, junk: float, eps: float | None
) -> None:
    student, teacher = case.tensors()
    student[0] = junk
    none = torch.zeros(len(student), dtype=torch.bool)
    loss, gradient = value_and_gradient(student, teacher, mask=none, eps=eps, **case.options)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_all_masked_gives_zero_and_no_gradient_with_eps_zero() -> None:
    student, teacher = torch.randn(2, 6, 5)
    none = torch.zeros(6, dtype=torch.bool)
    loss, gradient = value_and_gradient(student, teacher, mask=none, eps=0.0)
    assert loss.item() == 0
    assert (gradient == 0).all()


@MODES
@given(case=strategies.logits())
def test_mask_that_keeps_all_is_no_mask(case: Logits, eps: float | None) -> None:
    student, teacher = case.tensors()
    everything = torch.ones(len(student), dtype=torch.bool)
    masked = dist_loss(student, teacher, mask=everything, eps=eps, **case.options)
    plain = dist_loss(student, teacher, eps=eps, **case.options)
    assert abs(masked - plain).item() <= tolerances.dist_bound(case, eps, torch.float64)


@MODES
@pytest.mark.parametrize("class_dim", [0, 1, 2, 3, -1, -2, -3, -4])
def test_class_dim_and_batch_axes_are_those_of_the_flattened_matrix(
    class_dim: int, eps: float | None
) -> None:
    shape = (2, 3, 4, 5)
    pair = torch.randn(2, *shape, dtype=torch.float64, generator=torch.manual_seed(0))
    flat = [x.movedim(class_dim, -1).reshape(-1, shape[class_dim]) for x in pair]
    mask = torch.rand(flat[0].shape[0], generator=torch.manual_seed(1)) < 0.5
    batch_shape = pair[0].movedim(class_dim, -1).shape[:-1]
    for flat_mask, shaped_mask in ((None, None), (mask, mask.reshape(batch_shape))):
        loss, gradient = value_and_gradient(*pair, class_dim=class_dim, mask=shaped_mask, eps=eps)
        flat_loss, flat_gradient = value_and_gradient(*flat, mask=flat_mask, eps=eps)
        assert torch.equal(loss, flat_loss)
        moved = gradient.movedim(class_dim, -1).reshape(flat_gradient.shape)
        assert torch.equal(moved, flat_gradient)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "batch axes swapped": lambda x: x.reshape(2, 3, 5).transpose(0, 1).contiguous().transpose(0, 1),
}


@MODES
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_in_memory_does_not_matter(name: str, eps: float | None) -> None:
    layout = LAYOUTS[name]
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    case = Logits(student.numpy(), teacher.numpy(), 2.0, 1.0, 1.0)
    loss, gradient = value_and_gradient(student, teacher, temperature=2.0, eps=eps)
    leaf = student.clone().requires_grad_()
    laid_out = dist_loss(layout(leaf), layout(teacher), temperature=2.0, eps=eps)
    (laid_out_gradient,) = torch.autograd.grad(laid_out, leaf)
    assert abs(laid_out - loss).item() <= tolerances.dist_bound(case, eps, torch.float64)
    error = (laid_out_gradient - gradient).abs().max().item()
    assert error <= tolerances.dist_gradient_bound(case, eps, torch.float64)


@MODES
def test_expanded_student_gets_the_sum_of_its_rows_gradients(eps: float | None) -> None:
    teacher = torch.randn(6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    row = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    loss, gradient = value_and_gradient(row.detach().repeat(6, 1), teacher, eps=eps)
    expanded = dist_loss(row.expand(6, 5), teacher, eps=eps)
    (to_row,) = torch.autograd.grad(expanded, row)
    assert torch.equal(expanded.detach(), loss)
    torch.testing.assert_close(to_row[0], gradient.sum(0), rtol=1e-9, atol=1e-6)


@MODES
def test_inputs_are_never_modified(eps: float | None) -> None:
    student, teacher = torch.randn(2, 6, 5)
    mask = torch.tensor([True, False] * 3)
    originals = [x.clone() for x in (student, teacher, mask)]
    versions = [x._version for x in (student, teacher, mask)]
    student.requires_grad_()
    dist_loss(student, teacher, mask=mask, eps=eps).backward()
    for now, original, version in zip((student, teacher, mask), originals, versions, strict=True):
        assert torch.equal(now, original)
        assert now._version == version


# --- dtypes ---------------------------------------------------------------------------------------


@MODES
@HALVES
@given(case=strategies.logits(scale=(1e-3, 100)), seed=strategies.seeds)
def test_half_precision_computes_in_float32(
    case: Logits, seed: int, dtype: torch.dtype, eps: float | None
) -> None:
    student, teacher = case.tensors(dtype)
    mask = torch.tensor(np.random.default_rng(seed).random(len(student)) < 0.7)
    options = {"eps": eps, "mask": mask, **case.options}
    loss, gradient = value_and_gradient(student, teacher, **options)
    expected, expected_gradient = value_and_gradient(student.float(), teacher.float(), **options)
    assert loss.dtype is torch.float32
    assert gradient.dtype is dtype
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@MODES
@HALVES
def test_autocast_changes_nothing(dtype: torch.dtype, eps: float | None) -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.manual_seed(0))
    loss, gradient = value_and_gradient(student, teacher, eps=eps)
    with torch.autocast("cpu", dtype=dtype):
        cast_loss, cast_gradient = value_and_gradient(student, teacher, eps=eps)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(cast_loss, loss)
    assert torch.equal(cast_gradient, gradient)


@MODES
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_compute_in_the_wider(
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    expected: torch.dtype,
    eps: float | None,
) -> None:
    student = torch.randn(6, 5, generator=torch.manual_seed(0)).to(student_dtype)
    teacher = torch.randn(6, 5, generator=torch.manual_seed(1)).to(teacher_dtype)
    loss, gradient = value_and_gradient(student, teacher, eps=eps)
    assert loss.dtype is expected
    assert gradient.dtype is student_dtype
    wide, wide_gradient = value_and_gradient(student.to(expected), teacher.to(expected), eps=eps)
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(student_dtype))


@MODES
def test_repeats_agree_to_the_bit_and_algorithms_are_deterministic(eps: float | None) -> None:
    student, teacher = torch.randn(2, 33, 17, generator=torch.manual_seed(0))
    mask = torch.rand(33, generator=torch.manual_seed(1)) < 0.8
    first = value_and_gradient(student, teacher, mask=mask, eps=eps)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(250):
            again = value_and_gradient(student, teacher, mask=mask, eps=eps)
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1], first[1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_zero_weights_give_a_zero_that_can_be_differentiated() -> None:
    student, teacher = torch.randn(2, 6, 5)
    loss, gradient = value_and_gradient(student, teacher, inter_weight=0, intra_weight=0)
    assert loss.item() == 0
    assert (gradient == 0).all()


# --- module ---------------------------------------------------------------------------------------

MODULES = [
    {},
    {"temperature": 4.0},
    {"temperature": 2.0, "inter_weight": 2.0, "intra_weight": 0.5, "eps": 1e-8},
    {"temperature": 0.5, "inter_weight": 0.0, "class_dim": 1, "backend": "reference"},
    {"temperature": 3, "intra_weight": 0},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_module_is_the_function_to_the_bit(options: dict[str, Any]) -> None:
    shape = (3, 5, 4) if "class_dim" in options else (6, 5)
    student, teacher = torch.randn(2, *shape, generator=torch.manual_seed(0))
    batch_shape = student.movedim(options.get("class_dim", -1), -1).shape[:-1]
    mask = torch.rand(batch_shape, generator=torch.manual_seed(1)) < 0.7
    criterion = DISTLoss(**options)
    for given_mask in (None, mask):
        expected, expected_gradient = value_and_gradient(
            student, teacher, mask=given_mask, **options
        )
        leaf = student.clone().requires_grad_()
        loss = criterion(leaf, teacher, mask=given_mask)
        loss.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(leaf.grad, expected_gradient)


def test_module_has_no_state_and_survives_copying() -> None:
    criterion = DISTLoss(4.0, 2.0, 0.5, eps=1e-8)
    assert criterion.state_dict() == {}
    student, teacher = torch.randn(2, 6, 5)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(student, teacher), criterion(student, teacher))
        assert repr(copied) == repr(criterion)
    criterion.load_state_dict(criterion.state_dict())


def test_module_shows_its_options() -> None:
    assert repr(DISTLoss(4, 2.0, 0.5)) == (
        "DISTLoss(temperature=4.0, inter_weight=2.0, intra_weight=0.5, class_dim=-1, eps=None, "
        "backend='auto')"
    )


@MODES
def test_module_compiles_without_a_graph_break(eps: float | None) -> None:
    torch._dynamo.reset()
    criterion = DISTLoss(temperature=4.0, eps=eps)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    student, teacher = torch.randn(2, 6, 5, generator=torch.manual_seed(0))
    mask = torch.tensor([True, True, False, True, True, False])
    for given_mask in (None, mask):
        expected, expected_gradient = value_and_gradient(
            student, teacher, temperature=4.0, mask=given_mask, eps=eps
        )
        leaf = student.clone().requires_grad_()
        loss = compiled(leaf, teacher, given_mask)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(leaf.grad, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of PyTorch's own code
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs the C++ compiler g++")
def test_module_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(DISTLoss(temperature=4.0), fullgraph=True)
    student, teacher = torch.randn(2, 16, 7, generator=torch.manual_seed(0))
    expected, expected_gradient = value_and_gradient(student, teacher, temperature=4.0)
    leaf = student.clone().requires_grad_()
    loss = compiled(leaf, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(leaf.grad, expected_gradient, rtol=1e-4, atol=1e-6)
