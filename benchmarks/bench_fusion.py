"""Fusion against its reference, compiled and not: time, memory, launches, error.

Run ``python -m benchmarks.bench_fusion``; it measures on the CPU and, if there is one, the CUDA
device, and writes ``benchmarks/results/<version>/fusion--<device>.json``.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.command import main
from benchmarks.providers import FUSED
from benchmarks.workload import (
    REFERENCE,
    UPSTREAM,
    Benchmark,
    Case,
    Work,
    bytes_per_element,
    normal,
)
from telme_kd import AttentionShiftingFusion, ShiftingFusion
from telme_kd._typing import Backend
from telme_kd.errors import BackendError
from telme_kd.kernels import fusion as kernels
from telme_kd.reference import fusion as definition

TAIL = "tail"
GATE_AND_SHIFT = "gate and shift"
HEAD = "attention head"
HEAD_WITH_DROPOUT = "attention head with dropout"

_BATCHES = (4, 16, 64, 256)
_COMPILED_BATCHES = (4, 64)  # of the heads: compiling takes longer than all the rest
_WIDTH = 768
_STUDENTS = 2  # each as wide as the anchor
_HEADS = 4
_DROPOUT = 0.1
_RAGGED = (37, 300)

# In squares of the width: weights, and products of an item with a weight. The gate reads three
# widths and the value two; a student is embedded and attends, in four squares, by itself.
_SQUARES = {TAIL: (0, 0), GATE_AND_SHIFT: (5, 5), HEAD: (11, 15), HEAD_WITH_DROPOUT: (11, 15)}
# Of the tail, matrices read and written: three in and one out; forward's three again and the
# upstream gradient in, three gradients out.
_TAIL_MATRICES = 4 + 7
_THRESHOLD, _NORM_EPS = 0.1, 1e-5


def cases(kind: str, quick: bool) -> list[Case]:
    """The sizes of a device: batch and width of the anchor."""
    if quick:
        return [case(TAIL, 9, 33), case(GATE_AND_SHIFT, 9, 33), case(HEAD, 9, 36)]
    found = [
        case(variant, *shape)
        for variant in (TAIL, GATE_AND_SHIFT, HEAD)
        for shape in (*((batch, _WIDTH) for batch in _BATCHES), _RAGGED)
    ]
    found.append(case(HEAD_WITH_DROPOUT, 64, _WIDTH))
    if kind == "cuda":
        found += [case(HEAD, batch, _WIDTH, "bfloat16") for batch in _BATCHES]
    return found


def case(variant: str, batch: int, width: int, dtype: str = "float32") -> Case:
    """A case with its floors: weights read twice and their gradients written; all products."""
    weights, products = _SQUARES[variant]
    elements = 3 * weights * width**2 + (_TAIL_MATRICES * batch * width if variant == TAIL else 0)
    return Case(
        (batch, width),
        dtype,
        variant,
        floor_bytes=elements * bytes_per_element(dtype),
        flop=3 * 2 * batch * products * width**2,
        compiled=variant in (TAIL, GATE_AND_SHIFT) or batch in _COMPILED_BATCHES,
        repeatable=variant != HEAD_WITH_DROPOUT,
    )


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Anchor, non-verbal features, all parameters, and the upstream gradient.

    Of the tail: anchor, both products, both biases, LayerNorm's parameters, and the gradient.
    """
    batch, width = case.shape
    upstream = normal(case, generator, batch, width, scale=UPSTREAM)
    if case.variant == TAIL:
        shapes = 3 * [(batch, width)] + 4 * [(width,)]
        leaves = [normal(case, generator, *shape).requires_grad_() for shape in shapes]
        return *leaves, upstream
    features = [normal(case, generator, batch, width).requires_grad_()]
    if case.variant == GATE_AND_SHIFT:
        features.append(normal(case, generator, batch, _STUDENTS * width).requires_grad_())
    else:
        features += [
            normal(case, generator, batch, width).requires_grad_() for _ in range(_STUDENTS)
        ]
    parameters = []
    for name, like in _parameters(_module(case.variant, width, "reference")):
        values = normal(case, generator, *like.shape, scale=like.shape[-1] ** -0.5)
        if "norm.weight" in name:
            values += 1.0
        parameters.append(nn.Parameter(values))
    return *features, *parameters, upstream


def work(case: Case, provider: str, tensors: tuple[Tensor, ...]) -> Work:
    """A module of that backend with the drawn parameters, over the drawn features; or the tail."""
    *leaves, upstream = tensors
    if case.variant == TAIL:
        return Work(_tail(provider, upstream), tuple(leaves), tuple(leaves), upstream)
    module = _module(case.variant, case.shape[1], cast(Backend, provider))
    names = [name for name, _ in _parameters(module)]
    features, parameters = leaves[: -len(names)], leaves[-len(names) :]
    for name, values in zip(names, parameters, strict=True):
        owner, _, attribute = name.rpartition(".")
        # Values that are a parameter stay that very tensor, so that its gradient can be asked for.
        setattr(module.get_submodule(owner), attribute, nn.Parameter(values))
    held = tuple(parameter for _, parameter in _parameters(module))
    return Work(module, tuple(features), (*features, *held), upstream)


def _tail(provider: str, like: Tensor) -> Callable[..., Tensor]:
    """The tail of the gate, which has no public name, and so no check of its backend."""
    if provider == REFERENCE:
        return partial(
            definition.gate_and_shift, threshold=_THRESHOLD, eps=None, norm_eps=_NORM_EPS
        )
    if provider != FUSED[like.device.type]:
        raise BackendError(f"backend: {provider!r} does not compute on {like.device.type}")
    return partial(
        kernels.gate_and_shift,
        threshold=_THRESHOLD,
        eps=None,
        norm_eps=_NORM_EPS,
        rate=0.0,
        output_dtype=like.dtype,
        backend=provider,
    )


def _module(variant: str, width: int, backend: Backend) -> nn.Module:
    """A module whose parameters have no values yet."""
    with torch.device("meta"):
        if variant == GATE_AND_SHIFT:
            return ShiftingFusion(width, _STUDENTS * width, backend=backend)
        return AttentionShiftingFusion(
            width,
            _STUDENTS * (width,),
            num_heads=_HEADS,
            dropout=_DROPOUT if variant == HEAD_WITH_DROPOUT else 0.0,
            backend=backend,
        )


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters()


BENCHMARK = Benchmark("fusion", cases, draw, work)

if __name__ == "__main__":
    main([BENCHMARK])
