"""The plan for small batches of any content: as few calls as possible, into buffers that are kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from telme_kd.kernels.cpu.dist.affine import FEW_CLASSES
from telme_kd.kernels.cpu.dist.relations import Options, Relations


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


class Small:
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
        self.dtype, self.size = dtype, batch * classes
        self.relations = relations = Relations(batch, classes, dtype, options)
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
    ) -> tuple[Tensor, Tensor]:
        """Return the loss () and the needed gradients (k, B, C)."""
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
            return loss, self.nothing
        relations.differentiate(numbers)
        for side in self.sides:
            self._differentiate(side)
        gradients = torch._log_softmax_backward_data(
            self.by_log_p, self.needed_log_p, self.over_classes, self.dtype
        )
        return loss, gradients.mT.contiguous() if self.few else gradients

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
