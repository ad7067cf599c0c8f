"""The CPU passes of DIST against float64 autograd of the definition, NumPy and themselves."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from telme_kd.kernels.cpu import dist as passes
from telme_kd.kernels.cpu.dist import affine, blocks, kept
from telme_kd.reference.dist import dist_loss
from tests.helpers import strategies, tolerances, truth
from tests.helpers.conditions import conditions
from tests.helpers.strategies import Logits

MODES = pytest.mark.parametrize("eps", [None, 1e-8, 0.05], ids=["scale-free", "released", "large"])
WEIGHTS = pytest.mark.parametrize(
    "weights", [(1.0, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], ids=str
)
DOUBLE = 1e-11
"""Relative, of two float64 codes for well-conditioned inputs: a few hundred roundings apart."""


class Plan(NamedTuple):
    """The constants that choose a plan."""

    usual: int = 0
    together: int = 0
    small: int = 0
    medium: int = 0
    block: int = 1
    least_rows: int = 8
    in_units: bool = False


# The affine plan hands over to the small one or to a whole block where it does not hold.
PLANS = {
    "affine, rows and columns together": Plan(usual=2**16, together=2**16, small=2**16),
    "affine, in turn": Plan(usual=2**16, medium=2**16),
    "small": Plan(small=2**16),
    "whole": Plan(medium=2**16),
    "blocks of two rows": Plan(least_rows=2),
    "blocks of two rows in units": Plan(least_rows=2, in_units=True),
    "one block": Plan(block=2**17),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Plan:
    choose(request.param, monkeypatch)
    return request.param


def choose(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "USUAL", plan.usual)
    monkeypatch.setattr(affine, "TOGETHER", plan.together)
    monkeypatch.setattr(passes, "SMALL", plan.small)
    monkeypatch.setattr(passes, "MEDIUM", plan.medium)
    monkeypatch.setattr(blocks, "BLOCK", plan.block)
    monkeypatch.setattr(blocks, "LEAST_ROWS", plan.least_rows)
    if plan.in_units:
        monkeypatch.setattr(blocks, "FAINT", math.inf)
    kept.forget()


def options(**changes: Any) -> dict[str, Any]:
    return {"temperature": 2.0, "inter_weight": 1.0, "intra_weight": 0.5, "eps": None} | changes


class Result(NamedTuple):
    loss: Tensor
    student: Tensor | None
    teacher: Tensor | None


@torch.no_grad()
def fused(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    needs: tuple[bool, bool] = (True, True),
    grad_output: float = 1.0,
    **chosen: Any,
) -> Result:
    needed = {"student_needs_grad": needs[0], "teacher_needs_grad": needs[1]}
    loss, rows, columns = passes.forward(student, teacher, mask, **chosen, **needed)
    saved = passes.saved_shapes(*student.shape, **needed)
    assert (tuple(rows.shape), tuple(columns.shape)) == saved
    assert rows.dtype == columns.dtype == loss.dtype
    if not any(needs):
        return Result(loss, None, None)
    arguments = student, teacher, mask, rows, columns
    gradients = passes.backward(loss.new_tensor(grad_output), *arguments, **chosen, **needed)
    return Result(loss, *gradients)


@torch.no_grad()
def in_chunks(
    student: Tensor, teacher: Tensor, mask: Tensor | None, cuts: Sequence[int], **chosen: Any
) -> Result:
    batch, classes = student.shape
    rows, columns = passes.new_statistics(
        batch, classes, dtype=student.dtype, device=student.device
    )
    chunks = [slice(*ends) for ends in pairwise((0, *cuts, batch))]

    def parts(chunk: slice) -> tuple[Any, ...]:
        present = None if mask is None else mask[chunk]
        return student[chunk], teacher[chunk], present, rows[:, chunk], columns

    for chunk in chunks:
        passes.observe(*parts(chunk), **chosen)
    loss = passes.conclude(rows, columns, mask, **chosen)
    gradients = [
        passes.gradient(
            torch.ones_like(loss),
            *parts(chunk),
            **chosen,
            student_needs_grad=True,
            teacher_needs_grad=True,
        )
        for chunk in chunks
    ]
    return Result(loss, *(torch.cat(side) for side in zip(*gradients, strict=True)))


def definition(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, **chosen: Any
) -> Result:
    """Loss and gradients of the definition, in float64 unless told."""
    inputs = [x.detach().double().requires_grad_() for x in (student, teacher)]
    loss = dist_loss(*inputs, mask=mask, **chosen)
    return Result(loss.detach(), *torch.autograd.grad(loss, inputs))


def assert_equal(result: Result, expected: Result, tolerance: float = DOUBLE) -> None:
    torch.testing.assert_close(result.loss, expected.loss, rtol=tolerance, atol=tolerance)
    for gradient, truth_of_it in zip(result[1:], expected[1:], strict=True):
        size = truth_of_it.norm().item()
        torch.testing.assert_close(
            gradient, truth_of_it, rtol=0.0, atol=tolerance * max(size, 1e-3)
        )


def pair(
    batch: int, classes: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator, dtype=dtype)
    return student, teacher


VARIED = [(4, 7), (33, 12), (9, 40)]
DEGENERATE = [(1, 5), (6, 1), (2, 2)]
# A tiny eps magnifies the rounding of constant vectors: that is left to the test of the bounds.
SHAPES_AND_EPS = pytest.mark.parametrize(
    ("shape", "eps"),
    [(shape, eps) for shape in VARIED for eps in (None, 1e-8, 0.05)]
    + [(shape, eps) for shape in DEGENERATE for eps in (None, 0.05)],
    ids=str,
)


# --- the definition -------------------------------------------------------------------------------


@SHAPES_AND_EPS
@WEIGHTS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_definition(
    shape: tuple[int, int],
    weights: tuple[float, float],
    eps: float | None,
    masked: bool,
    plan: Plan,
) -> None:
    student, teacher = pair(*shape)
    mask = torch.arange(shape[0]) % 4 != 1 if masked else None
    chosen = options(inter_weight=weights[0], intra_weight=weights[1], eps=eps)
    expected = definition(student, teacher, mask, **chosen)
    if mask is not None:
        student[~mask], teacher[~mask] = torch.nan, torch.inf
    result = fused(student, teacher, mask, **chosen)
    assert_equal(result, expected)
    if mask is not None:
        assert result.student is not None
        assert (result.student[~mask] == 0).all()


@MODES
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4, 1e-2, 30.0])
def test_equals_definition_near_constant_and_peaked(
    scale: float, eps: float | None, plan: Plan
) -> None:
    student, teacher = pair(6, 9)
    chosen = options(eps=eps)
    # What is left of a vector that varies by 1e-6 has lost six digits.
    tolerance = DOUBLE if scale > 1e-3 else 1e-8
    expected = definition(scale * student, teacher, **chosen)
    assert_equal(fused(scale * student, teacher, **chosen), expected, tolerance)


@MODES
@given(case=strategies.logits())
def test_loss_and_gradient_are_within_bounds(eps: float | None, case: Logits) -> None:
    for dtype in (torch.float64, torch.float32):
        rounded = case.rounded(dtype)
        student, teacher = rounded.tensors(dtype)
        expected = definition(student, teacher, **rounded.options, eps=eps)
        assert expected.student is not None
        # The definition rounds too, by no more than the allowance of float64.
        units = (dtype, torch.float64)
        bound = sum(tolerances.dist_bound(rounded, eps, unit) for unit in units)
        of_gradient = sum(tolerances.dist_gradient_bound(rounded, eps, unit) for unit in units)
        for plan in PLANS.values():
            with pytest.MonkeyPatch.context() as monkeypatch:
                choose(plan, monkeypatch)
                result = fused(student, teacher, **rounded.options, eps=eps)
            assert abs(result.loss.item() - expected.loss.item()) <= bound, plan
            assert result.student is not None
            assert (result.student.double() - expected.student).norm() <= of_gradient, plan


@given(case=strategies.varied_logits())
def test_released_loss_equals_numpy(case: Logits) -> None:
    student, teacher = case.tensors()
    expected = truth.released_dist(case.student, case.teacher, eps=1e-8, **case.options)
    bound = 2 * tolerances.dist_bound(case, 1e-8, torch.float64)
    for plan in PLANS.values():
        with pytest.MonkeyPatch.context() as monkeypatch:
            choose(plan, monkeypatch)
            loss = fused(student, teacher, **case.options, eps=1e-8).loss
        assert abs(loss.item() - expected) <= bound


@MODES
def test_class_at_minus_infinity_is_left_out(eps: float | None, plan: Plan) -> None:
    student, teacher = pair(8, 6)
    student[:, 2] = teacher[:, 2] = -torch.inf  # in both
    student[:, 4] = -torch.inf  # in one
    teacher[:, 0] = -torch.inf
    student[3:, 1] = -torch.inf  # in some rows
    chosen = options(eps=eps)
    result = fused(student, teacher, **chosen)
    assert_equal(result, definition(student, teacher, **chosen))
    assert result.student is not None
    assert (result.student[:, [2, 4]] == 0).all()


def test_class_less_probable_than_float32_can_tell_correlates(plan: Plan) -> None:
    student, teacher = pair(8, 6, torch.float32)
    student[:, 3] -= 300.0
    teacher[:, 3] -= 200.0
    chosen = options(temperature=1.0)
    assert_equal(
        Result(*(x.double() for x in fused(student, teacher, **chosen))),
        definition(student, teacher, **chosen),
        1e-4,  # exponents of 300 have a spacing of 3e-5
    )


@MODES
def test_everything_masked_gives_zero(eps: float | None, plan: Plan) -> None:
    student = torch.full((5, 4), torch.nan)
    result = fused(student, student, torch.zeros(5, dtype=torch.bool), **options(eps=eps))
    assert result.loss == 0
    for gradient in result[1:]:
        assert gradient is not None
        assert (gradient == 0).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
def test_nan_in_is_nan_out(weights: tuple[float, float], plan: Plan) -> None:
    student, teacher = pair(5, 4)
    student[2, 1] = torch.nan
    chosen = options(inter_weight=weights[0], intra_weight=weights[1])
    result = fused(student, teacher, **chosen)
    assert result.loss.isnan()
    assert result.student is not None
    assert result.student[2].isnan().all()
    if weights[1]:
        assert result.student.isnan().all()


def test_two_zero_weights_leave_nothing_even_of_nan(plan: Plan) -> None:
    student, teacher = pair(5, 4)
    student[2, 1] = torch.nan
    chosen = options(inter_weight=0.0, intra_weight=0.0)
    for value in fused(student, teacher, grad_output=torch.inf, **chosen):
        assert value is not None
        assert (value == 0).all()


def test_constant_vectors_give_nan_with_eps_zero(plan: Plan) -> None:
    student, teacher = pair(5, 4)
    student[2] = 0.0
    assert fused(student, teacher, **options(eps=0.0, intra_weight=0.0)).loss.isnan()


# --- inputs and outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (9, 40)], ids=str)
def test_only_needed_gradients_are_computed(
    shape: tuple[int, int], needs: tuple[bool, bool], plan: Plan
) -> None:
    student, teacher = pair(*shape)
    everything = fused(student, teacher, **options())
    result = fused(student, teacher, needs=needs, **options())
    assert torch.equal(result.loss, everything.loss)
    for gradient, needed, expected in zip(result[1:], needs, everything[1:], strict=True):
        assert (gradient is not None) == needed
        if needed:
            torch.testing.assert_close(gradient, expected, rtol=DOUBLE, atol=DOUBLE)


def test_gradient_is_multiplied_by_grad_output_before_it_is_rounded(plan: Plan) -> None:
    student, teacher = pair(256, 7, torch.float16)
    plain = fused(student.float(), teacher.float(), grad_output=65536.0, **options()).student
    result = fused(student, teacher, grad_output=65536.0, **options()).student
    assert plain is not None
    assert torch.equal(result, plain.half())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_compute_in_the_wider(
    dtypes: tuple[torch.dtype, torch.dtype], plan: Plan
) -> None:
    student, teacher = (x.to(dtype) for x, dtype in zip(pair(12, 9), dtypes, strict=True))
    wider = torch.float64 if torch.float64 in dtypes else torch.float32
    result = fused(student, teacher, **options())
    expected = fused(student.to(wider), teacher.to(wider), **options())
    assert torch.equal(result.loss, expected.loss)
    for gradient, dtype, whole in zip(result[1:], dtypes, expected[1:], strict=True):
        assert gradient is not None
        assert gradient.is_contiguous()
        assert torch.equal(gradient, whole.to(dtype))


def views(student: Tensor) -> Iterator[Tensor]:
    batch, classes = student.shape
    yield student.T.contiguous().T
    yield torch.stack((student, student), -1)[..., 0]
    yield student.new_zeros(batch, 3 * classes)[:, 1 : 1 + classes].copy_(student)
    yield student[:1].expand(batch, classes)


def test_strides_do_not_matter(plan: Plan) -> None:
    student, teacher = pair(12, 9)
    for view in views(student):
        result = fused(view, teacher, **options())
        expected = fused(view.contiguous(), teacher, **options())
        for ours, theirs in zip(result, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous()


def test_inputs_are_left_alone(plan: Plan) -> None:
    student, teacher = pair(12, 9)
    before = student.clone(), teacher.clone()
    fused(student, teacher, torch.arange(12) > 3, **options())
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_results_do_not_share_the_plans_buffers() -> None:
    student, teacher = pair(8, 5)
    first = fused(student, teacher, **options())
    copies = [x.clone() for x in first]
    fused(teacher, student, **options())
    for result, copy in zip(first, copies, strict=True):
        assert torch.equal(result, copy)


def test_plan_made_in_inference_mode_serves_outside_it() -> None:
    student, teacher = pair(11, 5)
    with torch.inference_mode():
        inside = fused(student, teacher, needs=(False, False), **options()).loss
    assert torch.equal(inside, fused(student, teacher, needs=(False, False), **options()).loss)


def test_few_plans_are_kept() -> None:
    for batch in range(2, 80):
        fused(*pair(batch, 1000), **options())
        assert 0 < sum(kept.sizes()) <= kept.KEPT_LOGITS


# --- the blocked plan -----------------------------------------------------------------------------


@MODES
@given(
    case=strategies.logits(items=(2, 12), scale=(0.01, 30.0)),
    cuts=st.sets(st.integers(1, 11)),
    masked=st.booleans(),
)
def test_chunks_equal_the_whole(
    eps: float | None, case: Logits, cuts: set[int], masked: bool
) -> None:
    student, teacher = case.tensors()
    batch = len(student)
    mask = torch.arange(batch) % 3 != 1 if masked else None
    kept = (
        case
        if mask is None
        else Logits(
            case.student[mask.numpy()],
            case.teacher[mask.numpy()],
            case.temperature,
            case.inter_weight,
            case.intra_weight,
        )
    )
    chosen = case.options | {"eps": eps}
    result = in_chunks(student, teacher, mask, sorted(x for x in cuts if x < batch), **chosen)
    expected = definition(student, teacher, mask, **chosen)
    bound = 2 * tolerances.dist_bound(kept, eps, torch.float64)
    assert abs(result.loss - expected.loss) <= bound
    bound = 2 * tolerances.dist_gradient_bound(kept, eps, torch.float64)
    for gradient, truth_of_it in zip(result[1:2], expected[1:2], strict=True):
        assert gradient is not None
        assert truth_of_it is not None
        assert (gradient - truth_of_it).norm() <= bound


def test_statistics_of_a_chunk_do_not_depend_on_the_blocks_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair(37, 11)
    results = []
    for least_rows in (37, 5, 1):
        choose(Plan(least_rows=least_rows), monkeypatch)
        results.append(fused(student, teacher, **options()))
    for result in results[1:]:
        assert_equal(result, results[0])


def test_only_statistics_are_saved() -> None:
    batch, classes = 300, 1000
    assert batch * classes > max(passes.USUAL, passes.SMALL, passes.MEDIUM)
    student, teacher = pair(batch, classes, torch.float32)
    needed = {"student_needs_grad": True, "teacher_needs_grad": True}
    with torch.no_grad():
        _, rows, columns = passes.forward(student, teacher, None, **options(), **needed)
    for saved in (rows, columns):
        assert saved.untyped_storage().nbytes() <= 4 * 9 * (batch + classes)


@pytest.mark.parametrize("shape", [(64, 7), (9, 40), (100, 700), (300, 1000)], ids=str)
def test_bits_repeat(shape: tuple[int, int]) -> None:
    student, teacher = pair(*shape, torch.float32)
    first = fused(student, teacher, **options())
    other = pair(*shape, torch.float32, seed=1)
    for run in range(250):
        if run % 50 == 0:  # leave something else behind in the buffers
            fused(*other, torch.arange(shape[0]) % 2 == 0, **options())
        for result, expected in zip(fused(student, teacher, **options()), first, strict=True):
            assert torch.equal(result, expected)


# --- accuracy -------------------------------------------------------------------------------------


PLANS_OF_SHAPES = {
    (4, 7): [PLANS["affine, rows and columns together"], Plan(small=2**16)],
    (64, 7): [PLANS["affine, rows and columns together"], Plan(small=2**16)],
    (256, 7): [
        PLANS["affine, rows and columns together"],
        Plan(small=2**16),
        Plan(block=2**9),
    ],
    (64, 1000): [
        PLANS["affine, in turn"],
        Plan(small=2**16),
        Plan(medium=2**16),
        Plan(block=2**14),
        Plan(block=2**14, in_units=True),
    ],
}
ACCURACY = pytest.mark.parametrize("shape", PLANS_OF_SHAPES, ids=str)


@ACCURACY
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_float32_error_is_at_most_half_more_than_eagers(
    shape: tuple[int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four items some vector is near constant in every 25th draw, and magnifies roundings.

    Then errors are compared in units of what a draw makes of roundings.
    """
    plans = PLANS_OF_SHAPES[shape]
    chosen = options(temperature=temperature, intra_weight=1.0)

    def outcomes(student: Tensor, teacher: Tensor) -> Sequence[Tensor]:
        expected = definition(student, teacher, **chosen)
        return expected.loss, expected.student

    for scale in (0.01, 0.1, 1.0, 10.0):
        errors = np.empty((200, len(plans) + 1, 2))
        for seed in range(len(errors)):
            student, teacher = pair(*shape, torch.float32, scale, seed)
            expected = outcomes(student, teacher)
            eager_student = student.clone().requires_grad_()
            loss = dist_loss(eager_student, teacher, mask=None, **chosen)
            results = [Result(loss.detach(), *torch.autograd.grad(loss, eager_student), None)]
            for plan in plans:
                choose(plan, monkeypatch)
                results.append(fused(student, teacher, needs=(True, False), **chosen))
            units = torch.stack([torch.ones_like(expected[0]), expected[1].norm()])
            if shape[0] == 4:
                units = conditions(outcomes, (student.double(), teacher.double()))
            for index, of in enumerate(results):
                found = zip((of.loss, of.student), expected, strict=True)
                distances = torch.stack([(one - other).norm() for one, other in found])
                errors[seed, index] = distances / units
        for figure in (errors.max(0), np.sqrt((errors**2).mean(0))):
            assert (figure[1:] <= 1.5 * figure[0]).all(), (scale, figure)


@ACCURACY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_error_is_at_most_eagers(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as float32 computes on features that were rounded once."""
    plans = PLANS_OF_SHAPES[shape]
    chosen = options(temperature=4.0)
    errors = np.empty((200, len(plans) + 1))
    for seed in range(len(errors)):
        student, teacher = (x.to(dtype) for x in pair(*shape, seed=seed))
        expected = definition(student, teacher, **chosen)
        eager_student = student.clone().requires_grad_()
        loss = dist_loss(eager_student.float(), teacher.float(), mask=None, **chosen)
        gradients = list(torch.autograd.grad(loss, eager_student))
        for plan in plans:
            choose(plan, monkeypatch)
            result = fused(student, teacher, needs=(True, False), **chosen)
            # The loss is a float32 of the same logits, for the test above.
            torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
            gradients.append(result.student)
        for index, gradient in enumerate(gradients):
            errors[seed, index] = (gradient - expected.student).norm() / expected.student.norm()
    # Both are rounded once to be stored; a thousandth is what they differ by before that.
    for figure in (errors.max(0), (errors**2).mean(0)):
        assert (figure[1:] <= 1.001 * figure[0]).all(), figure
