"""How many operators, or launches on a GPU, one forward and backward pass are."""

import re
from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.workload import Work

_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Memset|Memcpy)")


def count(work: Work, kind: str) -> int:
    """Launches from the CPU on a GPU; on a CPU, operators called by Python or by autograd."""
    activities = [ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
    work.backward(work.forward())
    with profile(activities=activities) as recorded:
        work.backward(work.forward())
    events = recorded.events()
    assert events is not None
    return launches(events) if kind == "cuda" else operators(events)


def launches(events: Iterable[Any]) -> int:
    """Calls of the CUDA runtime or driver that start work, a whole graph being one."""
    return sum(bool(_LAUNCH.match(event.name)) for event in events)


def operators(events: Iterable[Any]) -> int:
    """Operators of PyTorch that were not called by another."""
    return sum(event.name.startswith("aten::") and not _inside_operator(event) for event in events)


def _inside_operator(event: Any) -> bool:  # noqa: ANN401 - a profiler's event has no public type
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return True
        parent = parent.cpu_parent
    return False
