"""Batch similarity as one differentiable operator over a backend's hand-written passes.

Eagerly an :class:`torch.autograd.Function`, while ``torch.compile`` traces a custom operator; see
:mod:`telme_kd.kernels.dist` for the reason.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd.kernels.cpu import batch_similarity as cpu
from telme_kd.reference import batch_similarity as reference


def batch_similarity_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Eq. 15 over features (B, d) of any floating dtype and strides, by a fused backend."""
    enabled = torch.is_grad_enabled()
    needs_grad = (
        enabled and student_features.requires_grad,
        enabled and teacher_features.requires_grad,
    )
    if torch.compiler.is_compiling():
        loss: Tensor
        loss, _, _ = _batch_similarity_loss(
            student_features, teacher_features, mask, temperature, *needs_grad, backend
        )
        return loss
    applied: Tensor = _BatchSimilarity.apply(  # type: ignore[no-untyped-call]
        student_features, teacher_features, mask, temperature, needs_grad, _passes(backend)
    )
    return applied


def _passes(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from telme_kd.kernels.triton import batch_similarity as triton  # it may be absent elsewhere

    return triton


class _BatchSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        temperature: float,
        needs_grad: tuple[bool, bool],
        passes: ModuleType,
    ) -> Tensor:
        student_needs_grad, teacher_needs_grad = needs_grad
        loss: Tensor
        loss, rows, gradients = passes.forward(
            student,
            teacher,
            mask,
            temperature=temperature,
            student_needs_grad=student_needs_grad,
            teacher_needs_grad=teacher_needs_grad,
        )
        ctx.save_for_backward(student, teacher, mask, rows, gradients)
        ctx.temperature, ctx.needs_grad, ctx.passes = temperature, needs_grad, passes
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, rows, gradients = ctx.saved_tensors
        student_needs_grad, teacher_needs_grad = ctx.needs_grad
        with outside_autocast(grad_output.device):
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                pair = _differentiable_gradients(
                    grad_output, student, teacher, mask, ctx.temperature, ctx.needs_grad
                )
            else:
                pair = ctx.passes.backward(
                    grad_output,
                    student,
                    teacher,
                    mask,
                    rows,
                    gradients,
                    temperature=ctx.temperature,
                    student_needs_grad=student_needs_grad,
                    teacher_needs_grad=teacher_needs_grad,
                )
        return *pair, None, None, None, None


def _differentiable_gradients(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated themselves: autograd's, of the definition."""
    dtype = grad_output.dtype
    # By views, through which no other path leads: the teacher may have been made from the student.
    student, teacher = student.view_as(student), teacher.view_as(teacher)
    loss = reference.batch_similarity_loss(
        student.to(dtype), teacher.to(dtype), temperature=temperature, mask=mask
    )
    inputs = [
        tensor for tensor, needed in zip((student, teacher), needs_grad, strict=True) if needed
    ]
    gradients = iter(torch.autograd.grad(loss, inputs, grad_output, create_graph=True))
    student_needs_grad, teacher_needs_grad = needs_grad
    return (
        next(gradients) if student_needs_grad else None,
        next(gradients) if teacher_needs_grad else None,
    )


@torch.library.custom_op("telme_kd::batch_similarity_loss", mutates_args=())
def _batch_similarity_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, rows, gradients = _passes(backend).forward(
        student,
        teacher,
        mask,
        temperature=temperature,
        student_needs_grad=student_needs_grad,
        teacher_needs_grad=teacher_needs_grad,
    )
    return loss, rows, gradients


@_batch_similarity_loss.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, gradients = _passes(backend).saved_shapes(
        *student.shape,
        dtype=torch.promote_types(student.dtype, teacher.dtype),
        student_needs_grad=student_needs_grad,
        teacher_needs_grad=teacher_needs_grad,
    )
    dtype = accumulation_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(rows, dtype=dtype),
        student.new_empty(gradients, dtype=dtype),
    )


@torch.library.custom_op("telme_kd::batch_similarity_loss_backward", mutates_args=())
def _batch_similarity_loss_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    gradients: Tensor,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with outside_autocast(grad_output.device):
        student_gradient, teacher_gradient = _passes(backend).backward(
            grad_output,
            student,
            teacher,
            mask,
            rows,
            gradients,
            temperature=temperature,
            student_needs_grad=student_needs_grad,
            teacher_needs_grad=teacher_needs_grad,
        )
    return (
        student.new_empty(0) if student_gradient is None else student_gradient,
        teacher.new_empty(0) if teacher_gradient is None else teacher_gradient,
    )


@_batch_similarity_loss_backward.register_fake
def _(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    gradients: Tensor,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        student.new_empty(student.shape if student_needs_grad else (0,)),
        teacher.new_empty(teacher.shape if teacher_needs_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, mask, *ctx.options = inputs
    _, rows, gradients = output
    ctx.save_for_backward(student, teacher, mask, rows, gradients)


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *_, student_needs_grad, teacher_needs_grad, _ = ctx.options
    student_gradient, teacher_gradient = _batch_similarity_loss_backward(
        grad_output, *ctx.saved_tensors, *ctx.options
    )
    return (
        student_gradient if student_needs_grad else None,
        teacher_gradient if teacher_needs_grad else None,
        *[None] * (1 + len(ctx.options)),
    )


_batch_similarity_loss.register_autograd(_backward, setup_context=_setup_context)
