"""The plan for usual batches: no mask and, if scale-free, rows and columns that all vary.

With p, q the probabilities of student and teacher and a, b the same less their mean, a row's or a
column's rho is <a, b> / (|a| |b|), or <a, b> / (|a| |b| + eps), and the derivative of the loss by a
probability is affine in both,

    dL / dp = beta_i a_i - alpha_i b_i + beta_c a_c - alpha_c b_c

with numbers per row i and per column c: alpha = w / (|a| |b|) and beta = w rho / |a|^2 with w the
correlation's weight, or the same with eps. Small batches are bound by the number of calls; they go
through rows and columns at once. Larger ones are bound by memory and take one after the other.

Where, without eps, a vector varies by less than the definition's floor, or probabilities are so
small that their squares vanish, these formulas do not hold, and the plan says so.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from telme_kd.kernels.cpu.dist.relations import Options
from telme_kd.reference.dist import RELATIVE_FLOOR

FEW_CLASSES = 32
"""Up to this many, items lie on the last axis: a softmax over 7 numbers in a row takes 18 times as
long as across rows; at 64 both layouts are as fast."""

TOGETHER = 2**16
"""Rows and columns of up to so many logits go together: 0.9 of the time in turn at [16, 500], as
fast at [64, 1000]. Beyond, two products of all logits at once leave the cache."""

_LARGEST_RATIO = 0.99 * (RELATIVE_FLOOR**-2 - 1.0) ** 0.5
"""Of the norm of a vector's mean to its centred norm, which then is the floor's share of its norm."""

_FAINT = 1e-12
"""Added to the norm of a mean, it finds centred norms that are less than 1e-15."""

_LOG2_E = math.log2(math.e)


class _Step(NamedTuple):
    """Rows, columns, or both: what is centred and multiplied at once, and the sums that follow."""

    means: Tensor
    centred: Tensor  # (2, 1 or 2, first, last): of student and teacher
    student: Tensor
    teacher: Tensor
    sums: list[tuple[Tensor, int, Tensor]]  # products (3, first, last), their dim, moments


class _Side(NamedTuple):
    """What the gradient of one side is made of, of rows, then of columns."""

    terms: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # own centred, its beta; the other, alpha
    p: Tensor


class Affine:
    """Buffers for one shape, dtype and set of options, and views of them.

    A matrix lies as (classes, items) for few classes and as (items, classes) else: "first" and
    "last" below. Rows come before columns wherever numbers of both are in one buffer.
    """

    def __init__(
        self,
        batch: int,
        classes: int,
        dtype: torch.dtype,
        options: Options,
        needs: tuple[bool, bool],
    ) -> None:
        temperature, inter_weight, intra_weight, self.eps = options
        self.dtype, self.size = dtype, batch * classes
        few = classes <= FEW_CLASSES
        shape = (classes, batch) if few else (batch, classes)
        over_classes, over_items = (0, 1) if few else (1, 0)
        used = [kind for kind, weight in enumerate((inter_weight, intra_weight)) if weight]
        rows = batch if inter_weight else 0
        total = rows + (classes if intra_weight else 0)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="cpu")

        def filled(for_rows: float, for_columns: float) -> Tensor:
            numbers = empty(total)
            numbers[:rows], numbers[rows:] = for_rows, for_columns
            return numbers

        # Probabilities
        self.temperature, self.per_logit = empty().fill_(temperature), _LOG2_E / temperature
        self.by_softmax = few or self.size <= TOGETHER
        self.p = empty(2, *shape)
        self.logits = empty(2, *shape) if self.by_softmax else self.p
        self.sources = [logits.mT if few else logits for logits in self.logits]
        self.over_classes = 1 + over_classes
        self.peaks, self.totals = empty(2, batch, 1), empty(2, batch, 1)

        # Moments
        self.columns, self.over_items = bool(intra_weight), 1 + over_items
        # (2, kind, ...): a row's probabilities have the mean 1 / C.
        column = (classes, 1) if few else (1, classes)
        means = torch.full((2, 2, *column), 1.0 / classes, dtype=dtype, device="cpu")
        self.column_means, self.p_of_kinds = means[:, 1].view(2, classes), self.p.unsqueeze(1)
        moments = empty(3, total)
        self.squares, self.covariance = moments[:2], moments[2]
        centred = empty(2, 2, *shape)
        together = self.size <= TOGETHER
        products = empty(3, 2 if together else 1, *shape)
        self.steps = []
        self.squared, self.multiplied = products[:2], products[2]
        dims = (self.over_classes, self.over_items)
        of_kinds = (moments[:, :rows], moments[:, rows:])
        for kinds in [used] if together else [[kind] for kind in used]:
            which = slice(kinds[0], kinds[-1] + 1)
            sums = [
                (products[:, place], dims[kind], of_kinds[kind])
                for place, kind in enumerate(kinds)
            ]
            step = centred[:, which]
            self.steps.append(_Step(means[:, which], step, step[0], step[1], sums))
        if len(used) == 1:
            self.squared, self.multiplied = products[:2, :1], products[2, :1]

        # Correlations. Multiples of C and B are exact where the loss's weights over B and C would
        # be rounded; summed in double precision, the loss is rounded once.
        self.mean_norms = filled(1.0 / math.sqrt(classes), 0.0).repeat(2, 1)
        self.column_mean_norms, self.root = self.mean_norms[:, rows:], math.sqrt(batch)
        self.faint = empty().fill_(_FAINT)
        self.norms, self.ratios, self.product = empty(2, total), empty(2, total), empty(total)
        self.student_norms, self.teacher_norms = self.norms
        numbers, self.betas = empty(2, total), empty(2, total)
        self.numbers, (self.alpha, self.rho) = numbers, numbers
        self.slopes = filled(
            inter_weight * temperature / batch, intra_weight * temperature / classes
        )
        self.weights = filled(inter_weight * classes, intra_weight * batch)
        self.terms = torch.empty(total, dtype=torch.float64, device="cpu")
        self.loss_scale = torch.full_like(self.terms, temperature**2 / (batch * classes))

        # Gradients
        def across(numbers: Tensor) -> tuple[Tensor, Tensor]:
            of_rows, of_columns = numbers[:rows], numbers[rows:]
            return of_rows.unsqueeze(over_classes), of_columns.unsqueeze(over_items)

        self.sides = [
            _Side(
                [
                    (
                        centred[side, kind],
                        across(self.betas[side])[kind],
                        centred[1 - side, kind],
                        across(self.alpha)[kind],
                    )
                    for kind in used
                ],
                self.p[side],
            )
            for side in (0, 1)
            if needs[side]
        ]
        self.by_p = empty(*shape)
        self.shape = (len(self.sides), batch, classes)
        gradients = empty(len(self.sides), *shape) if few else empty(0, 0, 0)
        self.transposed = list(gradients) if few else None
        self.as_given = gradients.mT

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the loss () and the needed gradients (k, B, C), or None if a vector hardly varies.

        The gradients are by the logits, of a loss whose own gradient is 1.
        """
        self._take(student, teacher)
        if self.columns:
            torch.mean(self.p, self.over_items, out=self.column_means)
        for step in self.steps:
            torch.sub(self.p_of_kinds, step.means, out=step.centred)
            torch.mul(step.centred, step.centred, out=self.squared)
            torch.mul(step.student, step.teacher, out=self.multiplied)
            for products, dim, moments in step.sums:
                torch.sum(products, dim, out=moments)
        if self.eps is None and not self._all_vary():
            return None
        loss = self._correlate()
        if self.sides:
            self._weigh()
        if self.transposed is not None:
            for side, gradient in zip(self.sides, self.transposed, strict=True):
                self._differentiate(side, gradient)
            return loss, self.as_given.clone(memory_format=torch.contiguous_format)
        gradients = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for side, gradient in zip(self.sides, gradients, strict=True):
            self._differentiate(side, gradient)
        return loss, gradients

    def _take(self, student: Tensor, teacher: Tensor) -> None:
        """Fill in the probabilities."""
        if self.by_softmax:
            for logits, source in zip((student, teacher), self.sources, strict=True):
                if logits.dtype == self.dtype:
                    torch.div(logits, self.temperature, out=source)
                else:
                    source.copy_(logits).div_(self.temperature)
            torch._softmax(self.logits, self.over_classes, False, out=self.p)
            return
        for logits, source, peak in zip((student, teacher), self.sources, self.peaks, strict=True):
            wide = logits if logits.dtype == self.dtype else source.copy_(logits)
            torch.amax(wide, 1, True, out=peak).mul_(-self.per_logit)
            torch.add(peak, wide, alpha=self.per_logit, out=source)
        torch.sum(self.p.exp2_(), 2, True, out=self.totals)
        self.p.mul_(self.totals.reciprocal_())

    def _all_vary(self) -> bool:
        """Whether the definition has no floor here and the squares are numbers; never with NaN."""
        if self.columns:
            torch.add(self.faint, self.column_means, alpha=self.root, out=self.column_mean_norms)
        torch.rsqrt(self.squares, out=self.norms)
        ratio = torch.mul(self.mean_norms, self.norms, out=self.ratios).max().item()
        return bool(ratio <= _LARGEST_RATIO)

    def _correlate(self) -> Tensor:
        """Fill in alpha and rho; return the loss ()."""
        if self.eps is None:  # the norms are inverse
            torch.mul(self.student_norms, self.teacher_norms, out=self.alpha)
        else:
            torch.sqrt(self.squares, out=self.norms)
            torch.mul(self.student_norms, self.teacher_norms, out=self.product)
            torch.add(self.product, self.eps, out=self.alpha).reciprocal_()
        torch.mul(self.alpha, self.covariance, out=self.rho)
        torch.addcmul(self.weights, self.weights, self.rho, value=-1.0, out=self.terms)
        return torch.dot(self.terms, self.loss_scale).to(self.dtype)

    def _weigh(self) -> None:
        """Fill in each side's beta, and give alpha and rho their weight in the loss."""
        if self.eps is None:
            self.numbers.mul_(self.slopes)
            torch.div(self.rho, self.squares, out=self.betas)
            return
        # 0 / 0 is the gradient of a norm at 0, which is 0.
        torch.div(self.product, self.squares, out=self.betas).nan_to_num_(0.0, math.inf)
        self.betas.mul_(self.alpha)
        self.numbers.mul_(self.slopes)
        self.betas.mul_(self.rho)

    def _differentiate(self, side: _Side, gradient: Tensor) -> None:
        """Write the derivative by a side's logits."""
        (own, beta, other, alpha), *rest = side.terms
        by_p = torch.mul(own, beta, out=self.by_p).addcmul_(other, alpha, value=-1.0)
        for own, beta, other, alpha in rest:
            by_p.addcmul_(own, beta).addcmul_(other, alpha, value=-1.0)
        torch._softmax_backward_data(
            by_p, side.p, self.over_classes - 1, self.dtype, grad_input=gradient
        )
