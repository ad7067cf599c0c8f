"""Run a function in several processes that form a process group."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def run(world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in every process; return the results in rank order.

    Processes are spawned: forked ones hang once the parent has used torch's threads.
    """
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(
        _main,
        (world_size, str(folder / "rendezvous"), queue, function, arguments),
        world_size,
        False,
    )
    results = dict(queue.get() for _ in range(world_size))
    context.join()
    return [results[rank] for rank in range(world_size)]


def _main(
    rank: int, world_size: int, rendezvous: str, queue: Any, function: Any, arguments: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    try:
        try:
            result = function(rank, *arguments)
        except Exception as error:  # a parent that waits must hear of it
            result = repr(error)
        queue.put((rank, result))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    os._exit(0)  # on a busy machine, gloo's threads abort the interpreter's own way out
