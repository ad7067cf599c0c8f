"""DIST of a batch whose rows, and whose classes too if they must, lie on several processes.

Rows couple through the statistics of columns, and those merge. With u, v the probabilities of
student and teacher in units of the column's largest (``eps=None``), the processes agree on

    units        2 C   largest of all   (``eps=None`` only)
    means        2 C   sums of u, v, in double precision if the backend's means are
    moments      3 C   sums of (u - mean)^2, (v - mean)^2, (u - mean) (v - mean); and of 1 - rho of
                       the rows, one number

and the loss and the gradient of the own rows follow from these and the own logits. Means are taken
before moments: u^2 summed and n mean^2 subtracted would cancel. With classes on several processes,
a row's largest logit, its sum of exponentials, its moments and the projection of its gradient are
sums over these too. A backend observes the own rows in units of its own; where the statistics are
few they are gathered and merged in each process, one collective instead of three.

A derivative by a vector needs that of the loss by its moments alone, since no change of a mean
changes a centred sum: d loss / du = 2 m_uu (u - mean) + m_uv (v - mean) + m_mean / n.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd.kernels.cpu import dist as cpu
from telme_kd.kernels.distributed.spread import Spread
from telme_kd.reference.dist import inverse_norm

_GATHERED_NUMBERS = 2**14
"""Up to so many, statistics of all processes are gathered at once: one collective of 64 KiB takes
little longer than one of nothing, three of less take three times as long."""


class _Options(NamedTuple):
    """What defines the loss, by the names that a backend's passes take."""

    temperature: float
    inter_weight: float
    intra_weight: float
    eps: float | None


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
    items: Spread,
    backend: str,
) -> Tensor:
    """Eq. 12 over the logits (B, C) of all processes; the own part's gradient.

    Args:
        student_logits: (b, C), the own rows; any floating dtype.
        teacher_logits: (b, C).
        temperature: as everywhere.
        inter_weight: as everywhere.
        intra_weight: as everywhere.
        mask: bool (b,) or None.
        eps: as everywhere.
        items: the rows that count, by process.
        backend: whose passes work on the own rows; ``"reference"`` for plain PyTorch.
    """
    options = _Options(temperature, inter_weight, intra_weight, eps)
    if backend == "reference":
        classes = Spread((student_logits.shape[1],))
        return _sharded(student_logits, teacher_logits, mask, options, items, classes)
    loss: Tensor = _MergedDist.apply(  # type: ignore[no-untyped-call]
        student_logits,
        teacher_logits,
        mask,
        options,
        items,
        _needs_grad(student_logits, teacher_logits),
        _passes(backend),
    )
    return loss


def sharded_dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
    items: Spread,
    classes: Spread,
) -> Tensor:
    """Eq. 12 over logits (B, C) of which every process has some rows and some classes (b, c)."""
    options = _Options(temperature, inter_weight, intra_weight, eps)
    return _sharded(student_logits, teacher_logits, mask, options, items, classes)


def _needs_grad(student: Tensor, teacher: Tensor) -> tuple[bool, bool]:
    enabled = torch.is_grad_enabled()
    return enabled and student.requires_grad, enabled and teacher.requires_grad


def _passes(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from telme_kd.kernels.triton import dist as triton  # it may be absent elsewhere

    return triton


# --- the loss from moments ------------------------------------------------------------------------


def _distances(moments: Tensor, uncentred: Tensor, eps: float | None) -> Tensor:
    """Return 1 - rho (n,) of vectors with centred moments uu, vv, uv (3, n) and squares (2, n)."""
    covariance = moments[2]
    if eps is None:
        return 1.0 - covariance * inverse_norm(moments[:2], uncentred).prod(0)
    constant = moments[:2] == 0  # where the gradient of a norm is taken as 0
    norms = torch.where(constant, 0.0, torch.where(constant, 1.0, moments[:2]).sqrt())
    return 1.0 - covariance / (norms.prod(0) + eps)


def _row_distances(moments: Tensor, num_classes: int, eps: float | None) -> Tensor:
    return _distances(moments, moments[:2] + 1.0 / num_classes, eps)


def _column_distances(moments: Tensor, mean: Tensor, num_items: int, eps: float | None) -> Tensor:
    return _distances(moments, moments[:2] + num_items * mean.square(), eps)


def _summed(distances: Tensor) -> Tensor:
    # In double precision the sum is rounded once, when it travels.
    return distances.sum(dtype=torch.float64).to(distances.dtype)


def _combined(
    row_sum: Tensor, column_sum: Tensor, options: _Options, num_items: int, num_classes: int
) -> Tensor:
    """Return the loss () of the summed distances; 0 if no item counts."""
    if not num_items:
        return torch.zeros_like(row_sum)
    inter, intra = _weights(options, num_items, num_classes)
    return row_sum * inter + column_sum * intra


def _weights(options: _Options, num_items: int, num_classes: int) -> tuple[float, float]:
    """Return what a row's and what a column's 1 - rho weighs."""
    squared = options.temperature**2
    return (
        options.inter_weight * squared / max(num_items, 1),
        options.intra_weight * squared / num_classes,
    )


# --- a backend's passes over the own rows ---------------------------------------------------------


class _MergedDist(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        options: _Options,
        items: Spread,
        needs_grad: tuple[bool, bool],
        passes: ModuleType,
    ) -> Tensor:
        rows, columns = passes.new_statistics(
            *student.shape, dtype=accumulation_dtype(student, teacher), device=student.device
        )
        own = items.sizes[items.rank]
        if own:
            passes.observe(student, teacher, mask, rows, columns, **options._asdict())
        loss = _merge(rows, columns, mask, options, items, passes)
        # The mean over the own rows, which the passes take, is a part of that over all.
        options = options._replace(inter_weight=options.inter_weight * own / max(items.total, 1))
        if own and any(needs_grad):
            passes.conclude(rows, columns, mask, **options._asdict())
        ctx.save_for_backward(student, teacher, mask, rows, columns)
        ctx.options, ctx.own, ctx.needs_grad, ctx.passes = options, own, needs_grad, passes
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, rows, columns = ctx.saved_tensors
        student_needs_grad, teacher_needs_grad = ctx.needs_grad
        if not ctx.own:
            return (
                torch.zeros_like(student) if student_needs_grad else None,
                torch.zeros_like(teacher) if teacher_needs_grad else None,
                *[None] * 5,
            )
        with outside_autocast(grad_output.device):
            gradients = ctx.passes.gradient(
                grad_output,
                student,
                teacher,
                mask,
                rows,
                columns,
                **ctx.options._asdict(),
                student_needs_grad=student_needs_grad,
                teacher_needs_grad=teacher_needs_grad,
            )
        return *gradients, *[None] * 5


def _merge(
    rows: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    options: _Options,
    items: Spread,
    passes: ModuleType,
) -> Tensor:
    """Make a backend's statistics of the own columns those of all; return the loss ()."""
    num_classes = columns.shape[1]
    row_sum = column_sum = columns.new_zeros(())
    if options.inter_weight:
        distances = _row_distances(passes.row_moments(rows), num_classes, options.eps)
        if mask is not None:
            distances = torch.where(mask, distances, 0.0)
        row_sum = _summed(distances)
    if options.intra_weight:
        row_sum = _merge_columns(columns, row_sum, options.eps, items, passes.COLUMN_PARTS)
        _, mean, _, moments = torch.split(columns[: sum(passes.COLUMN_PARTS)], passes.COLUMN_PARTS)
        column_sum = _summed(_column_distances(moments, mean, items.total, options.eps))
    else:
        (row_sum,) = items.add(row_sum)
    return _combined(row_sum, column_sum, options, items.total, num_classes)


def _merge_columns(
    columns: Tensor,
    row_sum: Tensor,
    eps: float | None,
    items: Spread,
    parts: list[int],
) -> Tensor:
    """Make statistics of the own columns those of all; return the summed distances of all rows.

    Either every process merges everyone's statistics, or sums of the own ones travel. Where a
    backend keeps what rounding leaves out of its means, they are merged in double precision.
    """
    own = columns[: sum(parts)]
    numbers = torch.cat((own.reshape(-1), row_sum[None]))
    count = len(items.sizes)
    together = count * numbers.numel() <= _GATHERED_NUMBERS
    if together:
        numbers = items.of_each(numbers)
        sizes, across = items.sizes, Spread((items.total,))
    else:
        numbers = numbers[None]
        sizes, across = items.sizes[items.rank : items.rank + 1], items
    counts = numbers.new_tensor(sizes)[:, None, None]
    row_sums = numbers[:, -1].sum()
    statistics = numbers[:, :-1].view(len(sizes), sum(parts), -1)
    unit, mean, rest, moments = torch.split(statistics, parts, 1)
    if parts[2]:
        mean = mean.double() + rest
    if eps is None:
        lowest = torch.finfo(unit.dtype).min
        # A class at -inf in all rows has no unit; NaN is not above 0, but in the mean it stays.
        agreed = across.largest(torch.where(mean > 0, unit, lowest).amax(0))
        agreed = torch.where(agreed == lowest, 0.0, agreed)
        shrink = torch.where(mean == 0, 0.0, torch.exp2(unit - agreed))
        columns[:2] = agreed
        mean = mean * shrink
        moments = moments * _products(shrink)
    (merged_mean,) = across.add((mean * counts).sum(0))
    merged_mean /= max(items.total, 1)
    moments = moments + _products((mean - merged_mean).to(moments.dtype)) * counts
    merged_moments, row_sums = across.add(moments.sum(0), row_sums)
    rounded = merged_mean.to(columns.dtype)
    _, own_mean, own_rest, own_moments = torch.split(own, parts)
    own_mean.copy_(rounded)
    own_rest.copy_((merged_mean - rounded)[: parts[2]])
    own_moments.copy_(merged_moments)
    columns[sum(parts)] = items.total
    return row_sums


def _products(pairs: Tensor) -> Tensor:
    """Return s s, t t and s t of pairs s, t on the second axis: (p, 2, C) to (p, 3, C)."""
    return pairs[:, (0, 1, 0)] * pairs[:, (0, 1, 1)]


# --- plain PyTorch, rows and classes in parts -----------------------------------------------------


def _sharded(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: _Options,
    items: Spread,
    classes: Spread,
) -> Tensor:
    if mask is not None:  # what does not count is not looked at
        student, teacher = student[mask], teacher[mask]
    dtype = accumulation_dtype(student, teacher)
    loss: Tensor = _ShardedDist.apply(  # type: ignore[no-untyped-call]
        student.to(dtype),
        teacher.to(dtype),
        options,
        items,
        classes,
        _needs_grad(student, teacher),
    )
    return loss


class _ShardedDist(torch.autograd.Function):
    """The gradient is computed beside the loss, where the processes are all there."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        options: _Options,
        items: Spread,
        classes: Spread,
        needs_grad: tuple[bool, bool],
    ) -> Tensor:
        log_p = _log_softmax(torch.stack((student, teacher)) / options.temperature, classes)
        sides = slice(0 if needs_grad[0] else 1, 2 if needs_grad[1] else 1)
        loss, by_log_p = _loss_and_slopes(log_p, options, items, classes, sides)
        if any(needs_grad):
            p = log_p[sides].exp_()
            (projections,) = classes.add(by_log_p.sum(-1, keepdim=True))
            by_log_p.addcmul_(p, projections, value=-1.0).div_(options.temperature)
        ctx.needs_grad = needs_grad
        ctx.save_for_backward(by_log_p)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        student_needs_grad, teacher_needs_grad = ctx.needs_grad
        return (
            gradients[0] * grad_output if student_needs_grad else None,
            gradients[-1] * grad_output if teacher_needs_grad else None,
            *[None] * 4,
        )


def _log_softmax(logits: Tensor, classes: Spread) -> Tensor:
    logits = logits - classes.largest(logits.amax(-1, keepdim=True))
    (total,) = classes.add(logits.exp().sum(-1, keepdim=True))
    return logits.sub_(total.log_())


def _loss_and_slopes(
    log_p: Tensor, options: _Options, items: Spread, classes: Spread, sides: slice
) -> tuple[Tensor, Tensor]:
    """Return the loss () and the derivatives by log p (k, b, c) of the sides that need them.

    As if log p were free: that the probabilities of a row add up to one is not yet minded.
    """
    num_items, num_classes, eps = items.total, classes.total, options.eps
    of_row, of_column = _weights(options, num_items, num_classes)
    slopes = torch.zeros_like(log_p[sides])
    row_sum = column_sum = log_p.new_zeros(())
    if options.inter_weight:
        p = log_p.exp()
        centred = p - 1.0 / num_classes
        (moments,) = classes.add(_moments(centred, -1))
        row_sum = _summed(_row_distances(moments, num_classes, eps))
        if len(slopes):
            (by_moments,) = _derivatives(
                lambda moments: _row_distances(moments, num_classes, eps), moments
            )
            by_p = _by_vectors(by_moments[:, :, None], centred, sides)
            slopes.addcmul_(by_p, p[sides], value=of_row)
    if options.intra_weight:
        u = log_p.exp() if eps is not None else _in_units(log_p, items)
        (mean,) = items.add(u.sum(1))
        mean /= max(num_items, 1)
        centred = u - mean[:, None]
        moments, row_sum = items.add(_moments(centred, -2), row_sum)
        (column_sum,) = classes.add(_summed(_column_distances(moments, mean, num_items, eps)))
        if len(slopes):
            by_moments, by_mean = _derivatives(
                lambda moments, mean: _column_distances(moments, mean, num_items, eps),
                moments,
                mean,
            )
            by_u = _by_vectors(by_moments[:, None], centred, sides)
            by_u += by_mean[sides, None] / max(num_items, 1)
            slopes.addcmul_(by_u, u[sides], value=of_column)
    else:
        (row_sum,) = items.add(row_sum)
    return _combined(row_sum, column_sum, options, num_items, num_classes), slopes


def _in_units(log_p: Tensor, items: Spread) -> Tensor:
    """Probabilities of a class in units of the largest that any process has for it."""
    lowest = log_p.new_full(log_p.shape[::2], -torch.inf)
    unit = items.largest(log_p.amax(1) if log_p.shape[1] else lowest)
    return (log_p - torch.where(unit == lowest, 0.0, unit)[:, None]).exp_()


def _moments(centred: Tensor, dim: int) -> Tensor:
    """Return <a, a>, <b, b> and <a, b> along a dimension of (2, b, c), counted from the last."""
    covariance = (centred[0] * centred[1]).sum(dim)
    return torch.cat((centred.square().sum(dim), covariance[None]))


def _derivatives(distances: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of summed distances by what they are computed from."""
    with torch.enable_grad():
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        summed = distances(*leaves).sum()
        return torch.autograd.grad(summed, leaves, materialize_grads=True)


def _by_vectors(by_moments: Tensor, centred: Tensor, sides: slice) -> Tensor:
    """Return the derivatives by the vectors of some sides, of those by uu, vv and uv."""
    of_squares = 2.0 * by_moments[:2][sides] * centred[sides]
    return of_squares.addcmul_(by_moments[2], centred.flip(0)[sides])
