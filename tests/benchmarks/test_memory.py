import pytest
import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.results import Document
from benchmarks.workload import Work

MEGABYTE = 1_000_000


def exponential_sum(count: int = MEGABYTE // 4) -> Work:
    values = torch.zeros(count).requires_grad_()
    return Work(lambda x: x.exp().sum(), (values,), (values,), torch.tensor(3.0))


def change(at: int, size: int, device: int = 0) -> Document:
    arguments = {"Bytes": size, "Device Type": device, "Ev Idx": at}
    return {"name": "[memory]", "ts": at, "args": arguments}


def test_highest_balance_adds_in_the_order_of_time() -> None:
    events = [change(3, 50), change(1, 100), change(2, -80), change(4, 1000, device=1)]
    assert memory.highest_balance([{"name": "aten::add", "ts": 0}, *events]) == 100


def test_peak_on_the_cpu_is_the_saved_output_and_the_gradient() -> None:
    # The exponentials are kept; their gradient is an expanded number until it is multiplied.
    assert memory.peak_bytes(exponential_sum(), "cpu") == pytest.approx(2 * MEGABYTE, rel=1e-3)


def test_peak_on_the_cpu_does_not_depend_on_what_was_freed_before() -> None:
    spare = torch.zeros(10 * MEGABYTE)
    work = exponential_sum()
    first = memory.peak_bytes(work, "cpu")
    del spare
    assert memory.peak_bytes(work, "cpu") == first


def test_peak_on_a_gpu_is_the_allocators_less_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert memory.peak_bytes(exponential_sum(4), "cuda") == 250
    assert called == ["synchronize", "empty_cache", "reset_peak_memory_stats", "synchronize"]


def test_saved_counts_each_storage_once_and_no_input() -> None:
    values = torch.zeros(1000).requires_grad_()

    def function(x: Tensor) -> Tensor:
        once = x.exp()
        return (once * once * x).sum()

    work = Work(function, (values,), (values,), torch.tensor(3.0))
    assert memory.saved_bytes(work) == 2 * 4000  # exp, and exp squared
