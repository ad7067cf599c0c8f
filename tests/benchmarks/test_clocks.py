import gc
import sys
import types
from collections.abc import Callable

import pytest
import torch

from benchmarks import clocks
from benchmarks.clocks import (
    MODES,
    Sampler,
    Seconds,
    cold_sampler,
    graph_sampler,
    interleaved,
    summary,
    wall_sampler,
)
from benchmarks.workload import Work
from tests.benchmarks import toy


def toy_work() -> Work:
    tensors = toy.draw(toy.CASES[0], torch.Generator().manual_seed(0))
    return toy.work(toy.CASES[0], "reference", tensors)


def counting(log: list[str], name: str) -> Callable[[], Sampler]:
    def sample() -> Seconds:
        log.append(name)
        return {"full": [float(len(log))]}

    return lambda: sample


def test_summary_of_a_decade_is_its_fifths() -> None:
    found = summary([float(value) for value in range(11)])
    assert found == {"p20": 2.0, "p50": 5.0, "p80": 8.0, "samples": 11}


def test_summary_of_one_sample_is_that_sample() -> None:
    assert summary([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0, "samples": 1}


def test_every_round_begins_with_the_next_provider() -> None:
    log = []
    samplers = {name: counting(log, name) for name in "abc"}
    interleaved(samplers, budget=0.0, fewest=3)
    assert "".join(log) == "abcbcacab"


def test_rounds_end_with_the_budget_but_not_before_the_fewest() -> None:
    times = iter(range(100))
    log = []
    interleaved({"a": counting(log, "a")}, budget=5.0, fewest=2, now=lambda: float(next(times)))
    assert len(log) == 6  # the first reading is the beginning, and rounds 1 and 2 read none

    log.clear()
    interleaved({"a": counting(log, "a")}, budget=0.0, fewest=4)
    assert len(log) == 4


def test_rounds_end_when_there_are_enough() -> None:
    log = []
    interleaved({"a": counting(log, "a")}, budget=1e9, fewest=1, most=7)
    assert len(log) == 7


def test_a_provider_that_fails_leaves_a_reason_and_the_others_go_on() -> None:
    log = []

    def unready() -> Sampler:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def failing() -> Seconds:
        raise ValueError("second\nline")

    sampled = interleaved(
        {"a": counting(log, "a"), "b": unready, "c": lambda: failing}, budget=0.0, fewest=3
    )
    assert sampled.reasons == {"b": "out of memory", "c": "ValueError: second"}
    assert list(sampled.seconds) == ["a"]
    assert len(sampled.seconds["a"]["full"]) == 3


def test_garbage_is_collected_again_after_a_failure() -> None:
    interleaved({}, budget=0.0, fewest=1)
    assert gc.isenabled()


@pytest.mark.parametrize("one_graph", [False, True])
def test_wall_clock_has_every_mode(one_graph: bool) -> None:
    sample = wall_sampler(toy_work(), synchronise=lambda: None, one_graph=one_graph)
    seconds = sample()
    assert set(seconds) == set(MODES)
    assert all(value > 0 for values in seconds.values() for value in values)


def test_forward_and_backward_of_a_slow_call_are_timed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clocks, "_MOST_REPEATS", 1)
    seconds = wall_sampler(toy_work(), synchronise=lambda: None, one_graph=False)()
    both = seconds["forward_with_graph"][0] + seconds["backward"][0]
    assert seconds["full"] == [both]


class Event:
    """A CUDA event whose clock is how many events were recorded before."""

    recorded = 0

    def record(self) -> None:
        self.at = Event.recorded = Event.recorded + 1

    def elapsed_time(self, end: "Event") -> float:
        return float(end.at - self.at)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_event", Event)
    monkeypatch.setattr(clocks, "_flush_buffer", lambda: torch.ones(4))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_cold_clock_times_each_mode_call_by_call(fake_cuda: None) -> None:
    seconds = cold_sampler(toy_work())()
    assert set(seconds) == set(MODES)
    assert {value for values in seconds.values() for value in values} == {1e-3}  # milliseconds
    assert {len(values) for values in seconds.values()} == {clocks._COLD_REPEATS}


def test_graph_clock_asks_triton_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def do_bench_cudagraph(
        call: Callable[[], object], *, rep: float, return_mode: str
    ) -> list[float]:
        calls.append((torch.is_grad_enabled(), return_mode))
        call()
        return [2.0, 4.0]

    testing = types.ModuleType("triton.testing")
    testing.do_bench_cudagraph = do_bench_cudagraph
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    assert graph_sampler(toy_work())() == {"forward": [2e-3, 4e-3], "full": [2e-3, 4e-3]}
    assert calls == [(False, "all"), (True, "all")]
