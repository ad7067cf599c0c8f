"""The gate and the shift on a GPU: one Triton kernel forward, one or two backward.

A program holds a row of d <= 4096 features in registers, in a block of a power of two; everything
is float32 whatever comes in. Forward, it adds biases, opens the gate, measures anchor and
displacement in units of their largest entry (with the released constant: plainly, as the released
formula does), shifts, normalises and drops out, and keeps six numbers per row. Backward, with f and
h the directions of F and H, lambda = theta |F| / |H| where the shift is bounded, c = 1 (or
|H| / (|H| + eps), with that constant in lambda too) and D the gradient of Z, out of LayerNorm's
backward by the kept mean and scale,

    free:     dF = D                          dH = D
    bounded:  dF = D + theta c <D, h> f       dH = lambda (D - c <D, h> h)

then d gate = v dH where g > 0 and d value = g dH, all from the anchor and the products again. A
program adds up the gradients of biases, weight and bias of LayerNorm over every n-th row; a
third kernel adds the programs' sums. Both orders are fixed by the shapes: same input, same bits.

Dropout draws Philox numbers from a seed that lies on the device, so that a replayed CUDA graph
draws anew, and from the element's position, so that backward needs no mask.

The number of backward's programs follows from arithmetic and was not measured on a GPU.
"""

# ruff: noqa: SIM102
# An ``if`` that Triton decides while compiling stands alone.

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from telme_kd.kernels.triton.launch import Shipped, device_of

_BLOCKS = ((1024, 8), (2048, 8), (4096, 16))
"""Features that a program holds, and its warps: four or eight features per thread."""

_ANY_WIDTH = 2048
_ALIGNMENT = 16
"""Wider rows must be a multiple of this: 16 warps leave no registers for ragged ones."""

_PROGRAMS = 256

# Programs and features that a program adds up at a time, and its warps.
_SUM_TILE = (64, 64)
_SUM_WARPS = 4


# --- arithmetic that the kernels share ------------------------------------------------------------


@triton.jit
def _opened(gate, value, gate_bias, value_bias, columns, inside, row_gate, row_value):
    """ReLU(gate + bias) and value + bias of a row, and where the gate is open."""
    shut = tl.load(gate + row_gate + columns, mask=inside, other=0.0).to(tl.float32)
    said = tl.load(value + row_value + columns, mask=inside, other=0.0).to(tl.float32)
    shut += tl.load(gate_bias + columns, mask=inside, other=0.0).to(tl.float32)
    said += tl.load(value_bias + columns, mask=inside, other=0.0).to(tl.float32)
    # NaN is not at most 0: it goes through.
    return tl.where(shut <= 0.0, 0.0, shut), said


@triton.jit
def _measured(vector):
    """Norm of a row in units of its largest entry, and the unit. NaN and infinities: NaN."""
    unit = tl.max(tl.abs(vector), axis=0)
    scaled = vector / tl.where(unit == 0.0, 1.0, unit)
    return tl.sqrt_rn(tl.sum(scaled * scaled, axis=0)), unit


@triton.jit
def _plain_norm(vector):
    return tl.sqrt_rn(tl.sum(vector * vector, axis=0))


@triton.jit
def _direction(vector, norm, unit):
    """A row over its norm; zeros stay zeros."""
    scaled = vector / tl.where(unit == 0.0, 1.0, unit)
    return scaled / tl.where(norm == 0.0, 1.0, norm)


@triton.jit
def _is_free(anchor_norm, anchor_unit, norm, unit, threshold):
    """Whether a displacement is short enough, as ``reference.fusion.bounded_shift`` decides."""
    longest = threshold * anchor_norm
    common = tl.maximum(anchor_unit, unit)
    common = tl.where(common == 0.0, 1.0, common)
    free = norm * (unit / common) <= longest * (anchor_unit / common)
    return free & ((longest > 0.0) | (norm == 0.0))


@triton.jit
def _shifted(
    anchor,
    displacement,
    anchor_norm,
    anchor_unit,
    norm,
    unit,
    threshold,
    eps,
    RELEASED: tl.constexpr,
):
    if RELEASED:
        ratio = threshold * anchor_norm / (tl.where(norm == 0.0, 1.0, norm) + eps)
        shift = tl.where(ratio > 1.0, 1.0, ratio) * displacement
    else:
        free = _is_free(anchor_norm, anchor_unit, norm, unit, threshold)
        bounded = _direction(displacement, norm, unit) * (threshold * anchor_norm) * anchor_unit
        shift = tl.where(free, displacement, bounded)
    return anchor + shift


@triton.jit
def _keep(seed, row, width, columns, rate):
    """What dropout multiplies a row by."""
    drawn = tl.rand(tl.load(seed), row * width + columns)
    return tl.where(drawn < rate, 0.0, 1.0 / (1.0 - rate))


@triton.jit
def _add(sums, row, inside, added_to):
    """Add a row to sums in memory, where nothing is yet unless ``added_to``."""
    tl.store(sums, row + tl.load(sums, mask=added_to, other=0.0), mask=inside)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    anchor,
    gate,
    value,
    gate_bias,
    value_bias,
    norm_weight,
    norm_bias,
    seed,
    output,
    numbers,
    anchor_stride,
    gate_stride,
    value_stride,
    batch,
    width,
    threshold,
    eps,
    norm_eps,
    rate,
    RELEASED: tl.constexpr,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP_NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    leading = tl.load(anchor + row * anchor_stride + columns, mask=inside, other=0.0)
    leading = leading.to(tl.float32)
    opened, said = _opened(
        gate, value, gate_bias, value_bias, columns, inside, row * gate_stride, row * value_stride
    )
    displacement = opened * said
    if RELEASED:
        anchor_norm, norm = _plain_norm(leading), _plain_norm(displacement)
        anchor_unit, unit = 1.0, 1.0
    else:
        anchor_norm, anchor_unit = _measured(leading)
        norm, unit = _measured(displacement)
    fused = _shifted(
        leading, displacement, anchor_norm, anchor_unit, norm, unit, threshold, eps, RELEASED
    )
    if KEEP_NUMBERS:
        tl.store(numbers + row, anchor_norm)
        tl.store(numbers + batch + row, anchor_unit)
        tl.store(numbers + 2 * batch + row, norm)
        tl.store(numbers + 3 * batch + row, unit)
    if NORM:
        mean = tl.sum(tl.where(inside, fused, 0.0), axis=0) / width
        centred = tl.where(inside, fused - mean, 0.0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / width + norm_eps)
        weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
        fused = centred * scale * weight + bias
        if KEEP_NUMBERS:
            tl.store(numbers + 4 * batch + row, mean)
            tl.store(numbers + 5 * batch + row, scale)
    if DROPOUT:
        fused *= _keep(seed, row, width, columns, rate)
    tl.store(output + row * width + columns, fused, mask=inside)


@triton.jit
def _backward_kernel(
    grad_output,
    anchor,
    gate,
    value,
    gate_bias,
    value_bias,
    norm_weight,
    seed,
    numbers,
    to_anchor,
    to_gate,
    to_value,
    to_parameters,
    grad_stride,
    anchor_stride,
    gate_stride,
    value_stride,
    batch,
    units,
    threshold,
    eps,
    rate,
    RELEASED: tl.constexpr,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PARAMETERS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = units * UNIT
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    sums = to_parameters + program.to(tl.int64) * 4 * width + columns
    to_gate_bias = tl.zeros([BLOCK], tl.float32)
    to_value_bias = tl.zeros([BLOCK], tl.float32)
    to_norm_weight = tl.zeros([BLOCK], tl.float32)
    to_norm_bias = tl.zeros([BLOCK], tl.float32)
    row = program.to(tl.int64)
    while row < batch:
        leading = tl.load(anchor + row * anchor_stride + columns, mask=inside, other=0.0)
        leading = leading.to(tl.float32)
        opened, said = _opened(
            gate,
            value,
            gate_bias,
            value_bias,
            columns,
            inside,
            row * gate_stride,
            row * value_stride,
        )
        displacement = opened * said
        anchor_norm, anchor_unit = tl.load(numbers + row), tl.load(numbers + batch + row)
        norm, unit = tl.load(numbers + 2 * batch + row), tl.load(numbers + 3 * batch + row)
        grad = tl.load(grad_output + row * grad_stride + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        if DROPOUT:
            grad *= _keep(seed, row, width, columns, rate)
        if NORM:
            fused = _shifted(
                leading,
                displacement,
                anchor_norm,
                anchor_unit,
                norm,
                unit,
                threshold,
                eps,
                RELEASED,
            )
            mean, scale = tl.load(numbers + 4 * batch + row), tl.load(numbers + 5 * batch + row)
            normalised = tl.where(inside, (fused - mean) * scale, 0.0)
            if PARAMETERS == 1:
                to_norm_weight += grad * normalised
                to_norm_bias += grad
            if PARAMETERS == 2:
                added_to = inside & (row != program)
                _add(sums + 2 * width, grad * normalised, inside, added_to)
                _add(sums + 3 * width, grad, inside, added_to)
            weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
            grad *= weight
            along_row = tl.sum(grad * normalised, axis=0) / width
            grad = scale * (grad - tl.sum(grad, axis=0) / width - along_row * normalised)
            grad = tl.where(inside, grad, 0.0)

        if RELEASED:
            direction = displacement / tl.where(norm == 0.0, 1.0, norm)
            divisor = tl.where(norm == 0.0, 1.0, norm) + eps
            shortening = threshold * anchor_norm / divisor
            free = shortening > 1.0
            shrunk = norm / divisor
        else:
            direction = _direction(displacement, norm, unit)
            free = _is_free(anchor_norm, anchor_unit, norm, unit, threshold)
            shortening = threshold * anchor_norm / tl.where(norm == 0.0, 1.0, norm)
            shortening *= anchor_unit / tl.where(free, 1.0, unit)
            shrunk = 1.0
        along = tl.sum(grad * direction, axis=0) * shrunk
        if ANCHOR:
            if PARAMETERS == 2:  # read again, or it is spilled
                leading = tl.load(anchor + row * anchor_stride + columns, mask=inside, other=0.0)
                leading = leading.to(tl.float32)
            pulled = _direction(leading, anchor_norm, anchor_unit) * (threshold * along)
            tl.store(
                to_anchor + row * width + columns,
                grad + tl.where(free, 0.0, pulled),
                mask=inside,
            )
        grad = tl.where(free, grad, shortening * (grad - along * direction))
        if PARAMETERS == 2:  # read again, or they are spilled
            opened, said = _opened(
                gate,
                value,
                gate_bias,
                value_bias,
                columns,
                inside,
                row * gate_stride,
                row * value_stride,
            )
        for_gate = tl.where(opened == 0.0, 0.0, grad * said)
        for_value = grad * opened
        tl.store(to_gate + row * width + columns, for_gate, mask=inside)
        tl.store(to_value + row * width + columns, for_value, mask=inside)
        if PARAMETERS == 1:
            to_gate_bias += for_gate
            to_value_bias += for_value
        if PARAMETERS == 2:
            added_to = inside & (row != program)
            _add(sums, for_gate, inside, added_to)
            _add(sums + width, for_value, inside, added_to)
            tl.debug_barrier()
        row += programs
    if PARAMETERS == 1:
        tl.store(sums, to_gate_bias, mask=inside)
        tl.store(sums + width, to_value_bias, mask=inside)
        if NORM:
            tl.store(sums + 2 * width, to_norm_weight, mask=inside)
            tl.store(sums + 3 * width, to_norm_bias, mask=inside)


@triton.jit
def _sum_kernel(
    sums,
    to_gate_bias,
    to_value_bias,
    to_norm_weight,
    to_norm_bias,
    programs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the programs' sums, of one parameter and COLUMNS features, ROWS at a time."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    parameter = tl.program_id(1)
    inside = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    first = 0
    while first < programs:
        rows = first + tl.arange(0, ROWS)
        places = (rows[:, None] * 4 + parameter) * width + columns[None, :]
        present = (rows < programs)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums + places, mask=present, other=0.0), axis=0)
        first += ROWS
    if to_gate_bias is not None:
        if parameter == 0:
            tl.store(to_gate_bias + columns, total, mask=inside)
    if to_value_bias is not None:
        if parameter == 1:
            tl.store(to_value_bias + columns, total, mask=inside)
    if to_norm_weight is not None:
        if parameter == 2:
            tl.store(to_norm_weight + columns, total, mask=inside)
    if to_norm_bias is not None:
        if parameter == 3:
            tl.store(to_norm_bias + columns, total, mask=inside)


@triton.jit
def _kept_kernel(seed, output, width, rate, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    kept = _keep(seed, row, width, columns, rate)
    tl.store(output + row * width + columns, kept, mask=columns < width)


# --- passes ---------------------------------------------------------------------------------------


def reasons_against(width: int) -> list[str]:
    """Say why rows of a width cannot be served."""
    largest, any_width, alignment = _BLOCKS[-1][0], _ANY_WIDTH, _ALIGNMENT
    if width > largest:
        return [f"it holds rows of up to {largest} features, got {width}"]
    if width > any_width and width % alignment:
        return [
            f"beyond {any_width} features it takes multiples of {alignment}, got {width}",
        ]
    return []


def draw(anchor: Tensor) -> Tensor:
    """Return the seed of a dropout, on the device of its rows."""
    return torch.randint(2**62, (1,), device=anchor.device)


def kept(seed: Tensor, shape: Sequence[int], rate: float, dtype: torch.dtype) -> Tensor:
    """Return what dropout multiplies rows (B, d) by: 0, or the inverse of the share it keeps."""
    batch, width = shape
    output = torch.empty((batch, width), dtype=dtype, device=seed.device)
    block, warps = _block(width)
    if batch:
        with device_of(seed):
            _kept_kernel[(batch,)](seed, output, width, rate, BLOCK=block, num_warps=warps)
    return output


def empty_saved(
    anchor: Tensor, dtype: torch.dtype, *, eps: float | None, norm_eps: float | None
) -> list[Tensor]:
    """Return tensors like those that forward saves, their contents undefined.

    Per row, norm and unit of anchor and displacement, then mean and scale of LayerNorm.
    """
    return [anchor.new_empty((4 if norm_eps is None else 6, anchor.shape[0]), dtype=dtype)]


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
    batch, width = anchor.shape
    anchor, gate, value = _rows(anchor), _rows(gate), _rows(value)
    output = torch.empty((batch, width), dtype=output_dtype, device=anchor.device)
    saved = empty_saved(anchor, dtype, eps=eps, norm_eps=norm_eps) if needs_grad else []
    block, warps = _block(width)
    if batch:
        with device_of(anchor):
            _forward_kernel[(batch,)](
                anchor,
                gate,
                value,
                _or_zeros(gate_bias, anchor),
                _or_zeros(value_bias, anchor),
                _or_ones(norm_weight, anchor),
                _or_zeros(norm_bias, anchor),
                anchor if noise is None else noise,
                output,
                saved[0] if saved else output,
                anchor.stride(0),
                gate.stride(0),
                value.stride(0),
                batch,
                width,
                threshold,
                0.0 if eps is None else eps,
                0.0 if norm_eps is None else norm_eps,
                rate,
                RELEASED=int(eps is not None),
                NORM=int(norm_eps is not None),
                DROPOUT=int(noise is not None),
                KEEP_NUMBERS=int(needs_grad),
                BLOCK=block,
                num_warps=warps,
            )
    return output, saved


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
    batch, width = anchor.shape
    device = anchor.device
    grad_output = _rows(grad_output)
    anchor, gate, value = _rows(anchor), _rows(gate), _rows(value)
    programs = min(batch, _PROGRAMS)
    to_gate, to_value = (
        torch.empty((batch, width), dtype=rows.dtype, device=device) for rows in (gate, value)
    )
    to_anchor = torch.empty_like(to_gate, dtype=anchor.dtype) if needs_grad[0] else to_gate
    parameters = any(needs_grad[3:])
    sums = torch.empty((programs, 4, width) if parameters else 0, device=device)
    new_like = torch.empty_like if batch else torch.zeros_like
    to_parameters = [
        new_like(parameter) if needed and parameter is not None and used else None
        for parameter, needed, used in zip(
            (gate_bias, value_bias, norm_weight, norm_bias),
            needs_grad[3:],
            (True, True, norm_eps is not None, norm_eps is not None),
            strict=True,
        )
    ]
    block, warps = _block(width)
    if batch:
        with device_of(anchor):
            _backward_kernel[(programs,)](
                grad_output,
                anchor,
                gate,
                value,
                _or_zeros(gate_bias, anchor),
                _or_zeros(value_bias, anchor),
                _or_ones(norm_weight, anchor),
                anchor if noise is None else noise,
                saved[0],
                to_anchor,
                to_gate,
                to_value,
                sums,
                grad_output.stride(0),
                anchor.stride(0),
                gate.stride(0),
                value.stride(0),
                batch,
                width // _unit(block),
                threshold,
                0.0 if eps is None else eps,
                rate,
                RELEASED=int(eps is not None),
                NORM=int(norm_eps is not None),
                DROPOUT=int(noise is not None),
                ANCHOR=int(needs_grad[0]),
                PARAMETERS=_where_sums_are(block) if parameters else 0,
                UNIT=_unit(block),
                BLOCK=block,
                num_warps=warps,
                maxnreg=_max_registers(block, norm=norm_eps is not None, anchor=needs_grad[0]),
            )
            if parameters:
                _sum_kernel[(triton.cdiv(width, _SUM_TILE[1]), 4 if norm_eps is not None else 2)](
                    sums,
                    *to_parameters,
                    programs,
                    width,
                    ROWS=_SUM_TILE[0],
                    COLUMNS=_SUM_TILE[1],
                    num_warps=_SUM_WARPS,
                )
    return [
        gradient if needed else None
        for gradient, needed in zip(
            (to_anchor, to_gate, to_value, *to_parameters), needs_grad, strict=True
        )
    ]


def _block(width: int) -> tuple[int, int]:
    return next((block, warps) for block, warps in _BLOCKS if width <= block)


def _max_registers(block: int, *, norm: bool, anchor: bool) -> int | None:
    """What a thread of backward may have, if ptxas is to be told.

    Told nothing it saves registers for programs that are not there, and spills; told the limit of
    the widest rows, it spills where LayerNorm and the anchor's gradient come on top.
    """
    if block <= _ANY_WIDTH:
        return 255
    return None if norm and anchor else 128


def _where_sums_are(block: int) -> int:
    """1: in registers; 2: in memory, where the widest rows leave no registers for them."""
    return 1 if block <= _ANY_WIDTH else 2


def _unit(block: int) -> int:
    """What the width is counted in by a kernel that must know its divisor."""
    return 1 if block <= _ANY_WIDTH else _ALIGNMENT


def _rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous; they may be any stride apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _or_zeros(parameter: Tensor | None, anchor: Tensor) -> Tensor:
    return anchor.new_zeros(anchor.shape[1]) if parameter is None else parameter.contiguous()


def _or_ones(parameter: Tensor | None, anchor: Tensor) -> Tensor:
    return anchor.new_ones(anchor.shape[1]) if parameter is None else parameter.contiguous()


# --- what can be launched -------------------------------------------------------------------------


def shipped() -> list[Shipped]:
    """Return the specialisations that need the most registers, in every dtype.

    Dtypes are converted as they are loaded and stored; "mixed" is what autocast gives, float32 but
    for the products. A flag that is off leaves something out and adds nothing, and ptxas spills
    only what does not fit the limit it is told: with the narrower blocks all flags stay far below
    that, so they are listed on, without and with LayerNorm. The widest rows come close to it; all
    combinations are listed. Of the sums' four outputs any may be missing, likewise.
    """
    tile = {"ROWS": _SUM_TILE[0], "COLUMNS": _SUM_TILE[1]}
    found = [_shipped(_sum_kernel, rows, tile, _SUM_WARPS) for rows in _DTYPES]
    for block, warps in _BLOCKS:
        found.append(_shipped(_kept_kernel, "fp32", {"BLOCK": block}, warps))
        for released, norm, dropout, anchor, parameters in product((0, 1), repeat=5):
            full = dropout and anchor and parameters
            if not full and block <= _ANY_WIDTH:
                continue
            common: dict[str, object] = {
                "RELEASED": released,
                "NORM": norm,
                "DROPOUT": dropout,
                "BLOCK": block,
            }
            backward_constants = {
                **common,
                "ANCHOR": anchor,
                "PARAMETERS": _where_sums_are(block) if parameters else 0,
                "UNIT": _unit(block),
            }
            for rows in _DTYPES if full else _DTYPES[:1]:
                limit = _max_registers(block, norm=bool(norm), anchor=bool(anchor))
                found.append(_shipped(_backward_kernel, rows, backward_constants, warps, limit))
                if full and norm:
                    forward_constants = {**common, "KEEP_NUMBERS": 1}
                    found.append(_shipped(_forward_kernel, rows, forward_constants, warps))
    return found


_DTYPES = ("fp32", "bf16", "fp16", "mixed")
_PRODUCTS = ("gate", "value", "to_gate", "to_value")
_WORDS = {
    "batch": "i32",
    "width": "i32",
    "units": "i32",
    "programs": "i32",
    "seed": "*i64",
    "numbers": "*fp32",
    "sums": "*fp32",
    "to_parameters": "*fp32",
}
_SCALARS = ("threshold", "eps", "norm_eps", "rate")


def _shipped(
    kernel: Any,
    rows: str,
    constants: Mapping[str, object],
    warps: int,
    maxnreg: int | None = None,
) -> Shipped:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_stride"):
            signature[name] = "i32"
        elif name in _SCALARS:
            signature[name] = "fp32"
        elif rows == "mixed":
            signature[name] = _WORDS.get(name, "*bf16" if name in _PRODUCTS else "*fp32")
        else:
            signature[name] = _WORDS.get(name, f"*{rows}")
    return Shipped(kernel, signature, constants, warps, 3, maxnreg)
