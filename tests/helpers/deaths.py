"""A process that dies where it is told to, whatever it is doing, as nothing can be caught."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

PRELOADED = [
    "examples.erc.artifacts",
    "examples.erc.training",
    "torch._dynamo",
    "sklearn.metrics",
    "pytest",
    "tests.helpers.small_stores",
]
"""What takes seconds to import is imported once, in the process that all others are forked from."""


class Deadline:
    """Counts the moments before and after the calls that change files, and dies at one of them.

    Args:
        moment: At which to die, from 1; ``None``: never.

    Attributes:
        count: The moments so far.
    """

    def __init__(self, moment: int | None) -> None:
        self.count = 0
        self._moment = moment

    def tick(self) -> None:
        self.count += 1
        if self.count == self._moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, holder: Any, name: str) -> None:
        """Tick before and after every call of a function, which is replaced."""
        function = getattr(holder, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.tick()
            try:
                return function(*arguments, **options)
            finally:
                self.tick()

        setattr(holder, name, watched)


def run(function: Callable[..., None], *arguments: Any, kill_after: float | None = None) -> int:
    """Call a function in a process of its own.

    Args:
        function: Of a module that can be imported.
        arguments: Its own.
        kill_after: Seconds after which it is killed, wherever it is; ``None``: never.

    Returns:
        The exit status: 0, or less the number of the signal that it died of.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
