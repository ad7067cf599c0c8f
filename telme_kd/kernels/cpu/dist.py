"""DIST on the CPU: forward and backward written by hand in few calls to PyTorch.

Small batches are bound by the number of calls, large ones by memory. Hence three plans:

- *small*: as few calls as possible, into buffers that are kept. The gradient is computed beside the
  loss; the backward pass multiplies it by ``grad_output``.
- *whole*: the same from a single block of rows, with as few passes over it as possible.
- *blocked*: blocks of rows that stay in the cache are read twice, by :func:`observe` for the
  statistics of rows and columns and, in the backward pass, by :func:`gradient`. Only the logits and
  O(B + C) numbers are saved in between. Column moments are centred within a block and merged in the
  blocks' order (Chan, Golub and LeVeque 1983).

With p, q the probabilities of student and teacher, u, v the same in units of their columns and a
correlation rho = <a, b> h(a) h(b) of centred vectors, every derivative is affine:
d rho / dp = alpha b + beta a + gamma p, with numbers per row or column. Hence

    dz = p (G - <p, G>) / tau,    p G = p (alpha_i q + beta_i p) + u (alpha_c v + beta_c u + k_c)

where rows need no constant, which the softmax would remove. Everything accumulates in float32, or
in float64 if an input is.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype
from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR

# Measured with one thread on an EPYC 9004 core, 1 MiB of second-level and 32 MiB of shared cache,
# plans and layouts alternating, forward and backward passes, student's gradient only.

SMALL = 2**16
"""The small plan serves up to this many logits: 0.5 to 0.7 of the others' time at [64, 1000] and
[8192, 7], but 1.4 of it at [256, 1000]."""

MEDIUM = 2**18
"""The plan of a single block serves up to this many: 0.8 of the blocked plan's time at [256, 1000].
The gradient that it stores is 1 MiB in float32."""

BLOCK = 2**18
"""Logits in a block: with a quarter, the calls cost half as much again at [2048, 1000]."""

LEAST_ROWS = 8
"""Rows in a block: merging column moments costs about as much as three rows."""

FEW_CLASSES = 32
"""Up to this many, items lie on the last axis: a softmax over 7 numbers in a row takes 18 times as
long as across rows; at 64 both layouts are as fast."""

KEPT_LOGITS = 2**17
"""Of the small plans that keep their buffers, about 80 bytes a logit, for the next call."""

LEAST_LOGITS = 2**12
"""A kept plan counts as so many at least."""

KEPT_NUMBERS = 6 * 2**18
"""Intermediate results of blocks whose memory stays allocated for the next call."""

_SLOPE = RELATIVE_FLOOR / CONSTANT_GRADIENT_LIKE
_STEEP = 1.0 - 3.0 * RELATIVE_FLOOR**2
_STEEPER = 2.0 * (1.0 - _SLOPE + _SLOPE * RELATIVE_FLOOR**2)
_LOG2_E = math.log2(math.e)
_PLAIN = (Tensor, torch.nn.Parameter)

Options = tuple[float, float, float, float | None]
Shape = tuple[int, ...]
Gradients = tuple[Tensor | None, Tensor | None]


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
    """Return the loss () and what the backward pass needs, of logits (B, C); ``saved_shapes``."""
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    size = student.numel()
    if size <= SMALL and type(student) in _PLAIN and type(teacher) in _PLAIN:
        return _small(student, teacher, mask, options, needs)
    if size <= MEDIUM:
        return _whole(student, teacher, mask, options, needs)
    rows, columns = new_statistics(
        *student.shape, dtype=accumulation_dtype(student, teacher), device=student.device
    )
    _observe(student, teacher, mask, rows, columns, options)
    loss = _conclude(rows, columns, mask, options)
    if not any(needs):
        rows, columns = rows.new_empty(0), columns.new_empty(0)
    return loss, rows, columns


def saved_shapes(
    batch: int, classes: int, *, student_needs_grad: bool, teacher_needs_grad: bool
) -> tuple[Shape, Shape]:
    """Return the shapes of the two tensors that :func:`forward` returns beside the loss."""
    needed = student_needs_grad + teacher_needs_grad
    if not needed:
        return (0,), (0,)
    if batch * classes <= max(SMALL, MEDIUM):
        return (needed, batch, classes), (0,)
    return (_ROWS, batch), (_COLUMNS, classes)


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
) -> Gradients:
    """Return the gradients of student and teacher, each in its own dtype, or None."""
    if rows.dim() == 3:
        gradients = rows * grad_output
        return (
            _stored(gradients[0], student.dtype) if student_needs_grad else None,
            _stored(gradients[-1], teacher.dtype) if teacher_needs_grad else None,
        )
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    return _gradient(grad_output, student, teacher, mask, rows, columns, options, needs)


def _stored(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def new_statistics(
    batch: int, classes: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the statistics of no rows at all: (7, B) and (9, C), for :func:`observe` to fill.

    Per row: each side's largest logit, each side's 1 / sum of exponentials, and the centred moments
    <a, a>, <b, b>, <a, b>. Per column: each side's unit as a binary logarithm, each side's mean,
    the centred moments and, in every entry of the row behind, the number of items; the last row is
    for :func:`conclude`.
    """
    rows = torch.zeros((_ROWS, batch), dtype=dtype, device=device)
    columns = torch.zeros((_COLUMNS, classes), dtype=dtype, device=device)
    return rows, columns


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
    """Take a chunk of logits (R, C) into the statistics: rows[:, of the chunk] and all columns."""
    _observe(student, teacher, mask, rows, columns, (temperature, inter_weight, intra_weight, eps))


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
    """Return the loss (); the statistics become what :func:`gradient` multiplies with, in place.

    Per row, behind the four numbers of the softmax: -alpha and each side's beta. Per column, behind
    units and means: -alpha, each side's beta and each side's constant.
    """
    return _conclude(rows, columns, mask, (temperature, inter_weight, intra_weight, eps))


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
) -> Gradients:
    """Return the gradients of a chunk (R, C), as :func:`backward`; rows are those of the chunk."""
    options = (temperature, inter_weight, intra_weight, eps)
    needs = (student_needs_grad, teacher_needs_grad)
    return _gradient(grad_output, student, teacher, mask, rows, columns, options, needs)


# --- both plans -----------------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """What weighs the correlations (n,): rows first, then columns."""

    weights: Tensor  # in the loss, over loss_scale
    slopes: Tensor  # in the gradient by the logits
    shares: Tensor  # of the squared floor, due to the vector's mean; (2, n) where they differ


class _Relations:
    """The correlations of all rows, then all columns: the loss they make and its derivatives.

    The derivative of the loss by a vector p of which a is the centred one is beta a - alpha b, with
    b the other's, up to a constant that the softmax removes from a row, and from a column in units
    of its sum.
    """

    def __init__(self, batch: int, classes: int, dtype: torch.dtype, options: Options) -> None:
        temperature, inter_weight, intra_weight, eps = options
        self.eps = eps
        self.batch, self.classes = batch, classes
        self.rows = rows = batch if inter_weight else 0
        total = rows + (classes if intra_weight else 0)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="cpu")

        def filled(for_rows: float, for_columns: float) -> Tensor:
            numbers = empty(total)
            numbers[:rows] = for_rows
            numbers[rows:] = for_columns
            return numbers

        moments = empty(2, 2, total)
        self.row_moments, self.column_moments = moments[..., :rows], moments[..., rows:]
        self.squares, self.covariance = moments.diagonal(0, 0, 1).mT, moments[0, 1]
        self.floors, self.highs, self.attenuation, self.heights, self.pulls, self.beta = empty(
            6, 2, total
        )
        self.height_a, self.height_b = self.heights
        self.beta_a, self.beta_b = self.beta
        self.correlated, self.weighted = empty(2, 2, total)
        self.slope, self.rho = self.correlated  # rho = slope * covariance
        self.alpha, self.weighted_rho = self.weighted
        # Summed in double precision, the loss is rounded once.
        self.terms = torch.empty(total, dtype=torch.float64, device="cpu")

        # Multiples of C and B are exact where the loss's weights over B and C would be rounded.
        self.numbers = _Numbers(
            filled(inter_weight * classes, intra_weight * batch),
            filled(inter_weight * temperature / batch, intra_weight * temperature / classes),
            filled(RELATIVE_FLOOR**2 / classes, RELATIVE_FLOOR**2 / batch),
        )
        self.loss_scale = torch.full_like(self.terms, temperature**2 / (batch * classes))
        self.least, self.one, self.steep, self.regular = (
            empty().fill_(constant) for constant in (_SLOPE, 1.0, _STEEP, eps or 0.0)
        )

        self.present, self.inverse_count = empty(batch), empty()
        self.masked = _Numbers(*(number.clone() for number in self.numbers))
        self.row_weight = inter_weight * classes * batch
        self.column_weight = intra_weight * batch
        self.slope_scale = temperature / (batch * classes)

    def weigh(self, mask: Tensor | None) -> _Numbers:
        """Return the numbers for all items, or for those of a mask (B,)."""
        if mask is None:
            return self.numbers
        weights, slopes, shares = self.masked
        self.present.copy_(mask)
        torch.reciprocal(self.present.sum().clamp_min_(1.0), out=self.inverse_count)
        if self.rows:
            torch.mul(self.present, self.inverse_count, out=weights[: self.rows])
            weights[: self.rows].mul_(self.row_weight)
        weights[self.rows :].copy_(self.present.amax()).mul_(self.column_weight)
        torch.mul(weights, self.slope_scale, out=slopes)
        shares[self.rows :].copy_(self.inverse_count).mul_(RELATIVE_FLOOR**2)
        return self.masked

    def loss(self, numbers: _Numbers) -> Tensor:
        """Return the loss () of the moments."""
        if self.eps is None:
            # 1 / |a| for |a|^2 = high >= floor; below, (s + (1 - s) |a|^2 / floor) / sqrt(floor)
            torch.add(numbers.shares, self.squares, alpha=RELATIVE_FLOOR**2, out=self.floors)
            torch.maximum(self.squares, self.floors, out=self.highs)
            torch.addcdiv(
                self.least, self.squares, self.highs, value=1.0 - _SLOPE, out=self.attenuation
            )
            torch.rsqrt(self.highs, out=self.heights).mul_(self.attenuation)
            torch.mul(self.height_a, self.height_b, out=self.slope)
        else:
            torch.sqrt(self.squares, out=self.heights)
            torch.mul(self.height_a, self.height_b, out=self.slope)
            self.slope.add_(self.regular).reciprocal_()
            if numbers is self.masked:  # with eps = 0, what is absent would be 0 / 0
                self.slope.masked_fill_(numbers.weights == 0, 0.0)
        torch.mul(self.slope, self.covariance, out=self.rho)
        torch.addcmul(numbers.weights, numbers.weights, self.rho, value=-1.0, out=self.terms)
        loss: Tensor = torch.dot(self.terms, self.loss_scale).to(self.rho.dtype)
        return loss

    def differentiate(self, numbers: _Numbers) -> None:
        """Fill in alpha (n,) and each side's beta (2, n), after :meth:`loss`."""
        torch.mul(self.correlated, numbers.slopes, out=self.weighted)
        if self.eps is None:
            # beta = rho / high, less rho / high (c + d / attenuation) below the floor, where
            # the attenuation is less than 1. There |a|^2 is a share of |a|^2 + |mean|^2 itself.
            torch.addcdiv(self.steep, self.one, self.attenuation, value=_STEEPER, out=self.pulls)
            torch.threshold_(self.pulls, (_STEEP + _STEEPER) * (1.0 + 1e-6), 0.0)
            torch.div(self.weighted_rho, self.highs, out=self.heights)
            torch.addcmul(self.heights, self.heights, self.pulls, value=-1.0, out=self.beta)
        else:
            torch.div(self.height_b, self.height_a, out=self.beta_a)
            torch.div(self.height_a, self.height_b, out=self.beta_b)
            self.beta.masked_fill_(self.heights == 0, 0.0)  # the gradient of a norm at 0
            self.beta.mul_(self.weighted_rho).mul_(self.slope)

    def gamma(self) -> Tensor:
        """Return (2, n): times a vector's mean it is the constant that the derivative leaves out.

        The floor is a share of the uncentred norm and moves with its mean.
        """
        pulled: Tensor = self.heights * (3.0 - 2.0 * _SLOPE / self.attenuation)
        return pulled.mul_(self.pulls != 0).mul_(RELATIVE_FLOOR**2)


# --- blocks of rows -------------------------------------------------------------------------------

_ROWS = 7
_COLUMNS = 9


class _Room(NamedTuple):
    """Memory (2, R, C) for both sides' rows of a block, the longer axis last."""

    u: Tensor
    centred: Tensor
    spare: Tensor


_rooms: dict[torch.dtype, Tensor] = {}


def _borrow(length: int, classes: int, like: Tensor) -> Tensor:
    """Return the memory of a room for so many rows: the one last given back if it will do.

    The first touch of fresh memory costs as much as several passes over it.
    """
    size = 6 * length * classes
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
    numbers = memory[: 6 * length * classes]
    if classes <= FEW_CLASSES:  # short rows are slow to reduce as they lie
        return _Room(*numbers.view(3, 2, classes, length).mT)
    return _Room(*numbers.view(3, 2, length, classes))


def _blocks(batch: int, classes: int) -> Iterator[slice]:
    length = _block_length(batch, classes)
    return (slice(start, min(start + length, batch)) for start in range(0, batch, length))


def _block_length(batch: int, classes: int) -> int:
    return min(batch, max(LEAST_ROWS, BLOCK // classes))


def _observe(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
) -> None:
    batch, classes = student.shape
    memory = _borrow(_block_length(batch, classes), classes, rows)
    for block in _blocks(batch, classes):
        _observe_block(
            student[block],
            teacher[block],
            None if mask is None else mask[block],
            rows[:, block],
            columns,
            options,
            _room(memory, block.stop - block.start, classes),
        )
    _give_back(memory)


def _observe_block(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
    room: _Room,
) -> None:
    """Take a block into the statistics; leave its u, and its u centred in columns, in the room."""
    temperature, inter_weight, intra_weight, eps = options
    u, centred, spare = room
    largest, scale, row_moments = rows[:2], rows[2:4], rows[4:]
    unit, mean, moments, count = columns[:2], columns[2:4], columns[4:7], columns[7]
    as_they_are = student.shape[1] > FEW_CLASSES
    ours, theirs = (
        logits if as_they_are and logits.dtype == wide.dtype else wide.copy_(logits)
        for logits, wide in zip((student, teacher), u, strict=True)
    )
    torch.amax(ours, 1, out=largest[0])
    torch.amax(theirs, 1, out=largest[1])
    _exponents(ours, theirs, mask, largest, u)
    per_logit = _LOG2_E / temperature
    shrink = None
    if intra_weight and eps is None:
        unit.masked_fill_(count == 0, torch.finfo(unit.dtype).min)
        peak = torch.maximum(unit, u.amax(1).mul_(per_logit))
        shrink = torch.exp2(unit - peak)
        unit.copy_(peak)
        torch.add(-peak[:, None], u, alpha=per_logit, out=u).exp2_()
        p = torch.mul(u, peak[:, None].exp2_(), out=centred)
    else:
        p = torch.exp2(u.mul_(per_logit), out=centred)
        u.copy_(p)
    total = p.sum(2)
    torch.reciprocal(total, out=scale)
    if mask is not None:
        scale.masked_fill_(~mask, 0.0)
    u.mul_(scale[:, :, None])
    if inter_weight:
        p.sub_(total.div_(student.shape[1])[:, :, None])
        row_moments.copy_(_moments(p, 2, spare))
        row_moments[:2].mul_(scale).mul_(scale)
        row_moments[2].mul_(scale[0]).mul_(scale[1])
    if intra_weight:
        number = len(student) if mask is None else mask.sum()
        block_mean = u.sum(1) / (number if mask is None else mask.sum().clamp(min=1))
        torch.sub(u, block_mean[:, None], out=centred)
        if mask is not None:
            centred.mul_(mask[:, None])
        _merge(mean, moments, count, shrink, block_mean, _moments(centred, 1, spare), number)


def _exponents(
    student: Tensor, teacher: Tensor, mask: Tensor | None, largest: Tensor, out: Tensor
) -> None:
    """Subtract each row's largest logit, at which an absent item's logits become -inf."""
    torch.sub(student, largest[0, :, None], out=out[0])
    torch.sub(teacher, largest[1, :, None], out=out[1])
    if mask is not None:
        out.masked_fill_(~mask[:, None], -torch.inf)


def _moments(centred: Tensor, dim: int, spare: Tensor) -> Tensor:
    """Return <a, a>, <b, b> and <a, b> along a dimension of (2, R, C)."""
    squares = torch.mul(centred, centred, out=spare).sum(dim)
    covariance = torch.mul(centred[0], centred[1], out=spare[0]).sum(dim - 1)
    return torch.cat((squares, covariance[None]))


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


def _conclude(rows: Tensor, columns: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    _, inter_weight, intra_weight, eps = options
    batch, classes = rows.shape[1], columns.shape[1]
    relations = _Relations(batch, classes, rows.dtype, options)
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
            # Any share will do for a class at -inf in every row: its covariance is 0.
            shares[:, first:] = mean.square().mul_(count).mul_(RELATIVE_FLOOR**2).clamp_(min=1e-30)
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
    return loss


class _Coefficients:
    """What a block's gradient is put together from: vectors over the classes for one side each."""

    def __init__(self, grad_output: Tensor | None, columns: Tensor, options: Options) -> None:
        _, _, intra_weight, eps = options
        classes = columns.shape[1]
        self.unit = columns[:2] if intra_weight and eps is None else None
        self.mean = columns[2:4] if intra_weight else columns.new_full((2, 1), 1.0 / classes)
        of_columns = columns[4:] if grad_output is None else columns[4:] * grad_output
        self.alpha, self.betas, self.constants = of_columns[0], of_columns[1:3], of_columns[3:]
        self.powers = columns[:2].exp2()
        # A row's p - 1 / C is power (u - mean) and what its class has more than 1 / C on average.
        excess = self.mean * self.powers - 1.0 / classes
        self.own_excess, self.other_excess = self.powers * excess, self.powers * excess.flip(0)
        self.both_powers, self.squared_powers = self.powers.prod(0), self.powers.square()


def _gradient(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: Options,
    needs: tuple[bool, bool],
) -> Gradients:
    batch, classes = student.shape
    gradients = (
        student.new_empty((batch, classes)) if needs[0] else None,
        teacher.new_empty((batch, classes)) if needs[1] else None,
    )
    coefficients = _Coefficients(grad_output, columns, options)
    row_coefficients = rows[4:] * grad_output
    memory = _borrow(_block_length(batch, classes), classes, rows)
    for block in _blocks(batch, classes):
        room = _room(memory, block.stop - block.start, classes)
        present = None if mask is None else mask[block]
        _exponents(student[block], teacher[block], present, rows[:2, block], room.u)
        per_logit = _LOG2_E / options[0]
        if coefficients.unit is None:
            room.u.mul_(per_logit)
        else:
            torch.add(-coefficients.unit[:, None], room.u, alpha=per_logit, out=room.u)
        room.u.exp2_().mul_(rows[2:4, block, None])
        torch.sub(room.u, coefficients.mean[:, None], out=room.centred)
        for side, gradient_of_side in enumerate(gradients):
            if gradient_of_side is not None:
                out = gradient_of_side[block]
                _gradient_of_block(
                    side, row_coefficients[:, block], coefficients, options, room, out
                )
    _give_back(memory)
    return gradients


def _gradient_of_block(
    side: int,
    rows: Tensor,
    columns: _Coefficients,
    options: Options,
    room: _Room,
    out: Tensor,
) -> None:
    """Write a side's gradient (R, C), given u, and u less its mean, in the room."""
    _, inter_weight, intra_weight, _ = options
    u, own, other = room.u[side], room.centred[side], room.centred[1 - side]
    h, factor = room.spare
    alpha, beta = rows[0, :, None], rows[1 + side, :, None]
    if inter_weight and intra_weight:
        torch.addcmul(columns.alpha, alpha, columns.both_powers, out=factor)
        torch.addcmul(columns.constants[side], factor, other, out=h)
        torch.addcmul(columns.betas[side], beta, columns.squared_powers[side], out=factor)
        h.addcmul_(factor, own)
        h.addcmul_(alpha, columns.other_excess[side])
        h.addcmul_(beta, columns.own_excess[side])
    elif inter_weight:
        torch.mul(alpha, other, out=h).addcmul_(beta, own)
    elif intra_weight:
        torch.addcmul(columns.constants[side], columns.alpha, other, out=h)
        h.addcmul_(columns.betas[side], own)
    else:
        h.zero_()
    projection = torch.mul(h, u, out=factor).sum(1, keepdim=True)
    h.addcmul_(projection, columns.powers[side], value=-1.0)
    if out.dtype == h.dtype:
        torch.mul(h, u, out=out)
    else:
        out.copy_(h.mul_(u))


def _whole(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the plan of a single block, whose u need not be computed again for the gradient."""
    batch, classes = student.shape
    dtype = accumulation_dtype(student, teacher)
    rows, columns = new_statistics(batch, classes, dtype=dtype, device=student.device)
    memory = _borrow(batch, classes, rows)
    room = _room(memory, batch, classes)
    _observe_block(student, teacher, mask, rows, columns, options, room)
    loss = _conclude(rows, columns, mask, options)
    sides = [side for side in (0, 1) if needs[side]]
    gradients = rows.new_empty((len(sides), batch, classes) if sides else 0)
    if sides:
        coefficients = _Coefficients(None, columns, options)
        if not options[2]:  # the room's second part is rows, centred but not normalised
            torch.sub(room.u, coefficients.mean[:, None], out=room.centred)
        for side, out in zip(sides, gradients, strict=True):
            _gradient_of_block(side, rows[4:], coefficients, options, room, out)
    _give_back(memory)
    return loss, gradients, rows.new_empty(0)


# --- the small plan -------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Views (1, ...) for the gradient of one side."""

    own_a: Tensor
    other_a: Tensor
    own_b: Tensor
    other_b: Tensor
    p: Tensor
    u_floored: Tensor
    row_beta: Tensor
    column_beta: Tensor
    by_log_p: Tensor
    by_log_p_floored: Tensor


class _Small:
    """Buffers for one shape, dtype and set of options, views of them, and constants.

    A small operator takes as long as making a view or a constant, so these are made once and what
    is left are the steps themselves, with student and teacher in one wherever they are alike. The
    buffers are (2, C, B) for few classes and (2, B, C) else: short last axes are slow to reduce.

    With ``eps=None``, columns are measured in units of their sums, u = softmax over the items of
    log p: with this unit, as good as any, rows and columns are alike. Their means are 1 / C and
    1 / B, the means' share of the squares is constant, and both derivatives are a softmax's. One
    item more, less probable than any other, takes the softmax of a class at -inf in all rows.
    """

    def __init__(
        self,
        batch: int,
        classes: int,
        dtype: torch.dtype,
        options: Options,
        needs: tuple[bool, bool],
    ) -> None:
        temperature, inter_weight, intra_weight, eps = options
        self.inter_weight, self.intra_weight, self.eps = inter_weight, intra_weight, eps
        self.dtype, self.size = dtype, max(batch * classes, LEAST_LOGITS)
        self.relations = relations = _Relations(batch, classes, dtype, options)
        self.few = few = classes <= FEW_CLASSES
        self.over_classes, self.over_items = over_classes, over_items = (
            (-2, -1) if few else (-1, -2)
        )
        shape = (classes, batch) if few else (batch, classes)
        longer = (classes, batch + 1) if few else (batch + 1, classes)
        owners = [own for own in (0, 1) if needs[own]]

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="cpu")

        def items(floored: Tensor) -> Tensor:
            return floored.narrow(over_items, 0, batch)

        self.temperature, self.row_mean, self.column_mean, self.zero = (
            empty().fill_(constant) for constant in (temperature, 1 / classes, 1 / batch, 0.0)
        )
        self.logits, self.log_p, self.p, self.a, self.b = (empty(2, *shape) for _ in range(5))
        self.sources = [logits.mT if few else logits for logits in self.logits]
        self.log_p_floored = empty(2, *longer).fill_(torch.finfo(dtype).min)
        self.log_p_of_items = items(self.log_p_floored)
        self.u_floored = empty(2, *longer)
        self.u = items(self.u_floored) if eps is None else self.p
        self.floor = self.u_floored.narrow(over_items, batch, 1)
        self.row_means = empty(2, batch).unsqueeze(over_classes)
        self.column_means = empty(2, classes).unsqueeze(over_items)
        self.products = empty(2, 2, *shape)
        self.a_factors = self.a.unsqueeze(0), self.a.unsqueeze(1)
        self.b_factors = self.b.unsqueeze(0), self.b.unsqueeze(1)

        self.by_p = empty(1, *shape)
        self.by_u_floored = empty(1, *longer).zero_()
        self.by_u = items(self.by_u_floored)
        by_log_p_floored = empty(len(owners), *longer)
        self.by_log_p = items(by_log_p_floored)
        self.needed_log_p = self.log_p[owners[0] : owners[-1] + 1] if owners else self.log_p
        rows = relations.rows
        self.row_alpha = relations.alpha[:rows].unsqueeze(over_classes)
        self.column_alpha = relations.alpha[rows:].unsqueeze(over_items)
        row_beta = relations.beta[:, :rows].unsqueeze(over_classes)
        column_beta = relations.beta[:, rows:].unsqueeze(over_items)
        self.sides = [
            _Side(
                self.a[own : own + 1],
                self.a[1 - own : 2 - own],
                self.b[own : own + 1],
                self.b[1 - own : 2 - own],
                self.p[own : own + 1],
                self.u_floored[own : own + 1],
                row_beta[own : own + 1],
                column_beta[own : own + 1],
                self.by_log_p[place : place + 1],
                by_log_p_floored[place : place + 1],
            )
            for place, own in enumerate(owners)
        ]

        self.nothing = empty(0)
        self.absent = torch.empty(batch, dtype=torch.bool, device="cpu")
        self.absent_items = self.absent.unsqueeze(over_classes)
        self.present_items = relations.present.unsqueeze(over_classes)

    def __call__(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (), the needed gradients (k, B, C) and nothing (0,)."""
        relations = self.relations
        numbers = relations.weigh(mask)
        self._take(student, teacher, mask)
        if self.inter_weight:
            mean = self.row_mean
            if self.eps is not None:  # what a constant vector leaves is compared with eps
                torch.sum(self.p, self.over_classes, True, out=self.row_means)
                mean = self.row_means.mul_(mean)
            torch.sub(self.p, mean, out=self.a)
            torch.mul(*self.a_factors, out=self.products)
            torch.sum(self.products, self.over_classes, out=relations.row_moments)
        if self.intra_weight:
            self._centre_columns(mask)
            torch.mul(*self.b_factors, out=self.products)
            torch.sum(self.products, self.over_items, out=relations.column_moments)
        loss = relations.loss(numbers)
        if not self.sides:
            return loss, self.nothing, self.nothing
        relations.differentiate(numbers)
        for side in self.sides:
            self._differentiate(side)
        gradients = torch._log_softmax_backward_data(
            self.by_log_p, self.needed_log_p, self.over_classes, self.dtype
        )
        return loss, gradients.mT.contiguous() if self.few else gradients, self.nothing

    def _take(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        """Fill in log p and p; absent items are as if their logits were 0."""
        for logits, source in zip((student, teacher), self.sources, strict=True):
            if logits.dtype == self.dtype:
                torch.div(logits, self.temperature, out=source)
            else:
                source.copy_(logits).div_(self.temperature)
        if mask is not None:
            torch.logical_not(mask, out=self.absent)
            self.logits.masked_fill_(self.absent_items, 0.0)
        torch._log_softmax(self.logits, self.over_classes, False, out=self.log_p)
        torch.exp(self.log_p, out=self.p)

    def _centre_columns(self, mask: Tensor | None) -> None:
        mean = self.column_mean if mask is None else self.relations.inverse_count
        if self.eps is None:
            self.log_p_of_items.copy_(self.log_p)
            if mask is not None:
                self.log_p_of_items.masked_fill_(self.absent_items, -torch.inf)
            torch._softmax(self.log_p_floored, self.over_items, False, out=self.u_floored)
            torch.lerp(mean, self.zero, self.floor, out=self.column_means)
        else:
            present = self.p
            if mask is not None:
                present = torch.mul(self.p, self.present_items, out=self.b)
            torch.sum(present, self.over_items, True, out=self.column_means).mul_(mean)
        torch.sub(self.u, self.column_means, out=self.b)
        if mask is not None:
            self.b.mul_(self.present_items)

    def _differentiate(self, side: _Side) -> None:
        """Fill in the derivative of the loss by log p, which the columns' softmax is taken of."""
        if self.intra_weight:
            torch.mul(side.own_b, side.column_beta, out=self.by_u)
            self.by_u.addcmul_(side.other_b, self.column_alpha, value=-1.0)
        if self.inter_weight:
            torch.mul(side.own_a, side.row_beta, out=self.by_p)
            self.by_p.addcmul_(side.other_a, self.row_alpha, value=-1.0)
        if not self.intra_weight:
            by_p = self.by_p if self.inter_weight else self.by_p.zero_()
            torch.mul(by_p, side.p, out=side.by_log_p)
        elif self.eps is not None:
            by_p = self.by_u.add_(self.by_p) if self.inter_weight else self.by_u
            torch.mul(by_p, side.p, out=side.by_log_p)
        else:
            torch._softmax_backward_data(
                self.by_u_floored,
                side.u_floored,
                self.over_items,
                self.dtype,
                grad_input=side.by_log_p_floored,
            )
            if self.inter_weight:
                side.by_log_p.addcmul_(self.by_p, side.p)


_plans: dict[tuple[object, ...], _Small] = {}


def _small(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the plan for these shapes, which no other thread can use meanwhile, and keep it."""
    key = (student.shape, student.dtype, teacher.dtype, options, needs)
    plan = _plans.pop(key, None)
    if plan is None:
        with torch.inference_mode(False), torch.no_grad():
            batch, classes = student.shape
            dtype = accumulation_dtype(student, teacher)
            plan = _Small(batch, classes, dtype, options, needs)
        _make_room(plan.size)
    result = plan(student, teacher, mask)
    _plans[key] = plan
    return result


def _make_room(size: int) -> None:
    """Forget the plans not used for longest until another has room beside the rest."""
    for key, plan in reversed(_plans.copy().items()):
        size += plan.size
        if size > KEPT_LOGITS:
            _plans.pop(key, None)
