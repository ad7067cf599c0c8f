"""DIST's Triton kernels, in the interpreter, against the definition in float64."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from telme_kd.reference.dist import dist_loss
from tests.helpers import tolerances
from tests.helpers.strategies import Logits

pytest.importorskip("triton", reason="Triton is not installed")

from telme_kd.kernels.triton import dist

PLANS = ("small", "medium", "large", "chunks")
EPS = (None, 1e-8)


class Options(NamedTuple):
    temperature: float = 2.0
    inter_weight: float = 1.0
    intra_weight: float = 0.5
    eps: float | None = None


class Result(NamedTuple):
    loss: Tensor
    student: Tensor | None
    teacher: Tensor | None


def fused(
    plan: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    *,
    grad_output: float = 1.0,
    student_needs_grad: bool = True,
    teacher_needs_grad: bool = True,
    chunk: int = 5,
) -> Result:
    """Loss and gradients by one plan, whatever the shape would choose."""
    needs = {"student_needs_grad": student_needs_grad, "teacher_needs_grad": teacher_needs_grad}
    upstream = torch.tensor(grad_output)
    if plan == "chunks":
        return _in_chunks(student, teacher, mask, options, upstream, chunk, needs)
    weights = dist._Weights(*options)
    if plan == "small":
        tile = dist._small_tile(*student.shape)
        assert tile is not None
        loss, rows, columns = dist._forward_small(
            student, teacher, mask, weights, tile, student_needs_grad, teacher_needs_grad
        )
    else:
        forward = dist._forward_medium if plan == "medium" else dist._forward_large
        loss, rows, columns = forward(student, teacher, mask, weights)
    gradients = dist.backward(
        upstream, student, teacher, mask, rows, columns, **options._asdict(), **needs
    )
    return Result(loss, *gradients)


def _in_chunks(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    upstream: Tensor,
    chunk: int,
    needs: dict[str, bool],
) -> Result:
    rows, columns = dist.new_statistics(*student.shape, dtype=torch.float32, device=student.device)
    parts = [slice(start, start + chunk) for start in range(0, len(student), chunk)]
    inputs = [
        (student[p], teacher[p], None if mask is None else mask[p], rows[:, p]) for p in parts
    ]
    for inputs_of_chunk in inputs:
        dist.observe(*inputs_of_chunk, columns, **options._asdict())
    loss = dist.conclude(rows, columns, mask, **options._asdict())
    gradients = [
        dist.gradient(upstream, *inputs_of_chunk, columns, **options._asdict(), **needs)
        for inputs_of_chunk in inputs
    ]
    sides = [None if side[0] is None else torch.cat(side) for side in zip(*gradients, strict=True)]
    return Result(loss, *sides)


def definition(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by autograd of the reference."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (student, teacher)]
    loss = dist_loss(*inputs, mask=mask, **options._asdict())
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def assert_equals_definition(
    result: Result, student: Tensor, teacher: Tensor, mask: Tensor | None, options: Options
) -> None:
    """Within the project's bounds for float32, and half an ulp more for stored half precision."""
    loss, *gradients = definition(student, teacher, mask, options)
    kept = slice(None) if mask is None else mask
    sides = [x.detach()[kept].double().numpy() for x in (student, teacher)]
    case = Logits(*sides, options.temperature, options.inter_weight, options.intra_weight)
    swapped = Logits(*sides[::-1], options.temperature, options.inter_weight, options.intra_weight)
    assert result.loss.dtype == torch.float32
    assert abs(result.loss.double() - loss) <= tolerances.dist_bound(
        case, options.eps, torch.float32
    )
    for side, each, ours, truth, logits in zip(
        "st", (case, swapped), result[1:], gradients, (student, teacher), strict=True
    ):
        if ours is None:
            continue
        assert ours.dtype == logits.dtype, side
        assert ours.is_contiguous(), side
        error = torch.linalg.vector_norm(ours.double() - truth)
        bound = tolerances.dist_gradient_bound(each, options.eps, torch.float32)
        if ours.dtype != torch.float32:
            unit = tolerances.UNIT[ours.dtype]
            tiniest = torch.finfo(ours.dtype).smallest_normal * unit
            bound += float(unit * torch.linalg.vector_norm(truth)) + tiniest * truth.numel() ** 0.5
        assert error <= bound, side
        if mask is not None:
            assert (ours[~mask] == 0).all(), side


def batch(items: int, classes: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, items, classes, generator=generator)
    return student, teacher


def some(items: int) -> Tensor:
    """A mask that leaves out every third item."""
    return torch.arange(items) % 3 != 1


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("items", "classes"), [(4, 7), (13, 30)])
@pytest.mark.parametrize("plan", PLANS)
def test_loss_and_both_gradients_equal_the_definition(
    plan: str, items: int, classes: int, masked: bool, eps: float | None
) -> None:
    student, teacher = batch(items, classes)
    mask = some(items) if masked else None
    options = Options(eps=eps)
    result = fused(plan, student, teacher, mask, options)
    assert_equals_definition(result, student, teacher, mask, options)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(
    plan: str, dtype: torch.dtype
) -> None:
    student, teacher = (x.to(dtype) for x in batch(9, 11))
    result = fused(plan, student, teacher, None, Options())
    assert_equals_definition(result, student, teacher, None, Options())


@pytest.mark.parametrize("plan", PLANS)
def test_student_and_teacher_may_differ_in_dtype(plan: str) -> None:
    student, teacher = batch(6, 5)
    teacher = teacher.bfloat16()
    result = fused(plan, student, teacher, None, Options())
    assert_equals_definition(result, student, teacher, None, Options())


@pytest.mark.parametrize("plan", PLANS)
def test_grad_output_multiplies_before_the_gradient_is_rounded(plan: str) -> None:
    student, teacher = (x.half() for x in batch(9, 8))
    options = Options(inter_weight=1e-6, intra_weight=1e-6)  # a gradient that float16 cannot hold
    scaled = fused(plan, student, teacher, None, options, grad_output=65536.0).student
    assert scaled is not None
    _, truth, _ = definition(student, teacher, None, options)
    assert truth.abs().max() < 1e-6
    relative = torch.linalg.vector_norm(scaled.double() / 65536 - truth) / truth.norm()
    assert relative < tolerances.UNIT[torch.float16]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("inter_weight", "intra_weight"), [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_zero_weight_leaves_its_term_out(
    plan: str, inter_weight: float, intra_weight: float, eps: float | None
) -> None:
    student, teacher = batch(8, 6)
    options = Options(1.0, inter_weight, intra_weight, eps)
    result = fused(plan, student, teacher, some(8), options)
    assert_equals_definition(result, student, teacher, some(8), options)


@pytest.mark.parametrize("plan", PLANS)
def test_masked_items_leave_no_trace_whatever_they_hold(plan: str) -> None:
    student, teacher = batch(9, 7)
    mask = some(9)
    clean = fused(plan, student, teacher, mask, Options())
    student[~mask] = torch.nan
    teacher[~mask] = torch.inf
    dirty = fused(plan, student, teacher, mask, Options())
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("eps", EPS)
def test_nothing_is_lost_where_all_is_masked(plan: str, eps: float | None) -> None:
    student = torch.full((6, 5), torch.nan)
    mask = torch.zeros(6, dtype=torch.bool)
    result = fused(plan, student, student, mask, Options(eps=eps))
    for value in result:
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(
    "degrade",
    [
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:1].expand_as(x),
        lambda x: torch.zeros_like(x),
        lambda x: 1e-5 * x + x[:1],
        lambda x: 100.0 * x,
    ],
    ids=["constant rows", "constant columns", "zeros", "near-constant columns", "one class leads"],
)
def test_degenerate_students_equal_the_definition(
    plan: str, degrade: Callable[[Tensor], Tensor], eps: float | None
) -> None:
    student, teacher = batch(7, 6)
    student = degrade(student)
    result = fused(plan, student, teacher, None, Options(eps=eps), teacher_needs_grad=False)
    assert_equals_definition(result, student, teacher, None, Options(eps=eps))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_one_item_or_one_class(plan: str, shape: tuple[int, int]) -> None:
    student, teacher = batch(*shape)
    result = fused(plan, student, teacher, None, Options())
    assert_equals_definition(result, student, teacher, None, Options())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("eps", EPS)
def test_classes_at_minus_infinity_are_left_out(plan: str, eps: float | None) -> None:
    student, teacher = batch(8, 9)
    student[:, 2] = -torch.inf
    teacher[:, 2] = -torch.inf
    student[3:5, 0] = -torch.inf
    options = Options(eps=eps)
    result = fused(plan, student, teacher, None, options)
    loss, *gradients = definition(student, teacher, None, options)
    finite = student.nan_to_num(neginf=-80.0), teacher.nan_to_num(neginf=-80.0)
    case = Logits(*(x.double().numpy() for x in finite), *options[:3])
    assert abs(result.loss.double() - loss) <= tolerances.dist_bound(case, eps, torch.float32)
    for ours, truth in zip(result[1:], gradients, strict=True):
        bound = tolerances.dist_gradient_bound(case, eps, torch.float32)
        assert torch.linalg.vector_norm(ours.double() - truth) <= bound
        assert (ours[:, 2] == 0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_classes_whose_probabilities_float32_cannot_hold_still_count(plan: str) -> None:
    student, teacher = batch(12, 5, scale=1.0)
    student[:, 3] -= 150.0  # e-65
    teacher[:, 3] -= 120.0
    options = Options(temperature=1.0)
    result = fused(plan, student, teacher, None, options)
    loss, *gradients = definition(student, teacher, None, options)
    # A logit of 150 has a rounding error of 150 u, which is relative in its probability.
    unit = 150 * tolerances.UNIT[torch.float32]
    assert abs(result.loss.double() - loss) <= 8 * unit
    for ours, truth in zip(result[1:], gradients, strict=True):
        assert truth[:, 3].norm() > 0.01
        assert torch.linalg.vector_norm(ours.double() - truth) <= 8 * unit * truth.norm()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("intra_weight", [0.0, 1.0])
def test_nan_in_gives_nan_out(plan: str, intra_weight: float) -> None:
    student, teacher = batch(6, 5)
    student[2, 1] = torch.nan
    with np.errstate(invalid="ignore"):  # the interpreter's NumPy
        result = fused(plan, student, teacher, None, Options(intra_weight=intra_weight))
    assert result.loss.isnan()
    for gradient in result[1:]:
        assert gradient[2].isnan().all()
        assert intra_weight or gradient[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
def test_inputs_of_any_strides_give_the_same_bits(plan: str) -> None:
    student, teacher = batch(8, 6)
    mask = some(8)
    expected = fused(plan, student, teacher, mask, Options())
    spread = torch.full((16, 18), torch.nan)
    spread[::2, 1::3] = student
    apart = torch.zeros(16, dtype=torch.bool)
    apart[::2] = mask
    strided = fused(plan, spread[::2, 1::3], teacher.T.clone().T, apart[::2], Options())
    for ours, same in zip(strided, expected, strict=True):
        assert torch.equal(ours, same)
        assert ours.is_contiguous()


@pytest.mark.parametrize("plan", PLANS)
def test_expanded_inputs_and_masks(plan: str) -> None:
    student, _ = batch(8, 6)
    teacher = batch(1, 6, seed=1)[0].expand(8, 6)
    mask = torch.ones(1, dtype=torch.bool).expand(8)
    result = fused(plan, student, teacher, mask, Options())
    expected = fused(plan, student, teacher.contiguous(), mask.contiguous(), Options())
    for ours, same in zip(result, expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("student_needs_grad", "teacher_needs_grad"), [(True, False), (False, True)]
)
def test_a_gradient_that_nobody_wants_is_not_computed(
    plan: str, student_needs_grad: bool, teacher_needs_grad: bool
) -> None:
    student, teacher = batch(8, 6)
    both = fused(plan, student, teacher, None, Options())
    one = fused(
        plan,
        student,
        teacher,
        None,
        Options(),
        student_needs_grad=student_needs_grad,
        teacher_needs_grad=teacher_needs_grad,
    )
    assert torch.equal(one.loss, both.loss)
    for wanted, ours, same in zip(
        (student_needs_grad, teacher_needs_grad), one[1:], both[1:], strict=True
    ):
        assert torch.equal(ours, same) if wanted else ours is None


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("eps", EPS)
def test_chunks_of_any_size_give_the_whole_batch(chunk: int, eps: float | None) -> None:
    student, teacher = batch(11, 6)
    mask = some(11)
    mask[:4] = False  # chunks of which nothing counts
    result = fused("chunks", student, teacher, mask, Options(eps=eps), chunk=chunk)
    assert_equals_definition(result, student, teacher, mask, Options(eps=eps))


@pytest.mark.parametrize("plan", ["medium", "large"])
@pytest.mark.parametrize("eps", EPS)
def test_programs_that_read_several_tiles_merge_what_they_saw(plan: str, eps: float | None) -> None:
    student, teacher = batch(700 if plan == "medium" else 150, 5)
    student[100:] += 3 * student[100:].sign()  # moments of the tiles differ
    mask = some(len(student))
    result = fused(plan, student, teacher, mask, Options(eps=eps))
    assert_equals_definition(result, student, teacher, mask, Options(eps=eps))


def test_rows_longer_than_a_block_merge_what_they_saw() -> None:
    student, teacher = batch(3, dist._ROW_BLOCK + 5)
    student[0, : dist._ROW_BLOCK] = -torch.inf  # a block without a finite class, and then some
    student[1, dist._ROW_BLOCK :] += 20.0  # the largest logit comes last
    options = Options(intra_weight=0.0)
    result = fused("large", student, teacher, None, options, teacher_needs_grad=False)
    loss, truth, _ = definition(student, teacher, None, options)
    assert abs(result.loss.double() - loss) <= 1e-6
    assert result.student is not None
    assert torch.linalg.vector_norm(result.student.double() - truth) <= 1e-6 * truth.norm()


@pytest.mark.parametrize(
    ("items", "classes", "plan"),
    [
        (4, 7, "small"),
        (64, 32, "small"),
        (65, 32, "medium"),
        (4, 512, "small"),
        (2, 2049, "large"),
    ],
)
def test_the_shape_chooses_the_plan(items: int, classes: int, plan: str) -> None:
    assert (dist._small_tile(items, classes) is not None) == (plan == "small")
    rows, columns = dist.saved_shapes(
        items, classes, student_needs_grad=True, teacher_needs_grad=False
    )
    if plan == "small":
        assert (rows, columns) == ((1, items, classes), (0,))
    else:
        assert (rows[1:], columns[1:]) == ((items,), (classes,))


@pytest.mark.parametrize("shape", [(5, 7), (70, 70)])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
def test_what_is_saved_has_the_announced_shapes(
    shape: tuple[int, int], needs: tuple[bool, bool]
) -> None:
    student, teacher = batch(*shape)
    wanted = dict(zip(("student_needs_grad", "teacher_needs_grad"), needs, strict=True))
    loss, rows, columns = dist.forward(student, teacher, None, **Options()._asdict(), **wanted)
    assert (tuple(rows.shape), tuple(columns.shape)) == dist.saved_shapes(*shape, **wanted)
    assert {loss.dtype, rows.dtype, columns.dtype} == {torch.float32}
    gradients = (
        dist.backward(
            torch.tensor(1.0),
            student,
            teacher,
            None,
            rows,
            columns,
            **Options()._asdict(),
            **wanted,
        )
        if any(needs)
        else (None, None)
    )
    assert tuple(gradient is not None for gradient in gradients) == needs


def test_rows_of_the_gradient_stay_in_the_cache_if_most_processors_are_busy_even_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = batch(400, 40)
    for fitting, programs in ((16, 13), (8, 8), (4, 4), (3, 13), (0, 13)):
        cache = fitting * 32 * 40 * 8 * 4 // 3 + 1
        monkeypatch.setattr(dist, "_machine", lambda _, cache=cache: (8, cache))
        assert dist._gradient_programs(student, teacher, 32) == programs


def test_a_gradient_program_takes_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = batch(40, 40)
    expected = fused("medium", student, teacher, None, Options())
    monkeypatch.setattr(dist, "_gradient_programs", lambda *_: 1)
    for ours, same in zip(
        fused("medium", student, teacher, None, Options()), expected, strict=True
    ):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_input_gives_the_same_bits(plan: str) -> None:
    student, teacher = batch(11, 9)
    first = fused(plan, student, teacher, some(11), Options())
    for _ in range(3):
        again = fused(plan, student, teacher, some(11), Options())
        for ours, same in zip(again, first, strict=True):
            assert torch.equal(ours, same)


@pytest.mark.parametrize("plan", PLANS[:3])
@pytest.mark.parametrize("eps", EPS)
def test_float32_errs_no_more_than_eager(plan: str, eps: float | None) -> None:
    errors: dict[str, list[list[float]]] = {"fused": [], "eager": []}
    options = Options(temperature=4.0, intra_weight=1.0, eps=eps)
    for seed in range(30):
        student, teacher = batch(5, 7, seed)
        truth = definition(student, teacher, None, options)
        for name, values in (
            ("fused", fused(plan, student, teacher, None, options)),
            ("eager", definition(student, teacher, None, options, torch.float32)),
        ):
            errors[name].append(
                [
                    float((ours.double() - true).norm() / true.norm())
                    for ours, true in zip(values, truth, strict=True)
                ]
            )
    ours, eager = (torch.tensor(errors[name]).square().mean(0).sqrt() for name in errors)
    assert (ours <= 1.5 * eager).all(), (ours, eager)
