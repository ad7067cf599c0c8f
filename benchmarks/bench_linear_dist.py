"""DIST of linear layers, fused, against DIST of logits that are kept whole.

Run ``python -m benchmarks.bench_linear_dist``; it measures on the CPU and, if there is one, the
CUDA device, and writes ``benchmarks/results/<version>/linear_dist--<device>.json``.
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
from telme_kd import functional
from telme_kd._typing import Backend
from telme_kd.reference import linear_dist as definition

TEMPERATURE = 4.0

_SIZES = {
    "cpu": [(64, 256, 1000), (1024, 256, 32000)],
    "cuda": [(1024, 2048, 32000), (8192, 4096, 32000), (8192, 4096, 128256)],
}
_RAGGED = (333, 100, 5003)


def cases(kind: str, quick: bool) -> list[Case]:
    """The sizes of a device: tokens, width, classes."""
    if quick:
        return [case(9, 16, 131)]
    dtype = "bfloat16" if kind == "cuda" else "float32"
    return [case(*size, dtype) for size in _SIZES[kind]] + [case(*_RAGGED)]


def case(tokens: int, width: int, classes: int, dtype: str = "float32") -> Case:
    """A case with its floors: hidden and weights once each way, four products; fused takes six."""
    hidden, weight = tokens * width, classes * width
    return Case(
        (tokens, width, classes),
        dtype,
        floor_bytes=3 * (hidden + weight) * bytes_per_element(dtype),
        flop=4 * 2 * tokens * width * classes,
        plan_flop=6 * 2 * tokens * width * classes,
    )


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Hidden states and weights whose logits have a standard deviation of 2."""
    tokens, width, classes = case.shape
    scale = 2.0 / width**0.5
    student = normal(case, generator, tokens, width).requires_grad_()
    student_weight = normal(case, generator, classes, width, scale=scale).requires_grad_()
    teacher = normal(case, generator, tokens, width)
    return student, student_weight, teacher, normal(case, generator, classes, width, scale=scale)


def work(case: Case, provider: str, tensors: tuple[Tensor, ...]) -> Work:
    """The loss of the logits: kept whole, or never whole."""
    if provider == REFERENCE:
        function = _materialised
    else:
        function = partial(
            functional.linear_dist_loss, temperature=TEMPERATURE, backend=cast(Backend, provider)
        )
    return Work(function, tensors, tensors[:2], scalar_upstream(tensors[0]))


def _materialised(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Tensor:
    return definition.linear_dist_loss(
        student,
        student_weight,
        None,
        teacher,
        teacher_weight,
        None,
        temperature=TEMPERATURE,
        inter_weight=1.0,
        intra_weight=1.0,
        mask=None,
        eps=None,
    )


BENCHMARK = Benchmark("linear_dist", cases, draw, work)

if __name__ == "__main__":
    main([BENCHMARK])
