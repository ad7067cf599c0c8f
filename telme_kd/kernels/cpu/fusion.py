"""The gate and the shift on a CPU: forward and backward passes by hand.

Rows are independent. With g = ReLU(gate + b1), v = value + b2, H = g v, an upstream gradient that
LayerNorm's backward turns into D, and w = H / |H| where the shift is bounded, H where it is free,

    free:     Z = F + H               dF = D                             dH = D
    bounded:  Z = F + theta |F| w     dF = D + theta <D, w> F / |F|      dH = lambda (D - <D, w> w)

and with the released constant |H| + eps in place of |H| in w and lambda, and H / |H| for the last
w. Then d value = g dH and d gate = v dH where g > 0; where the gate is closed both are 0, whatever
dH is. Kept for backward: w (with the constant H, since nothing then divides by it), Z, and a few
numbers per row; g and v are computed again.

Small batches cost what PyTorch's calls cost, one to two microseconds each: whatever only backward
needs is left to backward, where it is fewer calls.

Large batches are worked through in blocks of rows, whose temporaries stay in the cache and in
memory that the process already holds: fresh pages cost more than the arithmetic on them.

Without the released constant, norms of float32 rows are sums in float64, in which no square of a
float32 overflows or vanishes: one pass, where a unit of the row's own (which float64 needs) takes
three. With it they are as plain as the released formula.

Dropout: PyTorch draws every decision by itself, which takes longer than all the rest together. Here
a decision is 16 bits of a random number of 64, so the rate is rounded to a multiple of 2**-16 and
what is kept is divided by exactly the share that is kept: the expectation is unchanged.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**17
"""Elements of a block per thread."""

_LEVELS = 2**16
_DECISIONS = 4
"""How many dropout decisions a drawn number holds."""

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}

# No norm is below these where it is divided by: the gradient of shorter rows stays finite.
_SHORTEST = {torch.float32: 1e-37, torch.float64: 1e-300}

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def draw(anchor: Tensor) -> Tensor:
    """Return random numbers for the dropout of rows (B, d)."""
    count = -(-anchor.numel() // _DECISIONS)
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=anchor.device)


def kept(noise: Tensor, shape: Sequence[int], rate: float, dtype: torch.dtype) -> Tensor:
    """Return what dropout multiplies rows (B, d) by: 0, or the inverse of the share it keeps."""
    batch, width = shape
    return _kept(noise.view(torch.int16)[: batch * width].view(batch, width), rate, dtype)


def _kept(bits: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    # Whole numbers, so this is 0 or 1; comparing, or multiplying by bool, is several times slower.
    decisions = bits.to(dtype).sub_(dropped - 1 - _LEVELS // 2).clamp_(0, 1)
    return decisions.mul_(_LEVELS / (_LEVELS - dropped))


def empty_saved(
    anchor: Tensor, dtype: torch.dtype, *, eps: float | None, norm_eps: float | None
) -> list[Tensor]:
    """Return tensors like those that forward saves, their contents undefined."""
    matrix = partial(anchor.new_empty, anchor.shape, dtype=dtype)
    number = partial(anchor.new_empty, (anchor.shape[0], 1), dtype=dtype)
    saved = [matrix(), number(), number(dtype=torch.bool), number()]
    if eps is not None:
        saved += [number(), number()]
    return saved if norm_eps is None else [*saved, matrix(), number(), number()]


def forward(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    *,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the fused rows (B, d) and, if there will be a backward, what it needs."""
    options: Any = {
        "gate_bias": _as(gate_bias, dtype),
        "value_bias": _as(value_bias, dtype),
        "threshold": threshold,
        "eps": eps,
        "dtype": dtype,
        "needs_grad": needs_grad,
    }
    if anchor.shape[0] <= _rows_per_block(anchor):
        output, direction, numbers = _shift(anchor, gate, value, **options)
    else:
        output, direction = (anchor.new_empty(anchor.shape, dtype=dtype) for _ in range(2))
        parts = []
        for *block, shifted, part in _blocks(anchor, gate, value, output, direction):
            parts.append(_shift(*block, shifted=shifted, direction=part, **options)[2])
        numbers = [torch.cat(part) for part in zip(*parts, strict=True)]
    saved = [direction, *numbers] if needs_grad else []
    if norm_eps is not None:
        shifted = output
        output, mean, scale = torch.native_layer_norm(
            shifted, shifted.shape[-1:], _as(norm_weight, dtype), _as(norm_bias, dtype), norm_eps
        )
        if needs_grad:
            saved += [shifted, mean, scale]
    if noise is not None:
        output.mul_(kept(noise, anchor.shape, rate, dtype))
    return _in(output, output_dtype), saved


def _shift(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    *,
    shifted: Tensor | None = None,
    direction: Tensor | None = None,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    threshold: float,
    eps: float | None,
    dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return Z and w (or H), in the places given, and what ``_pull_back`` needs of every row."""
    anchor, value = _in(anchor, dtype), _biased(value, value_bias, dtype)
    if gate_bias is None:
        opened = torch.relu(_in(gate, dtype))
    else:
        opened = _biased(gate, gate_bias, dtype).relu_()
    direction = torch.mul(opened, value, out=direction)
    if eps is None:
        anchor_length, divisor = _length_in_range(anchor), _length_in_range(direction)
        allowed = anchor_length * threshold
        free = divisor <= allowed  # NaN is not free, so that it reaches every entry
        divisor.masked_fill_(free, 1.0)
        allowed.masked_fill_(free, 1.0)
        shifted = torch.addcmul(anchor, direction.div_(divisor), allowed, out=shifted)
        if not needs_grad:
            return shifted, direction, []
        anchor_length.clamp_min_(_SHORTEST[dtype] * max(1.0, threshold))
        return shifted, direction, [allowed.div_(divisor), free, anchor_length]
    anchor_length = _length(anchor)
    length = torch.threshold(_length(direction), 0.0, 1.0)  # 1 where it is 0
    divisor = length + eps
    ratio = (anchor_length * threshold).div_(divisor)
    shortening = ratio.clamp(max=1.0)
    shifted = torch.addcmul(anchor, direction, shortening, out=shifted)
    if not needs_grad:
        return shifted, direction, []
    torch.threshold_(anchor_length, 0.0, 1.0)
    return shifted, direction, [shortening, ratio > 1.0, anchor_length, divisor, length]


def backward(
    grad_output: Tensor,
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    saved: Sequence[Tensor],
    *,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the first seven tensors, None where none is needed."""
    gradients: list[Tensor | None] = [None] * 7
    grad = _in(grad_output, dtype)
    if noise is not None:
        grad = kept(noise, anchor.shape, rate, dtype).mul_(grad)
    if norm_eps is not None:
        direction, *numbers, shifted, mean, scale = saved
        grad, gradients[5], gradients[6] = _layer_norm_backward(
            grad,
            shifted,
            shifted.shape[-1:],
            mean,
            scale,
            _as(norm_weight, dtype),
            _as(norm_bias, dtype),
            [any(needs_grad[:5]), needs_grad[5], needs_grad[6]],
        )
    else:
        direction, *numbers = saved
    if any(needs_grad[:5]):
        tensors = (grad, anchor, gate, value, direction, *numbers)
        options: Any = {
            "gate_bias": _as(gate_bias, dtype),
            "value_bias": _as(value_bias, dtype),
            "threshold": threshold,
            "anchor_needs_grad": needs_grad[0],
        }
        if anchor.shape[0] <= _rows_per_block(anchor):
            gradients[:3] = _pull_back(*tensors, **options)
        else:
            outputs = [anchor.new_empty(anchor.shape, dtype=dtype) for _ in range(3)]
            for *block, to_anchor, to_gate, to_value in _blocks(*tensors, *outputs):
                _pull_back(
                    *block, to_anchor=to_anchor, to_gate=to_gate, to_value=to_value, **options
                )
            gradients[:3] = outputs
        for of_rows, of_bias in ((1, 3), (2, 4)):
            matrix = gradients[of_rows]
            if needs_grad[of_bias] and matrix is not None:
                gradients[of_bias] = matrix.sum(0)
    originals = (anchor, gate, value, gate_bias, value_bias, norm_weight, norm_bias)
    return [
        _as(gradient, original.dtype) if needed and original is not None else None
        for gradient, original, needed in zip(gradients, originals, needs_grad, strict=True)
    ]


def _pull_back(
    grad: Tensor,
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    direction: Tensor,
    shortening: Tensor,
    free: Tensor,
    anchor_length: Tensor,
    *of_constant: Tensor,
    to_anchor: Tensor | None = None,
    to_gate: Tensor | None = None,
    to_value: Tensor | None = None,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    threshold: float,
    anchor_needs_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of anchor, gate and value, in the places given, from dL / dZ."""
    dtype, largest = grad.dtype, _LARGEST[grad.dtype]
    to_value = torch.mul(grad, direction, out=to_value)
    along = to_value.sum(dim=-1, keepdim=True)
    if of_constant:
        divisor, length = of_constant
        along.div_(divisor)
    along.masked_fill_(free, 0.0)
    if anchor_needs_grad:
        pulled = along / anchor_length
        if not of_constant:
            pulled.clamp_(-largest, largest)  # of an anchor of 0 or nearly
        anchor = _in(anchor, dtype)
        to_anchor = torch.addcmul(grad, anchor, pulled, value=threshold, out=to_anchor)
    if of_constant:
        along.div_(length)
    to_gate = torch.addcmul(grad, direction, along, value=-1.0, out=to_gate)
    gate = _in(gate, dtype) if gate_bias is None else torch.add(gate, gate_bias, out=to_value)
    _threshold_backward(to_gate.mul_(shortening), gate, 0, grad_input=to_gate)
    torch.mul(to_gate, gate, out=to_value)
    to_gate.mul_(_biased(value, value_bias, dtype))
    return to_anchor, to_gate, to_value


def _rows_per_block(matrix: Tensor) -> int:
    return max(1, _BLOCK * torch.get_num_threads() // matrix.shape[-1])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors, block by block."""
    rows = _rows_per_block(tensors[0])
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking is cheaper than a conversion that has nothing to do.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _in(tensor, dtype)


def _biased(rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _in(rows, dtype) if bias is None else torch.add(rows, bias)


def _length(rows: Tensor) -> Tensor:
    """Norms of rows (B, d), as (B, 1)."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return length


def _length_in_range(rows: Tensor) -> Tensor:
    """Norms of rows of any magnitude; NaN if an entry is infinite."""
    if rows.dtype is torch.float64:
        unit = rows.abs().amax(dim=-1, keepdim=True)
        unit.masked_fill_(torch.logical_not(unit), 1.0)
        return _length(rows / unit).mul_(unit)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    return torch.lerp(length, length, 0.0).to(rows.dtype)  # inf + 0 (inf - inf)
