"""DIST on the CPU: forward and backward written by hand in few calls to PyTorch.

Four plans share the work:

- *affine*: the usual batch of small or middle size. See :mod:`.affine`.

Whatever else there is, and where that gives up because a vector hardly varies:

- *small*: small batches. See :mod:`.small`.
- *whole*: middle-sized batches, as a single block of rows. See :mod:`.blocks`.
- *blocked*: large batches of all kinds. Blocks of rows that stay in the cache are read twice, for
  the statistics of rows and columns and, in the backward pass, for the gradient. Only the logits
  and O(B + C) numbers are saved in between.

All but the last compute the gradient beside the loss; the backward pass multiplies it by
``grad_output``. Their buffers are kept for the next call. Everything accumulates in float32, or in
float64 if an input is.
"""

from collections.abc import Hashable
from typing import TypeVar

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype
from telme_kd.kernels.cpu.dist import blocks, kept
from telme_kd.kernels.cpu.dist.affine import Affine
from telme_kd.kernels.cpu.dist.blocks import (
    COLUMN_PARTS,
    Gradients,
    Shape,
    new_statistics,
    row_moments,
)
from telme_kd.kernels.cpu.dist.relations import Options
from telme_kd.kernels.cpu.dist.small import Small

__all__ = [
    "COLUMN_PARTS",
    "backward",
    "conclude",
    "forward",
    "gradient",
    "new_statistics",
    "observe",
    "row_moments",
    "saved_shapes",
]

# Measured with one thread on an EPYC 9005 core, 1 MiB of second-level and 32 MiB of shared cache,
# plans alternating, forward and backward passes, student's gradient only.

USUAL = 2**18
"""The affine plan serves up to this many logits. The gradient that it stores is 1 MiB in float32."""

SMALL = 2**16
"""The small plan serves up to this many logits."""

MEDIUM = 2**18
"""The plan of a single block serves up to this many."""

PlanT = TypeVar("PlanT", Affine, Small)

with torch.inference_mode(False):
    _NOTHING = {
        dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)
    }
_PLAIN = (Tensor, torch.nn.Parameter)


def forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss () and what the backward pass needs, of logits (B, C); ``saved_shapes``."""
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    if student.numel() <= _most_at_once():
        loss, gradients = _at_once(student, teacher, mask, options, needs)
        nothing = _NOTHING[loss.dtype]
        return loss, gradients if any(needs) else nothing, nothing
    loss, rows, columns = blocks.observe_all(student, teacher, mask, options)
    if not any(needs):
        rows = columns = _NOTHING[loss.dtype]
    return loss, rows, columns


def saved_shapes(
    batch: int, classes: int, *, student_needs_grad: bool, teacher_needs_grad: bool
) -> tuple[Shape, Shape]:
    """Return the shapes of the two tensors that :func:`forward` returns beside the loss."""
    needed = student_needs_grad + teacher_needs_grad
    if not needed:
        return (0,), (0,)
    if batch * classes <= _most_at_once():
        return (needed, batch, classes), (0,)
    return blocks.saved_shapes(batch, classes)


def backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> Gradients:
    """Return the gradients of student and teacher, each in its own dtype, or None."""
    if not (inter_weight or intra_weight):
        return _zeros(student, student_needs_grad), _zeros(teacher, teacher_needs_grad)
    if rows.dim() == 3:
        gradients = rows * grad_output
        return (
            _stored(gradients[0], student.dtype) if student_needs_grad else None,
            _stored(gradients[-1], teacher.dtype) if teacher_needs_grad else None,
        )
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    return blocks.gradient(grad_output, student, teacher, mask, rows, columns, options, needs)


def observe(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
) -> None:
    """Take a chunk of logits (R, C) into the statistics: rows[:, of the chunk] and all columns."""
    options = (temperature, inter_weight, intra_weight, eps)
    blocks.observe(student, teacher, mask, rows, columns, options)


def conclude(
    rows: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
) -> Tensor:
    """Return the loss (); the statistics become what :func:`gradient` multiplies with, in place."""
    return blocks.conclude(rows, columns, mask, (temperature, inter_weight, intra_weight, eps))


def gradient(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> Gradients:
    """Return the gradients of a chunk (R, C), as :func:`backward`; rows are those of the chunk."""
    if not (inter_weight or intra_weight):
        return _zeros(student, student_needs_grad), _zeros(teacher, teacher_needs_grad)
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    return blocks.gradient(grad_output, student, teacher, mask, rows, columns, options, needs)


def _at_once(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Return the loss () and the needed gradients (k, B, C)."""
    size, plain = student.numel(), type(student) in _PLAIN and type(teacher) in _PLAIN
    common = (student.shape, student.dtype, teacher.dtype, options, needs)

    def made(plan: type[PlanT]) -> PlanT:
        batch, classes = student.shape
        return plan(batch, classes, accumulation_dtype(student, teacher), options, needs)

    result: tuple[Tensor, Tensor] | None = None
    if plain and mask is None and size <= USUAL and any(options[1:3]):
        key: Hashable = (Affine, common)
        affine = kept.take(key, lambda: made(Affine))
        result = affine(student, teacher)
        kept.keep(key, affine)
    if result is None and plain and size <= SMALL:
        key = (Small, common)
        small = kept.take(key, lambda: made(Small))
        result = small(student, teacher, mask)
        kept.keep(key, small)
    return result or blocks.whole(student, teacher, mask, options, needs)


def _zeros(logits: Tensor, needed: bool) -> Tensor | None:
    """Return the gradient of no term, whatever the logits are: zero times NaN would be NaN."""
    return logits.new_zeros(logits.shape) if needed else None


def _stored(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _most_at_once() -> int:
    return max(USUAL, SMALL, MEDIUM)
