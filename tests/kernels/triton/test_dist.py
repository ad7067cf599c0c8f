"""DIST's Triton kernels, in the interpreter, against the definition in float64."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from telme_kd.reference.dist import dist_loss
from tests.helpers import draws, tolerances
from tests.helpers.strategies import Logits

pytest.importorskip("triton", reason="Triton is not installed")

from telme_kd.kernels import dist as operator
from telme_kd.kernels.triton import dist, launch
from telme_kd.kernels.triton.launch import Tile

PLANS = ("small", "turns", "medium", "large", "chunks")
EPS = (None, 1e-8)
NEEDS = {"student_needs_grad": True, "teacher_needs_grad": True}


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
    turn_items: int = 4,
) -> Result:
    """Loss and gradients by one plan, whatever the shape would choose."""
    needs = {"student_needs_grad": student_needs_grad, "teacher_needs_grad": teacher_needs_grad}
    upstream = torch.tensor(grad_output)
    if plan == "chunks":
        loss, *sides = _by_chunks(student, teacher, mask, options, upstream, chunk, needs)
        return Result(loss, *(None if side[0] is None else torch.cat(side) for side in sides))
    with pytest.MonkeyPatch.context() as patch:
        if plan == "turns":
            patch.setattr(dist, "_SMALL_TILES", ())
            tile = Tile(turn_items, _power_of_two(student.shape[1]), 1)
            patch.setattr(dist, "_TURN_TILES", (tile,))
        elif plan != "small":
            patch.setattr(dist, "_small_tile", lambda *_: None)
            patch.setattr(dist, "_observations", lambda *_: [_observation(plan, student)])
        loss, rows, columns = dist.forward(student, teacher, mask, **options._asdict(), **needs)
    gradients = dist.backward(
        upstream, student, teacher, mask, rows, columns, **options._asdict(), **needs
    )
    return Result(loss, *gradients)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _observation(plan: str, student: Tensor) -> dist._Observation:
    tiles = dist._STREAM_TILES if plan == "medium" else dist._MOMENT_TILES
    return dist._Observation(plan == "medium", dist._first_that_holds(tiles, student.shape[1]))


def _by_chunks(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    upstream: Tensor,
    chunk: int,
    needs: dict[str, bool],
) -> tuple[Any, ...]:
    """Loss, and gradients of each chunk of the student and of the teacher."""
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
    return loss, *zip(*gradients, strict=True)


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


@pytest.mark.parametrize("plan", ["turns", "medium"])
@pytest.mark.parametrize("eps", EPS)
def test_tiles_may_hold_one_row(
    plan: str, eps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = batch(7, 6)
    student[1], teacher[1] = torch.nan, torch.inf  # masked
    tile = Tile(1, 8, 1)
    monkeypatch.setattr(dist, "_STREAM_TILES", (tile,))
    result = fused(plan, student, teacher, some(7), Options(eps=eps), turn_items=1)
    clean = [torch.where(some(7)[:, None], logits, 0.0) for logits in (student, teacher)]
    assert_equals_definition(result, *clean, some(7), Options(eps=eps))


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
        (512, 32, "small"),
        (513, 32, "medium"),
        (2048, 8, "small"),
        (2049, 8, "medium"),
        (8, 2048, "small"),
        (9, 2048, "medium"),
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


@pytest.mark.parametrize("shape", [(5, 7), (70, 70), (130, 130)])
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


def test_a_gradient_program_takes_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = batch(40, 40)
    expected = fused("medium", student, teacher, None, Options())
    plan = dist._GradientPlan(dist._GRADIENT_TILES[1], 1)
    monkeypatch.setattr(dist, "_gradient_plans", lambda *_: [plan])
    for ours, same in zip(
        fused("medium", student, teacher, None, Options()), expected, strict=True
    ):
        assert torch.equal(ours, same)


def _gradient_plans(student: Tensor, teacher: Tensor) -> list[Any]:
    return dist._gradient_plans(dist._Batch(student, teacher, None))


def test_the_gradients_second_read_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (logits.bfloat16() for logits in batch(400, 40))
    row = 40 * 4  # bytes of a row pair; the tiles below hold 16 and 32 rows
    monkeypatch.setattr(dist, "_LEAST_CHUNK_BYTES", 0)

    def chosen(rows_in_cache: int) -> Any:
        cache = 2 * rows_in_cache * row
        monkeypatch.setattr(dist, "_machine", lambda _: (8, cache))
        return _gradient_plans(student, teacher)[0]

    assert chosen(400)[1:] == (25, 0)  # everything fits
    assert chosen(399)[1:] == (24, 0)  # what is in flight fits
    assert chosen(8 * 16)[1:] == (8, 0)
    assert chosen(8 * 16 - 1)[1:] == (4, 120)  # not with all processors busy: in chunks
    assert chosen(31)[1:] == (2, 24)
    assert chosen(15)[1:] == (1, 8)
    assert chosen(7)[1:] == (25, 0)  # nothing fits
    monkeypatch.setattr(dist, "_LEAST_CHUNK_BYTES", 2**30)
    assert chosen(100)[1:] == (25, 0)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_chunks_of_the_gradient_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, rows: int, eps: float | None, needs: tuple[bool, bool]
) -> None:
    student, teacher = batch(37, 7)
    monkeypatch.setattr(dist, "_SPAN", 4)  # so that there are two segments
    tile = Tile(rows // 2, 2, 1)
    plan = dist._GradientPlan(tile, 2, rows)
    monkeypatch.setattr(dist, "_gradient_plans", lambda *_: [plan])
    mask = some(37)
    result = fused(
        "medium",
        student,
        teacher,
        mask,
        Options(eps=eps),
        student_needs_grad=needs[0],
        teacher_needs_grad=needs[1],
    )
    assert tuple(gradient is not None for gradient in result[1:]) == needs
    assert_equals_definition(result, student, teacher, mask, Options(eps=eps))


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_input_gives_the_same_bits(plan: str) -> None:
    student, teacher = batch(11, 9)
    first = fused(plan, student, teacher, some(11), Options())
    for _ in range(3):
        again = fused(plan, student, teacher, some(11), Options())
        for ours, same in zip(again, first, strict=True):
            assert torch.equal(ours, same)


# --- errors, over many draws ----------------------------------------------------------------------

DRAWS = 400
Drawn = tuple[Tensor, Tensor]
Values = tuple[Tensor, Tensor, Tensor]
"""Loss (draws,), and gradients of student and teacher (draws, B, C)."""


def independent(items: int, classes: int, scale: float = 3.0) -> Drawn:
    """Students and teachers (draws, B, C) that have nothing to do with one another."""
    generator = torch.Generator().manual_seed(100 * items + classes)
    students, teachers = scale * torch.randn(2, DRAWS, items, classes, generator=generator)
    return students, teachers


def redrawn(student: Tensor, teacher: Tensor) -> Drawn:
    """One batch with its roundings drawn anew, by changes too small for its condition number.

    Where condition numbers differ by orders of magnitude, among independent batches a single one
    would decide, and either side may be lucky there.
    """
    generator = torch.Generator().manual_seed(1)
    noise = 1e-5 * torch.randn(2, DRAWS, *student.shape, generator=generator)
    return student + noise[0], teacher + noise[1]


def nearly_constant_columns(logits: Tensor) -> Tensor:
    return 0.01 * logits + logits[:1]


def nearly_collinear() -> Drawn:
    students, others = independent(5, 7)
    return students, students + 0.02 * others


def with_an_even_column(temperature: float) -> Drawn:
    """Three items and a class that the teacher gives nearly the same probability in each."""
    student, teacher = batch(3, 8)
    shares = teacher.softmax(1)
    shares[:, 0] = 0.0
    even = torch.tensor([0.1000, 0.1002, 0.1003])
    shares *= ((1 - even) / shares.sum(1))[:, None]
    shares[:, 0] = even
    return redrawn(student, temperature * shares.log())


CELLS: dict[str, tuple[float, Callable[[], Drawn]]] = {
    "ordinary": (4.0, lambda: independent(5, 7)),
    "saturated": (1.0, lambda: independent(16, 7)),
    "several tiles": (1.0, lambda: redrawn(*batch(40, 20))),
    "low variance": (2.0, lambda: independent(5, 7, scale=0.1)),
    "nearly collinear": (4.0, nearly_collinear),
    "two items": (4.0, lambda: redrawn(*batch(2, 8))),
    "three items": (1.0, lambda: redrawn(*batch(3, 8))),
    "two classes": (1.0, lambda: redrawn(*batch(8, 2))),
    "three classes": (4.0, lambda: redrawn(*batch(5, 3))),
    "student's columns nearly constant": (
        4.0,
        lambda: redrawn(nearly_constant_columns(batch(5, 7)[0]), batch(5, 7)[1]),
    ),
    "teacher's columns nearly constant": (
        1.0,
        lambda: redrawn(batch(5, 7)[0], nearly_constant_columns(batch(5, 7)[1])),
    ),
    "an even column": (4.0, lambda: with_an_even_column(4.0)),
    "an even column, saturated": (1.0, lambda: with_an_even_column(1.0)),
}
"""Temperature and batches of kinds whose errors come about in different ways."""


def all_at_once(plan: str, students: Tensor, teachers: Tensor, options: Options) -> Values:
    """What ``fused`` gives of each draw."""
    student, teacher = students[0].clone(), teachers[0].clone()
    with draws.at_once(dist, {student: students, teacher: teachers}) as memory:
        if plan == "chunks":
            loss, *sides = _by_chunks(student, teacher, None, options, torch.tensor(1.0), 4, NEEDS)
            parts = [torch.cat([memory.of(part) for part in side], 1) for side in sides]
            return memory.of(loss), parts[0], parts[1]
        loss, *gradients = fused(plan, student, teacher, None, options)
        return memory.of(loss), memory.of(gradients[0]), memory.of(gradients[1])


def by_definition(
    students: Tensor, teachers: Tensor, options: Options, dtype: torch.dtype = torch.float64
) -> Values:
    """Loss and gradients by autograd of the reference, of each draw."""

    def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
        return dist_loss(student, teacher, mask=None, **options._asdict())

    of_each = torch.func.vmap(torch.func.grad_and_value(loss_of, argnums=(0, 1)))
    gradients, loss = of_each(students.to(dtype), teachers.to(dtype))
    return loss, *gradients


@lru_cache
def cell(name: str, eps: float | None) -> tuple[Tensor, Tensor, Options, Values, Values]:
    """Batches, options, the truth and what PyTorch computes in float32."""
    temperature, draw = CELLS[name]
    students, teachers = draw()
    options = Options(temperature, 1.0, 1.0, eps)
    truth = by_definition(students, teachers, options)
    eager = by_definition(students, teachers, options, torch.float32)
    return students, teachers, options, truth, eager


def errors(values: Values, truth: Values) -> Tensor:
    """Relative errors (draws, 3)."""
    return torch.stack(
        [
            (value.double() - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
            for value, true in zip(
                (each[:, None] if each.ndim == 1 else each for each in values),
                (each[:, None] if each.ndim == 1 else each for each in truth),
                strict=True,
            )
        ],
        dim=1,
    )


def assert_errs_no_more(ours: Tensor, eager: Tensor, factor: float) -> None:
    """RMS and maximum over all draws."""
    for size in (lambda x: x.square().mean(0).sqrt(), lambda x: x.amax(0)):
        assert (size(ours) <= factor * size(eager)).all(), (size(ours), size(eager))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("plan", PLANS)
def test_what_runs_at_once_is_what_the_interpreter_runs(plan: str, eps: float | None) -> None:
    students, teachers, options, truth, _ = cell("ordinary", eps)
    at_once = all_at_once(plan, students[:3], teachers[:3], options)
    for draw in range(3):
        one = fused(plan, students[draw], teachers[draw], None, options, chunk=4)
        for ours, same, true in zip(at_once, one, truth, strict=True):
            assert same is not None
            tolerance = 4 * tolerances.UNIT[torch.float32] * float(true[draw].abs().max())
            assert (ours[draw] - same).abs().max() <= tolerance


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("plan", [*PLANS, "gradient in chunks"])
def test_float32_errs_at_most_half_more_than_eager(
    plan: str, name: str, eps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plan == "gradient in chunks":
        monkeypatch.setattr(dist, "_SPAN", 4)
        gradient_plan = dist._GradientPlan(Tile(2, 2, 1), 2, 4)
        monkeypatch.setattr(dist, "_gradient_plans", lambda *_: [gradient_plan])
        plan = "medium"
    students, teachers, options, truth, eager = cell(name, eps)
    ours = all_at_once(plan, students, teachers, options)
    assert_errs_no_more(errors(ours, truth), errors(eager, truth), 1.5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("inter_weight", "intra_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_neither_term_alone_errs_more(plan: str, inter_weight: float, intra_weight: float) -> None:
    students, teachers = independent(16, 7)
    options = Options(1.0, inter_weight, intra_weight)
    truth = by_definition(students, teachers, options)
    eager = by_definition(students, teachers, options, torch.float32)
    ours = all_at_once(plan, students, teachers, options)
    assert_errs_no_more(errors(ours, truth), errors(eager, truth), 1.5)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_eager(
    plan: str, dtype: torch.dtype, eps: float | None
) -> None:
    """Kernels compute in float32 whatever they read; what they store is rounded here."""
    students, teachers = (logits.to(dtype) for logits in independent(5, 7))
    options = Options(4.0, 1.0, 1.0, eps)
    truth = by_definition(students, teachers, options)
    loss, *gradients = all_at_once(plan, students.float(), teachers.float(), options)
    ours = errors((loss, *(gradient.to(dtype) for gradient in gradients)), truth)
    eager = errors(by_definition(students, teachers, options, dtype), truth)
    assert_errs_no_more(ours, eager.nan_to_num(nan=torch.inf), 1.0)  # float16 loses gradients


# --- what the launcher does -----------------------------------------------------------------------


class Recorder:
    """In the place of a kernel: keeps count of launches."""

    def __init__(self, launched: list[str], name: str) -> None:
        self.launched, self.name = launched, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return lambda *_, **__: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a test would have started on an H100."""
    names: list[str] = []
    for kernel in {shipped.kernel.__name__ for shipped in dist.shipped()}:
        monkeypatch.setattr(dist, kernel, Recorder(names, kernel))
    monkeypatch.setattr(dist, "_machine", lambda _: (132, 50 << 20))
    return names


ONCE = ["_stream", "_conclude", "_loss"]
TWICE = ["_row_statistics", "_column_moments", "_conclude", "_loss"]


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((64, 7), torch.float32, ["_small"], ["_scale"]),
        ((2048, 7), torch.float16, ["_in_turns"], ["_scale"]),
        ((256, 1000), torch.float32, ONCE, ["_gradient"]),
        ((8192, 4096), torch.float32, ONCE, ["_sums", "_gradient"] * 11),
        ((8192, 4096), torch.bfloat16, ONCE, ["_gradient"]),
        ((8192, 4095), torch.bfloat16, TWICE, ["_gradient"]),
        ((256, 4096), torch.float32, TWICE, ["_gradient"]),
        ((128, 128256), torch.float32, TWICE, ["_sums", "_gradient"] * 6),
        ((128, 128256), torch.bfloat16, TWICE, ["_sums", "_gradient"] * 3),
        ((64, 262144), torch.float32, TWICE, ["_sums", "_gradient"] * 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_launches_follow_from_shapes_and_never_from_values(
    launched: list[str],
    shape: tuple[int, int],
    dtype: torch.dtype,
    forward: list[str],
    backward: list[str],
    masked: bool,
) -> None:
    """Tensors without values, as of a CUDA graph under capture: a look at one would raise."""
    student = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    teacher = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(shape[0], dtype=torch.bool, device="meta") if masked else None
    loss = operator.dist_loss(student, teacher, mask=mask, **Options()._asdict(), backend="triton")
    assert launched == forward
    launched.clear()
    loss.backward()
    assert launched == backward
    for gradient in (student.grad, teacher.grad):
        assert gradient is not None
        assert (gradient.dtype, gradient.device.type) == (dtype, "meta")


@pytest.mark.parametrize("shape", [(64, 7), (2048, 7), (256, 1000), (8192, 4096), (8, 128256)])
@pytest.mark.parametrize(
    ("inter_weight", "intra_weight", "unused"),
    [
        (0.0, 1.0, set()),
        (1.0, 0.0, {"_column_moments"}),
    ],
)
def test_a_zero_weight_saves_launches(
    launched: list[str],
    shape: tuple[int, int],
    inter_weight: float,
    intra_weight: float,
    unused: set[str],
) -> None:
    student = torch.empty(shape, device="meta", requires_grad=True)
    options = Options(1.0, inter_weight, intra_weight)._asdict()
    operator.dist_loss(student, student.detach(), mask=None, **options, backend="triton").backward()
    assert not unused & set(launched)


@pytest.mark.parametrize("plan", PLANS)
def test_two_zero_weights_start_nothing(plan: str, launched: list[str]) -> None:
    student, teacher = batch(6, 5)
    student[0, 0] = torch.nan
    result = fused(plan, student, teacher, None, Options(1.0, 0.0, 0.0), grad_output=torch.inf)
    assert launched == []
    for value in result:
        assert value is not None
        assert (value == 0).all()


@pytest.mark.parametrize("shape", [(130, 40), (40, 130)])
def test_whatever_tuning_may_choose_equals_the_definition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = batch(*shape, scale=1.0)
    monkeypatch.setattr(dist, "_small_tile", lambda *_: None)
    monkeypatch.setattr(dist, "_machine", lambda _: (2, 2 * 48 * shape[1] * 8))
    tried = set()
    for turn in range(3):

        def choose(plans: list[Any], kind: object, run: object, turn: int = turn) -> Any:
            plan = plans[turn % len(plans)]
            tried.add(plan)
            return plan

        monkeypatch.setattr(dist, "fastest", choose)
        result = fused_as_chosen(student, teacher, Options())
        assert_equals_definition(result, student, teacher, None, Options())
    assert len(tried) > 3


def test_tuning_runs_every_plan_before_the_chosen_one(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(launch, "TUNING", True)
    monkeypatch.setattr(launch, "_chosen", {})
    student = torch.empty(256, 1000, device="meta", requires_grad=True)
    loss = operator.dist_loss(
        student, student.detach(), mask=None, **Options()._asdict(), backend="triton"
    )
    assert launched == [ONCE[0], *TWICE[:2] * 2, *ONCE]
    launched.clear()
    loss.backward()
    assert launched == ["_gradient"]  # there was nothing to choose


def fused_as_chosen(student: Tensor, teacher: Tensor, options: Options) -> Result:
    needs = {"student_needs_grad": True, "teacher_needs_grad": True}
    loss, rows, columns = dist.forward(student, teacher, None, **options._asdict(), **needs)
    gradients = dist.backward(
        torch.tensor(1.0), student, teacher, None, rows, columns, **options._asdict(), **needs
    )
    return Result(loss, *gradients)


def test_the_kinds_that_are_timed_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Any] = []

    def note(plans: list[Any], kind: object, run: object) -> Any:
        kinds.append(kind)
        return plans[0]

    monkeypatch.setattr(dist, "_small_tile", lambda *_: None)
    monkeypatch.setattr(dist, "fastest", note)
    student, teacher = batch(40, 16)
    for items, dtype in (
        (40, torch.float32),
        (33, torch.float32),
        (20, torch.float32),
        (40, torch.float16),
    ):
        fused_as_chosen(student[:items].to(dtype), teacher[:items].to(dtype), Options())
    assert [kind[0] for kind in kinds] == ["observation", "gradient"] * 4
    assert kinds[:2] == kinds[2:4]  # alike within a factor of two
    assert len(set(kinds)) == 6
