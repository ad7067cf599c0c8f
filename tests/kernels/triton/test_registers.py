"""Shipped Triton kernels compile for sm_80 and sm_90 and spill no register; see ``registers.jobs``.

``python -m tests.helpers.registers MODULE`` prints the table behind it.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest

from telme_kd.kernels.triton.launch import Shipped
from tests.helpers import registers

pytest.importorskip("triton", reason="Triton is not installed")


PROCESSES = 2


@pytest.mark.parametrize("module", ["dist", "batch_similarity", "fusion"])
def test_no_shipped_kernel_spills_and_each_fits_shared_memory(module: str) -> None:
    processes = [registers.start(module, part, PROCESSES) for part in range(PROCESSES)]
    reports = [report for process in processes for report in registers.finish(process)]
    assert {report.architecture for report in reports} == set(registers.ARCHITECTURES)
    assert [str(report) for report in reports if report.spilled] == []
    assert [
        str(report)
        for report in reports
        if report.shared > registers.SHARED_MEMORY[report.architecture]
    ] == []


def test_enough_is_compiled_to_have_seen_every_pair_of_options() -> None:
    every = set(map(_key, registers.jobs("dist", every=True)))
    found = [_key(job) for job in registers.jobs("dist")]
    assert len(found) == len(set(found)) < len(every) / 10
    assert set(found) <= set(every)
    newest = registers.ARCHITECTURES[-1]
    assert _pairs(every, newest) == _pairs(found, newest)


def _key(job: tuple[Shipped, int]) -> tuple[Any, ...]:
    shipped, architecture = job
    options = {**shipped.signature, **shipped.constants}
    return architecture, shipped.kernel.__name__, *sorted(options.items(), key=str)


def _pairs(keys: Iterable[tuple[Any, ...]], architecture: int) -> set[tuple[Any, ...]]:
    return {
        (kernel, *pair)
        for (of, kernel, *options) in keys
        if of == architecture
        for pair in combinations(options, 2)
    }
