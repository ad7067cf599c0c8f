"""Batch similarity: golden values and every invariant."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from telme_kd import BatchSimilarityLoss, available_backends
from telme_kd.functional import batch_similarity_loss
from tests.helpers import golden, strategies, tolerances, truth
from tests.helpers.strategies import Features

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", available_backends())


def value_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for a copy of the student."""
    student = student.detach().clone().requires_grad_()
    loss = batch_similarity_loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def pair(items: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, items, width, dtype=dtype, generator=torch.manual_seed(0))


# --- golden values --------------------------------------------------------------------------------


def assert_golden(case: golden.Case) -> None:
    loss, gradient = value_and_gradient(
        torch.tensor(case["student"]),
        torch.tensor(case["teacher"]),
        temperature=float(case["temperature"]),
    )
    # Cosines are well-conditioned, so every case agrees to rounding: measured 2e-15 and 4e-15.
    tolerance = tolerances.GOLDEN_WELL_CONDITIONED
    assert abs(loss.item() - case["loss"]) <= tolerance * abs(case["loss"])
    error = np.linalg.norm(gradient.numpy() - case["student_grad"])
    assert error <= tolerance * np.linalg.norm(case["student_grad"])


@pytest.mark.parametrize("case", golden.cases("batch_similarity"))
def test_golden_values_and_gradients(case: golden.Case) -> None:
    assert_golden(case)


def test_golden_values_and_gradients_of_all_files() -> None:
    for case in golden.load(golden.full_directory(), "batch_similarity").values():
        assert_golden(case)


# --- range and zeros ------------------------------------------------------------------------------


def test_rounding_below_zero_is_not_hidden() -> None:
    # Clamped, a loss at its minimum would lose its gradient, and its error its sign.
    generator = torch.manual_seed(0)
    losses = []
    for _ in range(100):
        teacher = torch.randn(8, 16, generator=generator)
        losses.append(batch_similarity_loss(3 * teacher, teacher, backend="reference").item())
    assert min(losses) < 0 < max(losses)
    assert max(map(abs, losses)) < 1e-6


def test_other_features_give_zero_where_similarities_differ_by_a_constant() -> None:
    teacher = torch.eye(2, dtype=torch.float64)
    student = -teacher.flip(0)
    loss, gradient = value_and_gradient(student, teacher)
    assert abs(loss.item()) < 1e-16
    assert gradient.abs().max().item() < 1e-16


@given(case=strategies.features(items=(2, 8), widths=(2, 8), structures=("random",)))
def test_students_are_compared_with_teachers_not_with_each_other(case: Features) -> None:
    # A rotation of all students keeps their relations to each other, not those to the teachers.
    student, teacher = case.tensors()
    rotation = _rotation(student.shape[1], 5)
    loss = batch_similarity_loss(student @ rotation, teacher, temperature=case.temperature)
    expected = truth.batch_similarity(
        (student @ rotation).numpy(), case.teacher, temperature=case.temperature
    )
    assert abs(loss.item() - expected) <= 2 * tolerances.similarity_bound(case, torch.float64)
    turned = batch_similarity_loss(-teacher, teacher, temperature=case.temperature)
    assert turned > 0  # -T relates to itself exactly as T does


def _rotation(width: int, seed: int) -> Tensor:
    matrix = torch.tensor(np.random.default_rng(seed).normal(size=(width, width)))
    return torch.linalg.qr(matrix).Q


def test_all_zero_features_give_zero_and_no_gradient() -> None:
    zeros = torch.zeros(4, 3)
    loss, gradient = value_and_gradient(zeros, zeros)
    assert loss.item() == 0
    assert (gradient == 0).all()


# --- gradient -------------------------------------------------------------------------------------


def test_teacher_gradient_flows_through_both_distributions() -> None:
    student, teacher = pair()
    teacher.requires_grad_()
    batch_similarity_loss(student, teacher, temperature=0.5).backward()
    step = 1e-6
    for i, j in ((0, 0), (3, 2), (5, 4)):
        moved = []
        for sign in (1, -1):
            copied = teacher.detach().clone()
            copied[i, j] += sign * step
            moved.append(truth.batch_similarity(student.numpy(), copied.numpy(), temperature=0.5))
        difference = (moved[0] - moved[1]) / (2 * step)
        assert teacher.grad[i, j].item() == pytest.approx(difference, abs=1e-9)


def test_teacher_without_a_gradient_costs_no_product() -> None:
    student, teacher = pair(16, 8).unbind()
    with FlopCounterMode(display=False) as counter:
        value_and_gradient(student, teacher, backend="reference")
    assert counter.get_total_flops() == 3 * (2 * 16 * 16 * 8)  # T T', T S' and the student's


# --- magnitudes and bad values --------------------------------------------------------------------


@BACKENDS
@PRECISIONS
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_features_of_any_magnitude_give_the_right_value(
    size: float, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("Triton's kernels compute in float32")
    student, teacher = pair(dtype=dtype)
    options = {"temperature": 0.5, "backend": backend}
    expected, expected_gradient = value_and_gradient(student, teacher, **options)
    loss, gradient = value_and_gradient(student * size, teacher * size, **options)
    u = tolerances.UNIT[dtype]
    assert abs(loss - expected).item() <= 16 * u * (1 + 1 / 0.5 + math.log(6))
    torch.testing.assert_close(gradient * size, expected_gradient, rtol=0, atol=256 * u)


def test_rows_of_different_magnitude_stand_side_by_side() -> None:
    student, teacher = pair(dtype=torch.float32)
    sizes = torch.tensor([1e-30, 1e-10, 1.0, 1e10, 1e20, 1e30])[:, None]
    expected = batch_similarity_loss(student, teacher)
    loss, gradient = value_and_gradient(student * sizes, teacher * sizes.flip(0))
    assert abs(loss - expected).item() <= 32 * tolerances.UNIT[torch.float32]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_and_infinity_are_never_laundered(side: int, value: float) -> None:
    for position in ((0, 0), (5, 4)):
        features = pair()
        features[side][position] = value
        student, teacher = (tensor.clone().requires_grad_() for tensor in features)
        loss = batch_similarity_loss(student, teacher)
        assert loss.isnan()
        loss.backward()
        assert student.grad.isnan().any()
        assert teacher.grad.isnan().any()


# --- masks and shapes -----------------------------------------------------------------------------


def test_batch_axes_are_those_of_the_flattened_matrix() -> None:
    features = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for flat_mask, shaped_mask in ((None, None), (mask.reshape(-1), mask)):
        loss, gradient = value_and_gradient(*features, mask=shaped_mask)
        expected, expected_gradient = value_and_gradient(*features.reshape(2, 6, 4), mask=flat_mask)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient.reshape(6, 4), expected_gradient)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "batch axes swapped": lambda x: x.reshape(2, 3, 5).transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_in_memory_does_not_matter(name: str) -> None:
    layout = LAYOUTS[name]
    student, teacher = pair()
    loss, gradient = value_and_gradient(student, teacher)
    leaf = student.clone().requires_grad_()
    laid_out = batch_similarity_loss(layout(leaf), layout(teacher))
    (laid_out_gradient,) = torch.autograd.grad(laid_out, leaf)
    torch.testing.assert_close(laid_out.detach(), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(laid_out_gradient, gradient, rtol=0, atol=1e-14)


def test_expanded_student_gets_the_sum_of_its_rows_gradients() -> None:
    _, teacher = pair()
    row = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    loss, gradient = value_and_gradient(row.detach().repeat(6, 1), teacher)
    expanded = batch_similarity_loss(row.expand(6, 5), teacher)
    (to_row,) = torch.autograd.grad(expanded, row)
    torch.testing.assert_close(expanded.detach(), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(to_row[0], gradient.sum(0), rtol=0, atol=1e-14)


def test_inputs_are_never_modified() -> None:
    student, teacher = pair(dtype=torch.float32).unbind()
    student, teacher = student.clone(), teacher.clone()
    mask = torch.tensor([True, False] * 3)
    originals = [x.clone() for x in (student, teacher, mask)]
    versions = [x._version for x in (student, teacher, mask)]
    student.requires_grad_()
    batch_similarity_loss(student, teacher, mask=mask).backward()
    for now, original, version in zip((student, teacher, mask), originals, versions, strict=True):
        assert torch.equal(now, original)
        assert now._version == version


# --- dtypes ---------------------------------------------------------------------------------------


@HALVES
@given(case=strategies.features(scale=(1e-2, 100)), seed=strategies.seeds)
def test_half_precision_computes_in_float32(case: Features, seed: int, dtype: torch.dtype) -> None:
    student, teacher = case.tensors(dtype)
    mask = torch.tensor(np.random.default_rng(seed).random(len(student)) < 0.7)
    options = {"temperature": case.temperature, "mask": mask}
    loss, gradient = value_and_gradient(student, teacher, **options)
    expected, expected_gradient = value_and_gradient(student.float(), teacher.float(), **options)
    assert loss.dtype is torch.float32
    assert gradient.dtype is dtype
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@BACKENDS
@HALVES
def test_autocast_changes_nothing(dtype: torch.dtype, backend: Any) -> None:
    student, teacher = pair(dtype=torch.float32)
    loss, gradient = value_and_gradient(student, teacher, backend=backend)
    student = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        cast_loss = batch_similarity_loss(student, teacher, backend=backend)
        assert torch.is_autocast_enabled("cpu")
    (cast_gradient,) = torch.autograd.grad(cast_loss, student)
    assert torch.equal(cast_loss, loss)
    assert torch.equal(cast_gradient, gradient)


@BACKENDS
@HALVES
def test_autocast_changes_nothing_in_a_backward_inside_it(dtype: torch.dtype, backend: str) -> None:
    student, teacher = pair(dtype=torch.float32)
    _, gradient = value_and_gradient(student, teacher, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        _, cast_gradient = value_and_gradient(student, teacher, backend=backend)
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "expected"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_compute_in_the_wider(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, expected: torch.dtype
) -> None:
    student, teacher = pair()
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    loss, gradient = value_and_gradient(student, teacher)
    assert loss.dtype is expected
    assert gradient.dtype is student_dtype
    wide, wide_gradient = value_and_gradient(student.to(expected), teacher.to(expected))
    assert torch.equal(loss, wide)
    assert torch.equal(gradient, wide_gradient.to(student_dtype))


def test_repeats_agree_to_the_bit_and_algorithms_are_deterministic() -> None:
    student, teacher = pair(33, 17, torch.float32)
    mask = torch.rand(33, generator=torch.manual_seed(1)) < 0.8
    first = value_and_gradient(student, teacher, mask=mask)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(250):
            again = value_and_gradient(student, teacher, mask=mask)
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1], first[1])
    finally:
        torch.use_deterministic_algorithms(False)


# --- module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.1}, {"temperature": 4, "backend": "reference"}],
    ids=str,
)
def test_module_is_the_function_to_the_bit(options: dict[str, Any]) -> None:
    student, teacher = pair(dtype=torch.float32)
    criterion = BatchSimilarityLoss(**options)
    for mask in (None, torch.tensor([True, True, False, True, False, True])):
        expected, expected_gradient = value_and_gradient(student, teacher, mask=mask, **options)
        leaf = student.clone().requires_grad_()
        loss = criterion(leaf, teacher, mask=mask)
        loss.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(leaf.grad, expected_gradient)


def test_module_has_no_state_and_survives_copying() -> None:
    criterion = BatchSimilarityLoss(0.5)
    assert criterion.state_dict() == {}
    student, teacher = pair()
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(student, teacher), criterion(student, teacher))
        assert repr(copied) == repr(criterion)


def test_module_shows_its_options() -> None:
    assert repr(BatchSimilarityLoss(2)) == "BatchSimilarityLoss(temperature=2.0, backend='auto')"


def test_module_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(BatchSimilarityLoss(0.5), backend="aot_eager", fullgraph=True)
    student, teacher = pair(dtype=torch.float32)
    for mask in (None, torch.tensor([True, True, False, True, False, True])):
        expected, expected_gradient = value_and_gradient(
            student, teacher, temperature=0.5, mask=mask
        )
        leaf = student.clone().requires_grad_()
        loss = compiled(leaf, teacher, mask)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(leaf.grad, expected_gradient, rtol=1e-5, atol=1e-7)
