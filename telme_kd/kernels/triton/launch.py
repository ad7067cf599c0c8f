"""What every Triton module needs to start its kernels, and to be compiled without a GPU."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter and take CPU tensors. Read once, as Triton's decorator is."""

TUNING = os.environ.get("TELME_KD_TUNE") == "1"
"""Let a kernel that is shipped in several configurations choose by timing them. Read once."""

_Plan = TypeVar("_Plan")
_chosen: dict[Hashable, Any] = {}


class Tile(NamedTuple):
    """Rows and columns that a program holds at a time, and its warps."""

    items: int
    classes: int
    warps: int


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


def fastest(plans: Sequence[_Plan], kind: Hashable, run: Callable[[_Plan], object]) -> _Plan:
    """The first plan, which arithmetic prefers, or if ``TUNING`` the one that takes least time.

    Each kind of call is timed once per process. Nothing is timed while a CUDA graph is captured.

    Args:
        plans: shipped configurations that give the same result, up to rounding.
        kind: what the time depends on: the operator, the device, dtypes, sizes.
        run: launches a plan; it may be run any number of times.
    """
    if not TUNING or len(plans) == 1:
        return plans[0]
    if kind not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return plans[0]
        _chosen[kind] = min(plans, key=lambda plan: _milliseconds(partial(run, plan)))
    plan: _Plan = _chosen[kind]
    return plan


def _milliseconds(launch: Callable[[], object]) -> float:
    if INTERPRETED:  # no clock would tell anything of a GPU
        launch()
        return 0.0
    from triton.testing import do_bench

    median: float = do_bench(launch, warmup=10, rep=50, return_mode="median")
    return median
