"""DIST on a GPU: forward and backward passes as Triton kernels.

For a row i, p = softmax(z_i / tau) and q likewise of the teacher; the mean of either is exactly
1 / C. For a column c, u and v are p and q in units of a power of two in which nothing of the column
underflows (``eps=None``) or p and q themselves. With rho a correlation of the centred vectors, in
either direction,

    d rho / du = both (v - mean v) + own (u - mean u) + shared

with ``both``, ``own`` and ``shared`` one number per row or column, so that

    dz = -tau (g - p sum_c g),
    g  = beta / n   p (both_i (q - 1/C) + own_i (p - 1/C))
       + gamma / C  u (both_c (v - mean v) + own_c (u - mean u) + shared_c).

The teacher's gradient swaps the roles. Everything is float32, exponents are to base 2.

Where two or three items or classes correlate, what is left of d rho / du are differences of nearly
equal terms. They come out as well as PyTorch's because

- means of columns are known to more than float32: what rounding leaves out goes into ``shared``;
- every pass has the same digits of u and of exponentials: units are whole exponents, and rows are
  centred before they are divided by their sum;
- sum_c g is added up of the g that it is subtracted from, so that what all of them are off by, such
  as the mean of a row, does not count.

======  ===================================  =============================  ====================
plan    serves                               launches, forward + backward   bytes, both
======  ===================================  =============================  ====================
small   C <= 2048 and 16,384 elements, with  1 + 1; the gradient is made    2 N s or 4 N s, 4 N;
        C rounded up as in ``_TURN_TILES``   in forward                     4 N + N s
medium  C <= 2048; C <= 4096 if rows are     3 + 1; forward reads rows      2 N s; 3 N s
        ``WIDE``, many, and have their term  once
large   any C                                4 + 1, or 4 + 2 per chunk of   4 N s; 3 N s
                                             rows that fits the cache
======  ===================================  =============================  ====================

N = B C elements of s bytes. Up to 2,048 elements the small plan keeps them all in registers, above
it reads them a second time. Without the intra-class term forward reads rows once, in the large plan
with a launch less.

The gradient reads its rows twice: for sum_c g, then for dz. The second read comes from the L2
cache, of which half is counted on:

- all of the batch fits, or the rows that one program per processor has in flight: one launch;
- a chunk of 8 rows or more fits (on 40 MB all C up to 262k): for each chunk, one launch for sum_c g
  and one for dz, with all processors at it. Each program then reads coefficients of its columns, 36
  bytes each, once per 8 to 32 rows; one with few whole rows would read all, again and again;
- the cache is too small for either (less than 32 MB): one launch, and 5 N s instead of 3 N s.

Beside that, the medium plan moves 40 C bytes per program and the large one 40 C per split of the
rows, both twice; chunks 4 bytes per row and 512 classes, from the cache.

Sums merge in an order fixed by shapes and device: same input, same bits. There are no atomics, and
nothing waits for the device, so that everything can be captured into a CUDA graph.

Logits are read as they lie if a row's classes are next to each other, else from a copy. Every
kernel is compiled once for all sizes and strides (``_kernel``), and with wide loads if all rows
begin and end at multiples of eight classes.

Tile sizes and warps follow from arithmetic and from register counts of compiled kernels (none of
what ``tests.helpers.registers`` picks spills on sm_80 and sm_90); the limits between the plans were
not measured on a GPU. ``launch.fastest`` can measure them on the user's.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from telme_kd.kernels.triton.launch import INTERPRETED, Shipped, Tile, device_of, fastest
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR

_FLOOR = tl.constexpr(RELATIVE_FLOOR**2)
_SLOPE = tl.constexpr(RELATIVE_FLOOR / CONSTANT_GRADIENT_LIKE)
_STAGES = tl.constexpr(3)
"""Tiles in flight: two are copied to shared memory while one is computed with."""

_ROW_NUMBERS = 7
"""Per row: largest logit and sum of exponentials, of student and teacher; centred sums of pp, qq,
pq in units of the largest probabilities."""

_COLUMN_NUMBERS = 10
"""Per column, as statistics: see ``_no_moments``. As coefficients: units and means (0-3) stay; both
(4); own and shared of the student (5, 6) and of the teacher (7, 8); 1 / n in the first entry of
9."""

COLUMN_PARTS = [2, 2, 2, 3]
"""Of a column's statistics: units, means, what rounding leaves out of these, centred sums. The
number of items comes after them."""

_SMALL_TILES = (
    Tile(16, 8, 1),
    Tile(64, 8, 2),
    Tile(16, 32, 2),
    Tile(256, 8, 8),
    Tile(64, 32, 8),
    Tile(16, 128, 8),
    Tile(4, 512, 8),
)
"""Whole batches that a program holds in registers: first fit, smallest first."""

_SMALL_ELEMENTS = 16384
"""With the padding; what one program reads twice before four launches would have begun."""

_TURN_TILES = (
    Tile(256, 8, 8),
    Tile(32, 32, 8),
    Tile(8, 128, 8),
    Tile(4, 512, 8),
    Tile(1, 2048, 8),
)
_STREAM_TILES = (
    Tile(128, 16, 8),
    Tile(32, 64, 8),
    Tile(8, 256, 8),
    Tile(4, 1024, 8),
    Tile(2, 2048, 8),
)
_WIDE_STREAM_TILE = Tile(1, 4096, 8)
"""Whole rows. Eight numbers per column stay in registers: at 4096 classes they take half of those
of a processor, at 8192 they would leave none. Narrow loads of 4096 classes do not fit beside; and
without the inter-class term, for no reason of arithmetic, ptxas spills a few bytes."""

_MOMENT_TILES = (Tile(16, 128, 8), Tile(32, 64, 8))
_GRADIENT_TILES = (Tile(64, 16, 8), Tile(16, 64, 8), Tile(8, 128, 8))
_CHUNK_TILES = (Tile(32, 32, 8), Tile(16, 64, 8), Tile(8, 128, 8))
_SPAN = 512
"""Classes whose share of sum_c g one program adds up: few enough to employ all processors, enough
for the shares to be few."""

_PARTS = 32
_LEAST_CHUNK_BYTES = 16 << 20
_FARTHEST = 2**22
"""Elements from row to row, so that 32 bits count those of a tile."""

_WIDE = 8
"""Classes in 16 bytes of half precision."""

_MAX_REGISTERS = 255
"""For the kernels that hold most: left alone, ptxas spills a few bytes of some of their variants to
fit one more program on a processor."""

_ROW_BLOCK = 4096
_ROW_WARPS = 8
_MERGE_TILE = (32, 32)
_MERGE_WARPS = 8
_SUM_BLOCK = 1024
_SCALE_BLOCK = 1024


_ALIGNED = frozenset(
    (
        "student",
        "teacher",
        "student_gradient",
        "teacher_gradient",
        "gradients",
        "columns",
        "partials",
    )
)
"""Addresses that are multiples of 16 bytes. For the logits it matters only if rows are ``WIDE``."""


def _kernel(function: Any) -> Any:
    """Compile one kernel for all sizes and strides, so that a list of them all can be complete."""
    parameters = inspect.signature(function).parameters.values()
    runtime = [each.name for each in parameters if each.annotation is not tl.constexpr]
    return triton.jit(
        function, do_not_specialize=[name for name in runtime if name not in _ALIGNED]
    )


# --- arithmetic that the kernels share ------------------------------------------------------------


@triton.jit
def _inverse_norm(squared, uncentred):
    """The function h of ``reference.dist.inverse_norm`` and its derivatives by both squares."""
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
def _sizes(C, student_row_stride, teacher_row_stride, WIDE: tl.constexpr):
    """The same, as known multiples of WIDE: then the compiler makes loads of 16 bytes."""
    return (
        C // WIDE * WIDE, student_row_stride // WIDE * WIDE, teacher_row_stride // WIDE * WIDE,
    )  # fmt: skip


@triton.jit
def _kept(mask, items, present):
    """Which items are there and not masked."""
    if mask is not None:
        present &= tl.load(mask + items, mask=present, other=0) != 0
    return present


@triton.jit
def _load(logits, row_stride, first, classes, kept, inside):
    """A tile of logits in float32: -inf outside the classes, 0 in rows that do not count."""
    # Within a tile, 32 bits suffice; they take half the registers.
    offsets = tl.arange(0, kept.shape[0])[:, None] * row_stride + classes[None, :]
    read = kept[:, None] & inside[None, :]
    logits += tl.cast(first, tl.int64) * row_stride
    values = tl.load(logits + offsets, mask=read, other=-float("inf")).to(tl.float32)
    return tl.where(kept[:, None], values, 0.0)


@triton.jit
def _finite(unit):
    """A column at -inf in every row has no largest exponent; any unit makes it zero."""
    return tl.where(unit == -float("inf"), 0.0, unit)


@triton.jit
def _scales(first_is_smaller, shrink):
    return tl.where(first_is_smaller, shrink, 1.0), tl.where(first_is_smaller, 1.0, shrink)


@triton.jit
def _no_moments(CLASSES: tl.constexpr, RELEASED: tl.constexpr):
    """Column moments of nothing, in the order in which all of them are passed on and stored.

    Of student and teacher: the logarithm of the unit; the mean; the rest, which is what rounding
    has left out of the mean (in registers, a pair). Then centred sums of uu, vv and uv, and the
    number of items.
    """
    unit = tl.full((CLASSES,), 0.0 if RELEASED else -float("inf"), tl.float32)
    zeros = tl.zeros((CLASSES,), tl.float32)
    count = tl.full((), 0.0, tl.float32)
    return unit, unit, zeros, zeros, _pair(zeros, zeros), zeros, zeros, zeros, count


@triton.jit
def _pair(first, second):
    """Two numbers, to bfloat16's precision, in one register."""
    upper = first.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return upper | (second.to(tl.uint32, bitcast=True) >> 16)


@triton.jit
def _both_of(pair):
    first = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    return first, (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _merge(some, others):
    """Merge centred column moments (Chan et al. 1979), each in units of its own."""
    unit_s, unit_t, mean_s, mean_t, rests, ss, tt, st, count = some
    (
        other_unit_s, other_unit_t, other_mean_s, other_mean_t, other_rests,
        other_ss, other_tt, other_st, other_count,
    ) = others  # fmt: skip
    top_s, top_t = tl.maximum(unit_s, other_unit_s), tl.maximum(unit_t, other_unit_t)
    # The larger unit stays, so one exponential does for both.
    shrink_s = tl.exp2(tl.minimum(unit_s, other_unit_s) - _finite(top_s))
    shrink_t = tl.exp2(tl.minimum(unit_t, other_unit_t) - _finite(top_t))
    to_s, from_s = _scales(unit_s < other_unit_s, shrink_s)
    to_t, from_t = _scales(unit_t < other_unit_t, shrink_t)
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    spread = count * share
    rest_s, rest_t = _both_of(rests)
    other_rest_s, other_rest_t = _both_of(other_rests)
    mean_s, rest_s, apart_s = _mean_of_both(
        mean_s * to_s, rest_s * to_s, other_mean_s * from_s, other_rest_s * from_s, share
    )
    mean_t, rest_t, apart_t = _mean_of_both(
        mean_t * to_t, rest_t * to_t, other_mean_t * from_t, other_rest_t * from_t, share
    )
    ss = ss * (to_s * to_s) + other_ss * (from_s * from_s) + apart_s * apart_s * spread
    tt = tt * (to_t * to_t) + other_tt * (from_t * from_t) + apart_t * apart_t * spread
    st = st * (to_s * to_t) + other_st * (from_s * from_t) + apart_s * apart_t * spread
    return top_s, top_t, mean_s, mean_t, _pair(rest_s, rest_t), ss, tt, st, total


@triton.jit
def _mean_of_both(mean, rest, other_mean, other_rest, share):
    """A merged mean, its rest, and the distance of the two means."""
    apart, beside = other_mean - mean, other_rest - rest
    step = apart * share
    moved = mean + step
    rest += beside * share + (mean - moved + step)
    mean = moved + rest  # so that the rest stays less than the mean's last digit
    return mean, moved - mean + rest, apart + beside


@triton.jit
def _softmax(logits, exponent_scale):
    """Largest logit of each row, exponents to base 2, exponentials and their sums."""
    largest = tl.max(logits, axis=1)
    # Differences first: they are exact where it matters, whatever the size of the logits.
    exponents = (logits - largest[:, None]) * exponent_scale
    exponentials = tl.exp2(exponents)
    return largest, exponents, exponentials, tl.sum(exponentials, axis=1)


@triton.jit
def _from_mean(exponentials, total, uniform):
    """Rows p - 1 / C of a tile in units of their largest, which every pass rounds alike."""
    return exponentials - (total * uniform)[:, None]


@triton.jit
def _row_correlation(pp, qq, pq, total_s, total_t, uniform, eps, RELEASED: tl.constexpr):
    """Rho, ``both`` for the gradients of p and of q, and ``own`` of each, of rows in such units."""
    rho, both, own_s, _whole_s, own_t, _whole_t = _correlation(
        pp, qq, pq, pp + total_s * total_s * uniform, qq + total_t * total_t * uniform,
        eps * total_s * total_t, RELEASED,
    )  # fmt: skip
    return rho, both * total_s, both * total_t, own_s * total_s, own_t * total_t


@triton.jit
def _in_units(exponents, total, kept):
    """A tile's columns u, zero in rows that do not count, and the logarithms of their units.

    No exponent is larger than a unit's, so that their difference is exact, whichever the unit: u
    has the same digits in every tile and pass.
    """
    exponents = tl.where(kept[:, None], exponents, -float("inf"))
    unit = tl.ceil(tl.max(exponents, axis=0))
    return tl.exp2(exponents - _finite(unit)[None, :]) * (1.0 / total)[:, None], unit


@triton.jit
def _columns(exponents, exponentials, total, kept, RELEASED: tl.constexpr):
    """A tile's columns and their units, by either definition of correlation."""
    if RELEASED:
        u = tl.where(kept[:, None], exponentials * (1.0 / total)[:, None], 0.0)
        unit = tl.zeros((exponentials.shape[1],), tl.float32)
    else:
        u, unit = _in_units(exponents, total, kept)
    return u, unit


@triton.jit
def _with_tile(moments, u, v, unit_u, unit_v, kept):
    """Column moments of what came before and of a tile."""
    if kept.shape[0] > 1:
        moments = _merge(moments, _tile_moments(u, v, unit_u, unit_v, kept))
    else:
        mean_u, mean_v, none = tl.sum(u, axis=0), tl.sum(v, axis=0), tl.zeros_like(unit_u)
        one = tl.full((), 1.0, tl.float32)
        of_row = (unit_u, unit_v, mean_u, mean_v, _pair(none, none), none, none, none, one)
        if tl.max(kept.to(tl.int32), axis=0) > 0:  # arithmetic instead would take more registers
            moments = _merge(moments, of_row)
    return moments


@triton.jit
def _tile_moments(u, v, unit_u, unit_v, kept):
    """Moments of the columns of a tile."""
    items = tl.sum(kept.to(tl.float32), axis=0)
    divisor = tl.maximum(items, 1.0)
    mean_u, mean_v = tl.sum(u, axis=0) / divisor, tl.sum(v, axis=0) / divisor
    a = tl.where(kept[:, None], u - mean_u[None, :], 0.0)
    b = tl.where(kept[:, None], v - mean_v[None, :], 0.0)
    rest_u, rest_v = tl.sum(a, axis=0) / divisor, tl.sum(b, axis=0) / divisor
    uu, vv, uv = tl.sum(a * a, axis=0), tl.sum(b * b, axis=0), tl.sum(a * b, axis=0)
    return unit_u, unit_v, mean_u, mean_v, _pair(rest_u, rest_v), uu, vv, uv, items


@triton.jit
def _row_sums(a, b, inside):
    """Centred sums pp, qq and pq of the rows of a tile that holds whole rows."""
    a, b = tl.where(inside[None, :], a, 0.0), tl.where(inside[None, :], b, 0.0)
    return tl.sum(a * a, axis=1), tl.sum(b * b, axis=1), tl.sum(a * b, axis=1)


@triton.jit
def _parts(exponents, share, unit, INTRA: tl.constexpr, RELEASED: tl.constexpr):
    """Exponentials and probabilities p of a tile, and u, in units of its columns."""
    if INTRA and not RELEASED:
        of_unit, scale = tl.exp2(exponents - unit[None, :]), tl.exp2(unit)[None, :]
        u = of_unit * share[:, None]
        exponentials, p = of_unit * scale, u * scale  # exact: units are powers of two
    else:
        exponentials = tl.exp2(exponents)
        p = exponentials * share[:, None]
        u = p
    return exponentials, p, u


@triton.jit
def _slope(
    p, a, b, u, v, row_both, row_own, mean_u, mean_v, both, own, shared,
    INTER: tl.constexpr, INTRA: tl.constexpr,
):  # fmt: skip
    """The module's g, of the student; with the roles swapped, of the teacher.

    The rows a and b are p and q less their mean, in the units of their coefficients.
    """
    g = tl.zeros_like(p)
    if INTER:
        g = p * (row_both[:, None] * b + row_own[:, None] * a)
    if INTRA:
        along = own[None, :] * (u - mean_u[None, :]) + shared[None, :]
        g += u * (both[None, :] * (v - mean_v[None, :]) + along)
    return g


@triton.jit
def _store_moments(at, stride, inside, moments):
    unit_s, unit_t, mean_s, mean_t, rests, ss, tt, st, count = moments
    rest_s, rest_t = _both_of(rests)
    tl.store(at, unit_s, mask=inside)
    tl.store(at + stride, unit_t, mask=inside)
    tl.store(at + 2 * stride, mean_s, mask=inside)
    tl.store(at + 3 * stride, mean_t, mask=inside)
    tl.store(at + 4 * stride, rest_s, mask=inside)
    tl.store(at + 5 * stride, rest_t, mask=inside)
    tl.store(at + 6 * stride, ss, mask=inside)
    tl.store(at + 7 * stride, tt, mask=inside)
    tl.store(at + 8 * stride, st, mask=inside)
    tl.store(at + 9 * stride, count, mask=inside)


# --- small: one launch ----------------------------------------------------------------------------


@_kernel
def _small(
    student, teacher, mask, loss, gradients, B, C,
    student_row_stride, teacher_row_stride, exponent_scale, temperature, inter, intra, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, ITEMS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss and unit gradients by one program that holds both matrices, (ITEMS, CLASSES), float32.

    ``inter`` and ``intra`` are the weights times tau^2. The gradients, (1 or 2, B, C), are those of
    the module's formula for a grad_output of 1.
    """
    items, classes = tl.arange(0, ITEMS), tl.arange(0, CLASSES)
    inside = classes < C
    kept = _kept(mask, items, items < B)
    count = tl.maximum(tl.sum(kept.to(tl.float32), axis=0), 1.0)
    uniform = 1.0 / C
    first = tl.program_id(0)
    z_s = _load(student, student_row_stride, first, classes, kept, inside)
    z_t = _load(teacher, teacher_row_stride, first, classes, kept, inside)
    _, log_p, exp_p, total_s = _softmax(z_s, exponent_scale)
    _, log_q, exp_q, total_t = _softmax(z_t, exponent_scale)
    share_s, share_t = 1.0 / total_s, 1.0 / total_t
    p, q = exp_p * share_s[:, None], exp_q * share_t[:, None]
    a = _from_mean(exp_p, total_s, uniform) * share_s[:, None]
    b = _from_mean(exp_q, total_t, uniform) * share_t[:, None]

    value = 0.0
    row_both = tl.zeros((ITEMS,), tl.float32)
    row_own_s, row_own_t = row_both, row_both
    if INTER:
        pp, qq, pq = _row_sums(a, b, inside)
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
        u, unit_s = _columns(log_p, exp_p, total_s, kept, RELEASED)
        v, unit_t = _columns(log_q, exp_q, total_t, kept, RELEASED)
        moments = _tile_moments(u, v, unit_s, unit_t, kept)
        unit_s, unit_t, mean_s, mean_t, rests, uu, vv, uv, n = moments
        rest_s, rest_t = _both_of(rests)
        rho, both, own_s, shared_s, own_t, shared_t = _correlation(
            uu, vv, uv, uu + n * mean_s * mean_s, vv + n * mean_t * mean_t, eps, RELEASED
        )
        distance = tl.sum(tl.where(inside, 1.0 - rho, 0.0), axis=0)
        value += tl.where(n > 0.0, distance, 0.0) * intra / C
        weight = intra / C
        both, own_s, own_t = both * weight, own_s * weight, own_t * weight
        shared_s = shared_s * mean_s * weight - both * rest_t - own_s * rest_s
        shared_t = shared_t * mean_t * weight - both * rest_s - own_t * rest_t
    tl.store(loss, value)

    offsets = items[:, None] * C + classes[None, :]
    within = (items < B)[:, None] & inside[None, :]
    if STUDENT:
        g = _slope(
            p, a, b, u, v, row_both, row_own_s, mean_s, mean_t, both, own_s, shared_s,
            INTER, INTRA,
        )  # fmt: skip
        dz = (p * tl.sum(g, axis=1)[:, None] - g) / temperature
        tl.store(gradients + offsets, tl.where(kept[:, None], dz, 0.0), mask=within)
        gradients += B * C
    if TEACHER:
        g = _slope(
            q, b, a, v, u, row_both, row_own_t, mean_t, mean_s, both, own_t, shared_t,
            INTER, INTRA,
        )  # fmt: skip
        dz = (q * tl.sum(g, axis=1)[:, None] - g) / temperature
        tl.store(gradients + offsets, tl.where(kept[:, None], dz, 0.0), mask=within)


@_kernel
def _in_turns(
    student, teacher, mask, loss, gradients, B, C,
    student_row_stride, teacher_row_stride, exponent_scale, temperature, inter, intra, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What ``_small`` does, by one program that reads tiles of ITEMS whole rows, twice.

    The first time it collects moments of columns, the second time it makes gradients.
    """
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    classes = tl.arange(0, CLASSES)
    inside = classes < C
    uniform = 1.0 / C
    moments = _no_moments(CLASSES, RELEASED)
    count = tl.zeros((ITEMS,), tl.float32)
    distances = tl.zeros((ITEMS,), tl.float32)
    for start in tl.range(0, B, ITEMS, num_stages=_STAGES):
        items = start + tl.arange(0, ITEMS)
        kept = _kept(mask, items, items < B)
        z_s = _load(student, student_row_stride, start, classes, kept, inside)
        z_t = _load(teacher, teacher_row_stride, start, classes, kept, inside)
        _, log_p, exp_p, total_s = _softmax(z_s, exponent_scale)
        _, log_q, exp_q, total_t = _softmax(z_t, exponent_scale)
        count += kept.to(tl.float32)
        if INTER:
            a = _from_mean(exp_p, total_s, uniform) * (1.0 / total_s)[:, None]
            b = _from_mean(exp_q, total_t, uniform) * (1.0 / total_t)[:, None]
            pp, qq, pq = _row_sums(a, b, inside)
            rho, _b, _os, _ws, _ot, _wt = _correlation(
                pp, qq, pq, pp + uniform, qq + uniform, eps, RELEASED
            )
            distances += tl.where(kept, 1.0 - rho, 0.0)
        if INTRA:
            u, unit_s = _columns(log_p, exp_p, total_s, kept, RELEASED)
            v, unit_t = _columns(log_q, exp_q, total_t, kept, RELEASED)
            moments = _with_tile(moments, u, v, unit_s, unit_t, kept)
    divisor = tl.maximum(tl.sum(count, axis=0), 1.0)
    value = 0.0
    if INTER:
        value += tl.sum(distances, axis=0) * inter / divisor
    both = tl.zeros((CLASSES,), tl.float32)
    own_s, own_t, shared_s, shared_t = both, both, both, both
    unit_s, unit_t, mean_s, mean_t, rests, ss, tt, st, seen = moments
    if INTRA:
        rest_s, rest_t = _both_of(rests)
        rho, both, own_s, shared_s, own_t, shared_t = _correlation(
            ss, tt, st, ss + seen * mean_s * mean_s, tt + seen * mean_t * mean_t, eps, RELEASED
        )
        distance = tl.sum(tl.where(inside, 1.0 - rho, 0.0), axis=0)
        value += tl.where(seen > 0.0, distance, 0.0) * intra / C
        weight = intra / C
        both, own_s, own_t = both * weight, own_s * weight, own_t * weight
        shared_s = shared_s * mean_s * weight - both * rest_t - own_s * rest_s
        shared_t = shared_t * mean_t * weight - both * rest_s - own_t * rest_t
        unit_s, unit_t = _finite(unit_s), _finite(unit_t)
    tl.store(loss, value)

    if STUDENT or TEACHER:
        row_weight = inter / divisor
        for start in tl.range(0, B, ITEMS, num_stages=_STAGES):
            items = start + tl.arange(0, ITEMS)
            present = items < B
            kept = _kept(mask, items, present)
            z_s = _load(student, student_row_stride, start, classes, kept, inside)
            z_t = _load(teacher, teacher_row_stride, start, classes, kept, inside)
            _, log_p, exp_p, total_s = _softmax(z_s, exponent_scale)
            _, log_q, exp_q, total_t = _softmax(z_t, exponent_scale)
            share_s, share_t = 1.0 / total_s, 1.0 / total_t
            p, q = exp_p * share_s[:, None], exp_q * share_t[:, None]
            a = _from_mean(exp_p, total_s, uniform) * share_s[:, None]
            b = _from_mean(exp_q, total_t, uniform) * share_t[:, None]
            row_both = tl.zeros((ITEMS,), tl.float32)
            row_own_s, row_own_t = row_both, row_both
            if INTER:
                pp, qq, pq = _row_sums(a, b, inside)
                _, row_both, row_own_s, _ws, row_own_t, _wt = _correlation(
                    pp, qq, pq, pp + uniform, qq + uniform, eps, RELEASED
                )
                row_both = row_both * row_weight
                row_own_s, row_own_t = row_own_s * row_weight, row_own_t * row_weight
            u, v = p, q
            if INTRA and not RELEASED:
                log_p = tl.where(kept[:, None], log_p, -float("inf"))
                log_q = tl.where(kept[:, None], log_q, -float("inf"))
                u = tl.exp2(log_p - unit_s[None, :]) * share_s[:, None]
                v = tl.exp2(log_q - unit_t[None, :]) * share_t[:, None]
            offsets = items[:, None] * C + classes[None, :]
            within = present[:, None] & inside[None, :]
            if STUDENT:
                g = _slope(
                    p, a, b, u, v, row_both, row_own_s, mean_s, mean_t, both, own_s, shared_s,
                    INTER, INTRA,
                )  # fmt: skip
                dz = (p * tl.sum(g, axis=1)[:, None] - g) / temperature
                tl.store(gradients + offsets, tl.where(kept[:, None], dz, 0.0), mask=within)
            if TEACHER:
                g = _slope(
                    q, b, a, v, u, row_both, row_own_t, mean_t, mean_s, both, own_t, shared_t,
                    INTER, INTRA,
                )  # fmt: skip
                dz = (q * tl.sum(g, axis=1)[:, None] - g) / temperature
                at = gradients + (B * C if STUDENT else 0) + offsets
                tl.store(at, tl.where(kept[:, None], dz, 0.0), mask=within)


@_kernel
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


@_kernel
def _stream(
    student, teacher, mask, rows, partials, B, C, rows_stride,
    student_row_stride, teacher_row_stride, exponent_scale,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row statistics, and column moments of the rows that this program reads.

    Tiles (ITEMS, CLASSES) hold whole rows; eight numbers per column stay in registers from one
    tile to the next. ``rows`` is (7, B), ``partials`` (programs, 10, C).
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    classes = tl.arange(0, CLASSES)
    inside = classes < C
    uniform = 1.0 / C
    moments = _no_moments(CLASSES, RELEASED)
    stride = rows_stride.to(tl.int64)
    for block in tl.range(program, tl.cdiv(B, ITEMS), programs, num_stages=_STAGES):
        first = block * ITEMS
        items = first + tl.arange(0, ITEMS)
        present = items < B
        kept = _kept(mask, items, present)
        z_s = _load(student, student_row_stride, first, classes, kept, inside)
        z_t = _load(teacher, teacher_row_stride, first, classes, kept, inside)
        largest_s, log_p, exp_p, total_s = _softmax(z_s, exponent_scale)
        largest_t, log_q, exp_q, total_t = _softmax(z_t, exponent_scale)
        at = rows + items
        tl.store(at, largest_s, mask=present)
        tl.store(at + stride, total_s, mask=present)
        tl.store(at + 2 * stride, largest_t, mask=present)
        tl.store(at + 3 * stride, total_t, mask=present)
        if INTER:
            a = _from_mean(exp_p, total_s, uniform)
            b = _from_mean(exp_q, total_t, uniform)
            pp, qq, pq = _row_sums(a, b, inside)
            tl.store(at + 4 * stride, pp, mask=present)
            tl.store(at + 5 * stride, qq, mask=present)
            tl.store(at + 6 * stride, pq, mask=present)
        if INTRA:
            u, unit_s = _columns(log_p, exp_p, total_s, kept, RELEASED)
            v, unit_t = _columns(log_q, exp_q, total_t, kept, RELEASED)
            moments = _with_tile(moments, u, v, unit_s, unit_t, kept)
    if INTRA:
        _store_moments(partials + program.to(tl.int64) * 10 * C + classes, C, inside, moments)


# --- large: rows, then columns --------------------------------------------------------------------


@_kernel
def _row_statistics(
    student, teacher, mask, rows, C, rows_stride,
    student_row_stride, teacher_row_stride, exponent_scale,
    INTER: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per row, one read of it, in blocks: online largest, sum and centred sums.

    The centred sums are of the exponentials around their mean over the classes seen, merged block
    by block like column moments; in the end that mean over the sum is 1 / C.
    """
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    item = tl.program_id(0)
    kept = _kept(mask, item, item >= 0)
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
        z_s = tl.load(student + classes, mask=read, other=-float("inf")).to(tl.float32)
        z_t = tl.load(teacher + classes, mask=read, other=-float("inf")).to(tl.float32)
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
        tl.store(rows + 4 * stride, ss)
        tl.store(rows + 5 * stride, tt)
        tl.store(rows + 6 * stride, st)


@_kernel
def _column_moments(
    student, teacher, mask, rows, partials, B, C, rows_stride,
    student_row_stride, teacher_row_stride, exponent_scale,
    RELEASED: tl.constexpr, ITEMS: tl.constexpr, CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Moments of CLASSES columns over every n-th tile of ITEMS rows; the grid is (C, splits).

    Neighbouring programs read neighbouring classes of the same rows. ``partials``: (splits, 10, C).
    """
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    split, splits = tl.program_id(1), tl.num_programs(1)
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    inside = classes < C
    moments = _no_moments(CLASSES, RELEASED)
    stride = rows_stride.to(tl.int64)
    for block in tl.range(split, tl.cdiv(B, ITEMS), splits, num_stages=_STAGES):
        first = block * ITEMS
        items = first + tl.arange(0, ITEMS)
        kept = _kept(mask, items, items < B)
        z_s = _load(student, student_row_stride, first, classes, kept, inside)
        z_t = _load(teacher, teacher_row_stride, first, classes, kept, inside)
        largest_s = tl.load(rows + items, mask=kept, other=0.0)
        total_s = tl.load(rows + stride + items, mask=kept, other=1.0)
        largest_t = tl.load(rows + 2 * stride + items, mask=kept, other=0.0)
        total_t = tl.load(rows + 3 * stride + items, mask=kept, other=1.0)
        log_p = (z_s - largest_s[:, None]) * exponent_scale
        log_q = (z_t - largest_t[:, None]) * exponent_scale
        u, unit_s = _columns(log_p, tl.exp2(log_p), total_s, kept, RELEASED)
        v, unit_t = _columns(log_q, tl.exp2(log_q), total_t, kept, RELEASED)
        moments = _with_tile(moments, u, v, unit_s, unit_t, kept)
    _store_moments(partials + split.to(tl.int64) * 10 * C + classes, C, inside, moments)


# --- both: merging, loss, gradient ----------------------------------------------------------------


@triton.jit
def _collect(partials, P, C, classes, inside, moments, PARTS: tl.constexpr):
    """Merge P partial moments, (P, 10, C), into those given: PARTS at a time, in their order."""
    for start in tl.range(0, P, PARTS):
        parts = start + tl.arange(0, PARTS)
        here = (parts < P)[:, None] & inside[None, :]
        at = partials + parts.to(tl.int64)[:, None] * 10 * C + classes[None, :]
        n = tl.load(at + 9 * C, mask=here, other=0.0)
        # What saw no item has no unit either.
        own_s = tl.where(n > 0.0, tl.load(at, mask=here, other=0.0), -float("inf"))
        own_t = tl.where(n > 0.0, tl.load(at + C, mask=here, other=0.0), -float("inf"))
        top_s, top_t = tl.max(own_s, axis=0), tl.max(own_t, axis=0)
        to_s = tl.exp2(own_s - _finite(top_s)[None, :])
        to_t = tl.exp2(own_t - _finite(top_t)[None, :])
        others = tl.sum(n, axis=0)
        mean_s, rest_s, a = _mean_of_all(at + 2 * C, C, here, n, others, to_s)
        mean_t, rest_t, b = _mean_of_all(at + 3 * C, C, here, n, others, to_t)
        ss = tl.load(at + 6 * C, mask=here, other=0.0) * to_s * to_s + n * a * a
        tt = tl.load(at + 7 * C, mask=here, other=0.0) * to_t * to_t + n * b * b
        st = tl.load(at + 8 * C, mask=here, other=0.0) * to_s * to_t + n * a * b
        ss, tt, st = tl.sum(ss, axis=0), tl.sum(tt, axis=0), tl.sum(st, axis=0)
        found = (top_s, top_t, mean_s, mean_t, _pair(rest_s, rest_t), ss, tt, st, others)
        moments = _merge(moments, found)
    return moments


@triton.jit
def _mean_of_all(at, C, here, counts, count, scales):
    """The mean of parts, what its rounding leaves out, and the distances of theirs from it."""
    means = tl.load(at, mask=here, other=0.0) * scales
    rests = tl.load(at + 2 * C, mask=here, other=0.0) * scales
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(counts * means, axis=0) / divisor
    apart = means - mean[None, :] + rests
    return mean, tl.sum(counts * apart, axis=0) / divisor, apart


@_kernel
def _observe(partials, columns, P, C, PARTS: tl.constexpr, CLASSES: tl.constexpr):
    """Merge partial moments into the statistics of a batch that comes in chunks."""
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    inside = classes < C
    at = columns + classes
    count = tl.load(at + 9 * C, mask=inside, other=0.0)
    unit_s = tl.where(count > 0.0, tl.load(at, mask=inside), -float("inf"))
    unit_t = tl.where(count > 0.0, tl.load(at + C, mask=inside), -float("inf"))
    mean_s = tl.load(at + 2 * C, mask=inside, other=0.0)
    mean_t = tl.load(at + 3 * C, mask=inside, other=0.0)
    rest_s = tl.load(at + 4 * C, mask=inside, other=0.0)
    rest_t = tl.load(at + 5 * C, mask=inside, other=0.0)
    ss = tl.load(at + 6 * C, mask=inside, other=0.0)
    tt = tl.load(at + 7 * C, mask=inside, other=0.0)
    st = tl.load(at + 8 * C, mask=inside, other=0.0)
    moments = (unit_s, unit_t, mean_s, mean_t, _pair(rest_s, rest_t), ss, tt, st, count)
    moments = _collect(partials, P, C, classes, inside, moments, PARTS)
    tl.debug_barrier()  # every warp has read what one of them overwrites
    _store_moments(at, C, inside, moments)


@triton.jit
def _conclude_columns(
    columns, partials, P, C, classes, slope, eps, RELEASED: tl.constexpr,
    PARTS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Turn merged moments into coefficients; return the sum of 1 - rho."""
    inside = classes < C
    zeros = tl.zeros((CLASSES,), tl.float32)
    none = tl.full((CLASSES,), -float("inf"), tl.float32)
    moments = (none, none, zeros, zeros, _pair(zeros, zeros), zeros, zeros, zeros, zeros)
    moments = _collect(partials, P, C, classes, inside, moments, PARTS)
    unit_s, unit_t, mean_s, mean_t, rests, ss, tt, st, count = moments
    rest_s, rest_t = _both_of(rests)
    whole_s, whole_t = ss + count * mean_s * mean_s, tt + count * mean_t * mean_t
    rho, both, own_s, shared_s, own_t, shared_t = _correlation(
        ss, tt, st, whole_s, whole_t, eps, RELEASED
    )
    both, own_s, own_t = both * slope, own_s * slope, own_t * slope
    shared_s = shared_s * mean_s * slope - both * rest_t - own_s * rest_s
    shared_t = shared_t * mean_t * slope - both * rest_s - own_t * rest_t
    tl.debug_barrier()  # every warp has read what one of them overwrites
    tl.store(columns + classes, _finite(unit_s), mask=inside)
    tl.store(columns + C + classes, _finite(unit_t), mask=inside)
    tl.store(columns + 2 * C + classes, mean_s, mask=inside)
    tl.store(columns + 3 * C + classes, mean_t, mask=inside)
    tl.store(columns + 4 * C + classes, both, mask=inside)
    tl.store(columns + 5 * C + classes, own_s, mask=inside)
    tl.store(columns + 6 * C + classes, shared_s, mask=inside)
    tl.store(columns + 7 * C + classes, own_t, mask=inside)
    tl.store(columns + 8 * C + classes, shared_t, mask=inside)
    return tl.sum(tl.where(inside, 1.0 - rho, 0.0), axis=0)


@triton.jit
def _row_distance(rows, rows_stride, items, kept, C, eps, RELEASED: tl.constexpr):
    """Sum of 1 - rho of the rows that count."""
    at, stride = rows + items, rows_stride.to(tl.int64)
    total_s = tl.load(at + stride, mask=kept, other=1.0)
    total_t = tl.load(at + 3 * stride, mask=kept, other=1.0)
    pp = tl.load(at + 4 * stride, mask=kept, other=0.0)
    qq = tl.load(at + 5 * stride, mask=kept, other=0.0)
    pq = tl.load(at + 6 * stride, mask=kept, other=0.0)
    rho, _both_s, _both_t, _own_s, _own_t = _row_correlation(
        pp, qq, pq, total_s, total_t, 1.0 / C, eps, RELEASED
    )
    return tl.sum(tl.where(kept, 1.0 - rho, 0.0), axis=0)


@_kernel
def _conclude(
    rows, columns, partials, mask, sums, P, B, C, rows_stride, column_programs,
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
        kept = _kept(mask, items, items < B)
        if INTER:
            distance = _row_distance(rows, rows_stride, items, kept, C, eps, RELEASED)
            tl.store(sums + program, distance)
        row_programs = tl.num_programs(0) - column_programs
        tl.store(sums + program + row_programs, tl.sum(kept.to(tl.float32), axis=0))


@_kernel
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
def _row_coefficients(
    rows, stride, items, kept, count_share, uniform, inter, eps,
    INTER: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """What the gradient needs of each row, in the order in which it is passed on."""
    at = rows + items
    # Rows that do not count: an infinite largest logit makes p and u zero.
    largest_s = tl.load(at, mask=kept, other=float("inf"))
    total_s = tl.load(at + stride, mask=kept, other=1.0)
    largest_t = tl.load(at + 2 * stride, mask=kept, other=float("inf"))
    total_t = tl.load(at + 3 * stride, mask=kept, other=1.0)
    both_s = tl.zeros_like(total_s)
    both_t, own_s, own_t = both_s, both_s, both_s
    if INTER:
        weight = inter * tl.load(count_share)
        pp = tl.load(at + 4 * stride, mask=kept, other=0.0)
        qq = tl.load(at + 5 * stride, mask=kept, other=0.0)
        pq = tl.load(at + 6 * stride, mask=kept, other=0.0)
        _rho, both_s, both_t, own_s, own_t = _row_correlation(
            pp, qq, pq, total_s, total_t, uniform, eps, RELEASED
        )
        both_s, both_t = both_s * weight, both_t * weight
        own_s, own_t = own_s * weight, own_t * weight
    return largest_s, total_s, largest_t, total_t, both_s, both_t, own_s, own_t


@triton.jit
def _tile_slopes(
    student, teacher, student_row_stride, teacher_row_stride, item, classes, kept, C, columns,
    exponent_scale, uniform, of_rows,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """Probabilities p, q and g of student and teacher over a tile of classes, from ``item`` on."""
    inside = classes < C
    unit_s = tl.zeros((classes.shape[0],), tl.float32)
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
    largest_s, total_s, largest_t, total_t, row_both_s, row_both_t, row_own_s, row_own_t = of_rows
    share_s, share_t = 1.0 / total_s, 1.0 / total_t
    z_s = _load(student, student_row_stride, item, classes, kept, inside)
    z_t = _load(teacher, teacher_row_stride, item, classes, kept, inside)
    log_p = (z_s - largest_s[:, None]) * exponent_scale
    log_q = (z_t - largest_t[:, None]) * exponent_scale
    exp_p, p, u = _parts(log_p, share_s, unit_s, INTRA, RELEASED)
    exp_q, q, v = _parts(log_q, share_t, unit_t, INTRA, RELEASED)
    a = _from_mean(exp_p, total_s, uniform)
    b = _from_mean(exp_q, total_t, uniform)
    g_s = _slope(
        p, a, b, u, v, row_both_s, row_own_s, mean_s, mean_t, both, own_s, shared_s, INTER, INTRA
    )
    g_t = _slope(
        q, b, a, v, u, row_both_t, row_own_t, mean_t, mean_s, both, own_t, shared_t, INTER, INTRA
    )
    return p, q, g_s, g_t


@_kernel
def _sums(
    student, teacher, mask, rows, columns, student_sums, teacher_sums, first, B, C,
    rows_stride, student_row_stride, teacher_row_stride, exponent_scale, inter, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum_c g of rows ``first`` to B, over a segment of the classes each.

    A segment is SPAN classes in tiles of (ITEMS, CLASSES); the grid is (rows, segments). What is
    stored, (segments, B - first), is for the student's gradient, the teacher's or both.
    """
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    uniform = 1.0 / C
    item = first + tl.program_id(0) * ITEMS
    items = item + tl.arange(0, ITEMS)
    present = items < B
    kept = _kept(mask, items, present)
    of_rows = _row_coefficients(
        rows, rows_stride.to(tl.int64), items, kept, columns + 9 * C, uniform, inter, eps,
        INTER, RELEASED,
    )  # fmt: skip
    left = tl.program_id(1) * SPAN
    sum_s, sum_t = _sums_of_slopes(
        student, teacher, student_row_stride, teacher_row_stride, item, kept, C, columns,
        exponent_scale, uniform, of_rows, left, tl.minimum(left + SPAN, C),
        INTER, INTRA, RELEASED, CLASSES,
    )  # fmt: skip
    at = tl.program_id(1) * (B - first) + items - first
    if student_sums is not None:
        tl.store(student_sums + at, sum_s, mask=present)
    if teacher_sums is not None:
        tl.store(teacher_sums + at, sum_t, mask=present)


@triton.jit
def _sums_of_slopes(
    student, teacher, student_row_stride, teacher_row_stride, item, kept, C, columns,
    exponent_scale, uniform, of_rows, left, right,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The sum of g of student and teacher over the classes from ``left`` to ``right``."""
    sums_s = tl.zeros((kept.shape[0], CLASSES), tl.float32)
    sums_t = tl.zeros((kept.shape[0], CLASSES), tl.float32)
    for start in tl.range(left, right, CLASSES, num_stages=_STAGES):
        classes = start + tl.arange(0, CLASSES)
        _p, _q, g_s, g_t = _tile_slopes(
            student, teacher, student_row_stride, teacher_row_stride, item, classes, kept, C,
            columns, exponent_scale, uniform, of_rows, INTER, INTRA, RELEASED,
        )  # fmt: skip
        sums_s += g_s
        sums_t += g_t
    return tl.sum(sums_s, axis=1), tl.sum(sums_t, axis=1)


@triton.jit
def _add_up(sums, count, stride, items, present, ITEMS: tl.constexpr, PARTS: tl.constexpr):
    """Sums of ``count`` segments, PARTS at a time, in their order."""
    added = tl.zeros((ITEMS,), tl.float32)
    for start in tl.range(0, count, PARTS):
        parts = start + tl.arange(0, PARTS)
        here = present[:, None] & (parts < count)[None, :]
        at = sums + parts[None, :] * stride + items[:, None]
        added += tl.sum(tl.load(at, mask=here, other=0.0), axis=1)
    return added


@_kernel
def _gradient(
    grad_output, student, teacher, mask, rows, columns, student_sums, teacher_sums,
    student_gradient, teacher_gradient, first, B, C, segments,
    rows_stride, student_row_stride, teacher_row_stride, exponent_scale, inter, eps,
    INTER: tl.constexpr, INTRA: tl.constexpr, RELEASED: tl.constexpr,
    ITEMS: tl.constexpr, CLASSES: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The module's dz for ITEMS rows at a time, in tiles of (ITEMS, CLASSES), float32.

    The sign, tau and the weights are in the coefficients: ``inter`` is -tau beta. The grid is
    (rows, segments of SPAN classes), after ``_sums``; if SPAN is 0, a program has whole rows and
    adds up sum_c g itself.
    """
    C, student_row_stride, teacher_row_stride = _sizes(
        C, student_row_stride, teacher_row_stride, WIDE
    )
    factor = tl.load(grad_output)
    uniform = 1.0 / C
    stride = rows_stride.to(tl.int64)
    left, right = tl.program_id(1) * SPAN, C
    if SPAN:
        right = tl.minimum(left + SPAN, C)
    for block in tl.range(tl.program_id(0), tl.cdiv(B - first, ITEMS), tl.num_programs(0)):
        item = first + block * ITEMS
        items = item + tl.arange(0, ITEMS)
        present = items < B
        kept = _kept(mask, items, present)
        of_rows = _row_coefficients(
            rows, stride, items, kept, columns + 9 * C, uniform, inter, eps, INTER, RELEASED
        )
        if SPAN:
            sum_s, sum_t = tl.zeros((ITEMS,), tl.float32), tl.zeros((ITEMS,), tl.float32)
            if student_gradient is not None:
                sum_s = _add_up(
                    student_sums, segments, B - first, items - first, present, ITEMS, PARTS
                )
            if teacher_gradient is not None:
                sum_t = _add_up(
                    teacher_sums, segments, B - first, items - first, present, ITEMS, PARTS
                )
        else:
            sum_s, sum_t = _sums_of_slopes(
                student, teacher, student_row_stride, teacher_row_stride, item, kept, C, columns,
                exponent_scale, uniform, of_rows, 0, C, INTER, INTRA, RELEASED, CLASSES,
            )  # fmt: skip
        for start in tl.range(left, right, CLASSES, num_stages=_STAGES):
            classes = start + tl.arange(0, CLASSES)
            p, q, g_s, g_t = _tile_slopes(
                student, teacher, student_row_stride, teacher_row_stride, item, classes, kept, C,
                columns, exponent_scale, uniform, of_rows, INTER, INTRA, RELEASED,
            )  # fmt: skip
            offsets = tl.arange(0, ITEMS)[:, None] * C + classes[None, :]
            before = item.to(tl.int64) * C
            within = present[:, None] & (classes < C)[None, :]
            # What is written is not read again here; it should not drive logits out of the cache.
            if student_gradient is not None:
                dz = tl.where(kept[:, None], (g_s - p * sum_s[:, None]) * factor, 0.0)
                tl.store(student_gradient + before + offsets, dz, mask=within, cache_modifier=".cs")
            if teacher_gradient is not None:
                dz = tl.where(kept[:, None], (g_t - q * sum_t[:, None]) * factor, 0.0)
                tl.store(teacher_gradient + before + offsets, dz, mask=within, cache_modifier=".cs")


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
    needs = (student_needs_grad, teacher_needs_grad)
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    with device_of(student):
        batch = _Batch(student, teacher, mask)
        tile = _small_tile(*student.shape)
        if tile is not None:
            return _forward_small(batch, weights, tile, *needs)
        loss, rows, columns = _forward_large(batch, weights)
    if not any(needs):
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
    if rows.ndim == 3 and (inter_weight or intra_weight):
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


def row_moments(rows: Tensor) -> Tensor:
    """Centred sums (3, B) pp, qq and pq of observed rows."""
    totals = rows[1:4:2]
    return rows[4:7] / (totals[[0, 1, 0]] * totals[[0, 1, 1]])


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
    if not weights.any_on:
        return
    with device_of(student):
        partials = _observe_chosen(_Batch(student, teacher, mask), rows, weights)
        if weights.intra_on:
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
    if not weights.any_on:
        return torch.zeros((), dtype=torch.float32, device=rows.device)
    with device_of(rows):
        return _conclude_from(columns[None], rows, columns, _in_one_piece(mask), weights)


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
    weights = _Weights(temperature, inter_weight, intra_weight, eps)
    new = torch.empty if weights.any_on else torch.zeros
    gradients = (
        _like(student, new) if student_needs_grad else None,
        _like(teacher, new) if teacher_needs_grad else None,
    )
    if weights.any_on:
        with device_of(student):
            batch = _Batch(student, teacher, mask)
            plan = fastest(
                _gradient_plans(batch),
                ("gradient", *batch.kind, weights.flags, student_needs_grad, teacher_needs_grad),
                lambda plan: _run_gradient(
                    plan, grad_output, batch, rows, columns, weights, gradients
                ),
            )
            _run_gradient(plan, grad_output, batch, rows, columns, weights, gradients)
    return gradients


class _Weights:
    """The options of a call as the kernels take them."""

    def __init__(
        self, temperature: float, inter_weight: float, intra_weight: float, eps: float | None
    ) -> None:
        self.temperature = temperature
        self.exponent_scale = math.log2(math.e) / temperature
        self.inter = inter_weight * temperature**2
        self.intra = intra_weight * temperature**2
        self.inter_slope = -temperature * inter_weight
        self.inter_on = int(inter_weight != 0)
        self.intra_on = int(intra_weight != 0)
        self.any_on = bool(self.inter_on or self.intra_on)
        self.released = int(eps is not None)
        self.eps = 0.0 if eps is None else eps
        self.flags = (self.inter_on, self.intra_on, self.released)


class _Batch:
    """Logits and mask as the kernels take them: a row's classes next to each other in memory.

    What lies otherwise is copied first; read as it lies, it would cost a sector of 32 bytes per
    class, in each of up to six reads.
    """

    def __init__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        self.items, self.classes = student.shape
        self.student, self.teacher = _adjacent(student), _adjacent(teacher)
        self.mask = _in_one_piece(mask)
        self.strides = (self.student.stride(0), self.teacher.stride(0))
        self.pair_bytes = self.classes * (student.element_size() + teacher.element_size())
        self.device = student.device
        self.wide = _wide(self.classes, self.student, self.teacher)

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first arguments of every kernel that reads logits."""
        return self.student, self.teacher, self.mask

    @property
    def kind(self) -> tuple[object, ...]:
        """What the speed of a kernel depends on, with batches of up to twice the size alike."""
        dtypes = self.student.dtype, self.teacher.dtype
        return self.device, self.items.bit_length(), self.classes, self.wide, dtypes


def _adjacent(logits: Tensor) -> Tensor:
    near = logits.stride(1) == 1 or logits.shape[1] == 1
    return logits if near and logits.stride(0) <= _FARTHEST else logits.contiguous()


def _in_one_piece(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _wide(classes: int, *logits: Tensor) -> int:
    """_WIDE if all rows begin at multiples of 16 bytes and end at multiples of _WIDE classes."""
    numbers = [classes, *(tensor.stride(0) for tensor in logits)]
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in logits)
    return _WIDE if aligned and all(number % _WIDE == 0 for number in numbers) else 1


def _like(tensor: Tensor, new: Callable[..., Tensor] = torch.empty) -> Tensor:
    return new(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@lru_cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Number of processors, and bytes of L2 cache."""
    if INTERPRETED:
        return 2, 0
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _first_that_holds(tiles: Sequence[Tile], classes: int) -> Tile:
    return next((tile for tile in tiles if classes <= tile.classes), tiles[-1])


# --- small


def _small_tile(batch: int, classes: int) -> Tile | None:
    """The smallest tile that holds the whole batch, or one to take it in turns with."""
    for tile in _SMALL_TILES:
        if batch <= tile.items and classes <= tile.classes:
            return tile
    for tile in _TURN_TILES:
        if classes <= tile.classes:
            return tile if batch * tile.classes <= _SMALL_ELEMENTS else None
    return None


def _forward_small(
    batch: _Batch,
    weights: _Weights,
    tile: Tile,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, _ = saved_shapes(
        batch.items,
        batch.classes,
        student_needs_grad=student_needs_grad,
        teacher_needs_grad=teacher_needs_grad,
    )
    new = torch.empty if weights.any_on else torch.zeros
    kind: Any = {"dtype": torch.float32, "device": batch.device}
    loss, gradients, nothing = new((), **kind), new(shape, **kind), torch.empty(0, **kind)
    if not weights.any_on:
        return loss, gradients, nothing
    in_turns = batch.items > tile.items
    kernel, width = (_in_turns, {"WIDE": batch.wide}) if in_turns else (_small, {})
    kernel[(1,)](
        *batch.logits,
        loss,
        gradients,
        batch.items,
        batch.classes,
        *batch.strides,
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
        ITEMS=tile.items,
        CLASSES=tile.classes,
        num_warps=tile.warps,
        maxnreg=_MAX_REGISTERS,
        **width,
    )
    return loss, gradients, nothing


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


# --- medium and large, forward


class _Observation(NamedTuple):
    """How rows and columns are observed: in one read by one kernel, or in two by two."""

    once: bool
    tile: Tile


def _forward_large(batch: _Batch, weights: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    kind: Any = {"dtype": torch.float32, "device": batch.device}
    rows = torch.empty(_ROW_NUMBERS, batch.items, **kind)
    columns = torch.empty(_COLUMN_NUMBERS, batch.classes, **kind)
    if not weights.any_on:
        return torch.zeros((), **kind), rows, columns
    partials = _observe_chosen(batch, rows, weights)
    return _conclude_from(partials, rows, columns, batch.mask, weights), rows, columns


def _observe_chosen(batch: _Batch, rows: Tensor, weights: _Weights) -> Tensor:
    """Fill in the statistics of rows; return partial moments of columns (parts, 10, C)."""
    plan = fastest(
        _observations(batch, weights),
        ("observation", *batch.kind, weights.flags),
        lambda plan: _run_observation(plan, batch, rows, weights),
    )
    return _run_observation(plan, batch, rows, weights)


def _observations(batch: _Batch, weights: _Weights) -> list[_Observation]:
    """The choice, and what else may be tried.

    One read saves as many bytes as it reads; its partial moments, written and read again, should
    cost less. With few classes they stay in the L2 cache.
    """
    twice = [_Observation(False, tile) for tile in _MOMENT_TILES]
    tile = next((each for each in _STREAM_TILES if batch.classes <= each.classes), None)
    if tile is not None:
        return [_Observation(True, tile), *twice]
    fits = batch.wide != 1 and batch.classes <= _WIDE_STREAM_TILE.classes
    if not fits or not weights.inter_on:
        return twice
    once = [_Observation(True, _WIDE_STREAM_TILE)]
    programs = _stream_programs(batch, _WIDE_STREAM_TILE)
    moment_bytes = 2 * 4 * _COLUMN_NUMBERS * batch.classes * programs
    if batch.items * batch.pair_bytes > moment_bytes or not weights.intra_on:
        return once + twice
    return twice + once


def _stream_programs(batch: _Batch, tile: Tile) -> int:
    processors, _ = _machine(batch.device)
    blocks: int = triton.cdiv(batch.items, tile.items)
    return min(blocks, processors)


def _run_observation(plan: _Observation, batch: _Batch, rows: Tensor, weights: _Weights) -> Tensor:
    if plan.once:
        return _observe_once(plan.tile, batch, rows, weights)
    return _observe_twice(plan.tile, batch, rows, weights)


def _observe_once(tile: Tile, batch: _Batch, rows: Tensor, weights: _Weights) -> Tensor:
    programs = _stream_programs(batch, tile)
    partials = _new_partials(programs, batch, weights)
    _stream[(programs,)](
        *batch.logits,
        rows,
        partials,
        batch.items,
        batch.classes,
        rows.stride(0),
        *batch.strides,
        weights.exponent_scale,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        RELEASED=weights.released,
        ITEMS=tile.items,
        CLASSES=tile.classes,
        WIDE=batch.wide,
        num_warps=tile.warps,
        maxnreg=_MAX_REGISTERS,
    )
    return partials


def _observe_twice(tile: Tile, batch: _Batch, rows: Tensor, weights: _Weights) -> Tensor:
    _row_statistics[(batch.items,)](
        *batch.logits,
        rows,
        batch.classes,
        rows.stride(0),
        *batch.strides,
        weights.exponent_scale,
        INTER=weights.inter_on,
        BLOCK=_ROW_BLOCK,
        WIDE=batch.wide,
        num_warps=_ROW_WARPS,
    )
    column_programs = triton.cdiv(batch.classes, tile.classes)
    processors, _ = _machine(batch.device)
    # Four programs per processor keep memory busy; more would only add partial moments to merge.
    splits = min(triton.cdiv(4 * processors, column_programs), triton.cdiv(batch.items, tile.items))
    partials = _new_partials(splits, batch, weights)
    if weights.intra_on:
        _column_moments[(column_programs, splits)](
            *batch.logits,
            rows,
            partials,
            batch.items,
            batch.classes,
            rows.stride(0),
            *batch.strides,
            weights.exponent_scale,
            RELEASED=weights.released,
            ITEMS=tile.items,
            CLASSES=tile.classes,
            WIDE=batch.wide,
            num_warps=tile.warps,
            maxnreg=_MAX_REGISTERS,
        )
    return partials


def _new_partials(parts: int, batch: _Batch, weights: _Weights) -> Tensor:
    """Space for partial moments; none is needed without the intra-class term."""
    shape = (parts if weights.intra_on else 0, _COLUMN_NUMBERS, batch.classes)
    return torch.empty(shape, dtype=torch.float32, device=batch.device)


def _conclude_from(
    partials: Tensor, rows: Tensor, columns: Tensor, mask: Tensor | None, weights: _Weights
) -> Tensor:
    """Coefficients into ``columns``, from partial moments (P, 10, C); return the loss."""
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


# --- medium and large, backward


class _GradientPlan(NamedTuple):
    """How a gradient's rows are read twice, the second time from the L2 cache if they can be.

    Either ``programs`` have whole rows each, or, if ``rows`` is not 0, so many rows at a time are
    read by all programs for their sums, then by all for their gradient.
    """

    tile: Tile
    programs: int
    rows: int = 0


def _gradient_plans(batch: _Batch) -> list[_GradientPlan]:
    """The choice, and what else may be tried."""
    tile = _first_that_holds(_GRADIENT_TILES, batch.classes)
    blocks: int = triton.cdiv(batch.items, tile.items)
    processors, cache = _machine(batch.device)
    # Half of it: both of a large cache's partitions may hold a line, and coefficients stay there.
    cache //= 2
    at_once = _GradientPlan(tile, blocks)
    if batch.items * batch.pair_bytes <= cache:
        return [at_once]
    rows = cache // batch.pair_bytes // 8 * 8
    in_chunks = [
        _GradientPlan(tile, triton.cdiv(rows, tile.items), rows)
        for tile in _CHUNK_TILES
        if tile.items <= rows
    ]
    fitting = cache // (tile.items * batch.pair_bytes)
    if fitting >= processors:  # fewer programs than could run, but none of the processors idle
        return [_GradientPlan(tile, min(blocks, fitting)), *in_chunks]
    # Less than this is read sooner from memory than by two more launches.
    if cache < _LEAST_CHUNK_BYTES:
        return [at_once, *in_chunks]
    return [*in_chunks, at_once]


def _run_gradient(
    plan: _GradientPlan,
    grad_output: Tensor,
    batch: _Batch,
    rows: Tensor,
    columns: Tensor,
    weights: _Weights,
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    if not plan.rows:
        grid, none = (plan.programs, 1), (None, None)
        _launch_gradient(
            grid, plan.tile, 0, (0, batch.items), none, grad_output, batch, rows, columns,
            weights, gradients,
        )  # fmt: skip
        return
    segments = triton.cdiv(batch.classes, _SPAN)
    sums = [None if each is None else rows.new_empty(segments, plan.rows) for each in gradients]
    for first in range(0, batch.items, plan.rows):
        last = min(first + plan.rows, batch.items)
        grid = (triton.cdiv(last - first, plan.tile.items), segments)
        _sums[grid](
            *batch.logits,
            rows,
            columns,
            *sums,
            first,
            last,
            batch.classes,
            rows.stride(0),
            *batch.strides,
            weights.exponent_scale,
            weights.inter_slope,
            weights.eps,
            INTER=weights.inter_on,
            INTRA=weights.intra_on,
            RELEASED=weights.released,
            ITEMS=plan.tile.items,
            CLASSES=plan.tile.classes,
            SPAN=_SPAN,
            WIDE=batch.wide,
            num_warps=plan.tile.warps,
            maxnreg=_MAX_REGISTERS,
        )
        _launch_gradient(
            grid, plan.tile, _SPAN, (first, last), sums, grad_output, batch, rows, columns,
            weights, gradients,
        )  # fmt: skip


def _launch_gradient(
    grid: tuple[int, int],
    tile: Tile,
    span: int,
    items: tuple[int, int],
    sums: Sequence[Tensor | None],
    grad_output: Tensor,
    batch: _Batch,
    rows: Tensor,
    columns: Tensor,
    weights: _Weights,
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    _gradient[grid](
        grad_output,
        *batch.logits,
        rows,
        columns,
        *sums,
        *gradients,
        *items,
        batch.classes,
        grid[1],
        rows.stride(0),
        *batch.strides,
        weights.exponent_scale,
        weights.inter_slope,
        weights.eps,
        INTER=weights.inter_on,
        INTRA=weights.intra_on,
        RELEASED=weights.released,
        ITEMS=tile.items,
        CLASSES=tile.classes,
        SPAN=span,
        PARTS=_PARTS,
        WIDE=batch.wide,
        num_warps=tile.warps,
        maxnreg=_MAX_REGISTERS,
    )


# --- what can be launched -------------------------------------------------------------------------


def shipped() -> list[Shipped]:
    """Everything that can be launched: tiles by options by dtypes, all options on first.

    float16 is not listed: its kernels differ from bfloat16's in conversions alone.
    """
    terms = [{"INTER": 1, "INTRA": 1}, {"INTER": 0, "INTRA": 1}, {"INTER": 1, "INTRA": 0}]
    released = _either("RELEASED", 0, 1)
    masks = [{}, {"mask": None}]
    sides = [{}, {"teacher_gradient": None}, {"student_gradient": None}]
    flags = [{"STUDENT": s, "TEACHER": t} for s, t in ((1, 1), (1, 0), (0, 1), (0, 0))]
    summed = [side | _sums_of(side) for side in sides]
    whole = {"SPAN": 0, "PARTS": _PARTS, "student_sums": None, "teacher_sums": None}
    chunk = {"SPAN": _SPAN, "PARTS": _PARTS}
    merge = [{"PARTS": _MERGE_TILE[0], "CLASSES": _MERGE_TILE[1]}]
    wide = _either("WIDE", 1, _WIDE)
    most = _MAX_REGISTERS
    return [
        *_tiled(_small, _SMALL_TILES, terms, released, flags, masks, maxnreg=most),
        *_tiled(_in_turns, _TURN_TILES, terms, released, flags, masks, wide, maxnreg=most),
        *_products(_scale, 4, [{"BLOCK": _SCALE_BLOCK}], sides),
        *_tiled(_stream, _STREAM_TILES, terms, released, masks, wide, maxnreg=most),
        *_tiled(_stream, [_WIDE_STREAM_TILE], terms[::2], released, masks, wide[1:], maxnreg=most),
        *_products(
            _row_statistics,
            _ROW_WARPS,
            [{"BLOCK": _ROW_BLOCK}],
            _either("INTER", 1, 0),
            masks,
            wide,
        ),
        *_tiled(_column_moments, _MOMENT_TILES, released, masks, wide, maxnreg=most),
        *_products(_observe, _MERGE_WARPS, merge),
        *_products(_conclude, _MERGE_WARPS, merge, [{"ITEMS": _SUM_BLOCK}], terms, released, masks),
        *_products(_loss, 4, [{"BLOCK": _SUM_BLOCK}], terms),
        *_tiled(
            _sums,
            _CHUNK_TILES,
            [{"SPAN": _SPAN}],
            terms,
            released,
            summed,
            masks,
            wide,
            maxnreg=most,
        ),
        *_tiled(
            _gradient, _GRADIENT_TILES, [whole], terms, released, sides, masks, wide, maxnreg=most
        ),
        *_tiled(
            _gradient, _CHUNK_TILES, [chunk], terms, released, summed, masks, wide, maxnreg=most
        ),
    ]


_Options = Sequence[Mapping[str, object]]


def _either(name: str, *values: int) -> _Options:
    return [{name: value} for value in values]


def _sums_of(side: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("gradient", "sums"): value for name, value in side.items()}


def _tiled(
    kernel: Any, tiles: Sequence[Tile], *options: _Options, maxnreg: int | None = None
) -> Iterator[Shipped]:
    for tile in tiles:
        sizes = [{"ITEMS": tile.items, "CLASSES": tile.classes}]
        yield from _products(kernel, tile.warps, sizes, *options, maxnreg=maxnreg)


def _products(
    kernel: Any, warps: int, *options: _Options, maxnreg: int | None = None
) -> Iterator[Shipped]:
    """Every choice of one of each of the options, for logits in full or half precision."""
    for chosen in product(*options):
        constants = {name: value for each in chosen for name, value in each.items()}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        names = [name for name in kernel.arg_names if name not in constants]
        sides = {"student", "teacher"} & {name.split("_")[0] for name in names if name in _LOGITS}
        for kinds in product(("bf16", "fp32"), repeat=len(sides)):
            dtypes = dict(zip(sorted(sides), kinds, strict=True))
            signature = {
                name: f"*{dtypes[name.split('_')[0]]}"
                if name in _LOGITS
                else _SIGNATURE.get(name, "*fp32")
                for name in names
            }
            yield Shipped(kernel, signature, constants, warps, 3, maxnreg)


_LOGITS = ("student", "teacher", "student_gradient", "teacher_gradient")
_SIGNATURE = (
    dict.fromkeys(("B", "C", "N", "P", "first", "segments"), "i32")
    | dict.fromkeys(("student_row_stride", "teacher_row_stride", "rows_stride"), "i32")
    | dict.fromkeys(("column_programs", "row_programs"), "i32")
    | dict.fromkeys(("exponent_scale", "temperature", "inter", "intra", "eps", "slope"), "fp32")
    | {"mask": "*i1"}
)
