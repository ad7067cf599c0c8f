"""How far roundings take an outcome: the unit in which the errors of different draws compare.

The largest error of many draws is that of the draw that magnifies roundings most, and there one
rounding decides between two codes. In units of what a draw makes of roundings, each counts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHANGE = 1e-6
_TIMES = 4


def conditions(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], *, seed: int = 0
) -> Tensor:
    """Of each outcome its norm, as it is rounded itself, and how far a change by 1 would take it.

    Args:
        function: what makes outcomes of float64 tensors.
        tensors: the inputs, whose entries are all changed by independent normal numbers.
        seed: of those numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = function(*tensors)
    squared = torch.zeros(len(exact), dtype=torch.float64)
    for _ in range(_TIMES):
        changed = [
            x + _CHANGE * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            for x in tensors
        ]
        moved = zip(function(*changed), exact, strict=True)
        squared += torch.stack([(x - y).square().sum() for x, y in moved])
    sizes = torch.stack([x.double().norm() for x in exact])
    return sizes + (squared / _TIMES).sqrt() / _CHANGE
