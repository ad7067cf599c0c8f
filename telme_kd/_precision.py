"""The precision that operators compute in, whatever dtype they are given and under any autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: torch.compile of torch 2.6 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that losses compute in and return: the widest given, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast chooses dtypes on a device."""
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves the dtypes on a device alone."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def layer_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer, called here, would take a tensor in."""
    kind = tensor.device.type
    autocast = kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    if autocast and tensor.dtype is not torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
