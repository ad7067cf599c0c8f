"""The bounded shift (TelME Eq. 18-19), and the gate before it (Eq. 16-17), in plain PyTorch."""

import torch
from torch import Tensor, nn


def gate_and_shift(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
) -> Tensor:
    """Eq. 16-19 from the products with W_1 and W_2 on; then, unless None, LayerNorm."""
    gate = gate if gate_bias is None else gate + gate_bias
    value = value if value_bias is None else value + value_bias
    shifted = bounded_shift(anchor, torch.relu(gate) * value, threshold=threshold, eps=eps)
    if norm_eps is None:
        return shifted
    return nn.functional.layer_norm(shifted, shifted.shape[-1:], norm_weight, norm_bias, norm_eps)


def bounded_shift(
    anchor: Tensor, displacement: Tensor, *, threshold: float, eps: float | None
) -> Tensor:
    """Eq. 18-19 over the last axis of (..., d); see :func:`telme_kd.fusion.bounded_shift`."""
    if eps is not None:
        anchor_norm, displacement_norm = _length(anchor), _length(displacement)
        displacement_norm = torch.where(displacement_norm == 0, 1.0, displacement_norm)
        ratio: Tensor = threshold * anchor_norm / (displacement_norm + eps)
        return anchor + ratio.clamp(max=1.0) * displacement
    _, anchor_norm, anchor_unit = _measure(anchor)
    direction, displacement_norm, displacement_unit = _measure(displacement)
    longest = threshold * anchor_norm
    shortened = direction * longest * anchor_unit
    unit = torch.maximum(anchor_unit, displacement_unit)
    unit = torch.where(unit == 0, 1.0, unit)
    short_enough = displacement_norm * (displacement_unit / unit) <= longest * (anchor_unit / unit)
    # Where nothing may be added, nor may a displacement whose share of the unit vanishes.
    short_enough &= (longest > 0) | (displacement_norm == 0)
    # NaN is not short enough, so that it reaches every entry; a zero displacement always is.
    return anchor + torch.where(short_enough, displacement, shortened)


def _length(vectors: Tensor) -> Tensor:
    """Norms (..., 1); of zero vectors 0, as are its derivatives: PyTorch's second would be NaN."""
    present = (vectors != 0).any(dim=-1, keepdim=True)
    safe = torch.where(present, vectors, 1.0)
    length: Tensor = torch.linalg.vector_norm(safe, dim=-1, keepdim=True)
    return torch.where(present, length, 0.0)


def _measure(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of vectors (..., d), their norms (..., 1) in a unit of their own, and the units.

    The unit is the largest entry: 1e20 squared overflows float32, 1e-25 squared vanishes, and a
    norm itself may be too large. A zero vector has norm 0, direction 0 and gradient 0.
    """
    unit = vectors.detach().abs().amax(dim=-1, keepdim=True)
    present = unit != 0
    scaled = vectors / torch.where(present, unit, 1.0)
    norm = torch.where(present, scaled.square().sum(dim=-1, keepdim=True), 1.0).sqrt()
    return scaled / norm, torch.where(present, norm, 0.0), unit
