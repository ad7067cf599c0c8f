"""Losses over a process group equal one process that holds the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from telme_kd import BatchSimilarityLoss, DISTLoss
from telme_kd.errors import DistributedError, DTypeError
from telme_kd.functional import batch_similarity_loss, dist_loss
from tests.helpers import processes

WORLD_SIZE = 4
ITEMS = 11
# How the items lie on the processes: uneven, with empty processes, all on the last.
SHARDS = ((4, 3, 3, 1), (6, 5, 0, 0), (0, 0, 0, 11))
LOSSES = {"dist": dist_loss, "batch_similarity": batch_similarity_loss}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(0)
    student, teacher = torch.randn(2, ITEMS, 7, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), torch.rand(ITEMS, generator=generator) > 0.3


def own_rows(rank: int, shards: tuple[int, ...]) -> slice:
    return slice(sum(shards[:rank]), sum(shards[: rank + 1]))


def losses_and_gradients(rank: int) -> dict[str, tuple[float, list[list[float]]]]:
    """Every loss over every sharding; a gradient as DDP's mean of this process's share."""
    results = {}
    for dtype in TOLERANCES:
        student, teacher, mask = batch(dtype)
        for shards in SHARDS:
            rows = own_rows(rank, shards)
            for masked in ("no mask", "mask", "mask in one process"):
                own = (
                    mask[rows] if masked == "mask" or (masked != "no mask" and rank == 0) else None
                )
                for name, loss in LOSSES.items():
                    own_student = student[rows].clone().requires_grad_()
                    value = loss(own_student, teacher[rows], mask=own, group="world")
                    value.backward()
                    assert own_student.grad is not None
                    gradient = own_student.grad / WORLD_SIZE
                    results[f"{dtype} {shards} {masked} {name}"] = (value.item(), gradient.tolist())
    return results


def gradient_under_ddp(rank: int) -> list[float]:
    """Gradient of a linear student that DistributedDataParallel trains on this process's shard."""
    student, teacher, _ = batch(torch.float64)
    rows = own_rows(rank, SHARDS[0])
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(7, 7).double())
    logits = model(student[rows])
    loss = DISTLoss(2.0, group="world")(logits, teacher[rows])
    (loss + BatchSimilarityLoss(group="world")(logits, teacher[rows])).backward()
    return [entry for p in model.parameters() for entry in p.grad.flatten().tolist()]


def refusals(rank: int) -> list[str]:
    """What processes are told that disagree, or that have no item at all."""
    messages = []
    width = 7 if rank == 0 else 6
    for rows, columns in ((2, width), (0, 7)):
        try:
            dist_loss(torch.randn(rows, columns), torch.randn(rows, columns), group="world")
        except (DistributedError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def all_of_it(rank: int) -> dict[str, Any]:
    return {
        "losses": losses_and_gradients(rank),
        "ddp": gradient_under_ddp(rank),
        "refusals": refusals(rank),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(WORLD_SIZE, Path(tmp_path_factory.mktemp("group")), all_of_it)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", ["no mask", "mask", "mask in one process"])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_group_equals_one_process(
    answers: list[dict[str, Any]],
    dtype: torch.dtype,
    shards: tuple[int, ...],
    masked: str,
    name: str,
) -> None:
    student, teacher, mask = batch(dtype)
    kept = {
        "no mask": torch.ones(ITEMS, dtype=torch.bool),
        "mask": mask,
        "mask in one process": mask | (torch.arange(ITEMS) >= shards[0]),
    }[masked]
    student.requires_grad_()
    expected = LOSSES[name](student, teacher, mask=kept)
    expected.backward()
    assert student.grad is not None
    parts = [answer["losses"][f"{dtype} {shards} {masked} {name}"] for answer in answers]
    gradient = torch.cat([torch.tensor(part[1], dtype=dtype).reshape(-1, 7) for part in parts])
    tolerance = TOLERANCES[dtype]
    for value, _ in parts:
        assert value == pytest.approx(expected.item(), rel=tolerance)
    assert (gradient - student.grad).norm() <= tolerance * student.grad.norm()


def test_ddp_gradient_equals_one_process(answers: list[dict[str, Any]]) -> None:
    student, teacher, _ = batch(torch.float64)
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 7).double()
    logits = model(student)
    (DISTLoss(2.0)(logits, teacher) + BatchSimilarityLoss()(logits, teacher)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for answer in answers:
        gradient = torch.tensor(answer["ddp"], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_processes_that_disagree_are_told(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        widths, empty = answer["refusals"]
        assert widths.startswith("DistributedError: group: expected one width and dtype")
        assert "7 x 32 bit, 6 x 32 bit" in widths
        assert empty.startswith("ShapeError: group: expected at least one item")


def test_group_without_torch_distributed_is_refused() -> None:
    rows = torch.randn(3, 7)
    with pytest.raises(
        DistributedError, match=r"group: expected an initialised .*init_process_group"
    ):
        dist_loss(rows, rows, group="world")


@pytest.mark.parametrize("group", [3, "everyone"])
def test_group_of_another_kind_is_refused(group: Any) -> None:
    with pytest.raises(DTypeError, match=r"group: expected a torch\.distributed\.ProcessGroup"):
        DISTLoss(group=group)
    with pytest.raises(DTypeError, match=r"group: expected .*, got a"):
        BatchSimilarityLoss(group=group)
