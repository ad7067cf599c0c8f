"""Who computes an operator: the reference, PyTorch's compiler of it, and the library's backends."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.failures import reason_for
from benchmarks.machine import Machine
from benchmarks.workload import REFERENCE, Benchmark, Case, Work

FUSED = {"cpu": "cpu", "cuda": "triton"}  # the backend of a kind of device
COMPILED = "reference compiled"
GRAPHED = "reference compiled, CUDA graphs"
# torch.compile's modes, by what they are called here. The last captures CUDA graphs of its own.
_COMPILED = {
    "cpu": {COMPILED: "default"},
    "cuda": {
        COMPILED: "default",
        "reference compiled, max autotune": "max-autotune-no-cudagraphs",
        GRAPHED: "reduce-overhead",
    },
}

_GRAPHED_BYTES = 2**28


def is_compiled(provider: str) -> bool:
    """Whether a provider is the compiled reference, in any mode."""
    return provider.startswith(COMPILED)


def works(
    benchmark: Benchmark,
    case: Case,
    machine: Machine,
    tensors: tuple[Tensor, ...],
    *,
    compiled: bool,
) -> Iterator[tuple[str, Work | str]]:
    """Every provider's work on the tensors, or the reason why it has none.

    Each has computed forward and backward once, which is when a backend refuses, a compiler
    compiles, and what does not fit into memory shows.
    """
    yield REFERENCE, _tried(benchmark, case, REFERENCE, tensors, None)
    if compiled and case.compiled:
        torch._dynamo.reset()  # or the cases before this one count against its cache
        for name, mode in _COMPILED[machine.kind].items():
            if name == GRAPHED and case.floor_bytes > _GRAPHED_BYTES:
                yield name, "left out: its graphs keep the memory that the others are measured in"
            else:
                yield name, _tried(benchmark, case, REFERENCE, tensors, mode)
    for name in benchmark.providers:
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            yield name, "Triton interprets its kernels here; unset TRITON_INTERPRET"
        else:
            yield name, _tried(benchmark, case, name, tensors, None)


def _tried(
    benchmark: Benchmark,
    case: Case,
    provider: str,
    tensors: tuple[Tensor, ...],
    mode: str | None,
) -> Work | str:
    try:
        work = benchmark.work(case, provider, tensors)
        if mode is not None:
            compiled = torch.compile(work.function, mode=mode, dynamic=False, fullgraph=True)
            work = work._replace(function=compiled)
        work.backward(work.forward())
    except Exception as error:  # a provider that cannot do a case is a result
        return reason_for(error)
    return work
