"""How far a provider's output and gradients are from the definition in float64."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.failures import reason_for
from benchmarks.workload import REFERENCE, Benchmark, Case, Work

DRAWS = 200
FEWEST_DRAWS = 3


def errors(
    benchmark: Benchmark,
    case: Case,
    tensors: tuple[Tensor, ...],
    works: Mapping[str, Work],
    generator: torch.Generator,
    *,
    draws: int = DRAWS,
    budget: float,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Relative errors of every provider over random draws.

    An error is the norm of the deviation over the norm of the truth: of the output, and of the
    gradient that has the larger one. What is reported is the largest of all draws, and their root
    mean square.

    Args:
        benchmark: what draws the inputs and defines the truth.
        case: whose inputs to draw.
        tensors: what the works compute on; every draw overwrites them.
        works: every provider's work on those tensors.
        generator: of the draws.
        draws: how many, if the budget allows.
        budget: seconds after which no further draw is made, beyond the first few.
        now: the clock of the budget.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    reasons: dict[str, str] = {}
    begin = now()
    for count in range(draws):
        if count >= FEWEST_DRAWS and now() - begin >= budget:
            break
        with torch.no_grad():
            for tensor, drawn in zip(tensors, benchmark.draw(case, generator), strict=True):
                tensor.copy_(drawn)
        try:
            true_output, true_gradients = _truth(benchmark, case, tensors)
        except Exception as error:  # a truth too large for this machine is no fault of a provider
            return {name: {"reason": f"no float64 truth: {reason_for(error)}"} for name in works}
        for name, work in works.items():
            if name in reasons:
                continue
            try:
                output = work.forward()
                gradients = work.backward(output)
            except Exception as error:
                reasons[name] = reason_for(error)
                continue
            pairs = zip(gradients, true_gradients, strict=True)
            found[name].append(
                (
                    relative_error(output, true_output),
                    max(relative_error(gradient, truth) for gradient, truth in pairs),
                )
            )
    return {
        name: {"reason": reasons[name]} if name in reasons else _summary(values)
        for name, values in found.items()
    }


def _truth(
    benchmark: Benchmark, case: Case, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = tuple(
        tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors
    )
    work = benchmark.work(case, REFERENCE, wide)
    output = work.forward()
    return output, work.backward(output)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the deviation over that of the truth; the deviation's own where that is 0."""
    deviation: float = torch.linalg.vector_norm(value.detach().double() - truth.detach()).item()
    size: float = torch.linalg.vector_norm(truth.detach()).item()
    return deviation / size if size else deviation


def _summary(values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    output, gradient = zip(*values, strict=True)
    return {
        "draws": len(values),
        "output": {"max": max(output), "rms": _root_mean_square(output)},
        "gradient": {"max": max(gradient), "rms": _root_mean_square(gradient)},
    }


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
