"""A benchmark that costs nothing: the sum of squares, and backends that are wrong in known ways."""

import torch
from torch import Tensor

from benchmarks.machine import Machine
from benchmarks.workload import Benchmark, Case, Work, normal, scalar_upstream

CPU = Machine("cpu", "a processor", torch.device("cpu"), (1,))
# CUDA's branches over CPU tensors, for tests that replace the calls into torch.cuda.
CUDA = Machine("cuda", "NVIDIA T1000 8GB", torch.device("cpu"), (1,))
CASES = [Case((2, 3), floor_bytes=48, flop=12), Case((4, 3), variant="wide")]


def cases(kind: str, quick: bool) -> list[Case]:
    return CASES


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (normal(case, generator, *case.shape).requires_grad_(),)


def work(case: Case, backend: str, tensors: tuple[Tensor, ...]) -> Work:
    """``"cpu"`` is wrong by a thousandth; ``"triton"`` refuses."""
    if backend == "triton":
        raise RuntimeError("no such device\nand more")
    factor = 1.001 if backend == "cpu" else 1.0

    def function(values: Tensor) -> Tensor:
        return factor * values.square().sum()

    return Work(function, tensors, tensors, scalar_upstream(tensors[0]))


BENCHMARK = Benchmark("toy", cases, draw, work)
