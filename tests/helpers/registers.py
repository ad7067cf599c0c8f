"""Compile every shipped Triton kernel without a GPU and let ptxas report what it needs.

``python -m tests.helpers.registers dist`` prints a table. It must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program can have."""


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    architecture: int
    aligned: bool
    """Sizes and strides are multiples of 16, so that loads are wide."""
    registers: int
    spilled: int
    """Bytes stored and loaded because registers did not suffice."""
    shared: int

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return (
            f"{self.kernel:20} sm_{self.architecture} {'aligned' if self.aligned else 'any':7} "
            f"warps={self.warps:<2} "
            f"registers={self.registers:<3} spilled={self.spilled:<4} shared={self.shared:<6} "
            f"{constants}"
        )


def reports(module: str, architecture: int) -> list[Report]:
    """Compile what a module of ``telme_kd.kernels.triton`` ships."""
    shipped = importlib.import_module(f"telme_kd.kernels.triton.{module}").shipped()
    return [
        _report(each, architecture, aligned=aligned)
        for each in shipped
        for aligned in ((True, False) if _sizes(each) else (True,))
    ]


def _sizes(shipped: Any) -> list[str]:
    """Integers of which Triton compiles one kernel for multiples of 16, one for the others."""
    exempt = set(shipped.kernel.do_not_specialize or ())
    return [
        name
        for index, name in enumerate(shipped.kernel.arg_names)
        if shipped.signature.get(name, "")[:1] == "i" and not exempt & {name, index}
    ]


def _report(shipped: Any, architecture: int, *, aligned: bool) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    kernel, constants = shipped.kernel, dict(shipped.constants)
    names = kernel.arg_names
    assert set(names) == {*shipped.signature, *constants}, kernel.__name__
    signature = {name: shipped.signature.get(name, "constexpr") for name in names}
    sizes = _sizes(shipped) if aligned else []
    divisible = [
        index for index, name in enumerate(names) if signature[name][0] == "*" or name in sizes
    ]
    compiled: Any = triton.compile(
        ASTSource(
            kernel,
            signature,
            constants,
            {(index,): [["tt.divisibility", 16]] for index in divisible},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": shipped.num_warps,
            "num_stages": shipped.num_stages,
            "maxnreg": shipped.maxnreg,
        },
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        log = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"-arch={target[1]}", source, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    used = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert used is not None, log
    assert spills, log
    return Report(
        kernel=kernel.__name__,
        constants=constants,
        warps=shipped.num_warps,
        architecture=architecture,
        aligned=aligned,
        registers=int(used[1]),
        spilled=sum(map(int, spills)),
        shared=compiled.metadata.shared,
    )


def start(module: str, architecture: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Compile in a process of its own; it prints a line of JSON per kernel."""
    command = [sys.executable, "-m", __name__, module, "--json", f"--architecture={architecture}"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> list[Report]:
    """The reports of a process that ``start`` started."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return [Report(**json.loads(line)) for line in output.splitlines()]


def main() -> None:
    """Print what ptxas reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--architecture", type=int, action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for architecture in options.architecture or ARCHITECTURES:
        for report in reports(options.module, architecture):
            print(json.dumps(asdict(report), default=str) if options.json else report, flush=True)


if __name__ == "__main__":
    main()
