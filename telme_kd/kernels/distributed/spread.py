"""An axis of a batch that lies on several processes, and what they tell each other about it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from telme_kd._typing import ProcessGroup


class Spread(NamedTuple):
    """How an axis lies on the processes of a group, in rank order.

    Attributes:
        sizes: of each process, how much of the axis it has.
        group: the processes; None if one has it all, which then tells itself nothing.
    """

    sizes: tuple[int, ...]
    group: ProcessGroup | None = None

    @property
    def total(self) -> int:
        """The length of the whole axis."""
        return sum(self.sizes)

    @property
    def rank(self) -> int:
        """The place of this process."""
        return 0 if self.group is None else self.group.rank()

    @property
    def own(self) -> slice:
        """Where the part of this process lies in it."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def add(self, *parts: Tensor) -> list[Tensor]:
        """Return the sums of tensors over all processes, taken in one collective."""
        if self.group is None:
            return list(parts)
        joined = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(joined, group=self.group)
        sums = torch.split(joined, [part.numel() for part in parts])
        return [summed.view_as(part) for summed, part in zip(sums, parts, strict=True)]

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of all processes, entry by entry."""
        if self.group is None:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values

    def of_each(self, numbers: Tensor) -> Tensor:
        """Return the numbers of all processes: (n,) in, (processes, n) out."""
        if self.group is None:
            return numbers[None]
        received = [torch.empty_like(numbers) for _ in self.sizes]
        torch.distributed.all_gather(received, numbers, group=self.group)
        return torch.stack(received)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes: (own, d) in, (total, d) out."""
        if self.group is None:
            return rows
        return all_rows(rows, self.sizes, self.group)


def all_rows(rows: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return the rows of all processes of a group, of which each has its own number."""
    # all_gather wants equal shapes, so all are as long as the longest.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(received, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
