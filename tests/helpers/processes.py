"""Processes that form a process group and run functions together."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from telme_kd.errors import DegenerateBatchWarning

_TIMEOUT = timedelta(seconds=120)


class Crew:
    """Running processes; a test calls functions in all of them at once."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` in every process; return the results in rank order.

        Raises:
            AssertionError: a process raised; the message has what it said.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        failures = [f"process {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]


@contextmanager
def crew(world_size: int, folder: Path) -> Iterator[Crew]:
    """Start processes that form a group with gloo, and end them.

    They are spawned: forked ones hang once the parent has used torch's threads.
    """
    context = torch.multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_main, args=(rank, world_size, str(folder / "rendezvous"), theirs), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Crew(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(60)
            process.kill()


def _main(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DegenerateBatchWarning)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception as error:  # a parent that waits must hear of it
            pipe.send((False, repr(error)))
    os._exit(0)  # on a busy machine, gloo's threads abort the interpreter's own way out
