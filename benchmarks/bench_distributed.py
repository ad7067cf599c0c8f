"""Losses over a process group: what travels, and how long a step takes.

Processes on one machine form a group with gloo; each has an equal part of a whole batch and one
thread. Three providers take turns:

- ``shared``: the library's losses with ``group=``, which share statistics;
- ``gathered``: everyone's rows copied to every process, and the loss of the whole batch there;
- ``part``: the loss of the own part alone, another objective, as the least that a step can take.

Run ``python -m benchmarks.bench_distributed``; it writes
``benchmarks/results/<version>/distributed--cpu.json``, from which the scaling page is made.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from benchmarks import machine, results
from benchmarks.clocks import summary
from benchmarks.command import QUICK_FOLDER
from benchmarks.traffic import Traffic
from benchmarks.workload import UPSTREAM
from telme_kd.distributed import gather_batch
from telme_kd.functional import batch_similarity_loss, dist_loss

Loss = Callable[..., Tensor]

LOSSES: dict[str, Loss] = {"dist": dist_loss, "batch_similarity": batch_similarity_loss}
WORLDS = (1, 2, 4)
_SAMPLE_SECONDS = 2e-3
_MOST_REPEATS = 200
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 100
_BUDGET_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """A whole batch: which loss, and the shape of its logits or features."""

    loss: str
    items: int
    width: int


CASES = (
    Case("dist", 64, 7),
    Case("dist", 4096, 7),
    Case("dist", 256, 1000),
    Case("dist", 1024, 1000),
    Case("dist", 256, 32_000),
    Case("batch_similarity", 64, 768),
    Case("batch_similarity", 256, 768),
    Case("batch_similarity", 1024, 768),
)
QUICK_CASES = (Case("dist", 64, 7), Case("batch_similarity", 64, 96))


def providers(loss: Loss) -> dict[str, Loss]:
    """What is compared: functions of the own rows of student and teacher."""

    def gathered(student: Tensor, teacher: Tensor) -> Tensor:
        students, teachers, _ = gather_batch(student, teacher, None, "world")
        return loss(students, teachers)

    return {
        "shared": lambda student, teacher: loss(student, teacher, group="world"),
        "gathered": gathered,
        "part": loss,
    }


def measure(case: Case, rank: int, world: int) -> list[dict[str, Any]]:
    """A row for each provider; the time of a step is that of the slowest process."""
    generator = torch.Generator().manual_seed(rank)
    student, teacher = torch.randn(2, case.items // world, case.width, generator=generator)
    student.requires_grad_()

    def step(function: Loss) -> None:
        torch.autograd.grad(function(student, teacher), student, torch.tensor(UPSTREAM))

    functions = providers(LOSSES[case.loss])
    collectives, repeats = {}, {}
    for name, function in functions.items():
        with Traffic() as traffic:
            step(function)
        collectives[name] = traffic.calls
        elapsed = _slowest(step, function, 1)
        repeats[name] = max(1, min(_MOST_REPEATS, int(_SAMPLE_SECONDS / elapsed)))
    round_seconds = sum(
        repeats[name] * _slowest(step, function, repeats[name])
        for name, function in functions.items()
    )
    rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(_BUDGET_SECONDS / round_seconds)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_slowest(step, function, repeats[name]))
    return [
        {
            **asdict(case),
            "world": world,
            "provider": name,
            "seconds": summary(seconds[name]),
            "collectives": [{**call._asdict(), "bytes": call.bytes} for call in collectives[name]],
        }
        for name in functions
    ]


def _slowest(step: Callable[[Loss], None], function: Loss, repeats: int) -> float:
    """Seconds per step of the slowest process; all begin together."""
    torch.distributed.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        step(function)
    elapsed = torch.tensor((time.perf_counter() - begin) / repeats, dtype=torch.float64)
    torch.distributed.all_reduce(elapsed, torch.distributed.ReduceOp.MAX)
    return elapsed.item()


def _process(rank: int, world: int, rendezvous: str, cases: Sequence[Case], rows: Any) -> None:  # noqa: ANN401
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    for case in cases:
        measured = measure(case, rank, world)
        if rank == 0:
            for row in measured:
                rows.put(row)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(cases: Sequence[Case], worlds: Sequence[int] = WORLDS) -> list[dict[str, Any]]:
    """Measure every case in groups of so many processes."""
    measured = []
    for world in worlds:
        rows = torch.multiprocessing.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, str(Path(folder) / "rendezvous"), cases, rows)
            processes = torch.multiprocessing.spawn(_process, arguments, world, join=False)
            for _ in range(len(cases) * len(providers(dist_loss))):
                measured.append(rows.get())
                print(_line(measured[-1]), flush=True)
            processes.join()
    return measured


def _line(row: dict[str, Any]) -> str:
    moved = sum(call["bytes"] for call in row["collectives"])
    return (
        f"{row['loss']} {row['items']} x {row['width']}, {row['world']} processes, "
        f"{row['provider']}: {1e3 * row['seconds']['p50']:.2f} ms, {moved} bytes in "
        f"{len(row['collectives'])} collectives"
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description="Measure losses over a process group.")
    parser.add_argument("--quick", action="store_true", help="few small cases: does it run at all?")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    options = parser.parse_args(arguments)
    folder = options.output or (QUICK_FOLDER if options.quick else results.RESULTS)
    cpu = machine.machines()[0]
    rows = run(QUICK_CASES if options.quick else CASES, WORLDS[:2] if options.quick else WORLDS)
    path = results.path_of(folder, "distributed", cpu.slug)
    document = {
        "experiment": "distributed",
        "command": "python -m benchmarks.bench_distributed" + (" --quick" if options.quick else ""),
        "device": cpu.slug,
        "machine": {"name": cpu.name, "processors": os.cpu_count()},
        "versions": machine.versions("cpu"),
        "sources": results.source_digest(),
        "rows": rows,
    }
    results.write(path, document)
    print(path)
    return path


if __name__ == "__main__":
    main()
