"""DIST against its reference, compiled and not: time, memory, launches, error.

Run ``python -m benchmarks.bench_dist``; it measures on the CPU and, if there is one, the CUDA
device, and writes ``benchmarks/results/<version>/dist--<device>.json``.
"""

from dataclasses import replace
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
from telme_kd.functional import dist_loss
from telme_kd.reference import dist as definition

TEMPERATURE = 4.0  # MELD's
RELEASED = "released formula"
RELEASED_EPS = 1e-8

_SMALL = [(batch, classes) for batch in (4, 16, 64, 256) for classes in (6, 7)]
_LARGE = [(256, 1000), (2048, 1000)]
_RAGGED = [(37, 131)]
_VOCABULARIES = [(4096, 32000), (4096, 128256)]


def cases(kind: str, quick: bool) -> list[Case]:
    """The sizes of a device."""
    if quick:
        return [case(4, 7), case(37, 131, "bfloat16")]
    found = [case(*shape) for shape in _SMALL + _LARGE + _RAGGED]
    if kind == "cpu":  # compiling takes longer than all the rest, and six classes are like seven
        found = [replace(case, compiled=case.shape[1] != 6) for case in found]
    found += [case(64, 7, variant=RELEASED), case(256, 1000, variant=RELEASED)]
    found.append(case(256, 1000, "bfloat16"))
    if kind == "cuda":
        found += [
            case(*shape, dtype) for shape in _VOCABULARIES for dtype in ("float32", "bfloat16")
        ]
    return found


def case(batch: int, classes: int, dtype: str = "float32", variant: str = "") -> Case:
    """A case with its floor: two matrices read, one written.

    Over a vocabulary the fused plan moves seven: rows and columns take a read of both each, the
    gradient one and its result. It reads its rows twice, once of these from the L2 cache.
    """
    matrix = batch * classes * bytes_per_element(dtype)
    plan_bytes = 7 * matrix if (batch, classes) in _VOCABULARIES else 0
    return Case((batch, classes), dtype, variant, floor_bytes=3 * matrix, plan_bytes=plan_bytes)


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Logits with a standard deviation of 2; the teacher gets no gradient."""
    student = normal(case, generator, *case.shape, scale=2.0).requires_grad_()
    return student, normal(case, generator, *case.shape, scale=2.0)


def work(case: Case, provider: str, tensors: tuple[Tensor, ...]) -> Work:
    """The loss of the logits, by the definition called directly or by a backend."""
    eps = RELEASED_EPS if case.variant == RELEASED else None
    if provider == REFERENCE:
        function = partial(_defined, eps=eps)
    else:
        function = partial(
            dist_loss, temperature=TEMPERATURE, eps=eps, backend=cast(Backend, provider)
        )
    return Work(function, tensors, tensors[:1], scalar_upstream(tensors[0]))


def _defined(student: Tensor, teacher: Tensor, *, eps: float | None) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return definition.dist_loss(
        student.to(dtype),
        teacher.to(dtype),
        temperature=TEMPERATURE,
        inter_weight=1.0,
        intra_weight=1.0,
        mask=None,
        eps=eps,
    )


BENCHMARK = Benchmark("dist", cases, draw, work)

if __name__ == "__main__":
    main([BENCHMARK])
