"""How much memory forward and backward take beyond what was there before."""

import gc
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.workload import Work


def peak_bytes(work: Work, kind: str) -> int:
    """Most bytes alive at once during forward and backward, the gradients included.

    On a GPU the allocator keeps that count itself. On a CPU every allocation and release of
    PyTorch's allocator is recorded and added up, which, unlike the size of the process, neither
    misses memory that was free but not returned nor depends on what ran before. Buffers that a BLAS
    library allocates for itself are not in it.
    """
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.backward(work.forward())
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work.backward(work.forward())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return highest_balance(events)


def highest_balance(events: Iterable[dict[str, Any]]) -> int:
    """The largest sum of allocations less releases in a profiler's trace, on the CPU."""
    changes = sorted(
        (
            (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
            for event in events
            if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
        ),
    )
    balance = highest = 0
    for _, _, change in changes:
        balance += change
        highest = max(highest, balance)
    return highest


def saved_bytes(work: Work) -> int:
    """Bytes that autograd keeps for backward, beyond the arguments and leaves themselves."""
    given = {_storage(tensor) for tensor in (*work.arguments, *work.leaves)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in given:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = work.forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
