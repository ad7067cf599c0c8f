"""The command line that all benchmarks share."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cells, results
from benchmarks.ceilings import ceilings
from benchmarks.machine import Machine, machines
from benchmarks.workload import Benchmark

QUICK_FOLDER = results.ROOT / "runs" / "benchmarks"
_BUSY = 0.5  # load average; threads that wait for each other wait for every other program too


def main(benchmarks: Sequence[Benchmark], arguments: Sequence[str] | None = None) -> Path:
    """Measure operators on every device asked for; return the folder of the results."""
    parser = argparse.ArgumentParser(description="Measure operators on this machine.")
    parser.add_argument("--quick", action="store_true", help="few small cases: does it run at all?")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only there; default: everywhere")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of the result files; default: {results.RESULTS.relative_to(results.ROOT)}, "
        f"or {QUICK_FOLDER.relative_to(results.ROOT)} with --quick",
    )
    options = parser.parse_args(arguments)
    folder = options.output or (QUICK_FOLDER if options.quick else results.RESULTS)
    chosen = [machine for machine in machines() if options.device in (None, machine.kind)]
    if not chosen:
        parser.error("--device cuda: this machine has no CUDA device")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY and not options.quick:
        print(f"This machine is busy (load {load:.1f}): expect figures of it.", file=sys.stderr)
    usual_threads = torch.get_num_threads()
    try:
        for benchmark in benchmarks:
            for machine in chosen:
                run(benchmark, machine, folder, quick=options.quick, resume=options.resume)
    except KeyboardInterrupt:
        print("\nInterrupted. What was measured is kept; --resume goes on.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        torch.set_num_threads(usual_threads)
    return folder


def run(
    benchmark: Benchmark,
    machine: Machine,
    folder: Path,
    *,
    quick: bool,
    resume: bool,
    effort: cells.Effort | None = None,
) -> Path:
    """Measure an operator on a device and write its result file, cell by cell.

    Cells are collected beside the result file, which is replaced when all are there: an interrupted
    run neither loses a cell nor leaves half a result.
    """
    effort = effort or (cells.QUICK if quick else cells.THOROUGH)
    path = results.path_of(folder, benchmark.operator, machine.slug)
    partial = results.partial_path(path)
    document = results.new_document(benchmark.operator, machine, quick=quick)
    if resume:
        document = results.continued(path, document)
    print(f"{benchmark.operator} on {machine.name}", flush=True)
    cases = benchmark.cases(machine.kind, quick)
    todo = [(case, threads) for case in cases for threads in machine.threads]
    for number, (case, threads) in enumerate(todo, 1):
        if results.find(document["rows"], case.name, threads) is not None:
            continue
        torch.set_num_threads(threads)
        if str(threads) not in document["ceilings"]:
            document["ceilings"][str(threads)] = ceilings(machine, quick=quick)
        measured = document["ceilings"][str(threads)]
        row = cells.measure(benchmark, case, machine, threads, measured, effort)
        document["rows"].append(row)
        results.write(partial, document)
        with_threads = f", {threads} threads" if machine.kind == "cpu" else ""
        print(
            f"  [{number}/{len(todo)}] {case.name}{with_threads}: {cells.outcome(row)}", flush=True
        )
    results.write(path, document)
    partial.unlink(missing_ok=True)
    print(path, flush=True)
    return path
