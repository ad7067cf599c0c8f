"""Relations of a batch and remembered items, in plain PyTorch.

What is remembered comes as tensors here, and leaves as tensors: see :func:`remembered`.
"""

from functools import partial

import torch
from torch import Tensor

from telme_kd.reference.batch_similarity import batch_similarity_loss
from telme_kd.reference.dist import dist_loss


def dist_loss_with_memory(
    student_logits: Tensor,
    teacher_logits: Tensor,
    remembered_student: Tensor,
    remembered_teacher: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
) -> Tensor:
    """Eq. 12 over logits (B, C), whose columns go on through remembered logits (M, C)."""
    relate = partial(dist_loss, temperature=temperature, mask=None, eps=eps)
    inter = relate(student_logits, teacher_logits, inter_weight=inter_weight, intra_weight=0.0)
    intra = relate(
        torch.cat([remembered_student.detach(), student_logits]),
        torch.cat([remembered_teacher.detach(), teacher_logits]),
        inter_weight=0.0,
        intra_weight=intra_weight,
    )
    return inter + compensated(intra, len(student_logits), len(remembered_student))


def batch_similarity_loss_with_memory(
    student_features: Tensor,
    teacher_features: Tensor,
    remembered_student: Tensor,
    remembered_teacher: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Eq. 15 over features (B, d) and remembered features (M, d), in rows and in columns."""
    loss = batch_similarity_loss(
        torch.cat([remembered_student.detach(), student_features]),
        torch.cat([remembered_teacher.detach(), teacher_features]),
        temperature=temperature,
        mask=None,
    )
    return compensated(loss, len(student_features), len(remembered_student))


def compensated(loss: Tensor, items: int, remembered: int) -> Tensor:
    """Return a loss with its gradient times (items + remembered) / items.

    In a mean over B + M items each has a share of 1 / (B + M) in the gradient, and M of the shares
    are cut off. With the factor the expected gradient is that of the whole, were its items drawn
    anew.
    """
    return loss.detach() + (items + remembered) / items * (loss - loss.detach())


def remembered(held: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return the last ``size`` of the rows (M, n) that are held and new rows (B, n)."""
    return torch.cat([held, rows.detach()])[-size:]
