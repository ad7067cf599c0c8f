"""One batch out of many processes: rows gathered in rank order, gradients as DDP wants them.

A relational loss is a statistic of its batch, so the mean of per-process losses is another
objective. With ``group`` given, every process computes the loss of the whole batch from everyone's
rows. That costs an all-gather of the sizes, which are read on the host, one each of the students'
and the teachers' rows, one of the masks if there are any, and a copy of the whole batch in each
process; there is no communication in the backward pass.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from telme_kd import _checks
from telme_kd._typing import Group, ProcessGroup


def gather_batch(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows of all processes of a group, in rank order.

    Args:
        student: (B, C), this process's rows; B may differ between processes, and be 0.
        teacher: (B, C).
        mask: bool (B,), or None for all; it may be None in some processes only.
        group: the processes; None returns what is given.

    Returns:
        Student and teacher (sum of B, C), and the mask (sum of B,), the same in every process. The
        gradient that a process's own rows receive is multiplied by the number of processes, so that
        the mean which DistributedDataParallel takes is the gradient of the loss of the whole batch.

    Raises:
        DistributedError: the group is not there, or the processes disagree on the width or dtype.
        ShapeError: no process has a row.
    """
    if group is None:
        return student, teacher, mask
    process_group = _checks.process_group(group)
    sizes = _sizes(student, mask is not None, process_group)
    rows = [int(size[0]) for size in sizes]
    _checks.agree_across_processes(sizes)
    if any(size[-1] for size in sizes):
        own = mask if mask is not None else student.new_ones(student.shape[0], dtype=torch.bool)
        # Collectives of bool are not everywhere; bytes are.
        mask = _all_rows(own.to(torch.uint8)[:, None], rows, process_group)[:, 0].bool()
    return (
        _GatherRows.apply(student, rows, process_group),  # type: ignore[no-untyped-call]
        _GatherRows.apply(teacher, rows, process_group),  # type: ignore[no-untyped-call]
        mask,
    )


def _sizes(rows: Tensor, has_mask: bool, group: ProcessGroup) -> list[tuple[int, int, int, int]]:
    """Number of rows, width, bytes per entry and whether there is a mask, of every process."""
    own = torch.tensor(
        [*rows.shape, rows.element_size(), has_mask], dtype=torch.int64, device=rows.device
    )
    received = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(received, own, group=group)
    return [tuple(size) for size in torch.stack(received).tolist()]


def _all_rows(rows: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    # all_gather wants equal shapes, so all are as long as the longest.
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: rows.shape[0]] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(received, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


class _GatherContext(FunctionCtx):
    start: int
    size: int
    world_size: int


class _GatherRows(torch.autograd.Function):
    """All rows forward; backward, the gradient of the own rows times the number of processes."""

    @staticmethod
    def forward(ctx: _GatherContext, rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.start = sum(sizes[: group.rank()])
        ctx.size = rows.shape[0]
        ctx.world_size = len(sizes)
        return _all_rows(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatherContext, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient[ctx.start : ctx.start + ctx.size]
        return own * ctx.world_size, None, None
