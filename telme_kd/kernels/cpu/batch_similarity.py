"""Batch similarity on the CPU: matrix products over blocks of rows, the gradient beside the loss.

With U = [Ŝ; T̂] and G = T̂ Uᵀ / τ, both similarity matrices from one product, a block of rows i gives

    δ = log Q - log P,  KL_i = Σ_j Q_ij - P_ij - P_ij δ_ij,  B dL/dG = [Q - P | -P (δ + KL_i)],
    dU += (dL/dG)ᵀ T̂_block / τ,  and dT̂_block += dL/dG U / τ if the teacher needs a gradient,

and dU goes through the normalisation at the end. Q - P is (Q + P) tanh(δ / 2): nearly equal
probabilities are never subtracted, and no δ is too large. KL_i adds up terms of second order in δ,
where those of P (log P - log Q) are of first order and cancel. All of it in the accumulation dtype.
"""

import math

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype

_BLOCK_BYTES = 16 * 2**20
"""What the four matrices of a block of rows may take together."""

_FEWEST_ROWS = 64
"""Rows in a block, at least: every block reads and writes the whole gradient once."""


def forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (), no row numbers, and the gradients (k, B, d) of the sides that need one.

    The gradients are in the accumulation dtype, those of a loss scaled by one, student first.
    """
    batch, width = student.shape
    units, sizes = _unit_rows(student, teacher, mask)
    divergences, gradients = _blocks(
        units, mask, temperature, student_needs_grad, teacher_needs_grad
    )
    items: int | Tensor = batch if mask is None else mask.sum(dtype=units.dtype).clamp_(min=1.0)
    loss = divergences.sum() / items
    if student_needs_grad or teacher_needs_grad:
        wanted = slice(0 if student_needs_grad else 1, 2 if teacher_needs_grad else 1)
        units, sizes = units.view(2, batch, width)[wanted], sizes.view(2, batch, 1)[wanted]
        # d(u / |u|): off the row's direction, over its length.
        along = (units * gradients).sum(dim=-1, keepdim=True)
        gradients.addcmul_(units, along, value=-1).div_(sizes * (items * temperature))
    else:
        gradients = units.new_empty(0)
    return loss, units.new_empty(0), gradients


def saved_shapes(
    batch: int,
    width: int,
    *,
    dtype: torch.dtype,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what :func:`forward` returns beside the loss, the same for any dtype."""
    sides = student_needs_grad + teacher_needs_grad
    return (0,), (sides, batch, width) if sides else (0,)


def backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    gradients: Tensor,
    *,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients (B, d) in the dtypes of their inputs."""
    return (
        (gradients[0] * grad_output).to(student.dtype) if student_needs_grad else None,
        (gradients[-1] * grad_output).to(teacher.dtype) if teacher_needs_grad else None,
    )


def _unit_rows(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the unit rows of both sides (2B, d), student first, and the norms they had (2B, 1).

    Rows are first measured in units of their largest entry, so that no square overflows or
    vanishes. The unit of a zero row is infinity: it stays zero, and so does its gradient.
    """
    units = torch.cat((student, teacher)).to(accumulation_dtype(student, teacher))
    if mask is not None:  # an absent item may hold anything, NaN included
        units.masked_fill_(~mask.repeat(2)[:, None], 0.0)
    largest = units.abs().amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest == 0, torch.inf)
    units.div_(largest)
    norms = torch.linalg.vector_norm(units, dim=-1, keepdim=True).clamp_(min=1.0)
    units.div_(norms)
    return units, norms.mul_(largest)


def _blocks(
    units: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return KL_i of every row (B, 1) and τ B dL/dU of the sides that need it, (k, B, d)."""
    batch, width = len(units) // 2, units.shape[1]
    teacher = units[batch:]
    sides = [side for side, needed in enumerate((student_needs_grad, teacher_needs_grad)) if needed]
    gradients = units.new_zeros(len(sides), batch, width)
    divergences = units.new_empty(batch, 1)
    absent = None if mask is None else ~mask
    limits = torch.finfo(units.dtype)
    least_logarithm = math.log(limits.tiny)  # exp takes twenty times as long where it underflows

    height = min(batch, max(_FEWEST_ROWS, _BLOCK_BYTES // (4 * batch * units.element_size())))
    workspace = units.new_empty(2, height, 2 * batch)
    for start in range(0, batch, height):
        block = teacher[start : start + height]
        products, gradient = workspace[:, : len(block)].unbind()
        pairs, logarithms = products.view(-1, 2, batch), gradient.view(-1, 2, batch)
        delta, target = pairs.unbind(1)
        log_prediction, log_target = logarithms.unbind(1)

        torch.mm(block / temperature, units.T, out=products)
        if absent is not None:
            # Not infinity: absent items have δ = 0, as the difference of equal numbers.
            pairs.masked_fill_(absent, limits.min / 2)
        torch.log_softmax(pairs, dim=-1, out=logarithms)
        torch.sub(log_prediction, log_target, out=delta)
        torch.clamp(log_target, min=least_logarithm, out=target).exp_()
        prediction = log_prediction.clamp_(min=least_logarithm).exp_()
        half = torch.mul(delta, 0.5, out=log_target)
        difference = prediction.add_(target).mul_(half.tanh_())
        terms = torch.addcmul(difference, target, delta, value=-1, out=half)
        divergence = torch.sum(terms, -1, keepdim=True, out=divergences[start : start + height])

        if teacher_needs_grad:
            # Σ_j P (log P - log Q) as δ has it, so that what is common to a row's δ cancels.
            centre = divergence - difference.sum(dim=-1, keepdim=True)
            torch.add(delta, centre, out=terms).mul_(target).neg_()
            gradients[-1, start : start + height].addmm_(gradient, units)
        # Each side apart: a product of another shape would add up in another order.
        for side, of_side in zip(sides, gradients, strict=True):
            of_side.addmm_(logarithms[:, side].T, block)
    return divergences, gradients
