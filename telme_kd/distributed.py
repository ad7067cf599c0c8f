"""One batch out of many processes: its loss in each of them, and the gradient of each one's items.

A relational loss is a statistic of its batch, so the mean of per-process losses is another
objective. With ``group`` given, every process computes the loss of the whole batch: the value and
the gradient of one process that holds everyone's items, whichever process has how many of them.
Rows stay where they are. DIST exchanges statistics of the classes, batch similarity the teachers'
features and two sums per item. There is no communication in the backward pass.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from telme_kd import _checks
from telme_kd._precision import accumulation_dtype
from telme_kd._typing import Group, ProcessGroup
from telme_kd.kernels.distributed.spread import Spread, all_rows

_Loss = Callable[..., Tensor]


class Agreement(NamedTuple):
    """What the processes of a group have told each other about their parts of a batch.

    Attributes:
        items: the items that count, by process.
        rows: of each process, the number of all its items, the masked included.
        teacher_needs_grad: whether any process's teacher needs a gradient.
        same_teacher_dtype: whether all teachers are of one dtype.
    """

    items: Spread
    rows: tuple[int, ...]
    teacher_needs_grad: bool
    same_teacher_dtype: bool


class _Report(NamedTuple):
    """What a process says about its part, each a 64-bit integer."""

    rows: int
    items: int
    width: int
    bits: int
    teacher_dtype: int
    teacher_needs_grad: int
    settings: int


def agree(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group, settings: object
) -> Agreement:
    """Exchange what every process must know of the others before any of them computes.

    Args:
        student: (b, n), this process's rows; b may differ between processes, and be 0.
        teacher: (b, n).
        mask: bool (b,), or None for all; it may be None in some processes only.
        group: the processes.
        settings: what must be the same everywhere, with a ``repr`` that says it all.

    Raises:
        DistributedError: the group is not there, or the processes disagree.
        ShapeError: no process has a row.
    """
    process_group = _checks.process_group(group)
    reports = _reports(student, teacher, mask, process_group, settings)
    _checks.agree_across_processes(
        rows=[report.rows for report in reports],
        columns=[(report.width, report.bits) for report in reports],
        settings=[report.settings for report in reports],
    )
    return Agreement(
        Spread(tuple(report.items for report in reports), process_group),
        tuple(report.rows for report in reports),
        any(report.teacher_needs_grad for report in reports),
        len({report.teacher_dtype for report in reports}) == 1,
    )


def agree_on_classes(
    student: Tensor, teacher: Tensor, mask: Tensor | None, class_group: Group, settings: object
) -> Spread:
    """Exchange how classes lie on processes that have the same items; return the classes.

    Raises:
        DistributedError: the group is not there, or the processes disagree.
    """
    process_group = _checks.process_group(class_group, "class_group")
    reports = _reports(student, teacher, mask, process_group, settings)
    _checks.agree_across_class_group(
        items=[(report.rows, report.items) for report in reports],
        bits=[report.bits for report in reports],
        settings=[report.settings for report in reports],
    )
    return Spread(tuple(report.width for report in reports), process_group)


def _reports(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    group: ProcessGroup,
    settings: object,
) -> list[_Report]:
    """Exchange reports; they are read on the host, once for all that follows."""
    rows, width = student.shape
    bits = 8 * accumulation_dtype(student, teacher).itemsize
    own = torch.tensor(
        _Report(
            rows,
            rows,
            width,
            bits,
            zlib.crc32(str(teacher.dtype).encode()),
            torch.is_grad_enabled() and teacher.requires_grad,
            zlib.crc32(repr(settings).encode()),
        ),
        dtype=torch.int64,
        device=student.device,
    )
    if mask is not None:
        own[1] = mask.sum()
    received = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(received, own, group=group)
    return [_Report(*report) for report in torch.stack(received).tolist()]


def outside_graphs(loss: _Loss) -> _Loss:
    """Return a function that torch.compile calls, where it would otherwise trace it."""
    if torch.compiler.is_compiling():
        disable: Callable[[_Loss], _Loss] = torch.compiler.disable
        # With fullgraph=True the error that follows shows this line:
        return disable(loss)  # a loss over a group is no part of a full graph
    return loss


def for_averaging(loss: Tensor, group: Group) -> Tensor:
    """Return a loss whose gradient is multiplied by the number of processes.

    The mean which DistributedDataParallel takes of the processes' gradients is then the gradient of
    the loss of the whole batch. Whatever the group, it can be differentiated once only: no process
    has what the second derivative needs.
    """
    size = 1 if group is None else _checks.process_group(group).size()
    averaged: Tensor = _ForAveraging.apply(loss, size)  # type: ignore[no-untyped-call]
    return averaged


class _AveragingContext(FunctionCtx):
    size: int


class _ForAveraging(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _AveragingContext, loss: Tensor, size: int) -> Tensor:
        ctx.size = size
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: _AveragingContext, gradient: Tensor) -> tuple[Tensor, None]:
        _checks.differentiated_once(torch.is_grad_enabled())
        return gradient * ctx.size, None


def mean_over_processes(summed: Tensor, count: Tensor, group: Group) -> Tensor:
    """Return the mean of all processes' values, from their sums and counts; 0 if there is none.

    The gradient is that of the own values, multiplied as :func:`for_averaging` does.
    """
    process_group = _checks.process_group(group)
    everywhere = Spread((1,) * process_group.size(), process_group)
    (sums,) = everywhere.add(torch.stack((summed.detach(), count)).double())
    divisor = torch.where(sums[1] > 0, sums[1], 1.0)
    mean: Tensor = _Valued.apply(  # type: ignore[no-untyped-call]
        summed / divisor.to(summed.dtype), (sums[0] / divisor).to(summed.dtype)
    )
    return for_averaging(mean, group)


class _Valued(torch.autograd.Function):
    """One tensor's value with another's gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, own: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# --- for losses that are not this library's -------------------------------------------------------


def gather_batch(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows of all processes of a group, in rank order, for a relational loss of yours.

    This library's own losses need less; here the whole batch is copied to every process.

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
    agreement = agree(student, teacher, mask, group, "gather_batch")
    process_group, sizes = agreement.items.group, agreement.rows
    assert process_group is not None
    if sum(sizes) != agreement.items.total:
        own = mask if mask is not None else student.new_ones(student.shape[0], dtype=torch.bool)
        # Collectives of bool are not everywhere; bytes are.
        mask = all_rows(own.to(torch.uint8), sizes, process_group).bool()
    return (
        _GatherRows.apply(student, sizes, process_group),  # type: ignore[no-untyped-call]
        _GatherRows.apply(teacher, sizes, process_group),  # type: ignore[no-untyped-call]
        mask,
    )


class _GatherContext(FunctionCtx):
    start: int
    size: int
    world_size: int


class _GatherRows(torch.autograd.Function):
    """All rows forward; backward, the gradient of the own rows times the number of processes."""

    @staticmethod
    def forward(
        ctx: _GatherContext, rows: Tensor, sizes: Sequence[int], group: ProcessGroup
    ) -> Tensor:
        ctx.start = sum(sizes[: group.rank()])
        ctx.size = rows.shape[0]
        ctx.world_size = len(sizes)
        return all_rows(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _GatherContext, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient[ctx.start : ctx.start + ctx.size]
        return own * ctx.world_size, None, None
