"""Batch similarity on a GPU: forward and backward passes as Triton kernels.

With unit rows t_i, s_j, cosines a_ij = t_i.t_j and x_ij = t_i.s_j, P = softmax_j(a / tau),
Q = softmax_j(x / tau) and n items, the loss is (1/n) sum_i KL_i, and

    slope_ij = Q_ij - P_ij                          tau n dL / dx_ij
    pull_ij  = P_ij (log P_ij - log Q_ij - KL_i)    tau n dL / da_ij
    ds_j = (1 / tau n) sum_i slope_ij t_i
    dt_i = (1 / tau n) sum_j (pull_ij + pull_ji) t_j + slope_ij s_j

each projected off its own unit row and divided by the row's length. slope is P expm1(delta) with
delta = log Q - log P where that is small: near-equal probabilities are never subtracted.

=========  ==========================  ===========================  ==========  ====================
plan       serves                      launches (forward + back)    FLOP        memory beside inputs
=========  ==========================  ===========================  ==========  ====================
small      B <= 64                     1 + 1, gradient in forward   6 B^2 d     B d (the gradient)
streaming  float16, bfloat16           4 + 1                        12 B^2 d    12 B numbers
           float32, B > 32768          4 + 1                        10 B^2 d    12 B numbers
chunked    float32, B <= 32768         5 + 4 per chunk, + 1         6 B^2 d     3 B d, and a chunk
=========  ==========================  ===========================  ==========  ====================

The streaming plan never holds a B x B matrix: both passes compute tiles of cosines, 4 B^2 d each,
and the gradient adds 2 B^2 d, or 4 (see below). That counts features of up to 768 columns whose
rows begin at multiples of 16 bytes; a program holds no more, and every further 768 (512 of other
layouts) make the cosines anew. What limits it is reading: all teachers pass once per 16 students.
Of bfloat16, aligned rows of up to 768 columns, a program keeps its own items in shared memory and
reads the others once for all products, a third of what it would read else. Softmaxes keep a running
maximum, so any temperature will do. The chunked plan takes ``_CHUNK_BYTES`` of cosines at a time
from cuBLAS. A pair of different dtypes is treated as float32. The teacher's gradient, where it is
asked for, costs another 6 B^2 d chunked, and streaming about three times that.

Time against memory: of float32 the streaming plan makes 10 / 6 of the products, outside cuBLAS; the
chunked plan needs room for unit rows. ``TELME_KD_SIMILARITY_PLAN`` and
``TELME_KD_SIMILARITY_CHUNK_BYTES`` in the environment settle it otherwise.

**Precision of matrix products.** Never TF32 unasked: in our kernels, float32 products are IEEE
(``input_precision="ieee"``); those of the chunked plan go to cuBLAS and follow PyTorch's setting
(``torch.backends.cuda.matmul``) as the reference's do: IEEE, unless the user asked for TF32. Not
``tf32x3`` either: its operands keep nearly all bits, but tensor cores cut sums off where the
reference rounds them, and a float32 gradient is stored with the bits that this costs. Products of
two half-precision features are exact in float32, which accumulates them. Cosines, softmaxes and
sums are float32; slope and pull enter their product with half-precision features as the sum of two
halves, which keeps 16 bits or more and makes 12 B^2 d of the streaming plan's 10. Rounded to one
half they would not do: simulated, the error of the stored gradient is then up to 1.43 times that of
a float32 gradient rounded once, in the root of the mean square, and twice in the worst row (200
draws of B = 24 to 256 and d = 32 or 64; a flat softmax over 85 times as many items as features
still has 1.007 times). With two halves it is 1.0000 times. float16 weights with bfloat16 features
(1.008 times) are no product that tensor cores know.

**Roundings that do not average.** Two would be common to a row, and no sum over it makes them any
smaller. A sum of exponentials less their largest is often 1 and a little, whose digits the 1 would
take: sums are kept without it. And a float32 inverse length is off in all cosines of its row alike:
float32 features have it as a sum of two, of which the first has 12 bits, so that products of such
are exact; the second also makes up for what an approximate square root lacks.

**Magnitudes.** Rows are measured in units of the power of two at their largest entry. That loses no
bit, and squares neither overflow nor vanish. The streaming plan multiplies features by it while
loading them only if the batch has a row beyond ``_ORDINARY``: otherwise products stay in the range
of float32 anyway, and features can go from memory to the tensor cores untouched. A zero row has a
unit row of zeros. Absent items have the scale 0: nothing of theirs is ever loaded.

Sums have an order fixed by shapes, strides and dtypes: same input, same bits. No atomics.

Tile sizes and warps follow from arithmetic and from register counts of compiled kernels (none
spills on sm_80 and sm_90); nothing here was measured on a GPU, the choice of plan included.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from telme_kd import _checks
from telme_kd.kernels.triton.launch import INTERPRETED, Shipped, device_of

_EMULATED = tl.constexpr(INTERPRETED)
_ORDINARY = tl.constexpr(2.0**20)
_FLAG_BLOCK = tl.constexpr(1024)

_NUMBERS = 12
"""Per row: power of two and inverse length in its units, of student and of teacher (0-3); largest
a / tau, and logarithm of the sum of exponentials less it (4, 5), likewise of x / tau (6, 7); KL_i
(8); 1 / n, or 0 for an absent item (9); what the inverse lengths lack, of float32 (10, 11).

Some are found by 32-bit offsets, to save registers: 2^31 numbers would be 178 million rows.
"""

_SMALL_BATCH = 64
_CHUNKED_BATCH = 2**15

_PLAN: Literal["auto", "streaming", "chunked"] = _checks.environment_word(
    "TELME_KD_SIMILARITY_PLAN", ("auto", "streaming", "chunked")
)
"""Whether batches beyond ``_SMALL_BATCH`` save memory or time; by default by their size."""

_CHUNK_BYTES = _checks.environment_integer("TELME_KD_SIMILARITY_CHUNK_BYTES", 2**27)
"""What the cosines of a chunk may take: 128 MiB keep cuBLAS busy (4096 rows of 4096, 256 of 65536;
with fewer than about 100 it would wait for memory) and are little beside the features of batches
that need several chunks."""


# --- arithmetic that the kernels share ------------------------------------------------------------


@triton.jit
def _tile(
    matrix, row_stride, column_stride, items, columns, kept, width, scale, SCALED: tl.constexpr
):
    """Entries (items, columns) in their own dtype, zero where absent; SCALED: in units of rows."""
    offsets = items.to(tl.int64)[:, None] * row_stride
    offsets += columns.to(tl.int64)[None, :] * column_stride
    tile = tl.load(matrix + offsets, mask=kept[:, None] & (columns < width)[None, :], other=0.0)
    if SCALED:
        tile = (tile.to(tl.float32) * scale[:, None]).to(tile.dtype)
    return tile


@triton.jit
def _dot(a, b, total):
    """Total + a b, in float32."""
    if _EMULATED:  # the interpreter multiplies bfloat16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _dot_weights(tile, weights, total):
    """Total + tileᵀ weights, for features (M, D) and float32 weights (M, N)."""
    if tile.dtype == tl.float32:
        total = _dot(tl.trans(tile), weights, total)
    else:
        high = weights.to(tile.dtype)
        low = (weights - high.to(tl.float32)).to(tile.dtype)
        total = _dot(tl.trans(tile), high, total)
        total = _dot(tl.trans(tile), low, total)
    return total


@triton.jit
def _power_of_two(largest):
    """1 / 2^floor(log2(largest)) by its exponent's bits, 2^-126 to 2^126; 1 for a zero row."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return tl.where(largest == 0.0, 1.0, ((254 - exponent) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _head(x):
    """The first 12 of 24 bits: a product of two such is exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_length(squared):
    """1 / length as a sum: 12 bits, and the rest. Zeros for a zero row, NaN for an infinite one.

    The rounding of a length would be in all cosines of its row alike, where no sum averages it.
    """
    present = squared != 0.0
    squared = tl.where(present, squared, 1.0)
    high = _head(tl.rsqrt(squared))
    square, own = high * high, _head(squared)
    own_rest, square_head = squared - own, _head(square)
    lacking = 1.0 - own * square_head  # exact
    lacking -= own * (square - square_head) + own_rest * square
    low = high * lacking * (0.5 + 0.375 * lacking)
    return tl.where(present, high, 0.0), tl.where(present, low, 0.0)


@triton.jit
def _cosine(product, high, low, other_high, other_low, EXACT: tl.constexpr):
    """Products of rows and other rows times the inverse lengths of both.

    EXACT, with both parts of those: rounded once or twice.
    """
    cosine = product * (high * other_high)  # of the first 12 bits, an exact product
    if EXACT:
        cosine += product * (high * other_low + low * (other_high + other_low))
    return cosine


@triton.jit
def _expm1_less(x):
    """Expm1(x) - x for |x| < 1/4: the first term left out is below a rounding of the first."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))
    return x * x * 0.5 * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series)))


@triton.jit
def _slope_and_pull(target, prediction, top_t, log_t, top_p, log_p, divergence, kept):
    """Slope and pull (see above) of a tile of a / tau and x / tau, by the logarithms of their sums.

    The largest is subtracted first, exactly: beside 1 / tau, log P would lose its last digits.
    """
    log_target = tl.where(kept, (target - top_t) - log_t, 0.0)
    log_prediction = tl.where(kept, (prediction - top_p) - log_p, 0.0)
    delta = log_prediction - log_target
    p = tl.exp(log_target)
    near = tl.abs(delta) < 0.25
    slope = tl.where(near, p * (delta + _expm1_less(delta)), tl.exp(log_prediction) - p)
    return slope, tl.where(kept, p * (-delta - divergence), 0.0)


@triton.jit
def _add_exponentials(exponentials, rise, shrink, rest):
    """Sums but for the 1 of one largest, beside which the others would lose their digits.

    Most of P is often in the largest, and then its rounding would be the error of a gradient. The
    sums are -1 where nothing has been added yet.
    """
    below = exponentials < 1.0
    others = tl.sum(tl.where(below, exponentials, 0.0), axis=1)
    largest = tl.sum(tl.where(below, 0.0, exponentials), axis=1)  # as many ones
    risen = rise > 0.0
    rest = tl.where(risen, shrink * (1.0 + rest), rest)
    return rest + (others + (largest - risen.to(tl.float32)))


@triton.jit
def _log_of_sum(rest):
    """Log(1 + rest), with what 1 + rest rounds off."""
    total = 1.0 + rest
    lost = tl.where(rest < 1.0, rest - (total - 1.0), 1.0 - (total - rest))
    return tl.log(total) + lost / total


@triton.jit
def _observe(target, prediction, top_t, rest_t, top_p, rest_p, first, second, kept):
    """Add columns to the rows' running maxima and to their sums over columns.

    With t and p less their maxima, and delta = p - t, these are of exp(t), of exp(p), of exp(t)
    delta, and of exp(t) (expm1(delta) - delta): what is left of a divergence where P and Q are near
    each other or near one class, and the sums of exponentials would cancel.
    """
    sum_t, sum_p = 1.0 + rest_t, 1.0 + rest_p
    grown_t = tl.maximum(top_t, tl.max(tl.where(kept, target, -float("inf")), axis=1))
    grown_p = tl.maximum(top_p, tl.max(tl.where(kept, prediction, -float("inf")), axis=1))
    rise_t, rise_p = grown_t - top_t, grown_p - top_p
    shrink_t, shrink_p = tl.exp(-rise_t), tl.exp(-rise_p)
    shift = rise_t - rise_p  # of every delta
    second = shrink_t * (second - sum_t * shift) + sum_p * (shrink_p - shrink_t)
    first = shrink_t * (first + sum_t * shift)
    target -= grown_t[:, None]
    prediction -= grown_p[:, None]
    delta = tl.where(kept, prediction - target, 0.0)
    exp_p = tl.exp(tl.where(kept, prediction, -float("inf")))
    exp_t = tl.exp(tl.where(kept, target, -float("inf")))
    by_delta = exp_t * delta
    first += tl.sum(by_delta, axis=1)
    excess = tl.where(tl.abs(delta) < 0.25, exp_t * _expm1_less(delta), (exp_p - exp_t) - by_delta)
    second += tl.sum(excess, axis=1)
    rest_p = _add_exponentials(exp_p, rise_p, shrink_p, rest_p)
    rest_t = _add_exponentials(exp_t, rise_t, shrink_t, rest_t)
    return grown_t, rest_t, grown_p, rest_p, first, second


@triton.jit
def _divergence(rest_t, first, second):
    """KL_i = log(sum_j P exp(delta)) - sum_j P delta from what ``_observe`` gathered."""
    sum_t = 1.0 + rest_t
    mean = first / sum_t
    growth = mean + second / sum_t
    # log1p: the rounding of 1 + growth cancels in the quotient.
    grown = 1.0 + growth
    still = grown == 1.0
    log1p = tl.where(still, growth, tl.log(grown) * growth / tl.where(still, 1.0, grown - 1.0))
    return log1p - mean


@triton.jit
def _lowest(inverse_temperature):
    """Below every a / tau, yet finite: where running maxima start."""
    return -1.5 * inverse_temperature


@triton.jit
def _softmaxes(rows, batch, items):
    """What ``_slope_and_pull`` needs of rows: largest and logarithm, twice, and KL_i."""
    inside = items < batch
    numbers = rows + 4 * batch.to(tl.int64) + items
    top_t = tl.load(numbers, mask=inside, other=0.0)
    log_t = tl.load(numbers + batch.to(tl.int64), mask=inside, other=0.0)
    top_p = tl.load(numbers + 2 * batch.to(tl.int64), mask=inside, other=0.0)
    log_p = tl.load(numbers + 3 * batch.to(tl.int64), mask=inside, other=0.0)
    divergence = tl.load(numbers + 4 * batch.to(tl.int64), mask=inside, other=0.0)
    return top_t, log_t, top_p, log_p, divergence


@triton.jit
def _scales(rows, batch, items, side: tl.constexpr):
    """Powers of two of items' rows, student (0) or teacher (1); zeros where absent."""
    return tl.load(rows + (2 * side * batch + items), mask=items < batch, other=0.0)


@triton.jit
def _inverse_lengths(rows, batch, items, side: tl.constexpr, EXACT: tl.constexpr):
    """Inverse lengths of items' rows, as sums of two where EXACT; zeros where absent."""
    inside = items < batch
    high = tl.load(rows + ((2 * side + 1) * batch + items), mask=inside, other=0.0)
    low = tl.zeros_like(high)
    if EXACT:
        low = tl.load(rows + ((10 + side) * batch.to(tl.int64) + items), mask=inside, other=0.0)
    return high, low


@triton.jit
def _add_slab(
    student, teacher, by_s, by_t, scale_s, scale_t, m, kept, columns, width, total,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    SCALED: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Total (columns, N) plus features of t_m times by_t and, where BOTH, of s_m times by_s."""
    t = _tile(
        teacher, teacher_row_stride, teacher_column_stride, m, columns, kept, width,
        scale_t, SCALED,
    )  # fmt: skip
    total = _dot_weights(t, by_t, total)
    if BOTH:
        s = _tile(
            student, student_row_stride, student_column_stride, m, columns, kept, width,
            scale_s, SCALED,
        )  # fmt: skip
        total = _dot_weights(s, by_s, total)
    return total


@triton.jit
def _store_slab(
    own, gradient, row_stride, column_stride, n, kept, columns, batch, width,
    scale, inverse, projection, factor, total,
):  # fmt: skip
    """Project a slab of gradients off its unit rows, and undo the rows' lengths."""
    own = _tile(own, row_stride, column_stride, n, columns, kept, width, scale, 0)
    unit = own.to(tl.float32) * scale[:, None] * inverse[:, None]
    total = (tl.trans(total) - unit * projection[:, None]) * (inverse * factor)[:, None]
    tl.store(
        gradient + n.to(tl.int64)[:, None] * width + columns[None, :],
        tl.where(kept[:, None], total * scale[:, None], 0.0),
        mask=(n < batch)[:, None] & (columns < width)[None, :],
    )


# --- small: one launch ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["masked", "student_wanted", "teacher_wanted"])
def _small_kernel(
    student, teacher, mask, loss, gradients, scratch, batch, width, masked, mask_stride,
    student_wanted, teacher_wanted, inverse_temperature, headroom,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """Loss and unit gradients in one program; all cosines (ITEMS, ITEMS) and sums are float32.

    Reads the features in columns of WIDTH: for the largest entry, for the cosines, and once more
    for the gradient, whose formulas stand above.
    """
    items = tl.arange(0, ITEMS)
    inside = items < batch
    kept = inside & (tl.load(mask + items * mask_stride, mask=inside & (masked != 0), other=1) != 0)
    both_kept = kept[:, None] & kept[None, :]
    largest_s, largest_t = tl.zeros((ITEMS,), tl.float32), tl.zeros((ITEMS,), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        s = _tile(
            student, student_row_stride, student_column_stride, items, columns, kept, width, 0.0, 0
        )
        t = _tile(
            teacher, teacher_row_stride, teacher_column_stride, items, columns, kept, width, 0.0, 0
        )
        largest_s = tl.maximum(largest_s, tl.max(tl.abs(s.to(tl.float32)), axis=1))
        largest_t = tl.maximum(largest_t, tl.max(tl.abs(t.to(tl.float32)), axis=1))
    scale_s, scale_t = _power_of_two(largest_s), _power_of_two(largest_t)

    squared_s, squared_t = tl.zeros((ITEMS,), tl.float32), tl.zeros((ITEMS,), tl.float32)
    a, x = tl.zeros((ITEMS, ITEMS), tl.float32), tl.zeros((ITEMS, ITEMS), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        s = _tile(
            student, student_row_stride, student_column_stride, items, columns, kept, width,
            scale_s, 1,
        )  # fmt: skip
        t = _tile(
            teacher, teacher_row_stride, teacher_column_stride, items, columns, kept, width,
            scale_t, 1,
        )  # fmt: skip
        squared_s += tl.sum(s.to(tl.float32) * s.to(tl.float32), axis=1)
        squared_t += tl.sum(t.to(tl.float32) * t.to(tl.float32), axis=1)
        a = _dot(t, tl.trans(t), a)
        x = _dot(t, tl.trans(s), x)
    high_s, low_s = _inverse_length(squared_s)
    high_t, low_t = _inverse_length(squared_t)
    exact: tl.constexpr = student.dtype.element_ty == tl.float32
    inverse_s, inverse_t = high_s + low_s, high_t + low_t
    if not exact:
        high_s, high_t = inverse_s, inverse_t

    # Through memory, in which a tile can be transposed and cut, and from which it comes back spread
    # over the threads once: tensor cores leave several copies in registers.
    square = items[:, None] * ITEMS + items[None, :]
    transposed = items[None, :] * ITEMS + items[:, None]
    slopes, pulls = scratch + 2 * ITEMS, scratch + 2 * ITEMS + ITEMS * ITEMS
    slopes_back, cosines = pulls + ITEMS * ITEMS, pulls + 2 * ITEMS * ITEMS
    tl.store(cosines + square, a)
    tl.store(slopes + square, x)
    tl.debug_barrier()
    a = _cosine(
        tl.load(cosines + square), high_t[:, None], low_t[:, None], high_t[None, :],
        low_t[None, :], exact,
    )  # fmt: skip
    x = _cosine(
        tl.load(slopes + square), high_t[:, None], low_t[:, None], high_s[None, :],
        low_s[None, :], exact,
    )  # fmt: skip
    zeros = tl.zeros((ITEMS,), tl.float32)
    target, prediction = a * inverse_temperature, x * inverse_temperature
    lowest = zeros + _lowest(inverse_temperature)
    top_t, rest_t, top_p, rest_p, _first, _second = _observe(
        target, prediction, lowest, zeros - 1.0, lowest, zeros - 1.0, zeros, zeros, both_kept
    )
    # An absent row has sums of 0; its logarithms need only be finite.
    log_t = _log_of_sum(tl.where(kept, rest_t, 0.0))
    log_p = _log_of_sum(tl.where(kept, rest_p, 0.0))
    slope, pull = _slope_and_pull(
        target, prediction, top_t[:, None], log_t[:, None], top_p[:, None], log_p[:, None],
        zeros[:, None], both_kept,
    )  # fmt: skip
    # sum_j slope_ij is 0; its rounding cancels that of the logarithms in sum_j P (log P - log Q).
    divergence = tl.sum(slope + pull, axis=1)
    share = 1.0 / tl.maximum(tl.sum(kept.to(tl.float32), axis=0), 1.0)
    tl.store(loss, tl.sum(divergence, axis=0) * share)

    if student_wanted + teacher_wanted != 0:
        along_s = tl.sum(slope * x, axis=0) * headroom
        along_t = zeros
        tl.store(scratch + items, tl.where(kept, scale_s, 0.0))
        tl.store(scratch + ITEMS + items, tl.where(kept, scale_t, 0.0))
        tl.debug_barrier()
        tl.store(slopes + square, slope * (inverse_t * headroom)[:, None])
        if teacher_wanted != 0:
            slope, pull = _slope_and_pull(
                target, prediction, top_t[:, None], log_t[:, None], top_p[:, None],
                log_p[:, None], divergence[:, None], both_kept,
            )  # fmt: skip
            tl.store(slopes_back + transposed, pull)
            tl.debug_barrier()
            pull += tl.load(slopes_back + square)
            along_t = (tl.sum(pull * a, axis=0) + tl.sum(slope * x, axis=1)) * headroom
            tl.store(pulls + square, pull * (inverse_t * headroom)[:, None])
            tl.debug_barrier()
            tl.store(slopes_back + transposed, slope * (inverse_s * headroom)[None, :])
        tl.debug_barrier()
        factor = tl.where(kept, share * inverse_temperature / headroom, 0.0)
        if student_wanted != 0:
            for start in range(0, width, SLAB):
                columns = start + tl.arange(0, SLAB)
                total = tl.zeros((SLAB, ITEMS), tl.float32)
                for few in range(0, ITEMS, 16):
                    m = few + tl.arange(0, 16)
                    scale_m = tl.load(scratch + ITEMS + m)
                    by_t = tl.load(slopes + m[:, None] * ITEMS + items[None, :])
                    total = _add_slab(
                        student, teacher, by_t, by_t, scale_m, scale_m, m, scale_m != 0.0,
                        columns, width, total, student_row_stride, teacher_row_stride,
                        student_column_stride, teacher_column_stride, 1, 0,
                    )  # fmt: skip
                _store_slab(
                    student, gradients, student_row_stride, student_column_stride, items, kept,
                    columns, batch, width, scale_s, inverse_s, along_s, factor, total,
                )  # fmt: skip
            gradients += batch * width
        if teacher_wanted != 0:
            for start in range(0, width, SLAB):
                columns = start + tl.arange(0, SLAB)
                total = tl.zeros((SLAB, ITEMS), tl.float32)
                for few in range(0, ITEMS, 16):
                    m = few + tl.arange(0, 16)
                    scale_s_m, scale_t_m = tl.load(scratch + m), tl.load(scratch + ITEMS + m)
                    by_t = tl.load(pulls + m[:, None] * ITEMS + items[None, :])
                    by_s = tl.load(slopes_back + m[:, None] * ITEMS + items[None, :])
                    total = _add_slab(
                        student, teacher, by_s, by_t, scale_s_m, scale_t_m, m, scale_t_m != 0.0,
                        columns, width, total, student_row_stride, teacher_row_stride,
                        student_column_stride, teacher_column_stride, 1, 1,
                    )  # fmt: skip
                _store_slab(
                    teacher, gradients, teacher_row_stride, teacher_column_stride, items, kept,
                    columns, batch, width, scale_t, inverse_t, along_t, factor, total,
                )  # fmt: skip


# --- streaming: rows of O(B) numbers --------------------------------------------------------------


@triton.jit(do_not_specialize=["side", "masked", "units_wanted"])
def _lengths_kernel(
    features, mask, rows, units, batch, width, side, masked, mask_stride, units_wanted,
    row_stride, column_stride, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Power of two and inverse length of ITEMS rows, in tiles of (ITEMS, WIDTH), float32.

    ``side`` is 0 for the student and 1 for the teacher. On request it writes the unit rows too.
    """
    items = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    inside = items < batch
    kept = inside & (tl.load(mask + items * mask_stride, mask=inside & (masked != 0), other=1) != 0)
    largest = tl.zeros((ITEMS,), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        x = _tile(features, row_stride, column_stride, items, columns, kept, width, 0.0, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=1))
    scale = _power_of_two(largest)
    squared = tl.zeros((ITEMS,), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        x = _tile(features, row_stride, column_stride, items, columns, kept, width, 0.0, 0)
        x = x.to(tl.float32) * scale[:, None]
        squared += tl.sum(x * x, axis=1)
    high, low = _inverse_length(squared)
    if features.dtype.element_ty != tl.float32:
        high, low = high + low, tl.zeros_like(low)
    stride = batch.to(tl.int64)
    numbers = rows + 2 * side * stride
    tl.store(numbers + items, tl.where(kept, scale, 0.0), mask=inside)
    tl.store(numbers + stride + items, high, mask=inside)
    tl.store(rows + (10 + side) * stride + items, low, mask=inside)
    if units_wanted != 0:
        units += side * stride * width
        for start in range(0, width, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            x = _tile(features, row_stride, column_stride, items, columns, kept, width, 0.0, 0)
            x = x.to(tl.float32) * scale[:, None]
            tl.store(
                units + items.to(tl.int64)[:, None] * width + columns[None, :],
                x * high[:, None] + x * low[:, None],
                mask=inside[:, None] & (columns < width)[None, :],
            )


@triton.jit
def _extraordinary(rows, batch):
    """1 if the largest entry of some row is far from 1, else 0. Absent items have the scale 0."""
    stride = batch.to(tl.int64)
    found = tl.zeros((_FLAG_BLOCK,), tl.int32)
    for start in range(0, batch, _FLAG_BLOCK):
        items = start + tl.arange(0, _FLAG_BLOCK)
        for side in tl.static_range(2):
            scale = tl.load(rows + 2 * side * stride + items, mask=items < batch, other=0.0)
            far = (scale > _ORDINARY) | ((scale < 1.0 / _ORDINARY) & (scale > 0.0))
            found |= far.to(tl.int32)
    return tl.max(found, axis=0)


@triton.jit
def _cosines(
    student, teacher, rows, batch, width, m, n,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    SCALED: tl.constexpr, THREE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Cosines (M, N) of t_m and t_n, of t_m and s_n and, where THREE, of s_m and t_n."""
    scale_s_m, scale_t_m = _scales(rows, batch, m, 0), _scales(rows, batch, m, 1)
    scale_s_n, scale_t_n = _scales(rows, batch, n, 0), _scales(rows, batch, n, 1)
    kept_m, kept_n = scale_t_m != 0.0, scale_t_n != 0.0
    exact: tl.constexpr = student.dtype.element_ty == tl.float32
    tt, ts = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    st = tl.zeros((M, N), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        t_m = _tile(
            teacher, teacher_row_stride, teacher_column_stride, m, columns, kept_m, width,
            scale_t_m, SCALED,
        )  # fmt: skip
        t_n = _tile(
            teacher, teacher_row_stride, teacher_column_stride, n, columns, kept_n, width,
            scale_t_n, SCALED,
        )  # fmt: skip
        s_n = _tile(
            student, student_row_stride, student_column_stride, n, columns, kept_n, width,
            scale_s_n, SCALED,
        )  # fmt: skip
        tt = _dot(t_m, tl.trans(t_n), tt)
        ts = _dot(t_m, tl.trans(s_n), ts)
        if THREE:
            s_m = _tile(
                student, student_row_stride, student_column_stride, m, columns, kept_m, width,
                scale_s_m, SCALED,
            )  # fmt: skip
            st = _dot(s_m, tl.trans(t_n), st)
    if SCALED:  # the features are in those units already
        scale_s_m, scale_t_m, scale_s_n, scale_t_n = 1.0, 1.0, 1.0, 1.0
    high_m, low_m = _inverse_lengths(rows, batch, m, 1, exact)
    high_m, low_m = (high_m * scale_t_m)[:, None], (low_m * scale_t_m)[:, None]
    high_n, low_n = _inverse_lengths(rows, batch, n, 1, exact)
    high_n, low_n = (high_n * scale_t_n)[None, :], (low_n * scale_t_n)[None, :]
    tt = _cosine(tt, high_m, low_m, high_n, low_n, exact)
    if THREE:
        high, low = _inverse_lengths(rows, batch, m, 0, exact)
        high, low = (high * scale_s_m)[:, None], (low * scale_s_m)[:, None]
        # Teachers first, as below: to the bit what the pass over rows n made of the pair.
        st = _cosine(st, high_n, low_n, high, low, exact)
    high, low = _inverse_lengths(rows, batch, n, 0, exact)
    high, low = (high * scale_s_n)[None, :], (low * scale_s_n)[None, :]
    ts = _cosine(ts, high_m, low_m, high, low, exact)
    return tt, ts, st


@triton.jit
def _statistics(
    student, teacher, rows, batch, width, inverse_temperature,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    SCALED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * M + tl.arange(0, M)
    stride = batch.to(tl.int64)
    kept_m = _scales(rows, batch, m, 1) != 0.0
    first, second = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    rest_t, rest_p = first - 1.0, first - 1.0
    top_t, top_p = first + _lowest(inverse_temperature), first + _lowest(inverse_temperature)
    for start in range(0, batch, N):
        n = start + tl.arange(0, N)
        a, x, _none = _cosines(
            student, teacher, rows, batch, width, m, n, student_row_stride, teacher_row_stride,
            student_column_stride, teacher_column_stride, SCALED, 0, M, N, WIDTH,
        )  # fmt: skip
        kept_n = _scales(rows, batch, n, 1) != 0.0
        top_t, rest_t, top_p, rest_p, first, second = _observe(
            a * inverse_temperature, x * inverse_temperature, top_t, rest_t, top_p, rest_p,
            first, second, kept_m[:, None] & kept_n[None, :],
        )  # fmt: skip
    rest_t, rest_p = tl.where(kept_m, rest_t, 0.0), tl.where(kept_m, rest_p, 0.0)
    tl.store(rows + 4 * stride + m, top_t, mask=m < batch)
    tl.store(rows + 5 * stride + m, _log_of_sum(rest_t), mask=m < batch)
    tl.store(rows + 6 * stride + m, top_p, mask=m < batch)
    tl.store(rows + 7 * stride + m, _log_of_sum(rest_p), mask=m < batch)
    tl.store(rows + 8 * stride + m, _divergence(rest_t, first, second), mask=m < batch)


@triton.jit(do_not_specialize=["width", "student_row_stride", "teacher_row_stride"])
def _statistics_kernel(
    student, teacher, rows, batch, width, inverse_temperature,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Logarithms of the sums and KL_i of M rows i, over tiles (M, N) of cosines, float32."""
    if ALIGNED:
        width = width // 8 * 8
        student_row_stride = student_row_stride // 8 * 8
        teacher_row_stride = teacher_row_stride // 8 * 8
    # Products of two float16 numbers stay in range. Of float32, scaling is cheap beside a product.
    if student.dtype.element_ty == tl.float32:
        _statistics(
            student, teacher, rows, batch, width, inverse_temperature, student_row_stride,
            teacher_row_stride, student_column_stride, teacher_column_stride, 1, M, N, WIDTH,
        )  # fmt: skip
    elif student.dtype.element_ty == tl.float16 or _extraordinary(rows, batch) == 0:
        _statistics(
            student, teacher, rows, batch, width, inverse_temperature, student_row_stride,
            teacher_row_stride, student_column_stride, teacher_column_stride, 0, M, N, WIDTH,
        )  # fmt: skip
    else:
        _statistics(
            student, teacher, rows, batch, width, inverse_temperature, student_row_stride,
            teacher_row_stride, student_column_stride, teacher_column_stride, 1, M, N, 16,
        )  # fmt: skip


@triton.jit
def _loss_kernel(rows, loss, batch, ITEMS: tl.constexpr):
    """Mean of KL_i, and every item's weight in it, by one program in blocks of ITEMS, float32."""
    stride = batch.to(tl.int64)
    sums, counts = tl.zeros((ITEMS,), tl.float32), tl.zeros((ITEMS,), tl.float32)
    for start in range(0, batch, ITEMS):
        items = start + tl.arange(0, ITEMS)
        inside = items < batch
        sums += tl.load(rows + 8 * stride + items, mask=inside, other=0.0)
        counts += (tl.load(rows + items, mask=inside, other=0.0) != 0.0).to(tl.float32)
    share = 1.0 / tl.maximum(tl.sum(counts, axis=0), 1.0)
    tl.store(loss, tl.sum(sums, axis=0) * share)
    for start in range(0, batch, ITEMS):
        items = start + tl.arange(0, ITEMS)
        inside = items < batch
        kept = tl.load(rows + items, mask=inside, other=0.0) != 0.0
        tl.store(rows + 9 * stride + items, tl.where(kept, share, 0.0), mask=inside)


@triton.jit
def _streaming_gradient(
    student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature, headroom,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    OF_TEACHER: tl.constexpr, COSINES_SCALED: tl.constexpr, SLABS_SCALED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    first = tl.program_id(1) * (SLAB * SLABS)
    stride = batch.to(tl.int64)
    kept_n = _scales(rows, batch, n, 1) != 0.0
    exact: tl.constexpr = student.dtype.element_ty == tl.float32
    projection = tl.zeros((N,), tl.float32)
    total_0, total_1 = tl.zeros((SLAB, N), tl.float32), tl.zeros((SLAB, N), tl.float32)
    total_2 = tl.zeros((SLAB, N), tl.float32)
    for start in range(0, batch, M):
        m = start + tl.arange(0, M)
        tt, ts, st = _cosines(
            student, teacher, rows, batch, width, m, n, student_row_stride, teacher_row_stride,
            student_column_stride, teacher_column_stride, COSINES_SCALED, OF_TEACHER, M, N, WIDTH,
        )  # fmt: skip
        scale_s_m, scale_t_m = _scales(rows, batch, m, 0), _scales(rows, batch, m, 1)
        kept_m = scale_t_m != 0.0
        kept = kept_m[:, None] & kept_n[None, :]
        top_t, log_t, top_p, log_p, divergence = _softmaxes(rows, batch, m)
        slope, pull = _slope_and_pull(
            tt * inverse_temperature, ts * inverse_temperature, top_t[:, None], log_t[:, None],
            top_p[:, None], log_p[:, None], divergence[:, None], kept,
        )  # fmt: skip
        by_t, by_s = slope, slope
        if OF_TEACHER:
            top_t, log_t, top_p, log_p, divergence = _softmaxes(rows, batch, n)
            by_s, pull_n = _slope_and_pull(
                tt * inverse_temperature, st * inverse_temperature, top_t[None, :],
                log_t[None, :], top_p[None, :], log_p[None, :], divergence[None, :], kept,
            )  # fmt: skip
            by_t = pull + pull_n
            projection += tl.sum(by_t * tt + by_s * st, axis=0)
        else:
            projection += tl.sum(slope * ts, axis=0)
        high, low = _inverse_lengths(rows, batch, m, 1, exact)
        by_t *= ((high + low) * (1.0 if SLABS_SCALED else scale_t_m) * headroom)[:, None]
        if OF_TEACHER:
            high, low = _inverse_lengths(rows, batch, m, 0, exact)
            by_s *= ((high + low) * (1.0 if SLABS_SCALED else scale_s_m) * headroom)[:, None]
        columns = first + tl.arange(0, SLAB)
        total_0 = _add_slab(
            student, teacher, by_s, by_t, scale_s_m, scale_t_m, m, kept_m, columns, width, total_0,
            student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
            SLABS_SCALED, OF_TEACHER,
        )  # fmt: skip
        if SLABS > 1:
            total_1 = _add_slab(
                student, teacher, by_s, by_t, scale_s_m, scale_t_m, m, kept_m, columns + SLAB,
                width, total_1, student_row_stride, teacher_row_stride, student_column_stride,
                teacher_column_stride, SLABS_SCALED, OF_TEACHER,
            )  # fmt: skip
        if SLABS > 2:
            total_2 = _add_slab(
                student, teacher, by_s, by_t, scale_s_m, scale_t_m, m, kept_m, columns + 2 * SLAB,
                width, total_2, student_row_stride, teacher_row_stride, student_column_stride,
                teacher_column_stride, SLABS_SCALED, OF_TEACHER,
            )  # fmt: skip
    factor = tl.load(rows + 9 * stride + n, mask=n < batch, other=0.0)
    factor *= tl.load(grad_output).to(tl.float32) * (inverse_temperature / headroom)
    projection *= headroom
    columns = first + tl.arange(0, SLAB)
    scale = _scales(rows, batch, n, OF_TEACHER)
    high, low = _inverse_lengths(rows, batch, n, OF_TEACHER, exact)
    inverse = high + low
    if OF_TEACHER:
        own, row_stride, column_stride = teacher, teacher_row_stride, teacher_column_stride
    else:
        own, row_stride, column_stride = student, student_row_stride, student_column_stride
    _store_slab(
        own, gradient, row_stride, column_stride, n, kept_n, columns, batch, width,
        scale, inverse, projection, factor, total_0,
    )  # fmt: skip
    if SLABS > 1:
        _store_slab(
            own, gradient, row_stride, column_stride, n, kept_n, columns + SLAB, batch, width,
            scale, inverse, projection, factor, total_1,
        )  # fmt: skip
    if SLABS > 2:
        _store_slab(
            own, gradient, row_stride, column_stride, n, kept_n, columns + 2 * SLAB, batch, width,
            scale, inverse, projection, factor, total_2,
        )  # fmt: skip


@triton.jit
def _held_gradient(
    student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature, headroom,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    M: tl.constexpr, N: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """``_streaming_gradient`` of students whose whole rows, three times SLAB, one program holds.

    Items n stay in shared memory, and those of m come there once to be in all three products: a
    third of what the general form reads for as many products.
    """
    n = tl.program_id(0) * N + tl.arange(0, N)
    stride = batch.to(tl.int64)
    scale_s_n, scale_t_n = _scales(rows, batch, n, 0), _scales(rows, batch, n, 1)
    kept_n = scale_t_n != 0.0
    inverse_s_n, _rest_s = _inverse_lengths(rows, batch, n, 0, 0)
    inverse_t_n, _rest_t = _inverse_lengths(rows, batch, n, 1, 0)
    by_s_n, by_t_n = inverse_s_n * scale_s_n, inverse_t_n * scale_t_n
    one = tl.arange(0, SLAB)
    two, three = one + SLAB, one + 2 * SLAB
    s_row, t_row, s_column, t_column = (
        student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride
    )  # fmt: skip
    t_n_1 = _tile(teacher, t_row, t_column, n, one, kept_n, width, 0.0, 0)
    s_n_1 = _tile(student, s_row, s_column, n, one, kept_n, width, 0.0, 0)
    t_n_2 = _tile(teacher, t_row, t_column, n, two, kept_n, width, 0.0, 0)
    s_n_2 = _tile(student, s_row, s_column, n, two, kept_n, width, 0.0, 0)
    t_n_3 = _tile(teacher, t_row, t_column, n, three, kept_n, width, 0.0, 0)
    s_n_3 = _tile(student, s_row, s_column, n, three, kept_n, width, 0.0, 0)
    total_1, total_2 = tl.zeros((SLAB, N), tl.float32), tl.zeros((SLAB, N), tl.float32)
    total_3 = tl.zeros((SLAB, N), tl.float32)
    for start in range(0, batch, M):
        m = start + tl.arange(0, M)
        scale_m = _scales(rows, batch, m, 1)
        kept_m = scale_m != 0.0
        t_1 = _tile(teacher, t_row, t_column, m, one, kept_m, width, 0.0, 0)
        t_2 = _tile(teacher, t_row, t_column, m, two, kept_m, width, 0.0, 0)
        t_3 = _tile(teacher, t_row, t_column, m, three, kept_m, width, 0.0, 0)
        a = _dot(t_1, tl.trans(t_n_1), tl.zeros((M, N), tl.float32))
        a = _dot(t_2, tl.trans(t_n_2), a)
        a = _dot(t_3, tl.trans(t_n_3), a)
        x = _dot(t_1, tl.trans(s_n_1), tl.zeros((M, N), tl.float32))
        x = _dot(t_2, tl.trans(s_n_2), x)
        x = _dot(t_3, tl.trans(s_n_3), x)
        inverse_m, _rest_m = _inverse_lengths(rows, batch, m, 1, 0)
        inverse_m *= scale_m
        a *= inverse_m[:, None] * by_t_n[None, :]
        x *= inverse_m[:, None] * by_s_n[None, :]
        top_t, log_t, top_p, log_p, _divergence = _softmaxes(rows, batch, m)
        slope, _pull = _slope_and_pull(
            a * inverse_temperature, x * inverse_temperature, top_t[:, None], log_t[:, None],
            top_p[:, None], log_p[:, None], 0.0, kept_m[:, None] & kept_n[None, :],
        )  # fmt: skip
        slope *= (inverse_m * headroom)[:, None]
        high = slope.to(t_1.dtype)
        low = (slope - high.to(tl.float32)).to(t_1.dtype)
        total_1 = _dot(tl.trans(t_1), low, _dot(tl.trans(t_1), high, total_1))
        total_2 = _dot(tl.trans(t_2), low, _dot(tl.trans(t_2), high, total_2))
        total_3 = _dot(tl.trans(t_3), low, _dot(tl.trans(t_3), high, total_3))
    scale_s_n = _scales(rows, batch, n, 0)
    inverse_s_n, _rest_s = _inverse_lengths(rows, batch, n, 0, 0)
    factor = tl.load(rows + 9 * stride + n, mask=n < batch, other=0.0)
    factor *= tl.load(grad_output).to(tl.float32) * (inverse_temperature / headroom)
    # Of a whole row the projection is at hand, and need not be gathered from the cosines.
    unit = (inverse_s_n * scale_s_n)[None, :]
    projection = tl.sum(total_1 * tl.trans(s_n_1).to(tl.float32) * unit, axis=0)
    projection += tl.sum(total_2 * tl.trans(s_n_2).to(tl.float32) * unit, axis=0)
    projection += tl.sum(total_3 * tl.trans(s_n_3).to(tl.float32) * unit, axis=0)
    _store_slab(
        student, gradient, s_row, s_column, n, kept_n, one, batch, width,
        scale_s_n, inverse_s_n, projection, factor, total_1,
    )  # fmt: skip
    _store_slab(
        student, gradient, s_row, s_column, n, kept_n, two, batch, width,
        scale_s_n, inverse_s_n, projection, factor, total_2,
    )  # fmt: skip
    _store_slab(
        student, gradient, s_row, s_column, n, kept_n, three, batch, width,
        scale_s_n, inverse_s_n, projection, factor, total_3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["width", "student_row_stride", "teacher_row_stride"])
def _streaming_gradient_kernel(
    student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature, headroom,
    student_row_stride, teacher_row_stride, student_column_stride, teacher_column_stride,
    OF_TEACHER: tl.constexpr, ALIGNED: tl.constexpr, HELD: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Gradients ds of N students n, or dt of N teachers n, in SLABS times SLAB columns.

    Loops over all items m; cosines are tiles (M, N), the gradient stands transposed in registers,
    (SLAB, N) times SLABS (a tile of 64 rows or more is what the tensor cores of sm_90 take), all
    float32. With the letters of the formulas above, a student n is a column j and m runs over i:

        ds_n = sum_m slope_mn t_m
        dt_n = sum_m (pull_mn + pull_nm) t_m + slope_nm s_m

    times 1 / tau n; projected off the own unit row u: d - u (u.d), where u.d is the same sum with
    cosines for vectors.
    """
    if ALIGNED:
        width = width // 8 * 8
        student_row_stride = student_row_stride // 8 * 8
        teacher_row_stride = teacher_row_stride // 8 * 8
    if student.dtype.element_ty == tl.float32:
        _streaming_gradient(
            student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature,
            headroom, student_row_stride, teacher_row_stride, student_column_stride,
            teacher_column_stride,
            OF_TEACHER, 1, 1, M, N, WIDTH, SLAB, SLABS,
        )  # fmt: skip
    elif student.dtype.element_ty == tl.float16:
        # Products stay in range; weights do so only of rows in units of their largest entry.
        _streaming_gradient(
            student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature,
            headroom, student_row_stride, teacher_row_stride, student_column_stride,
            teacher_column_stride,
            OF_TEACHER, 0, 1, M, N, WIDTH, SLAB, SLABS,
        )  # fmt: skip
    elif _extraordinary(rows, batch) == 0:
        if HELD:
            _held_gradient(
                student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature,
                headroom, student_row_stride, teacher_row_stride, student_column_stride,
                teacher_column_stride,
                M, N, SLAB,
            )  # fmt: skip
        else:
            _streaming_gradient(
                student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature,
                headroom, student_row_stride, teacher_row_stride, student_column_stride,
                teacher_column_stride,
                OF_TEACHER, 0, 0, M, N, WIDTH, SLAB, SLABS,
            )  # fmt: skip
    else:
        _streaming_gradient(
            student, teacher, rows, grad_output, gradient, batch, width, inverse_temperature,
            headroom, student_row_stride, teacher_row_stride, student_column_stride,
            teacher_column_stride,
            OF_TEACHER, 1, 1, 16, N, 16, SLAB, SLABS,
        )  # fmt: skip


# --- chunked: what cuBLAS leaves over -------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "slopes_wanted", "pulls_wanted"])
def _rows_kernel(
    targets, predictions, rows, first, batch, inverse_temperature, slopes_wanted, pulls_wanted,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """KL_i of one row of cosines (1, B), in blocks of (1, WIDTH), float32.

    On request the row's slope replaces its x, and pull its a. The second reading finds the row in
    the L2 cache.
    """
    here = tl.program_id(0)
    item = first + here + tl.arange(0, 1)
    stride = batch.to(tl.int64)
    kept_row = tl.load(rows + item) != 0.0
    targets += here.to(tl.int64) * batch
    predictions += here.to(tl.int64) * batch
    first_sum, second_sum = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    rest_t, rest_p = first_sum - 1.0, first_sum - 1.0
    top_t = first_sum + _lowest(inverse_temperature)
    top_p = first_sum + _lowest(inverse_temperature)
    for start in range(0, batch, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < batch
        kept = kept_row[:, None] & (tl.load(rows + columns, mask=inside, other=0.0) != 0.0)[None, :]
        a = tl.load(targets + columns, mask=inside, other=0.0)[None, :]
        x = tl.load(predictions + columns, mask=inside, other=0.0)[None, :]
        top_t, rest_t, top_p, rest_p, first_sum, second_sum = _observe(
            a * inverse_temperature, x * inverse_temperature, top_t, rest_t, top_p, rest_p,
            first_sum, second_sum, kept,
        )  # fmt: skip
    rest_t, rest_p = tl.where(kept_row, rest_t, 0.0), tl.where(kept_row, rest_p, 0.0)
    divergence = _divergence(rest_t, first_sum, second_sum)
    tl.store(rows + 8 * stride + item, divergence)
    if slopes_wanted != 0:
        log_t, log_p = _log_of_sum(rest_t), _log_of_sum(rest_p)
        for start in range(0, batch, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < batch
            there = tl.load(rows + columns, mask=inside, other=0.0) != 0.0
            a = tl.load(targets + columns, mask=inside, other=0.0)[None, :]
            x = tl.load(predictions + columns, mask=inside, other=0.0)[None, :]
            slope, pull = _slope_and_pull(
                a * inverse_temperature, x * inverse_temperature, top_t[:, None], log_t[:, None],
                top_p[:, None], log_p[:, None], divergence[:, None],
                kept_row[:, None] & there[None, :],
            )  # fmt: skip
            tl.store(predictions + columns[None, :], slope, mask=inside[None, :])
            if pulls_wanted != 0:
                tl.store(targets + columns[None, :], pull, mask=inside[None, :])


@triton.jit(do_not_specialize=["side"])
def _project_kernel(
    units, gradients, rows, batch, width, side, inverse_temperature,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """In place, in tiles of (ITEMS, WIDTH), float32: (d - u (u.d)) / length, u the unit row."""
    items = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    inside = items < batch
    stride = batch.to(tl.int64)
    scale = tl.load(rows + 2 * side * stride + items, mask=inside, other=0.0)
    inverse = tl.load(rows + (2 * side + 1) * stride + items, mask=inside, other=0.0)
    inverse += tl.load(rows + (10 + side) * stride + items, mask=inside, other=0.0)
    kept = scale != 0.0
    share = tl.load(rows + 9 * stride + items, mask=inside, other=0.0)
    factor = inverse * share * inverse_temperature
    units += side * stride * width
    along = tl.zeros((ITEMS,), tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        u = _tile(units, width, 1, items, columns, kept, width, 0.0, 0)
        d = _tile(gradients, width, 1, items, columns, kept, width, 0.0, 0)
        along += tl.sum(u * d, axis=1)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        u = _tile(units, width, 1, items, columns, kept, width, 0.0, 0)
        d = _tile(gradients, width, 1, items, columns, kept, width, 0.0, 0)
        projected = (d - u * along[:, None]) * factor[:, None] * scale[:, None]
        # Where an item is absent, the NaN of another may have come: 0 NaN is NaN.
        tl.store(
            gradients + items.to(tl.int64)[:, None] * width + columns[None, :],
            tl.where(kept[:, None], projected, 0.0),
            mask=inside[:, None] & (columns < width)[None, :],
        )


# --- launching ------------------------------------------------------------------------------------

_Plan = Literal["small", "streaming", "chunked"]
_HALVES = (torch.float16, torch.bfloat16)


class _SmallTile(NamedTuple):
    items: int
    width: int
    slab: int
    num_warps: int
    num_stages: int


class _StatisticsTile(NamedTuple):
    m: int
    n: int
    width: int
    num_warps: int
    num_stages: int


class _GradientTile(NamedTuple):
    m: int
    n: int
    width: int
    slab: int
    slabs: int
    num_warps: int
    num_stages: int


# IEEE products hold the whole depth of a tile in registers, so that must be little.
_SMALL_IEEE_TILES = (_SmallTile(16, 32, 64, 4, 3), _SmallTile(64, 16, 64, 8, 3))
_SMALL_HALF_TILES = (_SmallTile(16, 128, 128, 4, 3), _SmallTile(64, 32, 64, 8, 3))

# Of aligned features, which are loaded 16 bytes at a time, and of others. A program keeps as many
# columns of gradients as its registers hold, because all programs of a row of them make the same
# cosines: 768 are one program's.
_STATISTICS_HALF_TILES = {
    True: _StatisticsTile(64, 128, 32, 8, 4),
    False: _StatisticsTile(32, 32, 32, 4, 3),
}
_STATISTICS_IEEE_TILES = {
    True: _StatisticsTile(64, 64, 16, 8, 3),
    False: _StatisticsTile(64, 32, 16, 8, 3),
}
_STUDENT_HALF_TILES = {
    True: (
        _GradientTile(64, 32, 64, 256, 1, 8, 2),
        _GradientTile(32, 16, 64, 256, 3, 8, 2),
    ),
    False: (_GradientTile(16, 16, 32, 256, 2, 8, 2),),
}
_STUDENT_IEEE_TILES = {
    True: (_GradientTile(16, 32, 16, 256, 1, 8, 2), _GradientTile(16, 16, 16, 256, 3, 8, 2)),
    False: (_GradientTile(16, 16, 16, 256, 2, 8, 2),),
}
_TEACHER_HALF_TILES = {
    True: (_GradientTile(64, 16, 64, 256, 1, 8, 2), _GradientTile(16, 16, 64, 256, 3, 8, 2)),
    False: (_GradientTile(16, 16, 16, 128, 2, 8, 2),),
}
_TEACHER_IEEE_TILES = {
    True: (_GradientTile(16, 16, 16, 128, 3, 8, 2),),
    False: (_GradientTile(16, 16, 16, 256, 1, 8, 2),),
}
_ROWS_TILE = (8, 256)
_LOSS_BLOCK = 1024
_ROW_BLOCK = 1024


def _plan(batch: int, dtype: torch.dtype) -> _Plan:
    """Which plan serves a batch, by ``_PLAN`` or by arithmetic (see the module); not measured.

    One program is a 132nd of a large GPU, but one launch: up to 64 items, launches cost more. Half
    precision streams on the tensor cores, where the reference, casting first, never is. IEEE
    float32 runs beside them, and there cuBLAS needs fewer products and makes them faster: it is
    taken as long as the reference's five matrices of B x B would fit on a GPU too (20 GiB at
    ``_CHUNKED_BATCH``).
    """
    if batch <= _SMALL_BATCH:
        return "small"
    if _PLAN != "auto":
        return _PLAN
    return "streaming" if dtype in _HALVES or batch > _CHUNKED_BATCH else "chunked"


def _small_tiles(dtype: torch.dtype) -> tuple[_SmallTile, ...]:
    return _SMALL_HALF_TILES if dtype in _HALVES else _SMALL_IEEE_TILES


def _statistics_tile(dtype: torch.dtype, *, aligned: bool) -> _StatisticsTile:
    return (_STATISTICS_HALF_TILES if dtype in _HALVES else _STATISTICS_IEEE_TILES)[aligned]


def _gradient_tiles(
    dtype: torch.dtype, *, aligned: bool, of_teacher: bool
) -> tuple[_GradientTile, ...]:
    if dtype in _HALVES:
        return (_TEACHER_HALF_TILES if of_teacher else _STUDENT_HALF_TILES)[aligned]
    return (_TEACHER_IEEE_TILES if of_teacher else _STUDENT_IEEE_TILES)[aligned]


def _gradient_tile(
    width: int, dtype: torch.dtype, *, aligned: bool, of_teacher: bool
) -> _GradientTile:
    tiles = _gradient_tiles(dtype, aligned=aligned, of_teacher=of_teacher)
    return next((tile for tile in tiles if width <= tile.slab * tile.slabs), tiles[-1])


def _is_held(
    tile: _GradientTile, width: int, dtype: torch.dtype, aligned: bool, of_teacher: bool
) -> bool:
    """Whether a program holds whole rows; not of float16, whose weights need rows in units."""
    whole = tile.slabs == 3 and width <= tile.slab * tile.slabs
    return dtype is torch.bfloat16 and aligned and not of_teacher and whole


def _aligned(*matrices: Tensor) -> bool:
    """Whether rows can be loaded 16 bytes at a time."""
    return all(
        matrix.stride(1) == 1
        and matrix.stride(0) % 8 == matrix.shape[1] % 8 == 0
        and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )


def _headroom(dtype: torch.dtype, temperature: float, *, of_teacher: bool) -> float:
    """A power of two that keeps weights at most 2^15 of float16's 2^16, and above its underflow.

    A slope is at most 1, the sum of two pulls 16 / tau: log P and log Q are within 2 / tau of
    -log n, so that their difference and its mean KL_i are within 4 / tau of 0.
    """
    if dtype is not torch.float16:
        return 1.0
    bound = max(1.0, 16.0 / temperature) if of_teacher else 1.0
    return 2.0 ** (15 - math.ceil(math.log2(bound)))


def saved_shapes(
    batch: int,
    width: int,
    *,
    dtype: torch.dtype,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that ``forward`` saves for ``backward``.

    Args:
        batch: B.
        width: d.
        student_needs_grad: whether the student gets a gradient.
        teacher_needs_grad: whether the teacher does.
        dtype: what the dtypes of student and teacher promote to: the plan depends on it.
    """
    gradients = student_needs_grad + teacher_needs_grad
    if not gradients:
        return (0,), (0,)
    if _plan(batch, dtype) == "streaming":
        return (_NUMBERS, batch), (0,)
    return (0,), (gradients, batch, width)


def forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and what ``backward`` needs beside the features."""
    plan = _plan(len(student), torch.promote_types(student.dtype, teacher.dtype))
    with device_of(student):
        if plan == "streaming":
            loss, rows = _forward_streaming(student, teacher, mask, temperature)
            if not (student_needs_grad or teacher_needs_grad):
                rows = rows.new_empty(0)
            return loss, rows, rows.new_empty(0)
        in_one = _forward_small if plan == "small" else _forward_chunked
        loss, gradients = in_one(
            student, teacher, mask, temperature, student_needs_grad, teacher_needs_grad
        )
    return loss, loss.new_empty(0), gradients


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
    """Gradients in the dtypes of their inputs; grad_output is read on the device."""
    if gradients.ndim == 3:
        return (
            _scaled(gradients[0], grad_output, student.dtype) if student_needs_grad else None,
            _scaled(gradients[-1], grad_output, teacher.dtype) if teacher_needs_grad else None,
        )
    with device_of(student):
        return (
            _backward_streaming(grad_output, student, teacher, rows, temperature, of_teacher=False)
            if student_needs_grad
            else None,
            _backward_streaming(grad_output, student, teacher, rows, temperature, of_teacher=True)
            if teacher_needs_grad
            else None,
        )


def _of_one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return (
        (student, teacher) if student.dtype is teacher.dtype else (student.float(), teacher.float())
    )


def _scaled(gradient: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """One launch, rounding after the product."""
    return torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=dtype))


def _mask_arguments(mask: Tensor | None, student: Tensor) -> tuple[Tensor, int, int]:
    """Bytes of the mask, whether there is one, and its stride; without one nothing is read."""
    if mask is None:
        return torch.empty(1, dtype=torch.uint8, device=student.device), 0, 0
    return mask.view(torch.uint8), 1, mask.stride(0)


def _strides(student: Tensor, teacher: Tensor) -> tuple[int, int, int, int]:
    (student_row, student_column), (teacher_row, teacher_column) = (
        student.stride(),
        teacher.stride(),
    )
    return student_row, teacher_row, student_column, teacher_column


def _forward_small(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    student, teacher = _of_one_dtype(student, teacher)
    # Other layouts are copied: their addresses would take registers that are not there.
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    batch, width = student.shape
    tile = next(tile for tile in _small_tiles(student.dtype) if batch <= tile.items)
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    wanted = student_needs_grad + teacher_needs_grad
    gradients = loss.new_empty((wanted, batch, width) if wanted else 0)
    scratch = loss.new_empty((2 + 4 * tile.items) * tile.items)
    mask, *masked = _mask_arguments(mask, student)
    _small_kernel[(1,)](
        student,
        teacher,
        mask,
        loss,
        gradients,
        scratch,
        batch,
        width,
        *masked,
        int(student_needs_grad),
        int(teacher_needs_grad),
        1.0 / temperature,
        _headroom(student.dtype, temperature, of_teacher=teacher_needs_grad),
        *_strides(student, teacher),
        ITEMS=tile.items,
        WIDTH=tile.width,
        SLAB=tile.slab,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return loss, gradients


def _measure_lengths(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, units: Tensor | None
) -> Tensor:
    """The numbers (8, B) of rows with those of their lengths, and their unit rows (2, B, d)."""
    batch, width = student.shape
    rows = torch.empty(_NUMBERS, batch, dtype=torch.float32, device=student.device)
    mask, *masked = _mask_arguments(mask, student)
    items, columns = _ROWS_TILE
    for side, features in enumerate((student, teacher)):
        _lengths_kernel[(triton.cdiv(batch, items),)](
            features,
            mask,
            rows,
            rows if units is None else units,
            batch,
            width,
            side,
            *masked,
            int(units is not None),
            *features.stride(),
            ITEMS=items,
            WIDTH=columns,
            num_warps=4,
        )
    return rows


def _mean_divergence(rows: Tensor) -> Tensor:
    loss = rows.new_empty(())
    _loss_kernel[(1,)](rows, loss, rows.shape[1], ITEMS=_LOSS_BLOCK, num_warps=4)
    return loss


def _forward_streaming(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    student, teacher = _of_one_dtype(student, teacher)
    batch, width = student.shape
    rows = _measure_lengths(student, teacher, mask, units=None)
    aligned = _aligned(student, teacher)
    tile = _statistics_tile(student.dtype, aligned=aligned)
    _statistics_kernel[(triton.cdiv(batch, tile.m),)](
        student,
        teacher,
        rows,
        batch,
        width,
        1.0 / temperature,
        *_strides(student, teacher),
        ALIGNED=int(aligned),
        M=tile.m,
        N=tile.n,
        WIDTH=tile.width,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return _mean_divergence(rows), rows


def _backward_streaming(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    temperature: float,
    *,
    of_teacher: bool,
) -> Tensor:
    batch, width = student.shape
    stored = (teacher if of_teacher else student).dtype
    student, teacher = _of_one_dtype(student, teacher)
    dtype = student.dtype
    aligned = _aligned(student, teacher)
    tile = _gradient_tile(width, dtype, aligned=aligned, of_teacher=of_teacher)
    # The interpreter cuts bfloat16 off instead of rounding it.
    gradient = torch.empty(
        batch, width, dtype=torch.float32 if INTERPRETED else dtype, device=student.device
    )
    grid = (triton.cdiv(batch, tile.n), triton.cdiv(width, tile.slab * tile.slabs))
    _streaming_gradient_kernel[grid](
        student,
        teacher,
        rows,
        grad_output,
        gradient,
        batch,
        width,
        1.0 / temperature,
        _headroom(dtype, temperature, of_teacher=of_teacher),
        *_strides(student, teacher),
        OF_TEACHER=int(of_teacher),
        ALIGNED=int(aligned),
        HELD=int(_is_held(tile, width, dtype, aligned, of_teacher)),
        M=tile.m,
        N=tile.n,
        WIDTH=tile.width,
        SLAB=tile.slab,
        SLABS=tile.slabs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return gradient.to(stored)


def _forward_chunked(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_needs_grad: bool,
    teacher_needs_grad: bool,
    *,
    chunk_bytes: int = _CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    batch, width = student.shape
    units = torch.empty(2, batch, width, dtype=torch.float32, device=student.device)
    rows = _measure_lengths(student, teacher, mask, units=units)
    unit_s, unit_t = units
    size = min(batch, max(1, chunk_bytes // (8 * batch)))
    cosines = units.new_empty(2, size, batch)
    wanted = student_needs_grad + teacher_needs_grad
    gradients = units.new_zeros((wanted, batch, width) if wanted else 0)
    inverse_temperature = 1.0 / temperature
    for first in range(0, batch, size):
        some_t = unit_t[first : first + size]
        a, x = cosines[:, : len(some_t)]
        # In-place and out= products stay float32 under autocast.
        torch.mm(some_t, unit_t.T, out=a)
        torch.mm(some_t, unit_s.T, out=x)
        _rows_kernel[(len(some_t),)](
            a,
            x,
            rows,
            first,
            batch,
            inverse_temperature,
            int(wanted > 0),
            int(teacher_needs_grad),
            WIDTH=_ROW_BLOCK,
            num_warps=4,
        )
        slope, pull = x, a
        if student_needs_grad:
            gradients[0].addmm_(slope.T, some_t)
        if teacher_needs_grad:
            gradients[-1].addmm_(pull.T, some_t)
            gradients[-1, first : first + size].addmm_(pull, unit_t).addmm_(slope, unit_s)
    loss = _mean_divergence(rows)
    items, columns = _ROWS_TILE
    sides = [side for side, needed in enumerate((student_needs_grad, teacher_needs_grad)) if needed]
    for gradient, side in zip(gradients if wanted else (), sides, strict=True):
        _project_kernel[(triton.cdiv(batch, items),)](
            units,
            gradient,
            rows,
            batch,
            width,
            side,
            inverse_temperature,
            ITEMS=items,
            WIDTH=columns,
            num_warps=4,
        )
    return loss, gradients


# --- what can be launched -------------------------------------------------------------------------


def shipped() -> list[Shipped]:
    """Every specialisation that the functions above launch.

    Each dtype with each tile and flag. Columns of a small batch and of aligned features are
    neighbours; those of others may have any strides, of which 1 makes a kernel of its own. Left out
    are neighbours on one side only, and sizes and strides of which some are multiples of 16 and
    some are not: they fold more than the one extreme, and less than the other.
    """
    items, columns = _ROWS_TILE
    rows_tile: dict[str, object] = {"ITEMS": items, "WIDTH": columns}
    anywhere: dict[str, object] = {}
    neighbours: dict[str, object] = {"student_column_stride": 1, "teacher_column_stride": 1}
    listed = [
        _shipped(_loss_kernel, {"ITEMS": _LOSS_BLOCK}, 4, 3),
        _shipped(_rows_kernel, {"WIDTH": _ROW_BLOCK}, 4, 3),
        _shipped(_project_kernel, rows_tile, 4, 3),
    ]
    for dtype, word in (
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
    ):
        for column_stride in (anywhere, {"column_stride": 1}):
            listed.append(_shipped(_lengths_kernel, rows_tile | column_stride, 4, 3, word))
        for *small, warps, stages in _small_tiles(dtype):
            constants = neighbours | dict(zip(("ITEMS", "WIDTH", "SLAB"), small, strict=True))
            listed.append(_shipped(_small_kernel, constants, warps, stages, word))
        for aligned, strides in ((True, neighbours), (False, neighbours), (False, anywhere)):
            listed += _shipped_streaming(dtype, word, aligned, strides)
    return listed


def _shipped_streaming(
    dtype: torch.dtype, word: str, aligned: bool, strides: dict[str, object]
) -> list[Shipped]:
    common = {"ALIGNED": int(aligned)} | strides
    *sizes, warps, stages = _statistics_tile(dtype, aligned=aligned)
    constants = common | dict(zip(("M", "N", "WIDTH"), sizes, strict=True))
    listed = [_shipped(_statistics_kernel, constants, warps, stages, word)]
    for of_teacher in (False, True):
        for tile in _gradient_tiles(dtype, aligned=aligned, of_teacher=of_teacher):
            *sizes, warps, stages = tile
            constants = common | dict(zip(("M", "N", "WIDTH", "SLAB", "SLABS"), sizes, strict=True))
            constants["OF_TEACHER"] = int(of_teacher)
            widths = (tile.slab * tile.slabs, tile.slab * tile.slabs + 1)
            kinds = {_is_held(tile, w, dtype, aligned, of_teacher) for w in widths}
            listed += [
                _shipped(
                    _streaming_gradient_kernel, constants | {"HELD": int(held)}, warps, stages, word
                )
                for held in sorted(kinds)
            ]
    return listed


def _shipped(
    kernel: Any,
    constants: dict[str, object],
    num_warps: int,
    num_stages: int,
    features: str = "fp32",
) -> Shipped:
    words = (
        dict.fromkeys(("student", "teacher", "features", "gradient"), f"*{features}")
        | dict.fromkeys(("rows", "loss", "grad_output", "gradients", "scratch", "units"), "*fp32")
        | dict.fromkeys(("targets", "predictions"), "*fp32")
        | dict.fromkeys(("inverse_temperature", "headroom"), "fp32")
        | {"mask": "*u8"}
    )
    signature = {name: words.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return Shipped(kernel, signature, constants, num_warps, num_stages)
