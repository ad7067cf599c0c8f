"""DIST on a GPU: forward and backward passes as Triton kernels.

For a row i, p = softmax(z_i / tau) and q likewise of the teacher; the mean of either is exactly
1 / C. For a column c, u and v are p and q in units of the column's largest (``eps=None``) or p and
q themselves. With rho a correlation of the centred vectors, in either direction,

    d rho / du = both (v - mean v) + own (u - mean u) + shared

with ``both``, ``own`` and ``shared`` one number per row or column, so that

    dz = -tau (g - p sum_c g),
    g  = beta / n   p (both_i (q - 1/C) + own_i (p - 1/C))
       + gamma / C  u (both_c (v - mean v) + own_c (u - mean u) + shared_c).

The teacher's gradient swaps the roles. Everything is float32, exponents are to base 2.

======  ========================  ======================================  ======================
plan    serves                    launches, forward + backward            bytes, forward; backward
======  ========================  ======================================  ======================
small   one of ``_SMALL_TILES``   1 + 1; the gradient is made in forward  2 N s + 4 N; 4 N + N s
medium  C <= 2048                 3 + 1; rows are read once               2 N s; 3 N s
large   any C                     4 + 1; row statistics, then columns     4 N s; 3 N s or 5 N s
======  ========================  ======================================  ======================

N = B C elements of s bytes. The gradient pass of the last two reads its rows twice: first for
sum_c g, then for dz. The second read comes from the L2 cache (3 N s) if the rows in flight fit in
it; where they cannot, as with 128k classes, it costs memory traffic again (5 N s). A program works
on eight rows or more, not on one, because each row needs all seven coefficients of every column.
The medium plan adds 32 C bytes per program, the large one 32 C per split of the rows, both twice.

Sums merge in an order fixed by shapes and device: same input, same bits. There are no atomics.

Tile sizes and warps follow from arithmetic and from register counts of compiled kernels (none
spills on sm_80 and sm_90); the limits between the plans were not measured on a GPU.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from telme_kd.kernels.triton.launch import INTERPRETED, Shipped, device_of
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR

_FLOOR = tl.constexpr(RELATIVE_FLOOR**2)
_SLOPE = tl.constexpr(RELATIVE_FLOOR / CONSTANT_GRADIENT_LIKE)
_STAGES = tl.constexpr(3)
"""Tiles in flight: two are copied to shared memory while one is computed with."""

_ROW_NUMBERS = 7
"""Per row: largest logit and sum of exponentials, of student and teacher; centred sums of pp, qq,
pq."""

_COLUMN_NUMBERS = 10
"""Per column, as statistics: logarithm of the unit, mean, of student and teacher (0-3); centred
sums of uu, vv, uv (4-6); number of items (7). As coefficients: 0-3 stay; both (4); own and shared
of the student (5, 6) and of the teacher (7, 8); 1 / n in the first entry of 9."""

_MOMENTS = 8

# (items, classes) that a program holds in registers, with its warps: first fit, smallest first.
_SMALL_TILES = (
    (16, 8, 1),
    (64, 8, 2),
    (16, 32, 2),
    (256, 8, 8),
    (64, 32, 8),
    (16, 128, 8),
    (4, 512, 8),
)
_STREAM_TILES = ((256, 16, 8), (64, 64, 8), (16, 256, 8), (4, 1024, 8), (2, 2048, 8))
_GRADIENT_TILES = ((64, 16, 8), (16, 64, 8), (8, 128, 8))
_MEDIUM_CLASSES = _STREAM_TILES[-1][1]
_MAX_REGISTERS = 255
"""For the two kernels that keep column moments: left alone, ptxas spills a few bytes of some of
their variants to fit one more program on a processor."""

_ROW_BLOCK = 4096
_ROW_WARPS = 8
_MOMENT_TILE = (16, 128)
_MOMENT_WARPS = 4
_MERGE_TILE = (32, 32)
_MERGE_WARPS = 8
_SUM_BLOCK = 1024
_SCALE_BLOCK = 1024


# --- arithmetic that the kernels share ------------------------------------------------------------


@triton.jit
def _inverse_norm(squared, uncentred):
    """The function h of ``reference.dist._inverse_norm`` and its derivatives by both squares."""
    floor = uncentred * _FLOOR
    floor = tl.where(floor == 0.0, 1.0, floor)
    faint = squared < floor
    larger = tl.where(faint, floor, squared)
    root = tl.rsqrt(larger)
    rise = squared / floor * (1.0 - _SLOPE)
    inverse = tl.where(faint, (rise + _SLOPE) * root, root)
    by_squared = root / larger * tl.where(faint, 1.0 - _SLOPE, -0.5)
    by_floor = -root / floor * (1.5 * rise + 0.5 * _SLOPE)
    return inverse, by_squared, tl.where(faint, by_floor * _FLOOR, 0.0)


@triton.jit
def _correlation(uu, vv, uv, uncentred_u, uncentred_v, eps, RELEASED: tl.constexpr):
    """Rho, ``both``, and of each side ``own`` and the part of it that goes with u, not u - mean."""
    if RELEASED:
        norm_u, norm_v = tl.sqrt(uu), tl.sqrt(vv)
        divisor = norm_u * norm_v + eps
        both = 1.0 / divisor
        rho = uv / divisor
        # The gradient of a norm at zero is zero; rho is zero there.
        own_u = -rho * both * norm_v / tl.where(norm_u == 0.0, 1.0, norm_u)
        own_v = -rho * both * norm_u / tl.where(norm_v == 0.0, 1.0, norm_v)
        whole_u, whole_v = tl.zeros_like(uu), tl.zeros_like(vv)
    else:
        inverse_u, by_uu, by_whole_u = _inverse_norm(uu, uncentred_u)
        inverse_v, by_vv, by_whole_v = _inverse_norm(vv, uncentred_v)
        both = inverse_u * inverse_v
        rho = uv * both
        whole_u, whole_v = 2.0 * uv * inverse_v * by_whole_u, 2.0 * uv * inverse_u * by_whole_v
        own_u = 2.0 * uv * inverse_v * by_uu + whole_u
        own_v = 2.0 * uv * inverse_u * by_vv + whole_v
    return rho, both, own_u, whole_u, own_v, whole_v


@triton.jit
def _kept(mask, mask_stride, items, present):
    """Which items are there and not masked."""
    if mask is not None:
        present &= tl.load(mask + items.to(tl.int64) * mask_stride, mask=present, other=0) != 0
    return present


@triton.jit
def _load(logits, row_stride, column_stride, items, classes, kept, inside):
    """A tile of logits in float32: -inf outside the classes, 0 in rows that do not count."""
    offsets = items.to(tl.int64)[:, None] * row_stride
    offsets += classes.to(tl.int64)[None, :] * column_stride
    read = kept[:, None] & inside[None, :]
    values = tl.load(logits + offsets, mask=read, other=-float("inf")).to(tl.float32)
    return tl.where(kept[:, None], values, 0.0)


@triton.jit
def _finite(unit):
    """A column at -inf in every row has no largest probability; any unit makes it zero."""
    return tl.where(unit == -float("inf"), 0.0, unit)


@triton.jit
def _scales(first_is_smaller, shrink):
    return tl.where(first_is_smaller, shrink, 1.0), tl.where(first_is_smaller, 1.0, shrink)


@triton.jit
def _merge(
    unit_s, unit_t, mean_s, mean_t, ss, tt, st, count,
    other_unit_s, other_unit_t, other_mean_s, other_mean_t, other_ss, other_tt, other_st, others,
):  # fmt: skip
    """Merge centred column moments (Chan et al. 1979), each in units of its own largest."""
    top_s, top_t = tl.maximum(unit_s, other_unit_s), tl.maximum(unit_t, other_unit_t)
    # The larger unit stays, so one exponential does for both.
    shrink_s = tl.exp2(tl.minimum(unit_s, other_unit_s) - _finite(top_s))
    shrink_t = tl.exp2(tl.minimum(unit_t, other_unit_t) - _finite(top_t))
    to_s, from_s = _scales(unit_s < other_unit_s, shrink_s)
    to_t, from_t = _scales(unit_t < other_unit_t, shrink_t)
    total = count + others
    share = others / tl.maximum(total, 1.0)
    spread = count * share
    mean_s, mean_t = mean_s * to_s, mean_t * to_t
    apart_s, apart_t = other_mean_s * from_s - mean_s, other_mean_t * from_t - mean_t
    ss = ss * (to_s * to_s) + other_ss * (from_s * from_s) + apart_s * apart_s * spread
    tt = tt * (to_t * to_t) + other_tt * (from_t * from_t) + apart_t * apart_t * spread
    st = st * (to_s * to_t) + other_st * (from_s * from_t) + apart_s * apart_t * spread
    return top_s, top_t, mean_s + apart_s * share, mean_t + apart_t * share, ss, tt, st, total


@triton.jit
def _softmax(logits, exponent_scale):
    """Largest logit of each row, exponents to base 2, probabilities, and the sums in them."""
    largest = tl.max(logits, axis=1)
    # Differences first: they are exact where it matters, whatever the size of the logits.
    exponents = (logits - largest[:, None]) * exponent_scale
    exponentials = tl.exp2(exponents)
    total = tl.sum(exponentials, axis=1)
    return largest, exponents, exponentials / total[:, None], total


@triton.jit
def _in_units(logarithms, kept):
    """A tile's columns u, zero in rows that do not count, and the logarithms of their units."""
    logarithms = tl.where(kept[:, None], logarithms, -float("inf"))
    unit = tl.max(logarithms, axis=0)
    return tl.exp2(logarithms - _finite(unit)[None, :]), unit


@triton.jit
def _tile_moments(u, v, kept):
    """Means and centred sums of the columns of a tile."""
    items = tl.sum(kept.to(tl.float32), axis=0)
    mean_u = tl.sum(u, axis=0) / tl.maximum(items, 1.0)
    mean_v = tl.sum(v, axis=0) / tl.maximum(items, 1.0)
    a = tl.where(kept[:, None], u - mean_u[None, :], 0.0)
    b = tl.where(kept[:, None], v - mean_v[None, :], 0.0)
    return (
        mean_u, mean_v, tl.sum(a * a, axis=0), tl.sum(b * b, axis=0), tl.sum(a * b, axis=0), items,
    )  # fmt: skip


@triton.jit
def _parts(
    logits, largest, total, log_total, unit, exponent_scale,
    INTRA: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """Probabilities p of a tile, and u, in units of its columns."""
    exponents = (logits - largest[:, None]) * exponent_scale
    p = tl.exp2(exponents) / total[:, None]
    u = p
    if INTRA and not RELEASED:
        u = tl.exp2(exponents - log_total[:, None] - unit[None, :])
    return p, u


@triton.jit
def _slope(
    p, q, u, v, uniform, row_both, row_own, mean_u, mean_v, both, own, shared,
    INTER: tl.constexpr, INTRA: tl.constexpr,
):  # fmt: skip
    """The module's g, of the student; with the roles swapped, of the teacher."""
    g = tl.zeros_like(p)
    if INTER:
        g = p * (row_both[:, None] * (q - uniform) + row_own[:, None] * (p - uniform))
    if INTRA:
        along = own[None, :] * (u - mean_u[None, :]) + shared[None, :]
        g += u * (both[None, :] * (v - mean_v[None, :]) + along)
    return g


@triton.jit
def _store_moments(moments, stride, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, n):
    tl.store(moments + classes, unit_s, mask=inside)
    tl.store(moments + stride + classes, unit_t, mask=inside)
    tl.store(moments + 2 * stride + classes, mean_s, mask=inside)
    tl.store(moments + 3 * stride + classes, mean_t, mask=inside)
    tl.store(moments + 4 * stride + classes, ss, mask=inside)
    tl.store(moments + 5 * stride + classes, tt, mask=inside)
    tl.store(moments + 6 * stride + classes, st, mask=inside)
    tl.store(moments + 7 * stride + classes, n, mask=inside)


# --- small: one launch ----------------------------------------------------------------------------


# Wide loads save nothing here; one compiled kernel serves every number of items and classes.
@triton.jit(do_not_specialize=["B", "C", "student_row_stride", "teacher_row_stride"])
def _small(
    student, teacher, mask, loss, gradients, B, C,
    student_row_stride, student_column_stride, teacher_row_stride, teacher_column_stride,
    mask_stride, exponent_scale, temperature, inter, intra, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, ITEMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss and unit gradients by one program that holds both matrices, (ITEMS, CLASSES), float32.

    ``inter`` and ``intra`` are the weights times tau^2. The gradients, (1 or 2, B, C), are those of
    the module's formula for a grad_output of 1.
    """
    items, classes = tl.arange(0, ITEMS), tl.arange(0, CLASSES)
    inside = classes < C
    kept = _kept(mask, mask_stride, items, items < B)
    count = tl.maximum(tl.sum(kept.to(tl.float32), axis=0), 1.0)
    uniform = 1.0 / C
    z_s = _load(student, student_row_stride, student_column_stride, items, classes, kept, inside)
    z_t = _load(teacher, teacher_row_stride, teacher_column_stride, items, classes, kept, inside)
    _, log_p, p, total_s = _softmax(z_s, exponent_scale)
    _, log_q, q, total_t = _softmax(z_t, exponent_scale)

    value = 0.0
    row_both = tl.zeros((ITEMS,), tl.float32)
    row_own_s, row_own_t = row_both, row_both
    if INTER:
        a = tl.where(inside[None, :], p - uniform, 0.0)
        b = tl.where(inside[None, :], q - uniform, 0.0)
        pp, qq, pq = tl.sum(a * a, axis=1), tl.sum(b * b, axis=1), tl.sum(a * b, axis=1)
        rho, row_both, row_own_s, _, row_own_t, _ = _correlation(
            pp, qq, pq, pp + uniform, qq + uniform, eps, RELEASED
        )
        value += tl.sum(tl.where(kept, 1.0 - rho, 0.0), axis=0) * inter / count
        weight = inter / count
        row_both, row_own_s, row_own_t = row_both * weight, row_own_s * weight, row_own_t * weight
    mean_s = tl.zeros((CLASSES,), tl.float32)
    mean_t, both, own_s, own_t, shared_s, shared_t = mean_s, mean_s, mean_s, mean_s, mean_s, mean_s
    u, v = p, q
    if INTRA:
        if RELEASED:
            u, v = tl.where(kept[:, None], p, 0.0), tl.where(kept[:, None], q, 0.0)
        else:
            u, _ = _in_units(log_p - tl.log2(total_s)[:, None], kept)
            v, _ = _in_units(log_q - tl.log2(total_t)[:, None], kept)
        mean_s, mean_t, uu, vv, uv, n = _tile_moments(u, v, kept)
        rho, both, own_s, shared_s, own_t, shared_t = _correlation(
            uu, vv, uv, uu + n * mean_s * mean_s, vv + n * mean_t * mean_t, eps, RELEASED
        )
        distance = tl.sum(tl.where(inside, 1.0 - rho, 0.0), axis=0)
        value += tl.where(n > 0.0, distance, 0.0) * intra / C
        weight = intra / C
        both, own_s, own_t = both * weight, own_s * weight, own_t * weight
        shared_s, shared_t = shared_s * mean_s * weight, shared_t * mean_t * weight
    tl.store(loss, value)

    offsets = items[:, None] * C + classes[None, :]
    within = (items < B)[:, None] & inside[None, :]
    if STUDENT:
        g = _slope(
            p, q, u, v, uniform, row_both, row_own_s, mean_s, mean_t, both, own_s, shared_s,
            INTER, INTRA,
        )  # fmt: skip
        dz = (p * tl.sum(g, axis=1)[:, None] - g) / temperature
        tl.store(gradients + offsets, tl.where(kept[:, None], dz, 0.0), mask=within)
        gradients += B * C
    if TEACHER:
        g = _slope(
            q, p, v, u, uniform, row_both, row_own_t, mean_t, mean_s, both, own_t, shared_t,
            INTER, INTRA,
        )  # fmt: skip
        dz = (q * tl.sum(g, axis=1)[:, None] - g) / temperature
        tl.store(gradients + offsets, tl.where(kept[:, None], dz, 0.0), mask=within)


@triton.jit(do_not_specialize=["N"])
def _scale(grad_output, gradients, student_gradient, teacher_gradient, N, BLOCK: tl.constexpr):
    """Unit gradients times grad_output in float32, then rounded to the dtypes of the inputs."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    factor = tl.load(grad_output)
    if student_gradient is not None:
        scaled = tl.load(gradients + offsets, mask=inside) * factor
        tl.store(student_gradient + offsets, scaled, mask=inside)
        gradients += N
    if teacher_gradient is not None:
        scaled = tl.load(gradients + offsets, mask=inside) * factor
        tl.store(teacher_gradient + offsets, scaled, mask=inside)


# --- medium: rows and columns in one read ---------------------------------------------------------


@triton.jit(do_not_specialize=["B"])
def _stream(
    student, teacher, mask, rows, partials, B, C,
    student_row_stride, student_column_stride, teacher_row_stride, teacher_column_stride,
    mask_stride, exponent_scale,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Row statistics, and column moments of the rows that this program reads.

    Tiles (ITEMS, CLASSES) hold whole rows; seven float32 numbers per column stay in registers from
    one tile to the next. ``rows`` is (7, B), ``partials`` (programs, 8, C).
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    classes = tl.arange(0, CLASSES)
    inside = classes < C
    uniform = 1.0 / C
    unit_s = tl.full((CLASSES,), 0.0 if RELEASED else -float("inf"), tl.float32)
    unit_t = tl.full((CLASSES,), 0.0 if RELEASED else -float("inf"), tl.float32)
    mean_s, mean_t = tl.zeros((CLASSES,), tl.float32), tl.zeros((CLASSES,), tl.float32)
    ss, tt = tl.zeros((CLASSES,), tl.float32), tl.zeros((CLASSES,), tl.float32)
    st = tl.zeros((CLASSES,), tl.float32)
    count = 0.0
    stride = B.to(tl.int64)
    for block in tl.range(program, tl.cdiv(B, ITEMS), programs, num_stages=_STAGES):
        items = block * ITEMS + tl.arange(0, ITEMS)
        present = items < B
        kept = _kept(mask, mask_stride, items, present)
        z_s = _load(
            student, student_row_stride, student_column_stride, items, classes, kept, inside
        )
        z_t = _load(
            teacher, teacher_row_stride, teacher_column_stride, items, classes, kept, inside
        )
        largest_s, log_p, p, total_s = _softmax(z_s, exponent_scale)
        largest_t, log_q, q, total_t = _softmax(z_t, exponent_scale)
        at = rows + items
        tl.store(at, largest_s, mask=present)
        tl.store(at + stride, total_s, mask=present)
        tl.store(at + 2 * stride, largest_t, mask=present)
        tl.store(at + 3 * stride, total_t, mask=present)
        if INTER:
            a = tl.where(inside[None, :], p - uniform, 0.0)
            b = tl.where(inside[None, :], q - uniform, 0.0)
            tl.store(at + 4 * stride, tl.sum(a * a, axis=1), mask=present)
            tl.store(at + 5 * stride, tl.sum(b * b, axis=1), mask=present)
            tl.store(at + 6 * stride, tl.sum(a * b, axis=1), mask=present)
        if INTRA:
            if RELEASED:
                u, v = tl.where(kept[:, None], p, 0.0), tl.where(kept[:, None], q, 0.0)
                tile_unit_s, tile_unit_t = unit_s, unit_t
            else:
                u, tile_unit_s = _in_units(log_p - tl.log2(total_s)[:, None], kept)
                v, tile_unit_t = _in_units(log_q - tl.log2(total_t)[:, None], kept)
            tile_mean_s, tile_mean_t, tile_ss, tile_tt, tile_st, n = _tile_moments(u, v, kept)
            unit_s, unit_t, mean_s, mean_t, ss, tt, st, count = _merge(
                unit_s, unit_t, mean_s, mean_t, ss, tt, st, count,
                tile_unit_s, tile_unit_t, tile_mean_s, tile_mean_t, tile_ss, tile_tt, tile_st, n,
            )  # fmt: skip
    if INTRA:
        partials += program.to(tl.int64) * 8 * C
        _store_moments(
            partials, C, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, count
        )


# --- large: rows, then columns --------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows_stride"])
def _row_statistics(
    student, teacher, mask, rows, C, rows_stride,
    student_row_stride, student_column_stride, teacher_row_stride, teacher_column_stride,
    mask_stride, exponent_scale, INTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, one read of it, in blocks: online largest, sum and centred sums.

    The centred sums are of the exponentials around their mean over the classes seen, merged block
    by block like column moments; in the end that mean over the sum is 1 / C.
    """
    item = tl.program_id(0)
    kept = _kept(mask, mask_stride, item, item >= 0)
    student += item.to(tl.int64) * student_row_stride
    teacher += item.to(tl.int64) * teacher_row_stride
    largest_s, largest_t = -float("inf"), -float("inf")
    total_s, total_t = 0.0, 0.0
    ss, tt, st = 0.0, 0.0, 0.0
    seen = 0.0
    for start in tl.range(0, C, BLOCK, num_stages=_STAGES):
        classes = start + tl.arange(0, BLOCK)
        inside = classes < C
        read = inside & kept
        z_s = tl.load(
            student + classes.to(tl.int64) * student_column_stride, mask=read, other=-float("inf")
        ).to(tl.float32)
        z_t = tl.load(
            teacher + classes.to(tl.int64) * teacher_column_stride, mask=read, other=-float("inf")
        ).to(tl.float32)
        z_s, z_t = tl.where(kept, z_s, 0.0), tl.where(kept, z_t, 0.0)
        top_s = tl.maximum(largest_s, tl.max(z_s, axis=0))
        top_t = tl.maximum(largest_t, tl.max(z_t, axis=0))
        # Until a class is finite, sums stay zero.
        from_s, from_t = _finite(top_s), _finite(top_t)
        e_s = tl.exp2((z_s - from_s) * exponent_scale)
        e_t = tl.exp2((z_t - from_t) * exponent_scale)
        shrink_s = tl.exp2((largest_s - from_s) * exponent_scale)
        shrink_t = tl.exp2((largest_t - from_t) * exponent_scale)
        block_s, block_t = tl.sum(e_s, axis=0), tl.sum(e_t, axis=0)
        total_s, total_t = total_s * shrink_s, total_t * shrink_t
        if INTER:
            new = tl.minimum(C - start, BLOCK).to(tl.float32)
            mean_s, mean_t = block_s / new, block_t / new
            a, b = tl.where(inside, e_s - mean_s, 0.0), tl.where(inside, e_t - mean_t, 0.0)
            spread = seen * new / (seen + new)
            apart_s = mean_s - total_s / tl.maximum(seen, 1.0)
            apart_t = mean_t - total_t / tl.maximum(seen, 1.0)
            ss = ss * (shrink_s * shrink_s) + tl.sum(a * a, axis=0) + apart_s * apart_s * spread
            tt = tt * (shrink_t * shrink_t) + tl.sum(b * b, axis=0) + apart_t * apart_t * spread
            st = st * (shrink_s * shrink_t) + tl.sum(a * b, axis=0) + apart_s * apart_t * spread
            seen += new
        total_s, total_t = total_s + block_s, total_t + block_t
        largest_s, largest_t = top_s, top_t
    rows += item
    stride = rows_stride.to(tl.int64)
    tl.store(rows, largest_s)
    tl.store(rows + stride, total_s)
    tl.store(rows + 2 * stride, largest_t)
    tl.store(rows + 3 * stride, total_t)
    if INTER:
        tl.store(rows + 4 * stride, ss / (total_s * total_s))
        tl.store(rows + 5 * stride, tt / (total_t * total_t))
        tl.store(rows + 6 * stride, st / (total_s * total_t))


@triton.jit(do_not_specialize=["B", "rows_stride"])
def _column_moments(
    student, teacher, mask, rows, partials, B, C, rows_stride,
    student_row_stride, student_column_stride, teacher_row_stride, teacher_column_stride,
    mask_stride, exponent_scale,
    RELEASED: tl.constexpr, ITEMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Moments of CLASSES columns over every n-th tile of ITEMS rows; the grid is (C, splits).

    Neighbouring programs read neighbouring classes of the same rows. ``partials``: (splits, 8, C).
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    inside = classes < C
    unit_s = tl.full((CLASSES,), 0.0 if RELEASED else -float("inf"), tl.float32)
    unit_t = tl.full((CLASSES,), 0.0 if RELEASED else -float("inf"), tl.float32)
    mean_s, mean_t = tl.zeros((CLASSES,), tl.float32), tl.zeros((CLASSES,), tl.float32)
    ss, tt = tl.zeros((CLASSES,), tl.float32), tl.zeros((CLASSES,), tl.float32)
    st = tl.zeros((CLASSES,), tl.float32)
    count = 0.0
    stride = rows_stride.to(tl.int64)
    for block in tl.range(split, tl.cdiv(B, ITEMS), splits, num_stages=_STAGES):
        items = block * ITEMS + tl.arange(0, ITEMS)
        kept = _kept(mask, mask_stride, items, items < B)
        z_s = _load(
            student, student_row_stride, student_column_stride, items, classes, kept, inside
        )
        z_t = _load(
            teacher, teacher_row_stride, teacher_column_stride, items, classes, kept, inside
        )
        largest_s = tl.load(rows + items, mask=kept, other=0.0)
        total_s = tl.load(rows + stride + items, mask=kept, other=1.0)
        largest_t = tl.load(rows + 2 * stride + items, mask=kept, other=0.0)
        total_t = tl.load(rows + 3 * stride + items, mask=kept, other=1.0)
        log_p = (z_s - largest_s[:, None]) * exponent_scale
        log_q = (z_t - largest_t[:, None]) * exponent_scale
        if RELEASED:
            u = tl.where(kept[:, None], tl.exp2(log_p) / total_s[:, None], 0.0)
            v = tl.where(kept[:, None], tl.exp2(log_q) / total_t[:, None], 0.0)
            tile_unit_s, tile_unit_t = unit_s, unit_t
        else:
            u, tile_unit_s = _in_units(log_p - tl.log2(total_s)[:, None], kept)
            v, tile_unit_t = _in_units(log_q - tl.log2(total_t)[:, None], kept)
        tile_mean_s, tile_mean_t, tile_ss, tile_tt, tile_st, n = _tile_moments(u, v, kept)
        unit_s, unit_t, mean_s, mean_t, ss, tt, st, count = _merge(
            unit_s, unit_t, mean_s, mean_t, ss, tt, st, count,
            tile_unit_s, tile_unit_t, tile_mean_s, tile_mean_t, tile_ss, tile_tt, tile_st, n,
        )  # fmt: skip
    partials += split.to(tl.int64) * 8 * C
    _store_moments(partials, C, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, count)


# --- both: merging, loss, gradient ----------------------------------------------------------------


@triton.jit
def _collect(
    partials, P, C, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, count,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Merge P partial moments, (P, 8, C), into those given: PARTS at a time, in their order."""
    for start in tl.range(0, P, PARTS):
        parts = start + tl.arange(0, PARTS)
        here = (parts < P)[:, None] & inside[None, :]
        at = partials + parts.to(tl.int64)[:, None] * 8 * C + classes[None, :]
        n = tl.load(at + 7 * C, mask=here, other=0.0)
        # What saw no item has no unit either.
        own_s = tl.where(n > 0.0, tl.load(at, mask=here, other=0.0), -float("inf"))
        own_t = tl.where(n > 0.0, tl.load(at + C, mask=here, other=0.0), -float("inf"))
        top_s, top_t = tl.max(own_s, axis=0), tl.max(own_t, axis=0)
        to_s = tl.exp2(own_s - _finite(top_s)[None, :])
        to_t = tl.exp2(own_t - _finite(top_t)[None, :])
        others = tl.sum(n, axis=0)
        means_s = tl.load(at + 2 * C, mask=here, other=0.0) * to_s
        means_t = tl.load(at + 3 * C, mask=here, other=0.0) * to_t
        other_s = tl.sum(n * means_s, axis=0) / tl.maximum(others, 1.0)
        other_t = tl.sum(n * means_t, axis=0) / tl.maximum(others, 1.0)
        a, b = means_s - other_s[None, :], means_t - other_t[None, :]
        other_ss = tl.load(at + 4 * C, mask=here, other=0.0) * to_s * to_s + n * a * a
        other_tt = tl.load(at + 5 * C, mask=here, other=0.0) * to_t * to_t + n * b * b
        other_st = tl.load(at + 6 * C, mask=here, other=0.0) * to_s * to_t + n * a * b
        unit_s, unit_t, mean_s, mean_t, ss, tt, st, count = _merge(
            unit_s, unit_t, mean_s, mean_t, ss, tt, st, count,
            top_s, top_t, other_s, other_t,
            tl.sum(other_ss, axis=0), tl.sum(other_tt, axis=0), tl.sum(other_st, axis=0), others,
        )  # fmt: skip
    return unit_s, unit_t, mean_s, mean_t, ss, tt, st, count


@triton.jit(do_not_specialize=["P"])
def _observe(partials, columns, P, C, PARTS: tl.constexpr, CLASSES: tl.constexpr):
    """Merge partial moments into the statistics of a batch that comes in chunks."""
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    inside = classes < C
    count = tl.load(columns + 7 * C + classes, mask=inside, other=0.0)
    unit_s = tl.where(count > 0.0, tl.load(columns + classes, mask=inside), -float("inf"))
    unit_t = tl.where(count > 0.0, tl.load(columns + C + classes, mask=inside), -float("inf"))
    mean_s = tl.load(columns + 2 * C + classes, mask=inside, other=0.0)
    mean_t = tl.load(columns + 3 * C + classes, mask=inside, other=0.0)
    ss = tl.load(columns + 4 * C + classes, mask=inside, other=0.0)
    tt = tl.load(columns + 5 * C + classes, mask=inside, other=0.0)
    st = tl.load(columns + 6 * C + classes, mask=inside, other=0.0)
    unit_s, unit_t, mean_s, mean_t, ss, tt, st, count = _collect(
        partials, P, C, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, count, PARTS
    )
    tl.debug_barrier()  # every warp has read what one of them overwrites
    _store_moments(columns, C, classes, inside, unit_s, unit_t, mean_s, mean_t, ss, tt, st, count)


@triton.jit
def _conclude_columns(
    columns, partials, P, C, classes, slope, eps, RELEASED: tl.constexpr,
    PARTS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Turn merged moments into coefficients; return the sum of 1 - rho."""
    inside = classes < C
    zeros = tl.zeros((CLASSES,), tl.float32)
    none = tl.full((CLASSES,), -float("inf"), tl.float32)
    unit_s, unit_t, mean_s, mean_t, ss, tt, st, count = _collect(
        partials, P, C, classes, inside,
        none, none, zeros, zeros, zeros, zeros, zeros, zeros, PARTS,
    )  # fmt: skip
    whole_s, whole_t = ss + count * mean_s * mean_s, tt + count * mean_t * mean_t
    rho, both, own_s, shared_s, own_t, shared_t = _correlation(
        ss, tt, st, whole_s, whole_t, eps, RELEASED
    )
    tl.debug_barrier()  # every warp has read what one of them overwrites
    tl.store(columns + classes, _finite(unit_s), mask=inside)
    tl.store(columns + C + classes, _finite(unit_t), mask=inside)
    tl.store(columns + 2 * C + classes, mean_s, mask=inside)
    tl.store(columns + 3 * C + classes, mean_t, mask=inside)
    tl.store(columns + 4 * C + classes, both * slope, mask=inside)
    tl.store(columns + 5 * C + classes, own_s * slope, mask=inside)
    tl.store(columns + 6 * C + classes, shared_s * mean_s * slope, mask=inside)
    tl.store(columns + 7 * C + classes, own_t * slope, mask=inside)
    tl.store(columns + 8 * C + classes, shared_t * mean_t * slope, mask=inside)
    return tl.sum(tl.where(inside, 1.0 - rho, 0.0), axis=0)


@triton.jit
def _row_distance(rows, rows_stride, items, kept, C, eps, RELEASED: tl.constexpr):
    """Sum of 1 - rho of the rows that count."""
    at = rows + 4 * rows_stride.to(tl.int64) + items
    uniform = 1.0 / C
    pp = tl.load(at, mask=kept, other=0.0)
    qq = tl.load(at + rows_stride, mask=kept, other=0.0)
    pq = tl.load(at + 2 * rows_stride.to(tl.int64), mask=kept, other=0.0)
    rho, _, _, _, _, _ = _correlation(pp, qq, pq, pp + uniform, qq + uniform, eps, RELEASED)
    return tl.sum(tl.where(kept, 1.0 - rho, 0.0), axis=0)


@triton.jit(do_not_specialize=["P", "B", "rows_stride", "column_programs"])
def _conclude(
    rows, columns, partials, mask, sums, P, B, C, rows_stride, mask_stride, column_programs,
    slope, eps, INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    PARTS: tl.constexpr, CLASSES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Column moments become coefficients, times ``slope``; 1 - rho is summed per program.

    The first programs have CLASSES columns each, the others ITEMS rows. ``sums``: of each column
    program, then of each row program, then the number of items of each row program. ``partials``
    may be ``columns`` itself: each program reads its own columns before it writes them.
    """
    program = tl.program_id(0)
    if program < column_programs:
        if INTRA:
            classes = program * CLASSES + tl.arange(0, CLASSES)
            distance = _conclude_columns(
                columns, partials, P, C, classes, slope, eps, RELEASED, PARTS, CLASSES
            )
            tl.store(sums + program, distance)
    else:
        items = (program - column_programs) * ITEMS + tl.arange(0, ITEMS)
        kept = _kept(mask, mask_stride, items, items < B)
        if INTER:
            distance = _row_distance(rows, rows_stride, items, kept, C, eps, RELEASED)
            tl.store(sums + program, distance)
        row_programs = tl.num_programs(0) - column_programs
        tl.store(sums + program + row_programs, tl.sum(kept.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["column_programs", "row_programs"])
def _loss(
    sums, columns, loss, C, column_programs, row_programs, inter, intra,
    INTER: tl.constexpr, INTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up what the others have summed; it leaves 1 / n for the gradient."""
    row_sum = tl.zeros((BLOCK,), tl.float32)
    column_sum = tl.zeros((BLOCK,), tl.float32)
    items = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, row_programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        within = at < row_programs
        if INTER:
            row_sum += tl.load(sums + column_programs + at, mask=within, other=0.0)
        items += tl.load(sums + column_programs + row_programs + at, mask=within, other=0.0)
    for start in tl.range(0, column_programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if INTRA:
            column_sum += tl.load(sums + at, mask=at < column_programs, other=0.0)
    count = tl.sum(items, axis=0)
    divisor = tl.maximum(count, 1.0)
    value = tl.sum(row_sum, axis=0) * inter / divisor
    value += tl.where(count > 0.0, tl.sum(column_sum, axis=0), 0.0) * intra / C
    tl.store(loss, value)
    tl.store(columns + 9 * C, 1.0 / divisor)


@triton.jit
def _tile_slopes(
    student, teacher, student_row_stride, student_column_stride, teacher_row_stride,
    teacher_column_stride, items, start, kept, C, columns, exponent_scale, uniform,
    largest_s, largest_t, total_s, total_t, row_both, row_own_s, row_own_t,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Probabilities p, q and g of student and teacher over a tile of classes from ``start`` on."""
    classes = start + tl.arange(0, CLASSES)
    inside = classes < C
    unit_s = tl.zeros((CLASSES,), tl.float32)
    unit_t, mean_s, mean_t, both = unit_s, unit_s, unit_s, unit_s
    own_s, own_t, shared_s, shared_t = unit_s, unit_s, unit_s, unit_s
    if INTRA:
        unit_s = tl.load(columns + classes, mask=inside, other=0.0)
        unit_t = tl.load(columns + C + classes, mask=inside, other=0.0)
        mean_s = tl.load(columns + 2 * C + classes, mask=inside, other=0.0)
        mean_t = tl.load(columns + 3 * C + classes, mask=inside, other=0.0)
        both = tl.load(columns + 4 * C + classes, mask=inside, other=0.0)
        own_s = tl.load(columns + 5 * C + classes, mask=inside, other=0.0)
        shared_s = tl.load(columns + 6 * C + classes, mask=inside, other=0.0)
        own_t = tl.load(columns + 7 * C + classes, mask=inside, other=0.0)
        shared_t = tl.load(columns + 8 * C + classes, mask=inside, other=0.0)
    z_s = _load(student, student_row_stride, student_column_stride, items, classes, kept, inside)
    z_t = _load(teacher, teacher_row_stride, teacher_column_stride, items, classes, kept, inside)
    log_s, log_t = tl.log2(total_s), tl.log2(total_t)
    p, u = _parts(z_s, largest_s, total_s, log_s, unit_s, exponent_scale, INTRA, RELEASED)
    q, v = _parts(z_t, largest_t, total_t, log_t, unit_t, exponent_scale, INTRA, RELEASED)
    g_s = _slope(
        p, q, u, v, uniform, row_both, row_own_s, mean_s, mean_t, both, own_s, shared_s,
        INTER, INTRA,
    )  # fmt: skip
    g_t = _slope(
        q, p, v, u, uniform, row_both, row_own_t, mean_t, mean_s, both, own_t, shared_t,
        INTER, INTRA,
    )  # fmt: skip
    return p, q, g_s, g_t


@triton.jit(do_not_specialize=["B", "rows_stride"])
def _gradient(
    grad_output, student, teacher, mask, rows, columns, student_gradient, teacher_gradient, B, C,
    rows_stride, student_row_stride, student_column_stride, teacher_row_stride,
    teacher_column_stride, mask_stride, exponent_scale, inter, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The module's dz for ITEMS rows at a time, in tiles of (ITEMS, CLASSES), float32.

    The sign, tau and the weights are in the coefficients: ``inter`` is -tau beta.
    """
    factor = tl.load(grad_output)
    uniform = 1.0 / C
    stride = rows_stride.to(tl.int64)
    for block in tl.range(tl.program_id(0), tl.cdiv(B, ITEMS), tl.num_programs(0)):
        items = block * ITEMS + tl.arange(0, ITEMS)
        present = items < B
        kept = _kept(mask, mask_stride, items, present)
        at = rows + items
        # Rows that do not count: an infinite largest logit makes p and u zero.
        largest_s = tl.load(at, mask=kept, other=float("inf"))
        total_s = tl.load(at + stride, mask=kept, other=1.0)
        largest_t = tl.load(at + 2 * stride, mask=kept, other=float("inf"))
        total_t = tl.load(at + 3 * stride, mask=kept, other=1.0)
        both = tl.zeros((ITEMS,), tl.float32)
        own_s, own_t = both, both
        if INTER:
            weight = inter * tl.load(columns + 9 * C)
            pp = tl.load(at + 4 * stride, mask=kept, other=0.0)
            qq = tl.load(at + 5 * stride, mask=kept, other=0.0)
            pq = tl.load(at + 6 * stride, mask=kept, other=0.0)
            _, both, own_s, _unused_s, own_t, _unused_t = _correlation(
                pp, qq, pq, pp + uniform, qq + uniform, eps, RELEASED
            )
            both, own_s, own_t = both * weight, own_s * weight, own_t * weight
        sums_s = tl.zeros((ITEMS, CLASSES), tl.float32)
        sums_t = tl.zeros((ITEMS, CLASSES), tl.float32)
        for start in tl.range(0, C, CLASSES, num_stages=_STAGES):
            _p, _q, g_s, g_t = _tile_slopes(
                student, teacher, student_row_stride, student_column_stride, teacher_row_stride,
                teacher_column_stride, items, start, kept, C, columns, exponent_scale, uniform,
                largest_s, largest_t, total_s, total_t, both, own_s, own_t,
                INTER, INTRA, RELEASED, CLASSES,
            )  # fmt: skip
            sums_s += g_s
            sums_t += g_t
        sum_s, sum_t = tl.sum(sums_s, axis=1)[:, None], tl.sum(sums_t, axis=1)[:, None]
        for start in tl.range(0, C, CLASSES, num_stages=_STAGES):
            p, q, g_s, g_t = _tile_slopes(
                student, teacher, student_row_stride, student_column_stride, teacher_row_stride,
                teacher_column_stride, items, start, kept, C, columns, exponent_scale, uniform,
                largest_s, largest_t, total_s, total_t, both, own_s, own_t,
                INTER, INTRA, RELEASED, CLASSES,
            )  # fmt: skip
            classes = start + tl.arange(0, CLASSES)
            offsets = items.to(tl.int64)[:, None] * C + classes[None, :]
            within = present[:, None] & (classes < C)[None, :]
            if student_gradient is not None:
                dz = tl.where(kept[:, None], (g_s - p * sum_s) * factor, 0.0)
                tl.store(student_gradient + offsets, dz, mask=within)
            if teacher_gradient is not None:
                dz = tl.where(kept[:, None], (g_t - q * sum_t) * factor, 0.0)
                tl.store(teacher_gradient + offsets, dz, mask=within)


# --- launching ------------------------------------------------------------------------------------


def saved_shapes(
    batch: int, classes: int, *, student_needs_grad: bool, teacher_needs_grad: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that ``forward`` saves for ``backward``."""
    gradients = student_needs_grad + teacher_needs_grad
    if not gradients:
        return (0,), (0,)
    if _small_tile(batch, classes) is not None:
        return (gradients, batch, classes), (0,)
    return (_ROW_NUMBERS, batch), (_COLUMN_NUMBERS, classes)


def forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and what ``backward`` needs beside the logits."""
    tile = _small_tile(*student.shape)
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    with device_of(student):
        if tile is not None:
            return _forward_small(
                student, teacher, mask, weights, tile, student_needs_grad, teacher_needs_grad
            )
        if student.shape[1] <= _MEDIUM_CLASSES:
            loss, rows, columns = _forward_medium(student, teacher, mask, weights)
        else:
            loss, rows, columns = _forward_large(student, teacher, mask, weights)
    if not (student_needs_grad or teacher_needs_grad):
        return loss, rows.new_empty(0), columns.new_empty(0)
    return loss, rows, columns


def backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in the dtypes of their inputs; grad_output is read on the device."""
    if rows.ndim == 3:
        with device_of(student):
            return _backward_small(
                grad_output, student, teacher, rows, student_needs_grad, teacher_needs_grad
            )
    return gradient(
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


def new_statistics(
    batch: int, classes: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Statistics of a batch of which nothing was observed yet."""
    rows = torch.empty(_ROW_NUMBERS, batch, dtype=dtype, device=device)
    return rows, torch.zeros(_COLUMN_NUMBERS, classes, dtype=dtype, device=device)


def observe(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
) -> None:
    """Add a chunk of rows to the statistics; ``rows`` is the chunk's part of the batch's."""
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    with device_of(student):
        partials = _observe_large(student, teacher, mask, rows, weights)
        if partials is not None:
            classes = student.shape[1]
            parts, width = _MERGE_TILE
            _observe[(triton.cdiv(classes, width),)](
                partials,
                columns,
                len(partials),
                classes,
                PARTS=parts,
                CLASSES=width,
                num_warps=_MERGE_WARPS,
            )


def conclude(
    rows: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
) -> Tensor:
    """Loss of all that was observed; its statistics become coefficients of the gradient."""
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    with device_of(rows):
        return _conclude_from(columns[None], rows, columns, mask, weights)


def gradient(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a chunk of rows, or of all, after ``conclude``."""
    batch, classes = student.shape
    student_gradient = _like(student) if student_needs_grad else None
    teacher_gradient = _like(teacher) if teacher_needs_grad else None
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    items, width, warps = _gradient_tile(classes)
    programs = _gradient_programs(student, teacher, items)
    with device_of(student):
        _gradient[(programs,)](
            grad_output,
            student,
            teacher,
            mask,
            rows,
            columns,
            student_gradient,
            teacher_gradient,
            batch,
            classes,
            rows.stride(0),
            *student.stride(),
            *teacher.stride(),
            0 if mask is None else mask.stride(0),
            weights.exponent_scale,
            -temperature * inter_weight,
            weights.eps,
            INTER=weights.inter_on,
            INTRA=weights.intra_on,
            RELEASED=weights.released,
            ITEMS=items,
            CLASSES=width,
            num_warps=warps,
        )
    return student_gradient, teacher_gradient


class _Weights:
    """The options of a call as the kernels take them."""

    def __init__(
        self, temperature: float, inter_weight: float, intra_weight: float, eps: float | None
    ) -> None:
        self.temperature = temperature
        self.exponent_scale = math.log2(math.e) / temperature
        self.inter = inter_weight * temperature**2
        self.intra = intra_weight * temperature**2
        self.inter_on = int(inter_weight != 0)
        self.intra_on = int(intra_weight != 0)
        self.released = int(eps is not None)
        self.eps = 0.0 if eps is None else eps


def _small_tile(batch: int, classes: int) -> tuple[int, int, int] | None:
    """The smallest tile that holds the whole batch."""
    for tile in _SMALL_TILES:
        if batch <= tile[0] and classes <= tile[1]:
            return tile
    return None


def _stream_tile(classes: int) -> tuple[int, int, int]:
    return next(tile for tile in _STREAM_TILES if classes <= tile[1])


def _gradient_tile(classes: int) -> tuple[int, int, int]:
    return next((tile for tile in _GRADIENT_TILES if classes <= tile[1]), _GRADIENT_TILES[-1])


@lru_cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Number of processors, and bytes of L2 cache."""
    if INTERPRETED:
        return 2, 0
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _gradient_programs(student: Tensor, teacher: Tensor, items: int) -> int:
    """As many programs as there are tiles of rows, or only those whose rows fit the L2 cache.

    With fewer than half of the processors busy, a second read from memory is the smaller loss.
    """
    batch, classes = student.shape
    blocks: int = triton.cdiv(batch, items)
    processors, cache = _machine(student.device)
    bytes_per_program = items * classes * (student.element_size() + teacher.element_size())
    fitting = cache * 3 // 4 // bytes_per_program
    if processors // 2 <= fitting < 2 * processors:
        return min(blocks, fitting)
    return blocks


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _forward_small(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weights: _Weights,
    tile: tuple[int, int, int],
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = student.shape
    shape, _ = saved_shapes(
        batch, classes, student_needs_grad=student_needs_grad, teacher_needs_grad=teacher_needs_grad
    )
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    gradients = torch.empty(shape, dtype=torch.float32, device=student.device)
    items, width, warps = tile
    _small[(1,)](
        student,
        teacher,
        mask,
        loss,
        gradients,
        batch,
        classes,
        *student.stride(),
        *teacher.stride(),
        0 if mask is None else mask.stride(0),
        weights.exponent_scale,
        weights.temperature,
        weights.inter,
        weights.intra,
        weights.eps,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        RELEASED=weights.released,
        STUDENT=int(student_needs_grad),
        TEACHER=int(teacher_needs_grad),
        ITEMS=items,
        CLASSES=width,
        num_warps=warps,
    )
    return loss, gradients, torch.empty(0, dtype=torch.float32, device=student.device)


def _backward_small(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    gradients: Tensor,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    student_gradient = _like(student) if student_needs_grad else None
    teacher_gradient = _like(teacher) if teacher_needs_grad else None
    elements = student.numel()
    _scale[(triton.cdiv(elements, _SCALE_BLOCK),)](
        grad_output,
        gradients,
        student_gradient,
        teacher_gradient,
        elements,
        BLOCK=_SCALE_BLOCK,
        num_warps=4,
    )
    return student_gradient, teacher_gradient


def _forward_medium(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weights: _Weights
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = student.shape
    items, width, warps = _stream_tile(classes)
    processors, _ = _machine(student.device)
    programs = min(triton.cdiv(batch, items), processors)
    kind: Any = {"dtype": torch.float32, "device": student.device}
    rows = torch.empty(_ROW_NUMBERS, batch, **kind)
    partials = torch.empty(programs if weights.intra_on else 0, _MOMENTS, classes, **kind)
    _stream[(programs,)](
        student,
        teacher,
        mask,
        rows,
        partials,
        batch,
        classes,
        *student.stride(),
        *teacher.stride(),
        0 if mask is None else mask.stride(0),
        weights.exponent_scale,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        RELEASED=weights.released,
        ITEMS=items,
        CLASSES=width,
        num_warps=warps,
        maxnreg=_MAX_REGISTERS,
    )
    columns = torch.empty(_COLUMN_NUMBERS, classes, **kind)
    return _conclude_from(partials, rows, columns, mask, weights), rows, columns


def _forward_large(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weights: _Weights
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = student.shape
    kind: Any = {"dtype": torch.float32, "device": student.device}
    rows = torch.empty(_ROW_NUMBERS, batch, **kind)
    columns = torch.empty(_COLUMN_NUMBERS, classes, **kind)
    partials = _observe_large(student, teacher, mask, rows, weights)
    if partials is None:
        partials = columns[None]  # nobody reads it
    return _conclude_from(partials, rows, columns, mask, weights), rows, columns


def _observe_large(
    student: Tensor, teacher: Tensor, mask: Tensor | None, rows: Tensor, weights: _Weights
) -> Tensor | None:
    """Fill in the statistics of rows; return partial moments of columns (splits, 8, C)."""
    batch, classes = student.shape
    mask_stride = 0 if mask is None else mask.stride(0)
    _row_statistics[(batch,)](
        student,
        teacher,
        mask,
        rows,
        classes,
        rows.stride(0),
        *student.stride(),
        *teacher.stride(),
        mask_stride,
        weights.exponent_scale,
        INTER=weights.inter_on,
        BLOCK=_ROW_BLOCK,
        num_warps=_ROW_WARPS,
    )
    if not weights.intra_on:
        return None
    items, width = _MOMENT_TILE
    column_programs = triton.cdiv(classes, width)
    processors, _ = _machine(student.device)
    # Four programs per processor keep memory busy; more would only add partial moments to merge.
    splits = min(triton.cdiv(4 * processors, column_programs), triton.cdiv(batch, items))
    partials = torch.empty(splits, _MOMENTS, classes, dtype=torch.float32, device=student.device)
    _column_moments[(column_programs, splits)](
        student,
        teacher,
        mask,
        rows,
        partials,
        batch,
        classes,
        rows.stride(0),
        *student.stride(),
        *teacher.stride(),
        mask_stride,
        weights.exponent_scale,
        RELEASED=weights.released,
        ITEMS=items,
        CLASSES=width,
        num_warps=_MOMENT_WARPS,
        maxnreg=_MAX_REGISTERS,
    )
    return partials


def _conclude_from(
    partials: Tensor, rows: Tensor, columns: Tensor, mask: Tensor | None, weights: _Weights
) -> Tensor:
    """Coefficients into ``columns``, from partial moments (P, 8 or more, C); return the loss."""
    batch, classes = rows.shape[1], columns.shape[1]
    parts, width = _MERGE_TILE
    column_programs = triton.cdiv(classes, width) if weights.intra_on else 0
    row_programs = triton.cdiv(batch, _SUM_BLOCK)
    sums = torch.empty(
        column_programs + 2 * row_programs, dtype=torch.float32, device=columns.device
    )
    loss = torch.empty((), dtype=torch.float32, device=columns.device)
    _conclude[(column_programs + row_programs,)](
        rows,
        columns,
        partials,
        mask,
        sums,
        len(partials),
        batch,
        classes,
        rows.stride(0),
        0 if mask is None else mask.stride(0),
        column_programs,
        -weights.intra / (weights.temperature * classes),
        weights.eps,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        RELEASED=weights.released,
        PARTS=parts,
        CLASSES=width,
        ITEMS=_SUM_BLOCK,
        num_warps=_MERGE_WARPS,
    )
    _loss[(1,)](
        sums,
        columns,
        loss,
        classes,
        column_programs,
        row_programs,
        weights.inter,
        weights.intra,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        BLOCK=_SUM_BLOCK,
        num_warps=4,
    )
    return loss


def shipped() -> list[Shipped]:
    """Every tile that is ever launched, with all options on: what needs most registers.

    That is both terms, both gradients, a mask, and rows in one piece, whose wide loads hold most
    values at a time. The gradient is listed with the usual options too.
    """
    terms: dict[str, object] = {"INTER": 1, "INTRA": 1, "RELEASED": 0}
    both: dict[str, object] = {"STUDENT": 1, "TEACHER": 1}
    merge: dict[str, object] = {"PARTS": _MERGE_TILE[0], "CLASSES": _MERGE_TILE[1]}
    moments: dict[str, object] = {"ITEMS": _MOMENT_TILE[0], "CLASSES": _MOMENT_TILE[1]}
    usual: dict[str, object] = {"mask": None, "teacher_gradient": None}
    return [
        *(
            _shipped(_small, terms | both | {"ITEMS": items, "CLASSES": classes}, warps)
            for items, classes, warps in _SMALL_TILES
        ),
        _shipped(_scale, {"BLOCK": _SCALE_BLOCK}, 4),
        *(
            _shipped(_stream, terms | {"ITEMS": items, "CLASSES": classes}, warps, _MAX_REGISTERS)
            for items, classes, warps in _STREAM_TILES
        ),
        _shipped(_row_statistics, {"INTER": 1, "BLOCK": _ROW_BLOCK}, _ROW_WARPS),
        *(
            _shipped(
                _column_moments, moments | {"RELEASED": released}, _MOMENT_WARPS, _MAX_REGISTERS
            )
            for released in (0, 1)
        ),
        _shipped(_observe, merge, _MERGE_WARPS),
        _shipped(_conclude, terms | merge | {"ITEMS": _SUM_BLOCK}, _MERGE_WARPS),
        _shipped(_loss, {"INTER": 1, "INTRA": 1, "BLOCK": _SUM_BLOCK}, 4),
        *(
            _shipped(_gradient, terms | {"ITEMS": items, "CLASSES": classes} | options, warps)
            for items, classes, warps in _GRADIENT_TILES
            for options in ({}, usual)
        ),
    ]


def _shipped(
    kernel: Any, constants: dict[str, object], warps: int, maxnreg: int | None = None
) -> Shipped:
    unit_strides = dict.fromkeys(
        ("student_column_stride", "teacher_column_stride", "mask_stride"), 1
    )
    names = kernel.arg_names
    constants = {name: value for name, value in (unit_strides | constants).items() if name in names}
    signature = {name: _SIGNATURE.get(name, "*fp32") for name in names if name not in constants}
    return Shipped(kernel, signature, constants, warps, 3, maxnreg)


_SIGNATURE = (
    dict.fromkeys(("student", "teacher", "student_gradient", "teacher_gradient"), "*bf16")
    | dict.fromkeys(
        ("B", "C", "N", "P", "student_row_stride", "teacher_row_stride", "rows_stride"), "i32"
    )
    | dict.fromkeys(("column_programs", "row_programs"), "i32")
    | dict.fromkeys(("exponent_scale", "temperature", "inter", "intra", "eps", "slope"), "fp32")
    | {"mask": "*i1"}
)
