"""The bounded shift (TelME Eq. 18-19) in plain PyTorch."""

import torch
from torch import Tensor


def bounded_shift(
    anchor: Tensor, displacement: Tensor, *, threshold: float, eps: float | None
) -> Tensor:
    """Eq. 18-19 over the last axis of (..., d); see :func:`telme_kd.fusion.bounded_shift`."""
    if eps is not None:
        anchor_norm = torch.linalg.vector_norm(anchor, dim=-1, keepdim=True)
        displacement_norm = torch.linalg.vector_norm(displacement, dim=-1, keepdim=True)
        displacement_norm = torch.where(displacement_norm == 0, 1.0, displacement_norm)
        ratio: Tensor = threshold * anchor_norm / (displacement_norm + eps)
        return anchor + ratio.clamp(max=1.0) * displacement
    _, anchor_norm = _direction_and_norm(anchor)
    direction, displacement_norm = _direction_and_norm(displacement)
    longest = threshold * anchor_norm
    # A zero displacement is never too long, so its undefined direction is never used.
    return anchor + torch.where(longest < displacement_norm, direction * longest, displacement)


def _direction_and_norm(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., d) over their norm, and the norm (..., 1), right at any magnitude.

    They are first measured in units of their largest entry: 1e20 squared overflows float32, and
    1e-25 squared vanishes. A zero vector has norm 0, direction 0 and gradient 0.
    """
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    present = largest != 0
    scaled = vectors / torch.where(present, largest, 1.0)
    squared = torch.where(present, scaled.square().sum(dim=-1, keepdim=True), 1.0)
    norm = squared.sqrt()
    return scaled / norm, torch.where(present, norm * largest, 0.0)
