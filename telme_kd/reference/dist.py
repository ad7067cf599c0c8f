"""DIST (Huang et al. 2022; TelME Eq. 7-12) in plain PyTorch."""

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-3
"""With ``eps=None``, correlation is exact for vectors whose centred norm is more than this share of
their norm. Below, it fades to 0 for a constant, so that its gradient stays bounded."""

CONSTANT_GRADIENT_LIKE = 0.1
"""With ``eps=None``, a constant vector is pulled as hard as one varying by this share of its norm.

Pulled as hard as at ``RELATIVE_FLOOR``, a zero-initialised head is thrown so far by its first step
that it never learns as well; not pulled at all, DIST alone would never move it. The experiment
behind both numbers is ``benchmarks/bench_relative_floor.py``; the theory page shows its outcome.
"""


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
) -> Tensor:
    """Eq. 12 over logits (B, C) and an optional mask (B,); see :func:`telme_kd.dist.dist_loss`."""
    if mask is not None:
        # An absent item may hold anything, NaN included; it must not even be multiplied by zero.
        student_logits = student_logits.masked_fill(~mask[:, None], 0.0)
        teacher_logits = teacher_logits.masked_fill(~mask[:, None], 0.0)
    student_log_probabilities = torch.log_softmax(student_logits / temperature, dim=-1)
    teacher_log_probabilities = torch.log_softmax(teacher_logits / temperature, dim=-1)

    # Zero, and on the graph even if both weights are zero.
    loss = student_logits[:0].sum() + teacher_logits[:0].sum()
    if inter_weight:
        student, teacher = student_log_probabilities.exp(), teacher_log_probabilities.exp()
        distance = 1.0 - pearson(student, teacher, dim=-1, eps=eps)
        loss = loss + inter_weight * temperature**2 * _mean(distance, mask)
    if intra_weight:
        student, teacher = student_log_probabilities, teacher_log_probabilities
        if eps is None:
            student, teacher = _column_units(student, mask), _column_units(teacher, mask)
        else:
            student, teacher = student.exp(), teacher.exp()
        distance = 1.0 - pearson(student, teacher, dim=0, eps=eps, mask=mask)
        class_mean = distance.mean()
        if mask is not None:
            class_mean = torch.where(mask.any(), class_mean, 0.0)
        loss = loss + intra_weight * temperature**2 * class_mean
    return loss


def pearson(
    student: Tensor, teacher: Tensor, *, dim: int, eps: float | None, mask: Tensor | None = None
) -> Tensor:
    """Pearson correlation of two (B, C) matrices along ``dim``; the mask (B,) goes with ``dim=0``.

    With a number for ``eps`` it is the released formula, <a, b> / (|a| |b| + eps) of the centred
    vectors. With ``eps=None`` it is exact wherever both vectors vary, 0 where one is constant, does
    not depend on their scale, and has a bounded gradient for every input.
    """
    student_centred, teacher_centred = _centre(student, dim, mask), _centre(teacher, dim, mask)
    covariance = (student_centred * teacher_centred).sum(dim)
    if eps is not None:
        return covariance / (_norm(student_centred, dim) * _norm(teacher_centred, dim) + eps)
    return (
        covariance
        * inverse_norm(student_centred.square().sum(dim), student.square().sum(dim))
        * inverse_norm(teacher_centred.square().sum(dim), teacher.square().sum(dim))
    )


def _norm(centred: Tensor, dim: int) -> Tensor:
    """|a|; of a vector of zeros 0, as are its derivatives, of which PyTorch's second is NaN."""
    present = (centred != 0).any(dim)
    safe = torch.where(present.unsqueeze(dim), centred, 1.0)
    norm: Tensor = torch.linalg.vector_norm(safe, dim=dim)
    return torch.where(present, norm, 0.0)


def inverse_norm(squared: Tensor, uncentred_squared: Tensor) -> Tensor:
    """1 / |a|, attenuated where |a| is less than ``RELATIVE_FLOOR`` times the uncentred norm.

    With x = |a| / (floor |p|): 1 / |a| for x >= 1, and (s + (1 - s) x^2) / (floor |p|) below, where
    s sets the gradient at x = 0. Everything is a function of squares, so smooth at zero.
    """
    floor = RELATIVE_FLOOR**2 * uncentred_squared
    # The floor is zero only for a class at -inf in every row. Any divisor makes its rho 0.
    floor = torch.where(floor == 0, 1.0, floor)
    slope = RELATIVE_FLOOR / CONSTANT_GRADIENT_LIKE
    shortfall = 1.0 - (squared / floor).clamp(max=1.0)
    attenuation: Tensor = 1.0 - (1.0 - slope) * shortfall
    return attenuation * torch.maximum(squared, floor).rsqrt()


def _centre(values: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values - values.mean(dim, keepdim=True)
    kept = mask[:, None].to(values.dtype)
    mean = (values * kept).sum(dim, keepdim=True) / kept.sum().clamp(min=1.0)
    return (values - mean) * kept


def _column_units(log_probabilities: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities of a class in units of the largest that the batch gives it.

    Correlation does not see a column's scale, but float32 does: over a large vocabulary a class may
    hold 1e-25 at most, whose square is zero. Taken from the logarithms, nothing underflows, neither
    forward nor backward.
    """
    if mask is not None:
        log_probabilities = log_probabilities.masked_fill(~mask[:, None], -torch.inf)
    largest = log_probabilities.detach().amax(dim=0, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    return (log_probabilities - largest).exp()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
