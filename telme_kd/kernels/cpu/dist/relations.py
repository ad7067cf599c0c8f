"""The correlations of rows and columns: the loss that they make, and what it changes with."""

from typing import NamedTuple

import torch
from torch import Tensor

from telme_kd.reference.dist import CONSTANT_GRADIENT_LIKE, RELATIVE_FLOOR

Options = tuple[float, float, float, float | None]
"""Temperature, weight of the rows, weight of the columns, eps."""

_SLOPE = RELATIVE_FLOOR / CONSTANT_GRADIENT_LIKE
_STEEP = 1.0 - 3.0 * RELATIVE_FLOOR**2
_STEEPER = 2.0 * (1.0 - _SLOPE + _SLOPE * RELATIVE_FLOOR**2)


class Numbers(NamedTuple):
    """What weighs the correlations (n,): rows first, then columns."""

    weights: Tensor  # in the loss, over loss_scale
    slopes: Tensor  # in the gradient by the logits
    shares: Tensor  # of the squared floor, due to the vector's mean; (2, n) where they differ


class Relations:
    """The correlations of all rows, then all columns: the loss they make and its derivatives.

    The derivative of the loss by a vector p of which a is the centred one is beta a - alpha b, with
    b the other's, up to a constant that the softmax removes from a row, and from a column in units
    of its sum.
    """

    def __init__(self, batch: int, classes: int, dtype: torch.dtype, options: Options) -> None:
        temperature, inter_weight, intra_weight, eps = options
        self.eps = eps
        self.size = batch + classes
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
        self.numbers = Numbers(
            filled(inter_weight * classes, intra_weight * batch),
            filled(inter_weight * temperature / batch, intra_weight * temperature / classes),
            filled(RELATIVE_FLOOR**2 / classes, RELATIVE_FLOOR**2 / batch),
        )
        self.loss_scale = torch.full_like(self.terms, temperature**2 / (batch * classes))
        self.least, self.one, self.steep, self.regular = (
            empty().fill_(constant) for constant in (_SLOPE, 1.0, _STEEP, eps or 0.0)
        )

        self.present, self.inverse_count = empty(batch), empty()
        self.masked = Numbers(*(number.clone() for number in self.numbers))
        self.row_weight = inter_weight * classes * batch
        self.column_weight = intra_weight * batch
        self.slope_scale = temperature / (batch * classes)

    def weigh(self, mask: Tensor | None) -> Numbers:
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

    def loss(self, numbers: Numbers) -> Tensor:
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

    def differentiate(self, numbers: Numbers) -> None:
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
