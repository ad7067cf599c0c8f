"""Measure one cell: a case with a thread count, by every provider."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import accuracy, clocks, launches, memory, providers
from benchmarks.failures import OUT_OF_MEMORY, reason_for
from benchmarks.machine import Machine
from benchmarks.results import Document
from benchmarks.workload import Benchmark, Case, Work

_SEED = 0
_GRAPH_ROUNDS = 2  # each is ten replays of a graph that is captured anew


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: of sampling, for each clock.
        fewest_rounds: taken even if they cost more.
        draws: of random inputs for the errors.
        draw_seconds: after which fewer draws are enough.
        compiled: whether to compile.
    """

    seconds: float
    fewest_rounds: int
    draws: int
    draw_seconds: float
    compiled: bool


THOROUGH = Effort(1.0, 3, accuracy.DRAWS, 2.0, True)
QUICK = Effort(0.02, 1, 3, 0.0, False)


def measure(
    benchmark: Benchmark,
    case: Case,
    machine: Machine,
    threads: int,
    ceilings: Document,
    effort: Effort,
) -> Document:
    """Return the row of a result file for a case; errors and memory only at the usual threads."""
    usual = threads == machine.threads[0]
    row: Document = {**case.described(), "threads": threads, "providers": {}}
    generator = torch.Generator(machine.tensors_on).manual_seed(_SEED)
    try:
        tensors = benchmark.draw(case, generator)
    except Exception as error:  # the inputs alone may be too large for the device
        return {**row, "reason": reason_for(error)}
    found: dict[str, Any] = row["providers"]
    works: dict[str, Work] = {}
    tried = providers.works(benchmark, case, machine, tensors, compiled=effort.compiled and usual)
    for name, work in tried:
        found[name] = {}
        if isinstance(work, str):
            found[name]["reason"] = work
        else:
            works[name] = work

    for clock, samplers in _samplers(machine, works).items():
        fewest = _GRAPH_ROUNDS if clock == "graph" else effort.fewest_rounds
        sampled = clocks.interleaved(samplers, budget=effort.seconds, fewest=fewest)
        for name, by_mode in sampled.seconds.items():
            seconds = {mode: clocks.summary(values) for mode, values in by_mode.items()}
            found[name].setdefault("seconds", {})[clock] = seconds
        for name, reason in sampled.reasons.items():
            found[name].setdefault("clock_reasons", {})[clock] = reason

    for name in works:
        _derive(found[name], case, ceilings)
        if usual:
            _count(found[name], works[name], name, machine)
    if usual and case.repeatable:
        measured = accuracy.errors(
            benchmark,
            case,
            tensors,
            works,
            generator,
            draws=effort.draws,
            budget=effort.draw_seconds,
        )
        for name, errors in measured.items():
            found[name]["error"] = errors
    works.clear()
    gc.collect()
    return row


_Prepared = dict[str, Callable[[], clocks.Sampler]]


def _samplers(machine: Machine, works: dict[str, Work]) -> dict[str, _Prepared]:
    """For each clock what makes each provider ready."""
    wall: _Prepared = {
        name: partial(
            clocks.wall_sampler,
            work,
            synchronise=machine.synchronise,
            one_graph=name == providers.GRAPHED,
        )
        for name, work in works.items()
    }
    if machine.kind == "cpu":
        return {"wall": wall}
    cold: _Prepared = {name: partial(clocks.cold_sampler, work) for name, work in works.items()}
    graph: _Prepared = {
        name: partial(clocks.graph_sampler, work)
        for name, work in works.items()
        if name != providers.GRAPHED  # what replays graphs of its own cannot be captured
    }
    return {"wall": wall, "cold": cold, "graph": graph}


def _derive(found: dict[str, Any], case: Case, ceilings: Document) -> None:
    """Add which share of the device's measured rates the full pass reaches."""
    seconds = found.get("seconds", {})
    clock = seconds.get("cold") or seconds.get("wall")
    if clock is None:
        return
    full = clock["full"]["p50"]
    copy_rate = ceilings["copy_bytes_per_second"]
    matmul_rate = ceilings["matmul_flop_per_second"].get(case.dtype)
    if case.floor_bytes:
        found["share_of_copy_rate"] = case.floor_bytes / full / copy_rate
    if case.plan_bytes:
        found["plan_share_of_copy_rate"] = case.plan_bytes / full / copy_rate
    if case.flop and matmul_rate:
        found["share_of_matmul_rate"] = case.flop / full / matmul_rate
    if case.plan_flop and matmul_rate:
        found["plan_share_of_matmul_rate"] = case.plan_flop / full / matmul_rate


def _count(found: dict[str, Any], work: Work, name: str, machine: Machine) -> None:
    """Add memory and the number of launches, where they mean something."""
    if name == providers.GRAPHED:  # its graphs keep their memory to themselves
        return
    try:
        if machine.kind == "cuda" or not providers.is_compiled(name):
            found["launches"] = launches.count(work, machine.kind)
        found["peak_bytes"] = memory.peak_bytes(work, machine.kind)
        found["saved_bytes"] = memory.saved_bytes(work)
    except Exception as error:  # as when the profiler's own memory is the last straw
        found["memory_reason"] = reason_for(error)


def outcome(row: Document) -> str:
    """One line on a measured cell, for whoever waits for it."""
    if "reason" in row:
        return str(row["reason"])
    parts = []
    for name, found in row["providers"].items():
        wall = found.get("seconds", {}).get("wall")
        if wall:
            parts.append(f"{name} {1e3 * wall['full']['p50']:.3g} ms")
        elif found.get("reason") == OUT_OF_MEMORY:
            parts.append(f"{name}: {OUT_OF_MEMORY}")
    return ", ".join(parts)
