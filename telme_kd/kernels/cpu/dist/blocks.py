"""Blocks of rows that stay in the cache: statistics by :func:`observe`, then :func:`gradient`.

Probabilities p, q of student and teacher are taken as they are wherever float32 can tell them from
0 ("plain"). Of a class that is less probable than that, only its logarithm is known; then columns
are measured in units u, v of their largest probability ("in units"), which costs half as much
again. With ``alpha`` and ``beta`` per row i and per column c, and a constant per column,

    plain      G = beta_i a_i - alpha_i b_i + beta_c a_c - alpha_c b_c + k_c   dz = p (G - <p, G>)
    in units   p G = p (beta_i a_i - alpha_i b_i) + u (beta_c u_c - alpha_c v_c + k_c)

with a, b the probabilities less their mean. Rows need no constant, which the softmax would remove.

Column moments are centred within a block and merged in the blocks' order (Chan, Golub and LeVeque
1983).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype
from telme_kd.kernels.cpu.dist import kept
from telme_kd.kernels.cpu.dist.affine import FEW_CLASSES
from telme_kd.kernels.cpu.dist.relations import Options, Relations
from telme_kd.reference.dist import RELATIVE_FLOOR

BLOCK = 2**18
"""Logits in a block: with a quarter, the calls cost half as much again at [2048, 1000]."""

LEAST_ROWS = 8
"""Rows in a block: merging column moments costs about as much as three rows."""

KEPT_NUMBERS = 8 * 2**18
"""Intermediate results of blocks whose memory stays allocated for the next call."""

FAINT = 1e-28
"""Squares of a column that add up to less than this are measured in units: their inverse, which
the gradient multiplies with, and their rounding are then out of float32's range."""

_LEAST_FLOOR = 1e-2 * FAINT * RELATIVE_FLOOR**2
"""Below the square of any floor; for a class at -inf in every row, whose covariance is 0."""

_LOG2_E = math.log2(math.e)
_ROWS = 7
_COLUMNS = 9

COLUMN_PARTS = [2, 2, 0, 3]
"""Of a column's statistics: units, means, what rounding leaves out of these, centred moments. The
number of items comes after them."""

Shape = tuple[int, ...]
Gradients = tuple[Tensor | None, Tensor | None]


def saved_shapes(batch: int, classes: int) -> tuple[Shape, Shape]:
    """Return the shapes of the statistics of rows and columns."""
    return (_ROWS, batch), (_COLUMNS, classes)


def new_statistics(
    batch: int, classes: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the statistics of no rows at all: (7, B) and (9, C), for :func:`observe` to fill.

    Per row: each side's largest logit, each side's 1 / sum of exponentials, and the centred moments
    <a, a>, <b, b>, <a, b>. Per column: each side's unit as a binary logarithm, 0 where plain, each
    side's mean, the centred moments and, in every entry of the row behind, the number of items; the
    last row is for :func:`conclude`.
    """
    rows = torch.zeros((_ROWS, batch), dtype=dtype, device=device)
    columns = torch.zeros((_COLUMNS, classes), dtype=dtype, device=device)
    return rows, columns


def row_moments(rows: Tensor) -> Tensor:
    """Return the centred moments (3, B) of the probabilities of observed rows."""
    return rows[4:7]


class _Room(NamedTuple):
    """Memory (2, R, C) for both sides' rows of a block, the longer axis last."""

    u: Tensor
    centred: Tensor  # in columns
    row_centred: Tensor
    spare: Tensor


_MATRICES = 2 * len(_Room._fields)


_rooms: dict[torch.dtype, Tensor] = {}


def _borrow(length: int, classes: int, like: Tensor) -> Tensor:
    """Return the memory of a room for so many rows: the one last given back if it will do.

    The first touch of fresh memory costs as much as several passes over it.
    """
    size = _MATRICES * length * classes
    if type(like) is not Tensor:
        return like.new_empty(size)
    memory = _rooms.pop(like.dtype, None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
    return memory


def _give_back(memory: Tensor) -> None:
    if type(memory) is Tensor and memory.numel() <= KEPT_NUMBERS:
        _rooms[memory.dtype] = memory


def _room(memory: Tensor, length: int, classes: int) -> _Room:
    numbers = memory[: _MATRICES * length * classes]
    if classes <= FEW_CLASSES:  # short rows are slow to reduce as they lie
        return _Room(*numbers.view(-1, 2, classes, length).mT)
    return _Room(*numbers.view(-1, 2, length, classes))


def _blocks(batch: int, classes: int) -> Iterator[slice]:
    length = _block_length(batch, classes)
    return (slice(start, min(start + length, batch)) for start in range(0, batch, length))


def _block_length(batch: int, classes: int) -> int:
    return min(batch, max(LEAST_ROWS, BLOCK // classes))


# --- statistics -----------------------------------------------------------------------------------


def observe_all(
    student: Tensor, teacher: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss () and what :func:`gradient` needs of rows (7, B) and columns (9, C)."""
    batch, classes = student.shape
    rows, columns = new_statistics(
        batch, classes, dtype=accumulation_dtype(student, teacher), device=student.device
    )
    memory = _borrow(_block_length(batch, classes), classes, rows)
    _observe_within(memory, student, teacher, mask, rows, columns, options, in_units=False)
    if _are_faint(columns, options):
        columns.zero_()
        _observe_within(memory, student, teacher, mask, rows, columns, options, in_units=True)
    _give_back(memory)
    return conclude(rows, columns, mask, options), rows, columns


def whole(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Return the loss () and the needed gradients (k, B, C), from one block.

    What the statistics are of need not be computed again for the gradients.
    """
    batch, classes = student.shape
    dtype = accumulation_dtype(student, teacher)
    rows, columns = new_statistics(batch, classes, dtype=dtype, device=student.device)
    memory = _borrow(batch, classes, rows)
    room = _room(memory, batch, classes)
    arguments = student, teacher, mask, rows, columns, options, room
    _observe_block(*arguments, in_units=False)
    if _are_faint(columns, options):
        columns.zero_()
        _observe_block(*arguments, in_units=True)
    loss = conclude(rows, columns, mask, options)
    sides = [side for side in (0, 1) if needs[side]]
    gradients = rows.new_empty((len(sides), batch, classes) if sides else 0)
    if sides:
        coefficients = _coefficients(None, columns, options)
        for side, out in zip(sides, gradients, strict=True):
            coefficients.write_gradient(side, rows[4:], room, out)
    _give_back(memory)
    return loss, gradients


def observe(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
) -> None:
    """Take a chunk of logits (R, C) into the statistics: rows[:, of the chunk] and all columns."""
    batch, classes = student.shape
    memory = _borrow(_block_length(batch, classes), classes, rows)
    _observe_within(memory, student, teacher, mask, rows, columns, options, in_units=True)
    _give_back(memory)


def _observe_within(
    memory: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
    *,
    in_units: bool,
) -> None:
    batch, classes = student.shape
    for block in _blocks(batch, classes):
        _observe_block(
            student[block],
            teacher[block],
            None if mask is None else mask[block],
            rows[:, block],
            columns,
            options,
            _room(memory, block.stop - block.start, classes),
            in_units=in_units,
        )


def _observe_block(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
    room: _Room,
    *,
    in_units: bool,
) -> None:
    """Take a block into the statistics; leave its probabilities, or u, in the room.

    Centred they are left there too, but in columns without the absent items, which become zero.
    """
    temperature, inter_weight, intra_weight, eps = options
    u, centred, row_centred, spare = room
    largest, scale, row_moments = rows[:2], rows[2:4], rows[4:]
    unit, mean, moments, count = columns[:2], columns[2:4], columns[4:7], columns[7]
    as_they_are = student.shape[1] > FEW_CLASSES
    ours, theirs = (
        logits if as_they_are and logits.dtype == wide.dtype else wide.copy_(logits)
        for logits, wide in zip((student, teacher), u, strict=True)
    )
    torch.amax(ours, 1, out=largest[0])
    torch.amax(theirs, 1, out=largest[1])
    shrink = None
    if in_units and intra_weight and eps is None:
        _exponents(ours, theirs, mask, largest, u)
        per_logit = _LOG2_E / temperature
        unit.masked_fill_(count == 0, torch.finfo(unit.dtype).min)
        peak = torch.maximum(unit, u.amax(1).mul_(per_logit))
        shrink = torch.exp2(unit - peak)
        unit.copy_(peak)
        torch.add(-peak[:, None], u, alpha=per_logit, out=u).exp2_()
        p = torch.mul(u, peak[:, None].exp2_(), out=centred)
    else:
        p = _exponentials(ours, theirs, mask, largest, temperature, u)
    total = p.sum(2)
    torch.reciprocal(total, out=scale)
    if mask is not None:
        scale.masked_fill_(~mask, 0.0)
    u.mul_(scale[:, :, None])
    if inter_weight:
        if p is not u:
            p.mul_(scale[:, :, None])
        torch.sub(p, 1.0 / student.shape[1], out=row_centred)
        _moments(row_centred, 2, spare, row_moments)
    if intra_weight:
        number = len(student) if mask is None else mask.sum()
        block_mean = u.sum(1) / (number if mask is None else mask.sum().clamp(min=1))
        torch.sub(u, block_mean[:, None], out=centred)
        if mask is not None:
            centred.mul_(mask[:, None])
        block_moments = _moments(centred, 1, spare, torch.empty_like(moments))
        _merge(mean, moments, count, shrink, block_mean, block_moments, number)


def _exponents(
    student: Tensor, teacher: Tensor, mask: Tensor | None, largest: Tensor, out: Tensor
) -> None:
    """Subtract each row's largest logit, at which an absent item's logits become -inf."""
    torch.sub(student, largest[0, :, None], out=out[0])
    torch.sub(teacher, largest[1, :, None], out=out[1])
    if mask is not None:
        out.masked_fill_(~mask[:, None], -torch.inf)


def _exponentials(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    largest: Tensor,
    temperature: float,
    out: Tensor,
) -> Tensor:
    """Return exp((z - largest) / tau), and 0 for an absent item."""
    _exponents(student, teacher, mask, largest, out)
    return out.mul_(_LOG2_E / temperature).exp2_()


def _moments(centred: Tensor, dim: int, spare: Tensor, out: Tensor) -> Tensor:
    """Return <a, a>, <b, b> and <a, b> along a dimension of (2, R, C)."""
    torch.sum(torch.mul(centred, centred, out=spare), dim, out=out[:2])
    torch.sum(torch.mul(centred[0], centred[1], out=spare[0]), dim - 1, out=out[2])
    return out


def _merge(
    mean: Tensor,
    moments: Tensor,
    count: Tensor,
    shrink: Tensor | None,
    block_mean: Tensor,
    block_moments: Tensor,
    number: int | Tensor,
) -> None:
    """Take a block's column moments into the running ones, which its units may shrink first."""
    if shrink is not None:
        mean.mul_(shrink)
        moments[:2].mul_(shrink).mul_(shrink)
        moments[2].mul_(shrink[0]).mul_(shrink[1])
    share = number / (count + number).clamp_(min=1.0)
    difference = block_mean - mean
    moments.add_(block_moments)
    moments[:2].addcmul_(difference * difference, count * share)
    moments[2].addcmul_(difference[0] * difference[1], count * share)
    mean.addcmul_(difference, share)
    count.add_(number)


def _are_faint(columns: Tensor, options: Options) -> bool:
    """Whether a column's probabilities, as they are, are too small to correlate."""
    _, _, intra_weight, eps = options
    if not intra_weight or eps is not None:
        return False
    mean, squares, count = columns[2:4], columns[4:6], columns[7]
    return not torch.addcmul(squares, mean, mean * count).amin().item() >= FAINT


def conclude(rows: Tensor, columns: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """Return the loss (); the statistics become what :func:`gradient` multiplies with, in place.

    Per row, behind the four numbers of the softmax: -alpha and each side's beta. Per column, behind
    units and means: -alpha, each side's beta and each side's constant, which belongs to a vector
    less its mean.
    """
    _, inter_weight, intra_weight, eps = options
    batch, classes = rows.shape[1], columns.shape[1]
    key = (Relations, batch, classes, rows.dtype, options)
    relations = kept.take(key, lambda: Relations(batch, classes, rows.dtype, options))
    numbers = relations.weigh(mask)
    first = relations.rows  # of the columns
    mean, moments, count = columns[2:4], columns[4:7], columns[7]
    if inter_weight:
        relations.squares[:, :first] = rows[4:6]
        relations.covariance[:first] = rows[6]
    if intra_weight:
        relations.squares[:, first:] = moments[:2]
        relations.covariance[first:] = moments[2]
        if eps is None:
            shares = numbers.shares.repeat(2, 1)
            floors = mean.square().mul_(count).mul_(RELATIVE_FLOOR**2)
            shares[:, first:] = floors.clamp_(min=_LEAST_FLOOR)
            numbers = numbers._replace(shares=shares)
    loss = relations.loss(numbers)
    relations.differentiate(numbers)
    if inter_weight:
        torch.neg(relations.alpha[:first], out=rows[4])
        rows[5:] = relations.beta[:, :first]
    if intra_weight:
        torch.neg(relations.alpha[first:], out=columns[4])
        columns[5:7] = relations.beta[:, first:]
        columns[7:] = 0.0 if eps is not None else relations.gamma()[:, first:] * mean
    kept.keep(key, relations)
    return loss


# --- gradients ------------------------------------------------------------------------------------


def gradient(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
    needs: tuple[bool, bool],
) -> Gradients:
    """Return the gradients of a chunk (R, C), each in its side's dtype, or None."""
    batch, classes = student.shape
    gradients = (
        student.new_empty((batch, classes)) if needs[0] else None,
        teacher.new_empty((batch, classes)) if needs[1] else None,
    )
    coefficients = _coefficients(grad_output, columns, options)
    row_coefficients = rows[4:] * grad_output
    memory = _borrow(_block_length(batch, classes), classes, rows)
    for block in _blocks(batch, classes):
        room = _room(memory, block.stop - block.start, classes)
        coefficients.compute(
            student[block],
            teacher[block],
            None if mask is None else mask[block],
            rows[:, block],
            room,
        )
        for side, gradient_of_side in enumerate(gradients):
            if gradient_of_side is not None:
                coefficients.write_gradient(
                    side, row_coefficients[:, block], room, gradient_of_side[block]
                )
    _give_back(memory)
    return gradients


def _coefficients(
    grad_output: Tensor | None, columns: Tensor, options: Options
) -> "_Plain | _InUnits":
    return (_InUnits if columns[:2].any() else _Plain)(grad_output, columns, options)


class _Plain:
    """What a block's gradient is put together from: vectors over the classes for one side each."""

    def __init__(self, grad_output: Tensor | None, columns: Tensor, options: Options) -> None:
        self.temperature, self.inter_weight, self.intra_weight, _ = options
        of_columns = columns[4:] if grad_output is None else columns[4:] * grad_output
        self.alpha, self.betas, self.constants = of_columns[0], of_columns[1:3], of_columns[3:]
        self.means, self.class_mean = columns[2:4], 1.0 / columns.shape[1]

    def compute(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, rows: Tensor, room: _Room
    ) -> None:
        """Fill in the block's probabilities, as they are and less their means."""
        _exponentials(student, teacher, mask, rows[:2], self.temperature, room.u)
        room.u.mul_(rows[2:4, :, None])
        if self.inter_weight:
            torch.sub(room.u, self.class_mean, out=room.row_centred)
        if self.intra_weight:
            torch.sub(room.u, self.means[:, None], out=room.centred)

    def write_gradient(self, side: int, rows: Tensor, room: _Room, out: Tensor) -> None:
        """Write a side's gradient (R, C)."""
        p, (by_p, factor) = room.u[side], room.spare
        if self.intra_weight:
            own, other = room.centred[side], room.centred[1 - side]
            torch.addcmul(self.constants[side], self.alpha, other, out=by_p)
            by_p.addcmul_(self.betas[side], own)
        else:
            by_p.zero_()
        if self.inter_weight:
            own, other = room.row_centred[side], room.row_centred[1 - side]
            by_p.addcmul_(rows[0, :, None], other).addcmul_(rows[1 + side, :, None], own)
        few = p.shape[1] <= FEW_CLASSES
        in_place = not few and out.dtype == p.dtype
        by_logits = out if in_place else factor
        if few:
            torch._softmax_backward_data(by_p.mT, p.mT, 0, p.dtype, grad_input=by_logits.mT)
        else:
            torch._softmax_backward_data(by_p, p, 1, p.dtype, grad_input=by_logits)
        if not in_place:
            out.copy_(by_logits)


class _InUnits:
    """The same where columns are measured in units of their largest."""

    def __init__(self, grad_output: Tensor | None, columns: Tensor, options: Options) -> None:
        self.temperature, self.inter_weight, _, _ = options
        classes = columns.shape[1]
        self.unit, self.mean = columns[:2], columns[2:4]
        of_columns = columns[4:] if grad_output is None else columns[4:] * grad_output
        self.alpha, self.betas, self.constants = of_columns[0], of_columns[1:3], of_columns[3:]
        self.powers = self.unit.exp2()
        # A row's p - 1 / C is power (u - mean) and what its class has more than 1 / C on average.
        excess = self.mean * self.powers - 1.0 / classes
        self.own_excess, self.other_excess = self.powers * excess, self.powers * excess.flip(0)
        self.both_powers, self.squared_powers = self.powers.prod(0), self.powers.square()

    def compute(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, rows: Tensor, room: _Room
    ) -> None:
        """Fill in the block's u, as they are and less their mean."""
        _exponents(student, teacher, mask, rows[:2], room.u)
        torch.add(-self.unit[:, None], room.u, alpha=_LOG2_E / self.temperature, out=room.u)
        room.u.exp2_().mul_(rows[2:4, :, None])
        torch.sub(room.u, self.mean[:, None], out=room.centred)

    def write_gradient(self, side: int, rows: Tensor, room: _Room, out: Tensor) -> None:
        """Write a side's gradient (R, C)."""
        u, own, other = room.u[side], room.centred[side], room.centred[1 - side]
        h, factor = room.spare
        alpha, beta = rows[0, :, None], rows[1 + side, :, None]
        if self.inter_weight:
            torch.addcmul(self.alpha, alpha, self.both_powers, out=factor)
            torch.addcmul(self.constants[side], factor, other, out=h)
            torch.addcmul(self.betas[side], beta, self.squared_powers[side], out=factor)
            h.addcmul_(factor, own)
            h.addcmul_(alpha, self.other_excess[side])
            h.addcmul_(beta, self.own_excess[side])
        else:
            torch.addcmul(self.constants[side], self.alpha, other, out=h)
            h.addcmul_(self.betas[side], own)
        projection = torch.mul(h, u, out=factor).sum(1, keepdim=True)
        h.addcmul_(projection, self.powers[side], value=-1.0)
        if out.dtype == h.dtype:
            torch.mul(h, u, out=out)
        else:
            out.copy_(h.mul_(u))
