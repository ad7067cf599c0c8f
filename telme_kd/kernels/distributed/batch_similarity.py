"""Batch similarity of a batch whose items lie on several processes, each owning its columns.

With T̂ the teacher's unit rows of all processes (gathered) and U = [Ŝ; T̂] those of the own items, a
process computes the own columns of both similarity matrices, a block of rows at a time. What the
softmaxes of the rows need is one all-reduce of two sums per row,

    Σ_j exp(x_ij - o)  and  Σ_j exp(a_ij - o),    x = T̂ Ŝᵀ / τ,  a = T̂ T̂ᵀ / τ,

with the offset o = 1 / τ, which no cosine exceeds. If a row's largest may be far below, o is that
largest, which takes another all-reduce. Then, with δ = log Q - log P,

    B KL_i = Σ_j Q_ij - P_ij - P_ij δ_ij,    τ B dŜ_j = Σ_i (Q_ij - P_ij) t̂_i,

of which the second is local, and the first a sum of non-negative terms of second order in δ: a
third sum per row, of exp(a) (a - x), would give it too, but as a difference of terms of first order
that cancel. Only a teacher that needs a gradient costs more: Σ_j P_ij δ_ij of the rows and the
gradient of all teacher rows, summed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype
from telme_kd.kernels.distributed.spread import Spread
from telme_kd.reference.batch_similarity import unit_rows

_BLOCK_BYTES = 16 * 2**20
"""What the matrices of a block of rows may take together."""

_FEWEST_ROWS = 64
"""Rows in a block, at least: every block reads and writes the whole gradient once."""

_FARTHEST_OFFSET = 8.0
"""From a row's largest: the logarithm of its sum is then that large, and rounded accordingly."""


def batch_similarity_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    items: Spread,
    teacher_needs_grad: bool,
) -> Tensor:
    """Eq. 15 over the features (B, d) of all processes; the own part's gradient.

    Args:
        student_features: (b, d), the own rows; any floating dtype.
        teacher_features: (b, d).
        temperature: as everywhere.
        mask: bool (b,) or None.
        items: the rows that count, by process.
        teacher_needs_grad: whether any process's teacher does.
    """
    if mask is not None:  # what does not count is not sent
        student_features, teacher_features = student_features[mask], teacher_features[mask]
    dtype = accumulation_dtype(student_features, teacher_features)
    needs_grad = torch.is_grad_enabled() and student_features.requires_grad, teacher_needs_grad
    loss: Tensor = _ColumnsOfSimilarity.apply(  # type: ignore[no-untyped-call]
        unit_rows(student_features.to(dtype)),
        unit_rows(teacher_features.to(dtype)),
        unit_rows(items.gather(teacher_features.detach()).to(dtype)),
        temperature,
        items,
        needs_grad,
    )
    return loss


class _ColumnsOfSimilarity(torch.autograd.Function):
    """Of unit rows; the gradient is computed beside the loss, where the processes are all there."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        teachers: Tensor,
        temperature: float,
        items: Spread,
        needs_grad: tuple[bool, bool],
    ) -> Tensor:
        blocks = _Blocks(teachers, torch.cat((student, teacher)), temperature)
        softmaxes = _softmaxes(blocks, temperature, items)
        loss, *gradients = _loss_and_gradients(blocks, softmaxes, items, *needs_grad)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_student, of_teacher = ctx.saved_tensors
        return (
            None if of_student is None else of_student * grad_output,
            None if of_teacher is None else of_teacher * grad_output,
            *[None] * 4,
        )


class _Blocks:
    """Blocks of rows of both similarity matrices over the temperature, own columns alone.

    Iterated it yields the rows of a block and x and a in them (2, h, b). Blocks are computed again
    each time, unless there is but one.
    """

    def __init__(self, teachers: Tensor, units: Tensor, temperature: float) -> None:
        self.teachers, self.units, self.temperature = teachers, units, temperature
        columns = max(len(units) // 2, 1)
        fitting = _BLOCK_BYTES // (4 * columns * units.element_size())
        self.height = min(max(len(teachers), 1), max(_FEWEST_ROWS, fitting))
        self.only: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.teachers), self.height):
            rows = slice(start, start + self.height)
            yield rows, self._products(rows)

    def _products(self, rows: slice) -> Tensor:
        if self.only is not None:
            return self.only
        block = self.teachers[rows]
        products = torch.mm(block / self.temperature, self.units.T)
        products = products.view(len(block), 2, -1).transpose(0, 1)
        if self.height == len(self.teachers):
            self.only = products
        return products


def _softmaxes(blocks: _Blocks, temperature: float, items: Spread) -> tuple[Tensor, Tensor]:
    """Return what to subtract from x and a for log Q and log P, in two steps: (2, B) each.

    In one step, a large number would swallow the digits of a small one.
    """
    teachers = blocks.teachers
    offset = teachers.new_full((2, len(teachers)), 1.0 / temperature)
    if 2.0 / temperature > _FARTHEST_OFFSET:
        for rows, products in blocks:
            offset[:, rows] = products.amax(-1) if products.shape[-1] else -torch.inf
        offset = items.largest(offset)
    sums = torch.empty_like(offset)
    for rows, products in blocks:
        sums[:, rows] = (products - offset[:, rows, None]).exp_().sum(-1)
    (sums,) = items.add(sums)
    return offset, sums.log_()


def _loss_and_gradients(
    blocks: _Blocks,
    softmaxes: tuple[Tensor, Tensor],
    items: Spread,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss () and its gradients by the unit rows (b, d) of the sides that need one."""
    teachers, units = blocks.teachers, blocks.units
    columns = len(units) // 2
    scale = 1.0 / (blocks.temperature * max(items.total, 1))
    divergence = units.new_zeros((), dtype=torch.float64)
    of_student = units.new_zeros(columns, units.shape[1])
    crossed = units.new_zeros(len(teachers))  # -sum of P δ, which is sum of P (log P - log Q)

    for rows, products in blocks:
        delta, target, difference = _compared(products, softmaxes, rows)
        terms = target.mul(delta)
        divergence += (difference - terms).sum(-1).sum(dtype=torch.float64)
        if student_needs_grad:
            of_student.addmm_(difference.T, teachers[rows])
        crossed[rows] = -terms.sum(-1)
    (loss,) = items.add(divergence.to(units.dtype))
    of_teacher = None
    if teacher_needs_grad:
        of_teacher = _teacher_gradient(blocks, softmaxes, crossed, items).mul_(scale)
    return (
        loss / max(items.total, 1),
        of_student.mul_(scale) if student_needs_grad else None,
        of_teacher,
    )


def _teacher_gradient(
    blocks: _Blocks, softmaxes: tuple[Tensor, Tensor], crossed: Tensor, items: Spread
) -> Tensor:
    """Return τ B times the gradient by the own teachers, as columns here and as rows everywhere."""
    own_students, own_teachers = blocks.units.chunk(2)
    (crossed,) = items.add(crossed)
    as_columns = torch.zeros_like(own_teachers)
    as_rows = torch.empty_like(blocks.teachers)
    for rows, products in blocks:
        delta, target, difference = _compared(products, softmaxes, rows)
        of_target = delta.add_(crossed[rows, None]).mul_(target).neg_()
        as_columns.addmm_(of_target.T, blocks.teachers[rows])
        as_rows[rows] = difference @ own_students + of_target @ own_teachers
    (as_rows,) = items.add(as_rows)
    return as_columns.add_(as_rows[items.own])


def _compared(
    products: Tensor, softmaxes: tuple[Tensor, Tensor], rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return δ, P and Q - P of a block; nearly equal numbers are not subtracted."""
    offset, log_sums = softmaxes
    logarithms = (products - offset[:, rows, None]).sub_(log_sums[:, rows, None])
    log_prediction, log_target = logarithms.unbind()
    delta = log_prediction - log_target
    target = log_target.exp_()
    difference = log_prediction.exp_().add_(target).mul_(delta.mul(0.5).tanh_())
    return delta, target, difference
