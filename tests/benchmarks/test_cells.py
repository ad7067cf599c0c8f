from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import cells, clocks, launches, memory, providers
from benchmarks.clocks import MODES
from benchmarks.machine import Machine
from benchmarks.results import Document
from benchmarks.workload import Case
from tests.benchmarks import toy

CEILINGS = {"copy_bytes_per_second": 1e9, "matmul_flop_per_second": {"float32": 1e12}}


def measure(machine: Machine, case: Case = toy.CASES[0]) -> Document:
    return cells.measure(toy.BENCHMARK, case, machine, 1, CEILINGS, cells.QUICK)


def test_a_row_has_every_figure_of_a_provider() -> None:
    row = measure(toy.CPU)
    found = row["providers"]["cpu"]
    assert set(found["seconds"]["wall"]) == set(MODES)
    full = found["seconds"]["wall"]["full"]["p50"]
    assert found["share_of_copy_rate"] == pytest.approx(48 / full / 1e9)
    assert found["share_of_matmul_rate"] == pytest.approx(12 / full / 1e12)
    assert found["peak_bytes"] >= 24
    assert found["launches"] >= 2
    assert found["error"]["gradient"]["max"] == pytest.approx(1e-3, rel=1e-2)
    assert cells.outcome(row).startswith("reference ")


def test_a_backend_that_refuses_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert measure(toy.CPU)["providers"]["triton"] == {"reason": "RuntimeError: no such device"}


def test_an_interpreted_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in measure(toy.CPU)["providers"]["triton"]["reason"]


def test_inputs_that_do_not_fit_are_the_cells_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(toy, "BENCHMARK", toy.BENCHMARK.__class__("toy", toy.cases, draw, toy.work))
    row = measure(toy.CPU)
    assert row["reason"] == "out of memory"
    assert row["providers"] == {}


def test_compiled_references_are_tried_in_every_mode_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []

    def compile_(
        function: Callable[..., Tensor], *, mode: str, dynamic: bool, fullgraph: bool
    ) -> Callable[..., Tensor]:
        compiled.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    tensors = toy.draw(toy.CASES[0], torch.Generator().manual_seed(0))
    for machine, names in (
        (toy.CPU, [providers.COMPILED]),
        (toy.CUDA, [providers.COMPILED, "reference compiled, max autotune", providers.GRAPHED]),
    ):
        works = providers.works(toy.BENCHMARK, toy.CASES[0], machine, tensors, compiled=True)
        assert [name for name, _ in works if providers.is_compiled(name)] == names
    assert compiled == ["default", "default", "max-autotune-no-cudagraphs", "reduce-overhead"]


def test_a_gpu_has_three_clocks_and_own_graphs_are_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole CUDA branch, over CPU tensors and with every call into the device replaced."""
    sample = {"forward": [1e-3], "full": [2e-3]}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clocks, "cold_sampler", lambda work: lambda: {**sample, "backward": [1.0]})
    monkeypatch.setattr(clocks, "graph_sampler", lambda work: lambda: sample)
    monkeypatch.setattr(launches, "count", lambda work, kind: 75 if kind == "cuda" else 0)
    monkeypatch.setattr(memory, "peak_bytes", lambda work, kind: 99 if kind == "cuda" else 0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    effort = cells.Effort(0.0, 2, 3, 0.0, True)
    row = cells.measure(toy.BENCHMARK, toy.CASES[0], toy.CUDA, 1, CEILINGS, effort)

    found = row["providers"]["reference"]
    assert set(found["seconds"]) == {"wall", "cold", "graph"}
    assert found["seconds"]["graph"]["full"] == {
        "p20": 2e-3,
        "p50": 2e-3,
        "p80": 2e-3,
        "samples": 2,
    }
    assert (found["launches"], found["peak_bytes"]) == (75, 99)
    assert found["share_of_copy_rate"] == pytest.approx(48 / 2e-3 / 1e9)  # of the cold clock
    graphed = row["providers"][providers.GRAPHED]
    assert "graph" not in graphed["seconds"]
    assert "peak_bytes" not in graphed
