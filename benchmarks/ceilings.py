"""What the device can do at best: copy memory, multiply matrices. Measured, not looked up."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.clocks import summary
from benchmarks.machine import Machine
from benchmarks.workload import dtype_named

_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
_QUICK_DIVISOR = 8
_ROUNDS = 10


def ceilings(machine: Machine, *, quick: bool) -> dict[str, Any]:
    """Bytes per second of a large copy, read and written, and FLOP per second of a square product.

    The products are exact to their dtype: float32 is not rounded to TF32. Of ten rounds the
    fastest but one counts: a ceiling is what the device reaches undisturbed.
    """
    size = _COPY_BYTES[machine.kind] // (_QUICK_DIVISOR if quick else 1)
    source = torch.zeros(size, dtype=torch.int8, device=machine.tensors_on)
    target = torch.empty_like(source)
    copy_rate = 2 * size / _seconds(machine, partial(target.copy_, source))

    matmul_rates = {}
    width = _MATRIX[machine.kind] // (_QUICK_DIVISOR if quick else 1)
    for name in _DTYPES[machine.kind]:
        left, right = torch.randn(
            2, width, width, dtype=dtype_named(name), device=machine.tensors_on
        )
        matmul_rates[name] = 2 * width**3 / _seconds(machine, partial(torch.matmul, left, right))
    return {"copy_bytes_per_second": copy_rate, "matmul_flop_per_second": matmul_rates}


def _seconds(machine: Machine, call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_ROUNDS):
        machine.synchronise()
        begin = time.perf_counter()
        call()
        machine.synchronise()
        times.append(time.perf_counter() - begin)
    return summary(times)["p20"]
