"""Losses over a process group equal one process that holds the whole batch."""

import os
import re
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.traffic import Traffic
from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss
from telme_kd.distributed import gather_batch
from telme_kd.errors import BackendError, DistributedError, DTypeError, RangeError, TelmeKDError
from telme_kd.functional import batch_similarity_loss, dist_loss
from telme_kd.kernels.distributed import batch_similarity, dist
from tests.helpers import processes, strategies
from tests.helpers.tolerances import (
    UNIT,
    dist_bound,
    dist_gradient_bound,
    similarity_bound,
    similarity_gradient_bound,
)

Array = NDArray[np.float64]

WORLDS = (1, 2, 4)
LOSSES = {"dist": dist_loss, "batch_similarity": batch_similarity_loss}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
RELATIVE = {"float64": 1e-12, "float32": 1e-6}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
UPSTREAM = 3.0

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")


# --- what runs in the processes -------------------------------------------------------------------


@cache
def groups() -> dict[int, Any]:
    """Of the first 1, 2 and 4 processes; made in all of them together."""
    return {world: torch.distributed.new_group(range(world)) for world in WORLDS}


@dataclass(frozen=True)
class Batch:
    """A whole batch and how it lies on processes; arrays, as they travel in a pipe.

    Attributes:
        student: (B, n) in float64.
        teacher: (B, n).
        sizes: of each process, how many of the items it has, in rank order.
        dtype: what the tensors are made of.
        mask: (B,) or None.
        masked: the processes that pass their part of the mask; the others' is all True.
    """

    student: Array
    teacher: Array
    sizes: tuple[int, ...]
    dtype: str = "float64"
    mask: NDArray[np.bool_] | None = None
    masked: tuple[int, ...] = tuple(range(max(WORLDS)))

    @property
    def world(self) -> int:
        return len(self.sizes)

    def rows(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def tensors(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Leaves that want a gradient."""
        dtype = getattr(torch, self.dtype)
        student, teacher = (
            torch.tensor(side[rows]).to(dtype).requires_grad_()
            for side in (self.student, self.teacher)
        )
        return student, teacher

    def whole_mask(self) -> NDArray[np.bool_] | None:
        """What the parts of the mask come to."""
        if self.mask is None:
            return None
        kept = self.mask.copy()
        for rank in set(range(self.world)) - set(self.masked):
            kept[self.rows(rank)] = True
        return kept


def own_share(
    rank: int, name: str, batch: Batch, options: dict[str, Any], teacher_gradient: bool
) -> tuple[float, Array, Array | None] | None:
    """This process's loss, and its gradients as the mean over processes that DDP takes."""
    group = groups()[batch.world]
    if rank >= batch.world:
        return None
    student, teacher = batch.tensors(batch.rows(rank))
    teacher.requires_grad_(teacher_gradient)
    mask = None
    if batch.mask is not None and rank in batch.masked:
        mask = torch.tensor(batch.mask[batch.rows(rank)])
    loss = LOSSES[name](student, teacher, mask=mask, group=group, **options)
    (UPSTREAM * loss).backward()
    assert student.grad is not None
    assert (teacher.grad is not None) is teacher_gradient
    gradients = [
        None if side.grad is None else (side.grad.double() / batch.world).numpy()
        for side in (student, teacher)
    ]
    return loss.item(), gradients[0], gradients[1]


def over_group(
    crew: processes.Crew,
    name: str,
    batch: Batch,
    options: dict[str, Any],
    teacher_gradient: bool = False,
) -> tuple[list[float], Array, Array | None]:
    """Every process's value, and the gradients of the whole batch, row under row."""
    shares = crew(own_share, name, batch, options, teacher_gradient)[: batch.world]
    values = [share[0] for share in shares]
    student = np.concatenate([share[1] for share in shares])
    teacher = np.concatenate([share[2] for share in shares]) if teacher_gradient else None
    return values, student, teacher


def in_one_process(
    name: str, batch: Batch, options: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[float, Array, Array]:
    """Value and gradients of the definition, of the whole batch."""
    student, teacher = (side.detach() for side in batch.tensors())
    dtype = dtype or torch.promote_types(student.dtype, torch.float32)
    student, teacher = (side.to(dtype).requires_grad_() for side in (student, teacher))
    mask = batch.whole_mask()
    loss = LOSSES[name](
        student,
        teacher,
        mask=None if mask is None else torch.tensor(mask),
        **options | {"backend": "reference"},
    )
    (UPSTREAM * loss).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    return loss.item(), student.grad.double().numpy(), teacher.grad.double().numpy()


# --- equality -------------------------------------------------------------------------------------


@st.composite
def shardings(draw: st.DrawFn, items: int) -> tuple[int, ...]:
    """Any number of items on each of 1, 2 or 4 processes, none included."""
    world = draw(st.sampled_from(WORLDS))
    cuts = sorted(draw(st.lists(st.integers(0, items), min_size=world - 1, max_size=world - 1)))
    return tuple(np.diff([0, *cuts, items]).tolist())


@st.composite
def spreads(draw: st.DrawFn, student: Array, teacher: Array, dtype: str) -> Batch:
    """A whole batch on processes, masked or not."""
    items = len(student)
    mask = None
    if draw(st.booleans()):
        mask = np.random.default_rng(draw(strategies.seeds)).random(items) < 0.8
    sizes = draw(shardings(items))
    masked = tuple(rank for rank in range(len(sizes)) if draw(st.booleans()))
    return Batch(student, teacher, sizes, dtype, mask, masked)


def assert_equal_to_one_process(
    crew: processes.Crew, name: str, batch: Batch, options: dict[str, Any], teacher_gradient: bool
) -> None:
    """Value and gradients against the definition in float64, relative to their size."""
    tolerance = RELATIVE[batch.dtype]
    values, *gradients = over_group(crew, name, batch, options, teacher_gradient)
    value, *expected = in_one_process(name, batch, options, torch.float64)
    assert len(set(values)) == 1
    assert values[0] == pytest.approx(value, rel=tolerance)
    for found, truth in zip(gradients, expected, strict=True):
        if found is not None:
            assert np.linalg.norm(found - truth) <= tolerance * np.linalg.norm(truth)


DIST_OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0.5, 1.0, 2.0)),
        "inter_weight": st.sampled_from((0.0, 0.5, 2.0)),
        "intra_weight": st.sampled_from((0.5, 1.0)),
        "eps": st.sampled_from((None, 1e-8)),
        "backend": st.sampled_from(("cpu", "reference")),
    }
)


# Below a temperature of 0.25 no fixed offset will do; over less float32 has no six digits.
def similarity_options(*temperatures: float) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from(temperatures),
            "backend": st.sampled_from(("cpu", "reference")),
        }
    )


OPTIONS = {
    ("dist", "float64"): DIST_OPTIONS,
    ("dist", "float32"): DIST_OPTIONS,
    ("batch_similarity", "float64"): similarity_options(0.002, 0.1, 1.0),
    ("batch_similarity", "float32"): similarity_options(0.5, 1.0),
}
FIXED = np.random.default_rng(0).normal(size=(2, 19, 12))


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data())
def test_group_equals_one_process_in_float64(
    crew: processes.Crew, name: str, data: st.DataObject
) -> None:
    crew(gather_up_to, data.draw(st.sampled_from((0, 2**14))))
    seed, items, width = (data.draw(st.integers(*ends)) for ends in ((0, 99), (4, 24), (4, 24)))
    student, teacher = np.random.default_rng(seed).normal(size=(2, items, width))
    batch = data.draw(spreads(student, teacher, "float64"))
    options, teacher_gradient = data.draw(OPTIONS[name, batch.dtype]), data.draw(st.booleans())
    assert_equal_to_one_process(crew, name, batch, options, teacher_gradient)


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data())
def test_group_equals_one_process_in_float32(
    crew: processes.Crew, name: str, data: st.DataObject
) -> None:
    """One well-conditioned batch, however it is spread: else rounding alone is above 1e-6."""
    crew(gather_up_to, data.draw(st.sampled_from((0, 2**14))))
    batch = data.draw(spreads(*FIXED, "float32"))
    options, teacher_gradient = data.draw(OPTIONS[name, batch.dtype]), data.draw(st.booleans())
    assume(batch.mask is None or batch.mask.sum() > 12)
    assert_equal_to_one_process(crew, name, batch, options, teacher_gradient)


@given(data=st.data())
def test_dist_over_a_group_is_right_for_any_structure(
    crew: processes.Crew, data: st.DataObject
) -> None:
    crew(gather_up_to, data.draw(st.sampled_from((0, 2**14))))
    case = data.draw(strategies.logits(items=(1, 12), classes=(1, 12))).rounded(torch.float32)
    eps = data.draw(st.sampled_from((None, 1e-8)))
    batch = data.draw(spreads(case.student, case.teacher, "float32"))
    kept = batch.whole_mask()
    if kept is not None:
        assume(kept.any())
        case = replace(case, student=case.student[kept], teacher=case.teacher[kept])
    backend = data.draw(st.sampled_from(("cpu", "reference")))
    options = case.options | {"eps": eps, "backend": backend}
    values, student, _ = over_group(crew, "dist", batch, options)
    value, expected, _ = in_one_process("dist", batch, options, torch.float64)
    assert max(abs(found - value) for found in values) <= dist_bound(case, eps, torch.float32)
    bound = UPSTREAM * dist_gradient_bound(case, eps, torch.float32)
    assert np.linalg.norm(student - expected) <= bound


@given(data=st.data())
def test_batch_similarity_over_a_group_is_right_for_any_structure(
    crew: processes.Crew, data: st.DataObject
) -> None:
    case = data.draw(strategies.features(items=(1, 12), temperatures=(0.05, 0.1, 1.0, 64.0)))
    student, teacher = (side.double().numpy() for side in case.tensors(torch.float32))
    batch = data.draw(spreads(student, teacher, "float32"))
    options = {"temperature": case.temperature}
    values, gradient, _ = over_group(crew, "batch_similarity", batch, options)
    value, expected, _ = in_one_process("batch_similarity", batch, options, torch.float64)
    bound = similarity_bound(case, torch.float32)
    assert max(abs(found - value) for found in values) <= bound
    off = np.linalg.norm(gradient - expected, axis=1)
    assert (off <= UPSTREAM * similarity_gradient_bound(case, torch.float32)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_computes_in_float32(crew: processes.Crew, name: str, dtype: str) -> None:
    batch = Batch(*FIXED, sizes=(10, 0, 2, 7), dtype=dtype)
    values, *gradients = over_group(crew, name, batch, {}, teacher_gradient=True)
    value, *expected = in_one_process(name, batch, {}, torch.float64)
    assert values == pytest.approx([value] * 4, rel=1e-6)
    for found, truth in zip(gradients, expected, strict=True):
        assert found is not None
        # What is rounded is the gradient of a loss that is scaled for the mean; subnormals aside.
        np.testing.assert_allclose(found, truth, rtol=1.01 * UNIT[HALVES[dtype]], atol=1e-7)


def blockwise(rank: int, batch: Batch) -> list[Any]:
    """Batch similarity in blocks of three rows, and then in one."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for rows in (3, 64):
            patch.setattr(batch_similarity, "_FEWEST_ROWS", rows)
            patch.setattr(batch_similarity, "_BLOCK_BYTES", 1)
            for temperature in (0.05, 1.0):
                options = {"temperature": temperature}
                found.append(own_share(rank, "batch_similarity", batch, options, True))
    return found


def test_batch_similarity_in_blocks_equals_one_block(crew: processes.Crew) -> None:
    for *blocks, _ in [crew(blockwise, Batch(*FIXED, sizes=(10, 0, 2, 7)))]:
        for in_blocks, in_one in ((part[:2], part[2:]) for part in blocks):
            for (value, *gradients), (expected, *truths) in zip(in_blocks, in_one, strict=True):
                assert value == pytest.approx(expected, rel=1e-13)
                for found, truth in zip(gradients, truths, strict=True):
                    np.testing.assert_allclose(found, truth, rtol=1e-11, atol=1e-15)


# --- what travels ---------------------------------------------------------------------------------


def traffic(
    rank: int, name: str, batch: Batch, options: dict[str, Any], teacher_gradient: bool
) -> list[Any]:
    """The collectives of a forward pass; the backward pass is process 0's alone."""
    student, teacher = batch.tensors(batch.rows(rank))
    teacher.requires_grad_(teacher_gradient)
    mask = None if batch.mask is None else torch.tensor(batch.mask[batch.rows(rank)])
    with Traffic() as forward:
        loss = LOSSES[name](student, teacher, mask=mask, group="world", **options)
    if rank == 0:  # if it needed the others it would wait for them
        with Traffic() as backward:
            loss.backward()
        assert not backward.calls
        assert student.grad is not None
    return forward.calls


def gather_up_to(rank: int, numbers: int) -> None:
    dist._GATHERED_NUMBERS = numbers


REPORTS = ("all_gather", 7 * 4, "int64")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dist_exchanges_statistics_of_columns_alone(crew: processes.Crew, backend: str) -> None:
    crew(gather_up_to, 0)
    batch = Batch(*FIXED, sizes=(10, 0, 2, 7), dtype="float32")
    classes = FIXED.shape[-1]
    units = ("all_reduce", 2 * classes, "float32")
    means = ("all_reduce", 2 * classes, "float32")
    moments = ("all_reduce", 3 * classes + 1, "float32")
    rows = ("all_reduce", 1, "float32")
    for options, expected in (
        ({}, [REPORTS, units, means, moments]),
        ({"eps": 1e-8}, [REPORTS, means, moments]),
        ({"intra_weight": 0.0}, [REPORTS, rows]),
    ):
        for calls in crew(traffic, "dist", batch, options | {"backend": backend}, True):
            assert calls == expected
    crew(gather_up_to, 2**14)


def test_dist_gathers_few_statistics_at_once(crew: processes.Crew) -> None:
    batch = Batch(*FIXED, sizes=(10, 0, 2, 7), dtype="float32")
    statistics = ("all_gather", 4 * (7 * FIXED.shape[-1] + 1), "float32")
    for options in ({}, {"eps": 1e-8}):
        for calls in crew(traffic, "dist", batch, options | {"backend": "cpu"}, True):
            assert calls == [REPORTS, statistics]


def test_batch_similarity_gathers_the_teacher_alone(crew: processes.Crew) -> None:
    mask = np.arange(19) != 3  # a masked item does not travel
    batch = Batch(*FIXED, sizes=(10, 0, 2, 7), dtype="bfloat16", mask=mask)
    items, width = 18, FIXED.shape[-1]
    teachers = ("all_gather", 4 * 9 * width, "bfloat16")
    offsets = sums = ("all_reduce", 2 * items, "float32")
    loss = ("all_reduce", 1, "float32")
    crossed = ("all_reduce", items, "float32")
    gradient = ("all_reduce", items * width, "float32")
    for temperature, teacher_gradient, expected in (
        (1.0, False, [REPORTS, teachers, sums, loss]),
        (0.2, False, [REPORTS, teachers, offsets, sums, loss]),
        (1.0, True, [REPORTS, teachers, sums, loss, crossed, gradient]),
    ):
        options = {"temperature": temperature}
        for calls in crew(traffic, "batch_similarity", batch, options, teacher_gradient):
            assert calls == expected


def teacher_of_one(rank: int, batch: Batch) -> tuple[float, Array | None]:
    student, teacher = batch.tensors(batch.rows(rank))
    teacher.requires_grad_(rank == 2)
    loss = batch_similarity_loss(student.detach(), teacher, group="world")
    if rank == 2:
        (UPSTREAM * loss).backward()
    gradient = teacher.grad
    return loss.item(), None if gradient is None else (gradient / 4).numpy()


def test_teacher_of_a_single_process_may_need_a_gradient(crew: processes.Crew) -> None:
    batch = Batch(*FIXED, sizes=(10, 0, 2, 7))
    *_, (value, gradient), _ = crew(teacher_of_one, batch)
    expected, _, of_teacher = in_one_process("batch_similarity", batch, {})
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, of_teacher[batch.rows(2)], rtol=1e-11, atol=1e-14)


# --- under DistributedDataParallel ----------------------------------------------------------------


def objective(rank: int | None) -> tuple[list[float], list[float]]:
    """The terms and the gradient of a linear student on a shard that DDP trains, or on all."""
    batch = Batch(*FIXED, sizes=(8, 6, 4, 1))
    rows = slice(None) if rank is None else batch.rows(rank)
    generator = torch.manual_seed(0)
    labels = torch.randint(5, (19,), generator=generator)
    labels[::4] = -100
    labels = labels[rows]
    mask = (torch.rand(19, generator=generator) < 0.8)[rows]
    class_weight = torch.rand(12, generator=generator).double()
    model: Any = torch.nn.Linear(12, 12).double()
    group = None if rank is None else "world"
    if rank is not None:
        model = torch.nn.parallel.DistributedDataParallel(model)
    student, teacher = (side.detach() for side in batch.tensors(rows))
    criterion = StudentLoss(
        0.7,
        1.5,
        response=DISTLoss(2.0, group=group),
        class_weight=class_weight,
        label_smoothing=0.1,
        group=group,
    )
    logits = model(student)
    terms = criterion(
        logits, teacher, labels, student_features=logits, teacher_features=teacher, mask=mask
    )
    terms.total.backward()
    gradient = [entry for p in model.parameters() for entry in p.grad.flatten().tolist()]
    return [term.item() for term in terms], gradient


def test_objective_under_ddp_equals_one_process(crew: processes.Crew) -> None:
    terms, gradient = objective(None)
    for found_terms, found_gradient in crew(objective):
        np.testing.assert_allclose(found_terms, terms, rtol=1e-12)
        np.testing.assert_allclose(found_gradient, gradient, rtol=1e-11, atol=1e-14)


def objective_without_items(rank: int) -> list[float]:
    """No process has an item that counts; two have none at all."""
    rows = torch.randn(2 if rank < 2 else 0, 7, requires_grad=True)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    mask = torch.zeros(len(rows), dtype=torch.bool)
    terms = StudentLoss(group="world")(
        rows, rows, labels, student_features=rows, teacher_features=rows, mask=mask
    )
    terms.total.backward()
    assert rows.grad is not None
    assert not rows.grad.any()
    return [term.item() for term in terms]


def test_batch_in_which_nothing_counts_has_loss_zero(crew: processes.Crew) -> None:
    assert crew(objective_without_items) == [[0.0] * 4] * 4


def test_terms_of_another_group_are_refused() -> None:
    for terms in ({"response": DISTLoss()}, {"feature": BatchSimilarityLoss()}):
        (name,) = terms
        with pytest.raises(RangeError, match=rf"^{name}: expected a term over the group of the"):
            StudentLoss(**terms, group="world")


# --- edges ----------------------------------------------------------------------------------------


def with_nan(rank: int, name: str, options: dict[str, Any], masked: bool) -> tuple[float, bool]:
    """A NaN in process 1; whether the own gradient has one."""
    student, teacher = Batch(*FIXED, sizes=(10, 2, 0, 7)).tensors(
        Batch(*FIXED, sizes=(10, 2, 0, 7)).rows(rank)
    )
    student, teacher = student.detach(), teacher.detach()
    mask = torch.ones(len(student), dtype=torch.bool)
    if rank == 1:
        student[1, 3] = torch.nan
        mask[1] = not masked
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, mask=mask, group="world", **options)
    loss.backward()
    assert student.grad is not None
    return loss.item(), bool(student.grad.isnan().any())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_one_process_is_nan_in_all_unless_masked(
    crew: processes.Crew, name: str, backend: str
) -> None:
    options: dict[str, Any]
    for options in ({"intra_weight": 0.0}, {"inter_weight": 0.0}, {"eps": 1e-8}, {}):
        if name == "batch_similarity":
            options = {"temperature": 0.1} if "eps" in options else {}
        for value, _ in crew(with_nan, name, options | {"backend": backend}, False):
            assert np.isnan(value)
        for value, in_gradient in crew(with_nan, name, options | {"backend": backend}, True):
            assert np.isfinite(value)
            assert not in_gradient


def lost_class(rank: int, backend: str) -> list[Any]:
    """A class at -inf everywhere, another in one process, a third in all but one."""
    batch = Batch(*FIXED, sizes=(10, 2, 0, 7))
    student, teacher = (side.detach() for side in batch.tensors(batch.rows(rank)))
    student[:, 0] = teacher[:, 0] = -torch.inf
    if rank == 0:
        student[:, 1] = -torch.inf
    else:
        student[:, 2] = -torch.inf
    student.requires_grad_()
    loss = dist_loss(student, teacher, group="world", backend=backend)
    loss.backward()
    assert student.grad is not None
    return [student.detach().numpy(), teacher.numpy(), loss.item(), (student.grad / 4).numpy()]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_classes_left_out_by_some_processes(crew: processes.Crew, backend: str) -> None:
    students, teachers, values, gradients = zip(*crew(lost_class, backend), strict=True)
    student = torch.tensor(np.concatenate(students), requires_grad=True)
    loss = dist_loss(student, torch.tensor(np.concatenate(teachers)), backend="reference")
    loss.backward()
    assert student.grad is not None
    assert values == pytest.approx([loss.item()] * 4, rel=1e-12)
    np.testing.assert_allclose(np.concatenate(gradients), student.grad, rtol=1e-11, atol=1e-14)


def on_triton(rank: int, batch: Batch, options: dict[str, Any]) -> Any:
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    from telme_kd import _dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "_TRITON_INTERPRETED", True)
        return own_share(rank, "dist", batch, options | {"backend": "triton"}, True)


@pytest.mark.parametrize("eps", [None, 1e-8])
def test_triton_passes_over_a_group(crew: processes.Crew, eps: float | None) -> None:
    pytest.importorskip("triton")
    mask = np.arange(19) % 5 != 3
    for batch in (
        Batch(*FIXED, sizes=(10, 2, 0, 7), dtype="float32"),
        Batch(*FIXED, sizes=(8, 11), dtype="float32", mask=mask),
    ):
        options: dict[str, Any] = {"temperature": 2.0, "intra_weight": 0.5, "eps": eps}
        shares = crew(on_triton, batch, options)[: batch.world]
        value, *expected = in_one_process("dist", batch, options, torch.float64)
        for found, *_ in shares:
            assert found == pytest.approx(value, rel=1e-6)
        for side, truth in enumerate(expected, 1):
            gradient = np.concatenate([share[side] for share in shares])
            assert np.linalg.norm(gradient - truth) <= 1e-6 * np.linalg.norm(truth)


# --- refusals -------------------------------------------------------------------------------------


def message(loss: Any, *arguments: Any, **options: Any) -> str:
    try:
        loss(*arguments, **options, group="world")
    except TelmeKDError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int) -> dict[str, str]:
    """What processes are told that disagree, or that have no item at all."""
    first = rank == 0
    x = torch.randn(2, 7)
    narrow = torch.randn(2, 7 if first else 6)
    double = x.double() if rank == 3 else x
    empty = torch.randn(0, 7)
    found = {}
    for name, loss in LOSSES.items():
        found[f"{name}: width"] = message(loss, narrow, narrow)
        found[f"{name}: dtype"] = message(loss, double, double)
        found[f"{name}: options"] = message(loss, x, x, temperature=2.0 if rank == 2 else 1.0)
        found[f"{name}: empty"] = message(loss, empty, empty)
    found["loss"] = message(dist_loss if first else batch_similarity_loss, x, x)
    found["backend"] = message(dist_loss, x, x, backend="cpu" if first else "reference")
    return found


def test_processes_that_disagree_are_told(crew: processes.Crew) -> None:
    width = "expected one width and dtype in all processes, got "
    options = "expected one loss with the same options in all processes, got others in "
    remedy = "; give every process the same label set or feature width, and dtype"
    expected = {"loss": f"{options}1, 2, 3 than in 0; ", "backend": f"{options}1, 2, 3 than in 0; "}
    for name in LOSSES:
        narrow = ", ".join(["7 x 32 bit", *["6 x 32 bit"] * 3])
        double = ", ".join([*["7 x 32 bit"] * 3, "7 x 64 bit"])
        expected[f"{name}: width"] = f"{width}{narrow}{remedy}"
        expected[f"{name}: dtype"] = f"{width}{double}{remedy}"
        expected[f"{name}: options"] = f"{options}2 than in 0; call the same loss everywhere, and "
        expected[f"{name}: empty"] = "expected at least one item in one of the processes, got none"
    for told in crew(refusals):
        for mistake, text in expected.items():
            kind = "ShapeError" if mistake.endswith("empty") else "DistributedError"
            assert told[mistake].startswith(f"{kind}: group: {text}"), mistake
    assert set(told) == set(expected)


def told_by(loss: Callable[..., Tensor], group: Any) -> str:
    student, teacher = torch.randn(2, 4, 7).unbind()
    try:
        loss(student, teacher, group=group)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def left_alone(rank: int) -> str:
    """The second process leaves; the first finds out."""
    if rank == 0:
        return told_by(dist_loss, "world")
    threading.Timer(0.2, os._exit, [1]).start()
    return ""


def kept_waiting(rank: int, seconds: int) -> str:
    """The second process comes later than the group's timeout."""
    group = torch.distributed.new_group(range(2), timeout=timedelta(seconds=seconds))
    if rank == 0:
        return told_by(batch_similarity_loss, group)
    time.sleep(seconds + 1 if rank == 1 else 0)
    return ""


def test_process_that_dies_is_an_error(tmp_path: Path) -> None:
    with processes.crew(2, tmp_path) as two:
        told, _ = two(left_alone)
    assert re.search(r"(?i)closed by peer|reset by peer|broken pipe", told), told


def test_process_that_does_not_come_is_an_error_after_the_timeout(crew: processes.Crew) -> None:
    told, *_ = crew(kept_waiting, 2)
    assert re.search(r"(?i)timed out|timeout", told), told


def second_derivative(rank: int, name: str) -> str:
    student, teacher = torch.randn(2, 4, 7).unbind()
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, group="world")
    try:
        torch.autograd.grad(loss, student, create_graph=True)
    except DistributedError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_is_refused(crew: processes.Crew, name: str) -> None:
    for told in crew(second_derivative, name):
        assert told.startswith("group: expected a gradient that is not differentiated itself, got ")
        assert told.endswith("; compute the loss in one process, with group=None")


def compiled(rank: int, name: str) -> tuple[float, float, str]:
    pair = torch.randn(2, 4, 7, generator=torch.manual_seed(rank), requires_grad=True)

    def broken(pair: Tensor) -> Tensor:
        return LOSSES[name](*(2 * pair), group="world").cos()

    def whole(pair: Tensor) -> Tensor:
        return LOSSES[name](*(2 * pair), group="world").cos()

    with warnings.catch_warnings(action="ignore"):  # what Dynamo looks at when a graph breaks
        value: Any = torch.compile(broken, backend="eager")(pair)
        value.backward()
        try:
            torch.compile(whole, backend="eager", fullgraph=True)(pair)
            told = "nothing"
        except Exception as error:
            told = str(error)
    assert pair.grad is not None
    assert pair.grad.any()
    return value.item(), whole(pair).item(), told


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_call_breaks_the_graph_and_is_refused_in_a_full_one(
    crew: processes.Crew, name: str
) -> None:
    for broken, eager, told in crew(compiled, name):
        assert broken == eager
        assert "a loss over a group is no part of a full graph" in told


def without_kernel(rank: int) -> str:
    rows = torch.randn(3, 7)
    try:
        batch_similarity_loss(rows, rows, group="world", backend="triton")
    except BackendError as error:
        return str(error)
    return "nothing"


def test_batch_similarity_over_a_group_has_no_triton_kernel(crew: processes.Crew) -> None:
    for told in crew(without_kernel):
        assert "no 'triton' implementation of batch_similarity_loss over a group; use" in told


def alone(rank: int) -> list[bool]:
    """A group of one process is no group: the same bits, and a second derivative."""
    group = groups()[1]
    if rank > 0:
        return []
    found = []
    for loss in LOSSES.values():
        student, teacher = torch.randn(2, 4, 7).unbind()
        student.requires_grad_()
        value = loss(student, teacher, group=group)
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        found += [torch.equal(value, loss(student, teacher)), gradient.requires_grad]
    return found


def test_group_of_one_process_is_no_group(crew: processes.Crew) -> None:
    assert crew(alone)[0] == [True] * 4


def test_group_without_torch_distributed_is_refused() -> None:
    rows = torch.randn(3, 7)
    with pytest.raises(
        DistributedError, match=r"group: expected an initialised .*init_process_group"
    ):
        dist_loss(rows, rows, group="world")


@pytest.mark.parametrize("group", [3, "everyone"])
def test_group_of_another_kind_is_refused(group: Any) -> None:
    for module in (DISTLoss, BatchSimilarityLoss, StudentLoss):
        with pytest.raises(DTypeError, match=r"group: expected a torch\.distributed\.ProcessGroup"):
            module(group=group)


# --- losses that are not this library's -----------------------------------------------------------


def gathered(rank: int, batch: Batch) -> tuple[Array, Array, Array | None, Array, Array]:
    student, teacher = batch.tensors(batch.rows(rank))
    mask = None
    if batch.mask is not None and rank in batch.masked:
        mask = torch.tensor(batch.mask[batch.rows(rank)])
    all_students, all_teachers, kept = gather_batch(student, teacher, mask, "world")
    (all_students.square().sum() + all_teachers.sum()).backward()
    return (
        all_students.detach().numpy(),
        all_teachers.detach().numpy(),
        None if kept is None else kept.numpy(),
        student.grad.numpy(),  # type: ignore[union-attr]
        teacher.grad.numpy(),  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("masked", [None, (1, 3)])
def test_gathered_batch_is_in_rank_order_with_the_gradient_that_ddp_expects(
    crew: processes.Crew, masked: tuple[int, ...] | None
) -> None:
    mask = None if masked is None else np.arange(19) % 3 != 0
    batch = Batch(*FIXED, sizes=(10, 2, 0, 7), mask=mask, masked=masked or ())
    for rank, (student, teacher, kept, of_student, of_teacher) in enumerate(crew(gathered, batch)):
        np.testing.assert_array_equal(student, FIXED[0])
        np.testing.assert_array_equal(teacher, FIXED[1])
        np.testing.assert_equal(kept, batch.whole_mask())
        np.testing.assert_allclose(of_student / 4, 2 * FIXED[0][batch.rows(rank)], rtol=1e-15)
        np.testing.assert_array_equal(of_teacher, np.full_like(of_teacher, 4.0))


def test_batch_of_no_group_is_what_is_given() -> None:
    student, teacher = torch.randn(2, 3, 7).unbind()
    assert gather_batch(student, teacher, None, None) == (student, teacher, None)
