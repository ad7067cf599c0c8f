"""Compile every shipped Triton kernel without a GPU and let ptxas report what it needs.

``python -m tests.helpers.registers dist`` prints a table. It must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from telme_kd.kernels.triton.launch import Shipped

ARCHITECTURES = (80, 90)
_FEW = 100
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program can have."""


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    kernel: str
    constants: dict[str, Any]
    pointers: list[str]
    """Dtypes that its pointers have beside float32."""
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
            f"{constants} {' '.join(self.pointers)}"
        )


def jobs(module: str, *, every: bool = False) -> list[tuple[Shipped, int]]:
    """What to compile of a module of ``telme_kd.kernels.triton``, and for which architecture.

    Of a module that ships few, all. Else each tile with the options that its module names first,
    for all dtypes, as options that are off take code away. But that can cost registers, too; so for
    the newest architecture also every pair of options that is then still missing. The older one is
    spared those and logits of two dtypes. ``every`` combination of a module with many takes hours.
    """
    shipped = importlib.import_module(f"telme_kd.kernels.triton.{module}").shipped()
    if every or len(shipped) <= _FEW:
        return [(each, architecture) for architecture in ARCHITECTURES for each in shipped]
    *older, newest = ARCHITECTURES
    found = []
    for _, group in groupby(shipped, key=_tile):
        tile = list(group)
        first = [each for each in tile if _options(each) == _options(tile[0])]
        alike = [each for each in first if not _mixed(each)]
        found += [(each, architecture) for architecture in older for each in alike]
        found += [(each, newest) for each in first + _missing_pairs(tile, first)]
    return found


def _missing_pairs(tile: Sequence[Shipped], first: Sequence[Shipped]) -> list[Shipped]:
    """Few specialisations that together with the first have all pairs of options."""
    covered = {pair for each in first for pair in _pairs(each)}
    chosen = []
    while True:
        best = max(tile, key=lambda each: len(_pairs(each) - covered))
        if _pairs(best) <= covered:
            return chosen
        chosen.append(best)
        covered |= _pairs(best)


def reports(module: str, *, every: bool = False, part: int = 0, parts: int = 1) -> Iterator[Report]:
    """Compile every ``parts``-th job, from ``part`` on."""
    for shipped, architecture in jobs(module, every=every)[part::parts]:
        for aligned in (True, False) if _sizes(shipped) else (True,):
            yield _report(shipped, architecture, aligned=aligned)


def _tile(shipped: Shipped) -> tuple[object, ...]:
    sizes = [shipped.constants.get(name) for name in ("ITEMS", "CLASSES", "SPAN", "BLOCK")]
    return shipped.kernel.__name__, shipped.num_warps, *sizes


def _options(shipped: Shipped) -> list[tuple[str, object]]:
    return sorted((name, value) for name, value in shipped.constants.items() if name != "WIDE")


def _mixed(shipped: Shipped) -> bool:
    return len({shipped.signature.get("student"), shipped.signature.get("teacher")} - {None}) == 2


def _pairs(shipped: Shipped) -> set[tuple[object, object]]:
    return set(combinations((shipped.signature | shipped.constants).items(), 2))


def _sizes(shipped: Any) -> list[str]:
    """Integers of which Triton compiles one kernel for multiples of 16, one for the others."""
    exempt = _exempt(shipped.kernel)
    return [
        name
        for index, name in enumerate(shipped.kernel.arg_names)
        if shipped.signature.get(name, "")[:1] == "i" and not exempt & {name, index}
    ]


def _exempt(kernel: Any) -> set[object]:
    """Arguments, by name or place, of which Triton assumes nothing."""
    return set(kernel.do_not_specialize or ())


def _report(shipped: Shipped, architecture: int, *, aligned: bool) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = shipped.kernel, dict(shipped.constants)
    names = kernel.arg_names
    assert set(names) == {*shipped.signature, *constants}, kernel.__name__
    signature = {name: shipped.signature.get(name, "constexpr") for name in names}
    sizes = _sizes(shipped) if aligned else []
    exempt = _exempt(kernel)
    divisible = [
        index
        for index, name in enumerate(names)
        if (signature[name][0] == "*" and not exempt & {name, index}) or name in sizes
    ]
    printed = io.StringIO()
    with redirect_stdout(printed):  # what ptxas tells while it compiles
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
    log = printed.getvalue()
    used = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert used is not None, log
    assert spills, log
    return Report(
        kernel=kernel.__name__,
        constants=constants,
        pointers=[f"{n}={t}" for n, t in shipped.signature.items() if t[0] == "*" and t != "*fp32"],
        warps=shipped.num_warps,
        architecture=architecture,
        aligned=aligned,
        registers=int(used[1]),
        spilled=sum(map(int, spills)),
        shared=compiled.metadata.shared,
    )


def start(module: str, part: int, parts: int) -> subprocess.Popen[str]:
    """Compile a part in a process of its own; it prints a line of JSON per kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", __name__, module, "--json", f"--part={part}/{parts}"]
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
    parser.add_argument("--every", action="store_true", help="all that can be launched")
    parser.add_argument("--part", default="0/1", help="one of so many parts, as in 0/2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    # A kernel found in Triton's cache would not go through ptxas, which is to be asked.
    os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    for report in reports(options.module, every=options.every, part=part, parts=parts):
        print(json.dumps(asdict(report), default=str) if options.json else report, flush=True)


if __name__ == "__main__":
    main()
