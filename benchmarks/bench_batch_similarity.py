"""Batch similarity against its reference, compiled and not: time, memory, launches, error.

Run ``python -m benchmarks.bench_batch_similarity``; it measures on the CPU and, if there is one,
the CUDA device, and writes ``benchmarks/results/<version>/batch_similarity--<device>.json``.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from benchmarks.command import main
from benchmarks.workload import (
    REFERENCE,
    Benchmark,
    Case,
    Work,
    bytes_per_element,
    normal,
    scalar_upstream,
)
from telme_kd._typing import Backend
from telme_kd.functional import batch_similarity_loss
from telme_kd.reference import batch_similarity as definition

_WIDTH = 768
_BATCHES = {"cpu": (4, 16, 64, 1024, 4096), "cuda": (4, 16, 64, 1024, 8192, 65536)}
_RAGGED = (129, 333)


def cases(kind: str, quick: bool) -> list[Case]:
    """The sizes of a device."""
    if quick:
        return [case(4, _WIDTH), case(*_RAGGED)]
    found = [case(batch, _WIDTH) for batch in _BATCHES[kind]] + [case(*_RAGGED)]
    if kind == "cuda":
        found += [case(batch, _WIDTH, "bfloat16") for batch in (1024, 8192, 65536)]
    return found


def case(batch: int, width: int, dtype: str = "float32") -> Case:
    """A case with its floors: three matrices moved, three products; streaming takes five."""
    return Case(
        (batch, width),
        dtype,
        floor_bytes=3 * batch * width * bytes_per_element(dtype),
        flop=6 * batch**2 * width,
        plan_flop=10 * batch**2 * width,
    )


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normal features; the teacher gets no gradient."""
    student = normal(case, generator, *case.shape).requires_grad_()
    return student, normal(case, generator, *case.shape)


def work(case: Case, provider: str, tensors: tuple[Tensor, ...]) -> Work:
    """The loss of the features, by the definition called directly or by a backend."""
    by_backend = partial(batch_similarity_loss, backend=cast(Backend, provider))
    function = _defined if provider == REFERENCE else by_backend
    return Work(function, tensors, tensors[:1], scalar_upstream(tensors[0]))


def _defined(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return definition.batch_similarity_loss(
        student.to(dtype), teacher.to(dtype), temperature=1.0, mask=None
    )


BENCHMARK = Benchmark("batch_similarity", cases, draw, work)

if __name__ == "__main__":
    main([BENCHMARK])
