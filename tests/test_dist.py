"""DIST loss: every invariant, with ``eps=1e-8`` (released) and ``eps=None`` (scale-free)."""

import copy
import math
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from telme_kd import DISTLoss, available_backends
from telme_kd.functional import dist_loss, inter_class_loss, intra_class_loss
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR
from tests.helpers import golden, strategies, tolerances, truth
from tests.helpers.strategies import Logits

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

MODES = pytest.mark.parametrize("eps", [1e-8, None], ids=["released", "scale-free"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", available_backends())


def value_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for a copy of the student."""
    student = student.detach().clone().requires_grad_()
    loss = dist_loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


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


# --- symmetries -----------------------------------------------------------------------------------


def test_inter_class_term_treats_items_apart_and_intra_class_term_does_not() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    halves = [(student[:3], teacher[:3]), (student[3:], teacher[3:])]
    inter = sum(inter_class_loss(*half) for half in halves) / 2
    intra = sum(intra_class_loss(*half) for half in halves) / 2
    assert abs(inter - inter_class_loss(student, teacher)) < 1e-15
    assert abs(intra - intra_class_loss(student, teacher)) > 1e-2


# --- gradient -------------------------------------------------------------------------------------


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


def test_second_derivative_is_never_silently_wrong_at_a_constant_student() -> None:
    student = torch.zeros(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    loss = dist_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.isfinite().all()


# --- small batches and few classes ----------------------------------------------------------------


# --- extreme temperatures and logits --------------------------------------------------------------


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
@BACKENDS
def test_huge_logits_stay_finite(backend: str, eps: float | None) -> None:
    student, teacher = 1e30 * torch.randn(2, 5, 4, generator=torch.manual_seed(0))
    loss, gradient = value_and_gradient(student, teacher, eps=eps, backend=backend)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# --- masks and shapes -----------------------------------------------------------------------------


def test_masked_items_are_absent_with_eps_zero() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    mask = torch.tensor([True, True, False, True, True, False])
    loss, gradient = value_and_gradient(student, teacher, mask=mask, eps=0.0)
    expected, expected_gradient = value_and_gradient(student[mask], teacher[mask], eps=0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient[mask], expected_gradient, rtol=1e-9, atol=1e-12)


def test_all_masked_gives_zero_and_no_gradient_with_eps_zero() -> None:
    student, teacher = torch.randn(2, 6, 5)
    none = torch.zeros(6, dtype=torch.bool)
    loss, gradient = value_and_gradient(student, teacher, mask=none, eps=0.0)
    assert loss.item() == 0
    assert (gradient == 0).all()


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
@BACKENDS
@HALVES
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str, eps: float | None) -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.manual_seed(0))
    loss, gradient = value_and_gradient(student, teacher, eps=eps, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        cast_loss, cast_gradient = value_and_gradient(student, teacher, eps=eps, backend=backend)
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
