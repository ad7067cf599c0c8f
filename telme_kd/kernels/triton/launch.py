"""What every Triton module needs to start its kernels, and to be compiled without a GPU."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter and take CPU tensors. Read once, as Triton's decorator is."""


class Shipped(NamedTuple):
    """One specialisation that the heuristics of a module can launch.

    The signature maps every argument that is no constexpr, in the order of the kernel's parameters,
    to Triton's word for its type (``"*bf16"``, ``"i32"``, ``"fp32"``); the constants give the rest.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU current while kernels are launched: Triton starts them on the current."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
