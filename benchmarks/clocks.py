"""Clocks: wall time, GPU time from a cold cache, GPU time in a replayed graph.

Everything that a cell compares is sampled in rounds, one provider after the other, so that what
else the machine does hits all of them alike. A provider that fails leaves its round with a reason.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.failures import reason_for
from benchmarks.workload import Work

Seconds = dict[str, list[float]]  # by mode
Sampler = Callable[[], Seconds]

# "forward" builds no graph; "full" is forward with graph and backward.
MODES = ("forward", "forward_with_graph", "backward", "full")
_SAMPLE_SECONDS = 2e-3  # a wall-clock sample repeats the call until it takes about so long
_MOST_REPEATS = 200
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
_COLD_REPEATS = 5
_GRAPH_MILLISECONDS = 20


class Sampled(NamedTuple):
    """The samples of every provider, and why some have none."""

    seconds: dict[str, Seconds]
    reasons: dict[str, str]


def interleaved(
    samplers: Mapping[str, Callable[[], Sampler]],
    *,
    budget: float,
    fewest: int,
    most: int = 1000,
    now: Callable[[], float] = time.perf_counter,
) -> Sampled:
    """Sample all providers in rounds, each round beginning with the next provider.

    Args:
        samplers: for each provider what makes it ready and returns its sampler.
        budget: seconds after which no further round begins.
        fewest: rounds that are taken whatever they cost.
        most: rounds after which it is enough.
        now: the clock of the budget.
    """
    seconds: dict[str, Seconds] = {}
    reasons: dict[str, str] = {}
    ready: dict[str, Sampler] = {}
    for name, prepare in samplers.items():
        try:
            ready[name] = prepare()
            seconds[name] = defaultdict(list)
        except Exception as error:  # a provider's failure is a result, not the end of the others
            reasons[name] = reason_for(error)
    begin = now()
    with _no_collection():
        for count in range(most):
            if not ready or (count >= fewest and now() - begin >= budget):
                break
            names = list(ready)
            for name in names[count % len(names) :] + names[: count % len(names)]:
                try:
                    sampled = ready[name]()
                except Exception as error:
                    reasons[name] = reason_for(error)
                    del ready[name], seconds[name]
                else:
                    for mode, values in sampled.items():
                        seconds[name][mode] += values
    return Sampled({name: dict(values) for name, values in seconds.items()}, reasons)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summary(values: list[float]) -> dict[str, float]:
    """The median, the fifths beside it, and how many values they are of."""
    cuts = quantiles(values * 2 if len(values) == 1 else values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7], "samples": len(values)}


# Wall clock --------------------------------------------------------------------------------------


def wall_sampler(work: Work, *, synchronise: Callable[[], None], one_graph: bool) -> Sampler:
    """Wall time per call, of as many calls at once as take about two milliseconds.

    Args:
        work: what is timed; it is called a few times to warm up.
        synchronise: waits until the device has done what was launched.
        one_graph: a new forward pass invalidates the graph of the one before, so that backward
            passes cannot be timed in a row.
    """
    for _ in range(3):
        begin = time.perf_counter()
        work.backward(work.forward())
        synchronise()
        elapsed = time.perf_counter() - begin
    with torch.no_grad():
        work.forward()
    synchronise()
    repeats = max(1, min(_MOST_REPEATS, int(_SAMPLE_SECONDS / max(elapsed, 1e-9))))

    def timed(calls: Callable[[], object], count: int = repeats) -> list[float]:
        synchronise()
        begin = time.perf_counter()
        calls()
        synchronise()
        return [(time.perf_counter() - begin) / count]

    def full() -> None:
        for _ in range(repeats):
            work.backward(work.forward())

    def forward() -> None:
        for _ in range(repeats):
            work.forward()

    def forward_kept() -> None:
        outputs.extend(work.forward() for _ in range(1 if one_graph else repeats))

    def backward() -> None:
        for output in outputs:
            work.backward(output)

    outputs: list[Tensor] = []

    def sample() -> Seconds:
        with torch.no_grad():
            seconds = {"forward": timed(forward)}
        kept = 1 if one_graph else repeats
        seconds["forward_with_graph"] = timed(forward_kept, kept)
        seconds["backward"] = timed(backward, kept)
        outputs.clear()
        if repeats == 1:  # one forward and one backward were just timed
            both = seconds["forward_with_graph"][0] + seconds["backward"][0]
            seconds["full"] = [both]
        else:
            seconds["full"] = timed(full)
        return seconds

    return sample


# GPU time ----------------------------------------------------------------------------------------


def cold_sampler(work: Work) -> Sampler:
    """GPU time of single calls, each after the L2 cache was overwritten.

    The protocol of ``triton.testing.do_bench``, with one thing that it cannot do: before a backward
    pass its forward pass runs, untimed.
    """
    work.backward(work.forward())
    flush = _flush_buffer()

    def timed(call: Callable[[], object], prepare: Callable[[], object] | None) -> list[float]:
        pairs = []
        for _ in range(_COLD_REPEATS):
            if prepare is not None:
                prepare()
            flush.zero_()
            begin, end = _event(), _event()
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    kept: list[Tensor] = []

    def sample() -> Seconds:
        with torch.no_grad():
            seconds = {"forward": timed(work.forward, None)}
        seconds["forward_with_graph"] = timed(work.forward, None)
        seconds["backward"] = timed(
            lambda: work.backward(kept.pop()), lambda: kept.append(work.forward())
        )
        seconds["full"] = timed(lambda: work.backward(work.forward()), None)
        return seconds

    return sample


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _flush_buffer() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def graph_sampler(work: Work) -> Sampler:
    """GPU time per call in a replayed CUDA graph of many: neither Python nor launches count.

    The passes of a graph run in a row, so that there is no backward pass alone.
    """
    from triton.testing import do_bench_cudagraph  # on a machine without a GPU it may be absent

    work.backward(work.forward())

    def timed(call: Callable[[], object]) -> list[float]:
        torch.cuda.synchronize()  # the capture runs on a stream of its own
        milliseconds = do_bench_cudagraph(call, rep=_GRAPH_MILLISECONDS, return_mode="all")
        return [value / 1e3 for value in milliseconds]

    def sample() -> Seconds:
        with torch.no_grad():
            seconds = {"forward": timed(work.forward)}
        seconds["full"] = timed(lambda: work.backward(work.forward()))
        return seconds

    return sample
