"""The processes that train one model together: one, unless a launcher has started more.

Accelerate forms their group when the hardware is chosen. Asking here never does.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed
from torch import Tensor

Value = TypeVar("Value")


def count() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the one that reads, writes and prints for all."""
    return index() == 0


def tell(value: Value) -> Value:
    """Give every process the value that the first one has; all of them call this."""
    if count() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def gather(values: list[Value]) -> list[Value]:
    """Give every process the values of all, in order; all of them call this."""
    if count() == 1:
        return values
    found: list[list[Value]] = [[] for _ in range(count())]
    torch.distributed.all_gather_object(found, values)
    return [value for values in found for value in values]


def add(values: Tensor) -> Tensor:
    """Add up, in place, the tensors of all processes, which have one shape; all call this."""
    if count() > 1:
        torch.distributed.all_reduce(values)
    return values


def wait() -> None:
    """Wait until all are here."""
    if count() > 1:
        torch.distributed.barrier()


def in_turn(work: Callable[[], Value]) -> Value:
    """Work in one process after another, the first one first; all of them call this.

    What the first has to write is then there for the others, and nobody reads what another writes.

    Args:
        work: What every process does.

    Returns:
        What it returns.
    """
    for turn in range(count()):
        if turn == index():
            value = work()
        wait()
    return value


def leave() -> None:
    """Dissolve the group, so that no process ends while another still talks to it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
