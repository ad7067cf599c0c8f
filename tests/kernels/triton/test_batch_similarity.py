"""Batch similarity's Triton kernels, in the interpreter, against the definition in float64."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telme_kd.functional import batch_similarity_loss as batch_similarity
from telme_kd.reference.batch_similarity import batch_similarity_loss
from tests.helpers import tolerances
from tests.helpers.conditions import conditions
from tests.helpers.strategies import Features
from tests.helpers.synchronisation import NoValueIsRead

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from telme_kd.kernels.triton import batch_similarity as kernels

PLANS = ("small", "streaming", "chunked")
ALL_PLANS = pytest.mark.parametrize("plan", PLANS)
HALVES = (torch.float16, torch.bfloat16)


class Result(NamedTuple):
    loss: Tensor
    student: Tensor
    teacher: Tensor


def fused(
    plan: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.5,
    grad_output: float = 1.0,
    upstream: Tensor | None = None,
    sides: tuple[str, ...] = ("student", "teacher"),
    chunk: int = 13,
) -> Result:
    """Loss and both gradients by one plan, whatever the shape and dtype would choose."""
    upstream = torch.tensor(grad_output) if upstream is None else upstream
    wanted = ["student" in sides, "teacher" in sides]
    if plan == "streaming":
        loss, rows = kernels._forward_streaming(student, teacher, mask, temperature)
        gradients = [
            kernels._backward_streaming(
                upstream, student, teacher, rows, temperature, of_teacher=of_teacher
            )
            for of_teacher in (False, True)
            if wanted[of_teacher]
        ]
    else:
        arguments = student, teacher, mask, temperature, *wanted
        if plan == "small":
            loss, units = kernels._forward_small(*arguments)
        else:
            budget = 8 * len(student) * chunk
            loss, units = kernels._forward_chunked(*arguments, chunk_bytes=budget)
        dtypes = [x.dtype for x, asked in zip((student, teacher), wanted, strict=True) if asked]
        gradients = [
            kernels._scaled(unit, upstream, dtype)
            for unit, dtype in zip(units, dtypes, strict=True)
        ]
    found = dict(zip(sides, gradients, strict=True))
    nothing = torch.empty(0)
    return Result(loss, found.get("student", nothing), found.get("teacher", nothing))


def defined(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.5,
    grad_output: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """The definition and autograd's gradients, in ``dtype``."""
    student, teacher = (x.detach().to(dtype).requires_grad_() for x in (student, teacher))
    loss = batch_similarity_loss(student, teacher, temperature=temperature, mask=mask)
    loss.backward(torch.tensor(grad_output, dtype=dtype))
    assert student.grad is not None
    assert teacher.grad is not None
    return Result(loss.detach(), student.grad, teacher.grad)


def pair(
    items: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    likeness: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A student that is like its teacher, as one is that learns."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(items, width, generator=generator)
    student = likeness * teacher + torch.randn(items, width, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def kept_items(items: int, seed: int = 1) -> Tensor:
    mask = torch.rand(items, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0] = True
    return mask


def assert_right(
    result: Result, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: Any
) -> None:
    """Within the tolerances of a float32 computation, plus one rounding of a half gradient."""
    truth = defined(student, teacher, mask, **options)
    temperature = options.get("temperature", 0.5)
    arrays = [
        x.double().masked_fill(~mask[:, None], 0.0) if mask is not None else x.double()
        for x in (student, teacher)
    ]
    case = Features(arrays[0].numpy(), arrays[1].numpy(), temperature)
    swapped = Features(arrays[1].numpy(), arrays[0].numpy(), temperature)
    assert result.loss.dtype is torch.float32
    assert abs(result.loss - truth.loss) <= tolerances.similarity_bound(case, torch.float32)
    scale = abs(options.get("grad_output", 1.0))
    # A teacher's gradient is a sum of three of the size of a student's.
    bounds = [
        scale * tolerances.similarity_gradient_bound(case, torch.float32),
        3 * scale * tolerances.similarity_gradient_bound(swapped, torch.float32),
    ]
    pairs = ((result.student, truth.student, student), (result.teacher, truth.teacher, teacher))
    for (ours, theirs, features), bound in zip(pairs, bounds, strict=True):
        assert ours.dtype is features.dtype
        assert ours.is_contiguous()
        assert ours.shape == features.shape
        error = torch.linalg.vector_norm(ours.double() - theirs, dim=1).numpy()
        if features.dtype in HALVES:
            rounding = tolerances.UNIT[features.dtype] * torch.linalg.vector_norm(theirs, dim=1)
            smallest = torch.finfo(features.dtype).smallest_normal * tolerances.UNIT[features.dtype]
            bound = bound + rounding.numpy() + 2 * smallest * features.shape[1] ** 0.5
        assert (error <= bound).all()


# --- against the definition -----------------------------------------------------------------------


@ALL_PLANS
@pytest.mark.parametrize(
    ("items", "width", "temperature"),
    [(1, 7, 1.0), (2, 1, 0.1), (5, 7, 0.02), (16, 48, 0.1), (33, 100, 1.0), (40, 24, 4.0)],
)
def test_values_and_gradients_are_the_definitions(
    plan: str, items: int, width: int, temperature: float
) -> None:
    student, teacher = pair(items, width)
    options = {"temperature": temperature, "grad_output": 0.7}
    assert_right(fused(plan, student, teacher, **options), student, teacher, **options)


@pytest.mark.parametrize("plan", ["streaming", "chunked"])
@pytest.mark.parametrize("width", [20, 32])
def test_more_items_than_a_tile_and_a_chunk(plan: str, width: int) -> None:
    student, teacher = pair(70, width)
    mask = kept_items(70)
    result = fused(plan, student, teacher, mask, temperature=0.1)
    assert_right(result, student, teacher, mask, temperature=0.1)


@pytest.mark.parametrize("width", [800, 801])
def test_streaming_covers_widths_beyond_one_program(width: int) -> None:
    student, teacher = pair(5, width)
    assert_right(fused("streaming", student, teacher), student, teacher)


@pytest.mark.parametrize(("width", "size"), [(264, 1.0), (264, 2.0**40), (768, 1.0)])
def test_students_whose_rows_are_held_get_their_gradients(width: int, size: float) -> None:
    student, teacher = (size * x for x in pair(37, width, torch.bfloat16))
    mask = kept_items(37)
    tile = kernels._gradient_tile(width, torch.bfloat16, aligned=True, of_teacher=False)
    assert kernels._is_held(tile, width, torch.bfloat16, True, False)
    options = {"temperature": 0.1, "grad_output": 30.0}
    result = fused("streaming", student, teacher, mask, **options)
    assert_right(result, student, teacher, mask, **options)


@ALL_PLANS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_half_precision_loses_only_the_rounding_of_its_gradient(
    plan: str, dtype: torch.dtype, temperature: float
) -> None:
    student, teacher = pair(20, 24, dtype)
    mask = kept_items(20)
    options = {"temperature": temperature, "grad_output": 30.0}
    assert_right(fused(plan, student, teacher, mask, **options), student, teacher, mask, **options)


@ALL_PLANS
@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)], ids=str
)
def test_dtypes_may_differ(plan: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (x.to(dtype) for x, dtype in zip(pair(6, 10), dtypes, strict=True))
    result = fused(plan, student, teacher, grad_output=10.0)
    assert_right(result, student, teacher, grad_output=10.0)


@ALL_PLANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_magnitude_stand_side_by_side(plan: str, dtype: torch.dtype) -> None:
    student, teacher = pair(7, 24)
    sizes = torch.tensor([1e-30, 1e-25, 1e-10, 1.0, 1e10, 1e20, 1e30])[:, None]
    student, teacher = (student * sizes).to(dtype), (teacher * sizes.flip(0)).to(dtype)
    teacher[3] = 0.0
    student[2] = 0.0
    result = fused(plan, student, teacher)
    assert_right(result, student, teacher)
    assert (result.student[2] == 0).all()
    assert (result.teacher[3] == 0).all()


@ALL_PLANS
def test_the_largest_and_the_smallest_numbers_have_directions(plan: str) -> None:
    student, teacher = pair(5, 6)
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    extreme = [
        x / x.abs().amax(1, keepdim=True) * size for x, size in ((student, huge), (teacher, tiny))
    ]
    loss = fused(plan, *extreme).loss
    expected = defined(*extreme).loss
    assert abs(loss - expected) <= 16 * tolerances.UNIT[torch.float32] * (3 + np.log(5))


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e4])
@pytest.mark.parametrize("plan", ["small", "streaming"])
def test_float16_of_any_magnitude_keeps_its_weights_in_range(plan: str, scale: float) -> None:
    student, teacher = pair(6, 16)
    student, teacher = student.half(), (teacher * scale).half()
    result = fused(plan, student, teacher, temperature=0.1)
    truth = defined(student, teacher, temperature=0.1)
    bound = 2 * tolerances.UNIT[torch.float16] * truth.student.norm()
    assert (result.student.double() - truth.student).norm() <= bound


@ALL_PLANS
@pytest.mark.parametrize(
    "make",
    [
        lambda s, t: (t.clone(), t),
        lambda s, t: (-t, t),
        lambda s, t: (s[:1] * torch.arange(-2.0, 4.0)[:, None], t),
        lambda s, t: (torch.zeros_like(s), t),
        lambda s, t: (s, torch.zeros_like(t)),
        lambda s, t: (s.sign(), t.sign()),
    ],
    ids=["equal", "opposite", "parallel", "student of zeros", "teacher of zeros", "ties"],
)
def test_degenerate_features(
    plan: str, make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    student, teacher = make(*pair(6, 10))
    assert_right(fused(plan, student, teacher), student, teacher)


@ALL_PLANS
def test_one_item_gives_zero_and_no_gradient(plan: str) -> None:
    result = fused(plan, *pair(1, 9))
    assert result.loss == 0
    assert (result.student == 0).all()
    assert (result.teacher == 0).all()


@ALL_PLANS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of NaN
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_and_infinity_are_never_laundered(plan: str, side: int, value: float) -> None:
    features = pair(5, 9)
    features[side][3, 4] = value
    result = fused(plan, *features)
    assert result.loss.isnan()
    assert result.student.isnan().any()
    assert result.teacher.isnan().any()


# --- masks and layouts ----------------------------------------------------------------------------


@ALL_PLANS
def test_masked_items_leave_no_trace(plan: str) -> None:
    student, teacher = pair(18, 10)
    mask = kept_items(18)
    results = []
    for junk in (0.0, float("nan"), float("-inf")):
        student[~mask], teacher[~mask] = junk, -junk
        results.append(fused(plan, student, teacher, mask, temperature=0.1))
    for result in results:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
        assert (result.student[~mask] == 0).all()
        assert (result.teacher[~mask] == 0).all()
    without = fused(plan, student[mask], teacher[mask], temperature=0.1)
    torch.testing.assert_close(results[0].loss, without.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[0].student[mask], without.student, rtol=1e-5, atol=1e-6)


@ALL_PLANS
def test_all_masked_gives_zero_and_no_gradient(plan: str) -> None:
    student, teacher = pair(4, 5)
    student[0] = float("nan")
    result = fused(plan, student, teacher, torch.zeros(4, dtype=torch.bool))
    assert result.loss == 0
    assert (result.student == 0).all()
    assert (result.teacher == 0).all()


@ALL_PLANS
def test_mask_may_have_strides(plan: str) -> None:
    student, teacher = pair(6, 8)
    mask = kept_items(12)[::2]
    strided = fused(plan, student, teacher, mask)
    for ours, theirs in zip(strided, fused(plan, student, teacher, mask.clone()), strict=True):
        assert torch.equal(ours, theirs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.repeat_interleave(x, 3, dim=1)[:, ::3],
    "offset": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "row padded": lambda x: torch.nn.functional.pad(x, (0, 3))[:, :-3],
}


@ALL_PLANS
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_in_memory_does_not_matter(plan: str, name: str) -> None:
    student, teacher = pair(18, 16)
    student, teacher = LAYOUTS[name](student), LAYOUTS[name](teacher)
    assert_right(fused(plan, student, teacher), student, teacher)


@ALL_PLANS
def test_expanded_features(plan: str) -> None:
    student, teacher = pair(6, 16)
    student = student[:1].expand(6, 16)
    assert_right(fused(plan, student, teacher), student, teacher)


# --- plans ----------------------------------------------------------------------------------------


def test_plans_agree() -> None:
    student, teacher = pair(24, 24)
    small, *others = (fused(plan, student, teacher, temperature=0.3) for plan in PLANS)
    for other in others:
        for ours, theirs in zip(small, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_chunks_of_any_size_agree() -> None:
    student, teacher = pair(12, 10)
    whole = fused("chunked", student, teacher, chunk=100)
    for chunk in (1, 5, 11):
        for ours, theirs in zip(
            fused("chunked", student, teacher, chunk=chunk), whole, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_plan_depends_on_batch_and_dtype_alone() -> None:
    for dtype in (torch.float32, *HALVES):
        assert kernels._plan(64, dtype) == "small"
    assert kernels._plan(65, torch.float32) == "chunked"
    assert kernels._plan(2**15, torch.float32) == "chunked"
    assert kernels._plan(2**15 + 1, torch.float32) == "streaming"
    assert kernels._plan(65, torch.float16) == "streaming"
    assert kernels._plan(10**6, torch.bfloat16) == "streaming"


@pytest.mark.parametrize("plan", ["streaming", "chunked"])
def test_plan_of_the_environment_serves_all_but_small_batches(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_PLAN", plan)
    for dtype in (torch.float32, *HALVES):
        assert kernels._plan(64, dtype) == "small"
        for items in (65, 10**6):
            assert kernels._plan(items, dtype) == plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["streaming", "chunked"])
def test_either_plan_can_be_chosen_by_the_environment(
    plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_PLAN", plan)
    student, teacher = pair(65, 8, dtype)
    student.requires_grad_()
    batch_similarity(student, teacher, temperature=0.5, backend="triton").backward()
    assert student.grad is not None
    expected = defined(student, teacher)
    units = tolerances.UNIT[dtype]
    assert (student.grad.double() - expected.student).norm() <= 2 * max(units, 1e-6) * (
        expected.student.norm()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("items", "needed"),
    [
        (5, [(False, False), (True, False), (False, True), (True, True)]),
        (66, [(False, False), (False, True)]),
    ],
)
def test_passes_save_what_they_say_and_give_what_is_asked_for(
    items: int, needed: list[tuple[bool, bool]], dtype: torch.dtype
) -> None:
    student, teacher = pair(items, 8, dtype)
    expected = defined(student, teacher, grad_output=20.0)
    for student_needs_grad, teacher_needs_grad in needed:
        needs = {"student_needs_grad": student_needs_grad, "teacher_needs_grad": teacher_needs_grad}
        loss, rows, gradients = kernels.forward(student, teacher, None, temperature=0.5, **needs)
        assert loss.shape == ()
        assert rows.dtype is gradients.dtype is torch.float32
        shapes = kernels.saved_shapes(items, 8, dtype=dtype, **needs)
        assert shapes == (tuple(rows.shape), tuple(gradients.shape))
        torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
        upstream = torch.tensor(20.0)
        results = kernels.backward(
            upstream, student, teacher, None, rows, gradients, temperature=0.5, **needs
        )
        for ours, theirs, asked in zip(results, expected[1:], needs.values(), strict=True):
            assert (ours is not None) is asked
            if ours is not None:
                torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-4)


@ALL_PLANS
def test_no_pass_makes_a_gpu_wait(plan: str) -> None:
    student, teacher = pair(18, 8)
    mask, upstream = kept_items(18), torch.tensor(0.5)
    with NoValueIsRead():
        for given in (None, mask):
            fused(plan, student, teacher, given, upstream=upstream)
        with pytest.raises(AssertionError, match="would make a GPU wait"):
            student[mask]  # the mode does see what it is to see


@ALL_PLANS
def test_half_gradients_are_scaled_before_they_are_rounded(plan: str) -> None:
    # Unscaled, every entry of this gradient is below float16's smallest number.
    student, teacher = pair(6, 8)
    student, teacher = (student * 2.0**14).half(), teacher.half()
    unscaled = defined(student, teacher, temperature=8.0).student
    assert unscaled.abs().max() < 2.0**-25
    result = fused(plan, student, teacher, temperature=8.0, grad_output=2.0**24)
    expected = 2.0**24 * unscaled
    assert (result.student.double() - expected).norm() <= 2.0**-11 * expected.norm()


class _LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that any operator returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        if isinstance(outcome, Tensor):
            self.size = max(self.size, outcome.nbytes)
        return outcome


def test_streaming_allocates_no_matrix_of_all_pairs() -> None:
    items, width = 40, 8
    student, teacher = pair(items, width, torch.bfloat16)
    mask = kept_items(items)
    for dtype in (torch.bfloat16, torch.float32):
        features = student.to(dtype), teacher.to(dtype)
        with _LargestTensor() as seen:
            fused("streaming", *features, mask)
        assert seen.size <= 12 * items * 4  # twelve numbers per row
    with _LargestTensor() as seen:
        fused("chunked", student, teacher, mask, chunk=items)
    assert seen.size >= 2 * items * items * 4  # the mode does see what a plan allocates


# --- accuracy -------------------------------------------------------------------------------------


_DRAWS = 200


class Cell(NamedTuple):
    """Draws of one shape, temperature and dtype, and for each..."""

    pairs: list[tuple[Tensor, Tensor]]
    truths: list[Result]
    errors: list[list[Tensor]]
    """...those of the reference, computed in float32 and stored as the gradients are."""
    units: Tensor
    """...(draws, 3) what it makes of roundings."""


@cache
def cell(items: int, width: int, temperature: float, dtype: torch.dtype, size: float) -> Cell:
    define = partial(defined, temperature=temperature, grad_output=size)
    pairs = [pair(items, width, dtype, seed=seed) for seed in range(_DRAWS)]
    truths = [define(*features) for features in pairs]
    references = [define(*features, dtype=torch.float32) for features in pairs]
    stored = [Result(x.loss, x.student.to(dtype), x.teacher.to(dtype)) for x in references]
    units = [conditions(define, [x.double() for x in features]) for features in pairs]
    return Cell(pairs, truths, list(map(errors, stored, truths)), torch.stack(units))


def errors(result: Result, truth: Result) -> list[Tensor]:
    return [(ours.double() - theirs).abs() for ours, theirs in zip(result, truth, strict=True)]


def largest(draws: list[list[Tensor]]) -> Tensor:
    """Of all draws' entries: loss, student's gradient, teacher's gradient."""
    return torch.stack([torch.stack([x.max() for x in draw]) for draw in draws]).amax(0)


def root_mean_square(draws: list[list[Tensor]]) -> Tensor:
    squares = torch.stack([torch.stack([x.square().mean() for x in draw]) for draw in draws])
    return squares.mean(0).sqrt()


def norms(draws: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([x.norm() for x in draw]) for draw in draws])


def _one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs, each of which costs the interpreter milliseconds."""
    gradient = {True: (kernels._GradientTile(32, 32, 32, 32, 1, 4, 2),)}
    statistics = {True: kernels._StatisticsTile(32, 32, 32, 4, 2)}
    for kind in ("HALF", "IEEE"):
        monkeypatch.setattr(kernels, f"_STATISTICS_{kind}_TILES", statistics)
        monkeypatch.setattr(kernels, f"_STUDENT_{kind}_TILES", gradient)
        monkeypatch.setattr(kernels, f"_TEACHER_{kind}_TILES", gradient)
    monkeypatch.setattr(kernels, "_ROW_BLOCK", 32)


def _multiply_and_add(
    self: object, a: TensorHandle, b: TensorHandle, total: TensorHandle, *rest: object
) -> TensorHandle:
    """A float32 product as a GPU makes it, one multiply-add after the other.

    NumPy's rounds by the shapes: a cosine would be another number in the other pass, or transposed.
    """
    left, right, found = a.data.astype(np.float64), b.data.astype(np.float64), total.data
    for depth in range(left.shape[1]):
        if left[:, depth].any() or not np.isfinite(right[depth]).all():
            found = (found + left[:, depth, None] * right[depth]).astype(np.float32)
    return TensorHandle(found, total.dtype.scalar)


@pytest.mark.parametrize(
    ("plan", "items", "width", "temperature"),
    [
        ("small", 16, 24, 0.1),
        ("small", 5, 16, 0.1),
        ("small", 5, 16, 1.0),
        ("streaming", 16, 24, 0.1),
        ("streaming", 5, 16, 1.0),
        ("chunked", 5, 16, 0.1),
    ],
)
def test_errors_are_those_of_the_reference_in_float32(
    plan: str, items: int, width: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one_tile(monkeypatch)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _multiply_and_add)
    draws = cell(items, width, temperature, torch.float32, 1.0)
    ours = [
        errors(fused(plan, *features, temperature=temperature, chunk=items), truth)
        for features, truth in zip(draws.pairs, draws.truths, strict=True)
    ]
    assert (root_mean_square(ours) <= 1.5 * root_mean_square(draws.errors)).all()
    relative, of_reference = (norms(x) / draws.units for x in (ours, draws.errors))
    assert (relative.amax(0) <= 1.5 * of_reference.amax(0)).all()
    assert (relative.square().mean(0) <= 1.5**2 * of_reference.square().mean(0)).all()
    if items > 5:  # of five items, the draw with the worst condition decides either's largest error
        assert (largest(ours) <= 1.5 * largest(draws.errors)).all()


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        ("small", torch.float16),
        ("small", torch.bfloat16),
        ("streaming", torch.float16),
        ("streaming", torch.bfloat16),
        ("chunked", torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_errors_are_no_larger_than_the_references(
    plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one_tile(monkeypatch)
    draws = cell(6, 16, 0.5, dtype, 100.0)
    options = {"temperature": 0.5, "grad_output": 100.0, "chunk": 6}
    ours = [
        errors(fused(plan, *features, **options), truth)
        for features, truth in zip(draws.pairs, draws.truths, strict=True)
    ]
    # A few entries lie so near the middle of two numbers that float32's last digit decides.
    assert (root_mean_square(ours) <= 1.001 * root_mean_square(draws.errors)).all()
    assert (largest(ours) <= 1.001 * largest(draws.errors)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_weights_need_two_halves(dtype: torch.dtype, temperature: float) -> None:
    # What the tensor cores would make of weights rounded to one half, and of the sum of two.
    squares = {"once": 0.0, "twice": 0.0, "reference": 0.0}
    for seed in range(_DRAWS):
        student, teacher = (x.double() for x in pair(24, 32, dtype, seed=seed))
        unit_s, unit_t = (x / x.norm(dim=1, keepdim=True) for x in (student, teacher))
        target, prediction = (unit_t @ x.T / temperature for x in (unit_t, unit_s))
        slope = prediction.softmax(1) - target.softmax(1)
        weights = slope / teacher.norm(dim=1, keepdim=True) * 2.0**12  # away from underflow
        high = weights.to(dtype).double()
        low = (weights - high).to(dtype).double()
        exact = weights.T @ teacher
        for name, rounded in (("once", high), ("twice", high + low), ("reference", weights)):
            stored = (rounded.T @ teacher).to(dtype).double()
            squares[name] += (stored - exact).square().sum().item()
    assert squares["once"] > 1.2 * squares["reference"]
    assert squares["twice"] <= 1.001 * squares["reference"]


@ALL_PLANS
def test_repeats_agree_to_the_bit(plan: str) -> None:
    student, teacher = pair(20, 10)
    mask = kept_items(20)
    first = fused(plan, student, teacher, mask)
    for _ in range(2):
        for ours, theirs in zip(fused(plan, student, teacher, mask), first, strict=True):
            assert torch.equal(ours, theirs)


def test_inputs_are_never_modified() -> None:
    student, teacher = pair(20, 10)
    mask = kept_items(20)
    copies = [x.clone() for x in (student, teacher, mask)]
    for plan in PLANS:
        fused(plan, student, teacher, mask)
        for now, before in zip((student, teacher, mask), copies, strict=True):
            assert torch.equal(now, before)
