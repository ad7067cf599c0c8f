"""Names for the choices that users make by word."""

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch.distributed
from torch import Tensor

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:  # a build of torch without it, where no group can be made
    ProcessGroup = object

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton"]
"""Which implementation computes an operator; ``"auto"`` picks the fastest that fits."""

AttendOver: TypeAlias = Literal["modalities", "dialogue", "batch"]
"""What the tokens of the fusion head's attention are."""

Group: TypeAlias = ProcessGroup | Literal["world"] | None
"""A process group, ``"world"`` for all processes, or None for this process alone."""

LinearHead: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states (..., d) and the weight (V, d) and bias (V,) of the layer that reads them."""
