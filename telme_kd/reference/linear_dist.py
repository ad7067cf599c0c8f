"""DIST behind two linear layers in plain PyTorch: the logits as they are, whole."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from telme_kd.reference.dist import dist_loss


def linear_dist_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
) -> Tensor:
    """Eq. 12 over H W^T + b of both sides; see :func:`telme_kd.linear_dist.linear_dist_loss`.

    Unlike its neighbours it takes half precision: logits are rounded to the dtype of the layer.
    """
    if mask is not None:
        # An absent item may hold anything, NaN included, and a weight meets every item.
        student_hidden = student_hidden.masked_fill(~mask[:, None], 0.0)
        teacher_hidden = teacher_hidden.masked_fill(~mask[:, None], 0.0)
    student_logits = linear(student_hidden, student_weight, student_bias)
    teacher_logits = linear(teacher_hidden, teacher_weight, teacher_bias)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return dist_loss(
        student_logits.to(dtype),
        teacher_logits.to(dtype),
        temperature=temperature,
        inter_weight=inter_weight,
        intra_weight=intra_weight,
        mask=mask,
        eps=eps,
    )
