"""DIST as one differentiable operator over a backend's hand-written passes.

Called eagerly it is an :class:`torch.autograd.Function`; while ``torch.compile`` traces it is a
custom operator, which stays whole in the graph. Both call the same passes: an operator's dispatcher
alone takes a fifth of the time that DIST needs for a small batch.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd.kernels.cpu import dist as cpu
from telme_kd.reference import dist as reference


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
    backend: str,
) -> Tensor:
    """Eq. 12 over logits (B, C) of any floating dtype and strides, by a fused backend."""
    options = (temperature, inter_weight, intra_weight, eps)
    enabled = torch.is_grad_enabled()
    needs_grad = (
        enabled and student_logits.requires_grad,
        enabled and teacher_logits.requires_grad,
    )
    if torch.compiler.is_compiling():
        loss: Tensor
        loss, _, _ = _dist_loss(
            student_logits, teacher_logits, mask, *options, *needs_grad, backend
        )
        return loss
    applied: Tensor = _Dist.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits, mask, options, needs_grad, _passes(backend)
    )
    return applied


def _passes(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from telme_kd.kernels.triton import (
        dist as triton,
    )  # where it is not asked for, it may be absent

    return triton


class _Dist(torch.autograd.Function):
    # One method with a context: splitting off setup_context costs as much as ten small operators.
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        options: tuple[float, float, float, float | None],
        needs_grad: tuple[bool, bool],
        passes: ModuleType,
    ) -> Tensor:
        temperature, inter_weight, intra_weight, eps = options
        student_needs_grad, teacher_needs_grad = needs_grad
        loss: Tensor
        loss, rows, columns = passes.forward(
            student,
            teacher,
            mask,
            temperature=temperature,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            eps=eps,
            student_needs_grad=student_needs_grad,
            teacher_needs_grad=teacher_needs_grad,
        )
        ctx.save_for_backward(student, teacher, mask, rows, columns)
        ctx.options, ctx.needs_grad, ctx.passes = options, needs_grad, passes
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, rows, columns = ctx.saved_tensors
        temperature, inter_weight, intra_weight, eps = ctx.options
        student_needs_grad, teacher_needs_grad = ctx.needs_grad
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            with outside_autocast(grad_output.device):
                gradients = _differentiable_gradients(
                    grad_output, student, teacher, mask, ctx.options, ctx.needs_grad
                )
        else:
            gradients = ctx.passes.backward(
                grad_output,
                student,
                teacher,
                mask,
                rows,
                columns,
                temperature=temperature,
                inter_weight=inter_weight,
                intra_weight=intra_weight,
                eps=eps,
                student_needs_grad=student_needs_grad,
                teacher_needs_grad=teacher_needs_grad,
            )
        return *gradients, None, None, None, None


def _differentiable_gradients(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: tuple[float, float, float, float | None],
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated themselves: autograd's, of the definition."""
    temperature, inter_weight, intra_weight, eps = options
    dtype = grad_output.dtype
    # By views, through which no other path leads: the teacher may have been made from the student.
    student, teacher = student.view_as(student), teacher.view_as(teacher)
    loss = reference.dist_loss(
        student.to(dtype),
        teacher.to(dtype),
        temperature=temperature,
        inter_weight=inter_weight,
        intra_weight=intra_weight,
        mask=mask,
        eps=eps,
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


@torch.library.custom_op("telme_kd::dist_loss", mutates_args=())
def _dist_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, rows, columns = _passes(backend).forward(
        student,
        teacher,
        mask,
        temperature=temperature,
        inter_weight=inter_weight,
        intra_weight=intra_weight,
        eps=eps,
        student_needs_grad=student_needs_grad,
        teacher_needs_grad=teacher_needs_grad,
    )
    # An operator's results become part of the graph; nothing that outlives the call may be one.
    rows, columns = (kept if kept.numel() else kept.new_empty(0) for kept in (rows, columns))
    return loss, rows, columns


@_dist_loss.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = _passes(backend).saved_shapes(
        *student.shape, student_needs_grad=student_needs_grad, teacher_needs_grad=teacher_needs_grad
    )
    dtype = accumulation_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(rows, dtype=dtype),
        student.new_empty(columns, dtype=dtype),
    )


@torch.library.custom_op("telme_kd::dist_loss_backward", mutates_args=())
def _dist_loss_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
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
            columns,
            temperature=temperature,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            eps=eps,
            student_needs_grad=student_needs_grad,
            teacher_needs_grad=teacher_needs_grad,
        )
    return (
        student.new_empty(0) if student_gradient is None else student_gradient,
        # An operator's results may not be views of one tensor, as the small plan's are.
        teacher.new_empty(0) if teacher_gradient is None else teacher_gradient.clone(),
    )


@_dist_loss_backward.register_fake
def _(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
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
    _, rows, columns = output
    ctx.save_for_backward(student, teacher, mask, rows, columns)


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *_, student_needs_grad, teacher_needs_grad, _ = ctx.options
    student_gradient, teacher_gradient = _dist_loss_backward(
        grad_output, *ctx.saved_tensors, *ctx.options
    )
    return (
        student_gradient if student_needs_grad else None,
        teacher_gradient if teacher_needs_grad else None,
        *[None] * (1 + len(ctx.options)),
    )


_dist_loss.register_autograd(_backward, setup_context=_setup_context)
