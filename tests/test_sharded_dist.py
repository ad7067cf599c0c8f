"""DIST of logits whose classes lie on several processes equals that of whole logits."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.traffic import Traffic
from telme_kd.errors import DistributedError, DTypeError, ShapeError, TelmeKDError
from telme_kd.functional import dist_loss, sharded_dist_loss
from tests.helpers import processes, strategies
from tests.helpers.tolerances import dist_bound, dist_gradient_bound

Array = NDArray[np.float64]
Cuts = tuple[int, ...]

RELATIVE = {"float64": 1e-12, "float32": 1e-6}
UPSTREAM = 3.0
# How many processes share the items, and how many the classes of each part.
GRIDS = ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1))
FIXED = np.random.default_rng(0).normal(size=(2, 16, 19))

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")


# --- what runs in the processes -------------------------------------------------------------------


@cache
def groups(grid: tuple[int, int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Of each process, the group it shares classes with, and the one it shares items with."""
    parts, shards = grid
    class_groups, item_groups = {}, {}
    for part in range(parts):
        ranks = [part * shards + shard for shard in range(shards)]
        class_groups |= dict.fromkeys(ranks, torch.distributed.new_group(ranks))
    for shard in range(shards):
        ranks = [part * shards + shard for part in range(parts)]
        item_groups |= dict.fromkeys(ranks, torch.distributed.new_group(ranks))
    return class_groups, item_groups


def own_block(rank: int, grid: tuple[int, int], rows: Cuts, columns: Cuts) -> tuple[slice, slice]:
    part, shard = divmod(rank, grid[1])
    return slice(rows[part], rows[part + 1]), slice(columns[shard], columns[shard + 1])


def own_share(
    rank: int,
    grid: tuple[int, int],
    rows: Cuts,
    columns: Cuts,
    pair: tuple[Array, Array],
    dtype: str,
    mask: NDArray[np.bool_] | None,
    options: dict[str, Any],
) -> tuple[float, Array, Array] | None:
    """This process's loss, and its gradients as the mean over the processes that share items."""
    class_groups, item_groups = groups(grid)
    if rank not in class_groups:
        return None
    block = own_block(rank, grid, rows, columns)
    student, teacher = (
        torch.tensor(side[block], dtype=getattr(torch, dtype), requires_grad=True) for side in pair
    )
    loss = sharded_dist_loss(
        student,
        teacher,
        class_group=class_groups[rank] if grid[1] > 1 else None,
        group=item_groups[rank] if grid[0] > 1 else None,
        mask=None if mask is None else torch.tensor(mask[block[0]]),
        **options,
    )
    with Traffic() as backward:
        (UPSTREAM * loss).backward()
    assert not backward.calls
    gradients = [side.grad.double() / grid[0] for side in (student, teacher)]  # type: ignore[union-attr]
    return loss.item(), gradients[0].numpy(), gradients[1].numpy()


@st.composite
def cuts(draw: st.DrawFn, length: int, parts: int, least: int) -> Cuts:
    """Where to cut an axis into parts of at least so many."""
    free = length - least * parts
    inner = sorted(draw(st.lists(st.integers(0, free), min_size=parts - 1, max_size=parts - 1)))
    return (0, *(cut + least * (index + 1) for index, cut in enumerate(inner)), length)


def assemble(
    crew: processes.Crew, grid: tuple[int, int], rows: Cuts, columns: Cuts, *arguments: Any
) -> tuple[set[float], Array, Array]:
    """The values of all processes, and the gradients of the whole logits."""
    shares = crew(own_share, grid, rows, columns, *arguments)[: grid[0] * grid[1]]
    gradients = np.full((2, rows[-1], columns[-1]), np.nan)
    for rank, (_, *of_sides) in enumerate(shares):
        for whole, part in zip(gradients, of_sides, strict=True):
            whole[own_block(rank, grid, rows, columns)] = part
    return {share[0] for share in shares}, gradients[0], gradients[1]


def in_one_process(
    pair: tuple[Array, Array],
    dtype: str,
    mask: NDArray[np.bool_] | None,
    options: dict[str, Any],
) -> tuple[float, Array, Array]:
    """Value and gradients of the definition in float64, of logits as the dtype has them."""
    student, teacher = (
        torch.tensor(side).to(getattr(torch, dtype)).double().requires_grad_() for side in pair
    )
    kept = None if mask is None else torch.tensor(mask)
    loss = dist_loss(student, teacher, mask=kept, backend="reference", **options)
    (UPSTREAM * loss).backward()
    return loss.item(), student.grad.numpy(), teacher.grad.numpy()  # type: ignore[union-attr]


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0.5, 1.0, 2.0)),
        "inter_weight": st.sampled_from((0.5, 2.0)),
        "intra_weight": st.sampled_from((0.0, 0.5, 1.0)),
        "eps": st.sampled_from((None, 1e-8)),
    }
)


@pytest.mark.parametrize("dtype", RELATIVE)
@given(data=st.data())
def test_sharded_classes_equal_whole_logits(
    crew: processes.Crew, dtype: str, data: st.DataObject
) -> None:
    grid = data.draw(st.sampled_from(GRIDS))
    rows = data.draw(cuts(16, grid[0], least=0))
    columns = data.draw(cuts(19, grid[1], least=1))
    masks = st.lists(st.booleans(), min_size=16, max_size=16).map(np.array)
    mask = data.draw(st.none() | masks)
    assume(mask is None or mask.sum() > 9)
    options = data.draw(OPTIONS)
    pair = (FIXED[0], FIXED[1])
    values, *gradients = assemble(crew, grid, rows, columns, pair, dtype, mask, options)
    value, *expected = in_one_process(pair, dtype, mask, options)
    (found,) = values
    assert found == pytest.approx(value, rel=RELATIVE[dtype])
    for gradient, truth in zip(gradients, expected, strict=True):
        assert np.linalg.norm(gradient - truth) <= RELATIVE[dtype] * np.linalg.norm(truth)


@given(data=st.data())
def test_sharded_classes_are_right_for_any_structure(
    crew: processes.Crew, data: st.DataObject
) -> None:
    case = data.draw(strategies.logits(items=(1, 12), classes=(4, 12))).rounded(torch.float32)
    grid = data.draw(st.sampled_from(GRIDS))
    items, classes = case.student.shape
    rows = data.draw(cuts(items, grid[0], least=0))
    columns = data.draw(cuts(classes, grid[1], least=1))
    eps = data.draw(st.sampled_from((None, 1e-8)))
    pair, options = (case.student, case.teacher), case.options | {"eps": eps}
    values, gradient, _ = assemble(crew, grid, rows, columns, pair, "float32", None, options)
    value, expected, _ = in_one_process(pair, "float32", None, options)
    assert max(abs(found - value) for found in values) <= dist_bound(case, eps, torch.float32)
    bound = UPSTREAM * dist_gradient_bound(case, eps, torch.float32)
    assert np.linalg.norm(gradient - expected) <= bound


def test_class_axis_and_half_precision() -> None:
    student, teacher = torch.randn(2, 3, 7, 4, generator=torch.manual_seed(0)).bfloat16()
    mask = torch.rand(3, 4) < 0.8
    options: dict[str, Any] = {"class_dim": 1, "mask": mask, "temperature": 2.0}
    found = sharded_dist_loss(student, teacher, class_group=None, **options)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, dist_loss(student, teacher, **options), rtol=1e-6, atol=0)


def at_the_edges(rank: int) -> list[Any]:
    """A NaN in one process; a class of each process, and of one process all, at -inf; no items."""
    student, teacher = torch.tensor(FIXED[:, :, 4 * rank : 4 * rank + 4])
    spoiled = student.clone()
    if rank == 2:
        spoiled[3, 1] = torch.nan
    found = [sharded_dist_loss(spoiled, teacher, class_group="world").item()]
    mask = torch.arange(16) != 3
    found.append(sharded_dist_loss(spoiled, teacher, class_group="world", mask=mask).item())
    lost = student.clone()
    lost[:, 2] = -torch.inf
    if rank == 1:
        lost[5] = -torch.inf
    found.append(sharded_dist_loss(lost, teacher, class_group="world").item())
    nothing = torch.zeros(16, dtype=torch.bool)
    found.append(sharded_dist_loss(student, teacher, class_group="world", mask=nothing).item())
    return found


def test_edges_are_those_of_whole_logits(crew: processes.Crew) -> None:
    student, teacher = torch.tensor(FIXED[:, :, :16])
    without = dist_loss(student[torch.arange(16) != 3], teacher[torch.arange(16) != 3])
    lost = student.clone()
    lost[:, 2::4] = -torch.inf
    lost[5, 4:8] = -torch.inf
    for spoiled, masked, left_out, nothing in crew(at_the_edges):
        assert np.isnan(spoiled)
        assert masked == pytest.approx(without.item(), rel=1e-12)
        assert left_out == pytest.approx(dist_loss(lost, teacher).item(), rel=1e-12)
        assert nothing == 0.0


def refusals(rank: int) -> list[str]:
    x = torch.randn(3 if rank == 0 else 4, 7)
    same = torch.randn(4, 7)
    mask = torch.arange(4) > (1 if rank == 3 else 0)
    calls: list[dict[str, Any]] = [
        {"student_logits": x, "teacher_logits": x},
        {"student_logits": same, "teacher_logits": same, "mask": mask},
        {"student_logits": same.double() if rank == 1 else same, "teacher_logits": same},
        {"student_logits": same, "teacher_logits": same, "eps": 1e-8 if rank == 1 else None},
    ]
    told = []
    for arguments in calls:
        try:
            sharded_dist_loss(**arguments, class_group="world")
        except TelmeKDError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_processes_that_disagree_are_told(crew: processes.Crew) -> None:
    items = "DistributedError: class_group: expected the same items, and mask, in all processes, "
    for rows, mask, dtype, options in crew(refusals):
        assert rows.startswith(f"{items}got 3 of 3, 4 of 4, 4 of 4, 4 of 4; give every process its")
        assert mask.startswith(f"{items}got 3 of 4, 3 of 4, 3 of 4, 2 of 4; give every process its")
        assert "class_group: expected one dtype in all processes, got 32 bit, 64 bit, 32" in dtype
        assert "class_group: expected one loss with the same options in all processes" in options


def test_mistakes_are_told_before_any_process_is_asked() -> None:
    x = torch.randn(4, 7)
    with pytest.raises(DTypeError, match=r"class_group: expected a torch\.distributed\.Proc"):
        sharded_dist_loss(x, x, class_group="all")  # type: ignore[arg-type]
    with pytest.raises(DistributedError, match="class_group: expected an initialised torch"):
        sharded_dist_loss(x, x, class_group="world")
    with pytest.raises(ShapeError, match="expected at least one item and one column"):
        sharded_dist_loss(x[:, :0], x[:, :0], class_group=None)
