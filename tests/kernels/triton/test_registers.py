"""Every shipped Triton kernel compiles for sm_80 and sm_90 and spills no register.

``python -m tests.helpers.registers MODULE`` prints the table behind it.
"""

import os
from pathlib import Path

import pytest

from tests.helpers import registers

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("module", ["dist", "batch_similarity", "fusion"])
def test_no_shipped_kernel_spills_and_each_fits_shared_memory(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(registers.__file__).parents[2])
    processes = [
        registers.start(module, architecture, environment)
        for architecture in registers.ARCHITECTURES
    ]
    reports = [report for process in processes for report in registers.finish(process)]
    assert {report.architecture for report in reports} == set(registers.ARCHITECTURES)
    assert [str(report) for report in reports if report.spilled] == []
    assert [
        str(report)
        for report in reports
        if report.shared > registers.SHARED_MEMORY[report.architecture]
    ] == []
