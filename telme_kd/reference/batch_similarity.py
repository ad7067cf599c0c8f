"""Batch similarity (TelME Eq. 13-15) in plain PyTorch."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def batch_similarity_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
) -> Tensor:
    """Eq. 15 over features (B, d); see ``telme_kd.batch_similarity.batch_similarity_loss``."""
    if mask is not None:
        # An absent item may hold anything, NaN included; it must not even be multiplied by zero.
        student_features = student_features.masked_fill(~mask[:, None], 0.0)
        teacher_features = teacher_features.masked_fill(~mask[:, None], 0.0)
    student, teacher = unit_rows(student_features), unit_rows(teacher_features)
    target = similarities(teacher, teacher) / temperature
    prediction = similarities(teacher, student) / temperature
    if mask is not None:
        target = target.masked_fill(~mask, -torch.inf)
        prediction = prediction.masked_fill(~mask, -torch.inf)
    log_target = torch.log_softmax(target, dim=-1)  # log P, Eq. 13
    log_prediction = torch.log_softmax(prediction, dim=-1)  # log Q, Eq. 14
    log_ratio = log_target - log_prediction
    if mask is not None:
        log_ratio = torch.where(mask, log_ratio, 0.0)  # 0 log (0 / 0) = 0 for absent columns
        divergence = torch.where(mask, log_target.exp(), 0.0) * log_ratio
        return (divergence.sum(-1) * mask).sum() / mask.sum().clamp(min=1)
    return (log_target.exp() * log_ratio).sum(-1).mean()


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products of the rows of (B, d) and (N, d): (B, N)."""
    if torch.compiler.is_compiling():  # traces the backward pass in the forward's precision
        return rows @ columns.T
    products: Tensor = _Product.apply(rows, columns)  # type: ignore[no-untyped-call]
    return products


class _Product(torch.autograd.Function):
    """a bᵀ in the dtype of its inputs, and so are its gradients.

    Leaving autocast in the forward pass is not enough: a backward pass that is called inside an
    autocast region would take its matrix products in half precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors  # type: ignore[attr-defined]
        a_needed, b_needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        device = gradient.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return (
                similarities(gradient, b.T) if a_needed else None,
                similarities(gradient.T, a.T) if b_needed else None,
            )


def unit_rows(features: Tensor) -> Tensor:
    """Rows over their Euclidean norm, right at any magnitude; a zero row stays zero, gradient too.

    Rows are first measured in units of their largest entry: squares of 1e20 overflow float32, and
    those of 1e-25 vanish.
    """
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    present = largest != 0
    scaled = features / torch.where(present, largest, 1.0)
    squared_norm = scaled.square().sum(dim=-1, keepdim=True)
    return torch.where(present, scaled * torch.where(present, squared_norm, 1.0).rsqrt(), 0.0)
