"""A process that decodes what it is told to, under limits; its other end is in `crew`.

It reads orders from standard input, one JSON object a line, and writes messages to what was its
standard output: four bytes that give the length of a header, the header as JSON, and the bytes of
the array that the header describes. It imports no more than it needs, so that it starts in a moment
and can be thrown away. It writes no pickles: whatever a hostile file makes of it, what it says is
read as numbers and text.
"""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import numpy as np

from examples.erc.dialogue import Clip
from examples.erc.media import ClipError

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

_LONGEST_REASON = 200


def main(memory: int) -> None:
    """Serve until standard input ends, which it does when the parent dies, however it dies.

    Args:
        memory: Bytes that decoding may take.
    """
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything else prints stays out of the messages
    orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(orders,), daemon=True).start()
    _limit("RLIMIT_CORE", 0)
    _send(channel, {"limited": _limit_memory(memory)})
    while True:
        _serve(channel, orders.get())


def _listen(orders: "SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)


def _serve(channel: BinaryIO, order: dict[str, Any]) -> None:
    module, name = order["function"].split(":")
    decode = getattr(import_module(module), name)
    clips = [Clip(Path(order["path"]), *window) for window in order["windows"]]
    _limit_time(order["seconds"])
    try:
        for position, values, damaged in decode(clips, **order["options"]):
            if isinstance(values, ClipError):
                _send(channel, {"position": position, "broken": str(values)})
            else:
                _send(channel, {"position": position, "damaged": damaged}, values)
            _limit_time(order["seconds"])
    except ClipError as error:
        _send(channel, {"broken": str(error)})
    except MemoryError:
        # What else it took is unknown: this process is done.
        _send(channel, {"fatal": "it needs more memory than a clip may"})
        os._exit(1)
    except Exception as error:  # a hostile file finds what no one thought of
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _send(channel, {"fatal": reason[:_LONGEST_REASON]})
        os._exit(1)
    else:
        _send(channel, {"done": True})


def _send(channel: BinaryIO, header: dict[str, Any], values: Any = None) -> None:  # noqa: ANN401
    if values is not None:
        values = np.ascontiguousarray(values)
        header = {**header, "dtype": values.dtype.str, "shape": values.shape}
    text = json.dumps(header).encode()
    with suppress(BrokenPipeError):  # the parent is gone, and standard input is about to end
        channel.write(len(text).to_bytes(4, "little") + text)
        if values is not None and values.size:
            channel.write(memoryview(values).cast("B"))
        channel.flush()


def _limit(name: str, value: int) -> bool:
    """Lower a limit of this process; false where the system has none."""
    if not hasattr(resource, name):
        return False
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(kind, (value, hard))
    except (ValueError, OSError):
        return False
    return True


def _limit_memory(more: int) -> bool:
    """Allow so many bytes beyond those that are mapped already."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:  # not Linux; elsewhere the limit can be set, and is not enforced
        return False
    return _limit("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + more)


def _limit_time(seconds: int) -> None:
    """Allow so many more seconds of processor time."""
    times = os.times()
    _limit("RLIMIT_CPU", int(times.user + times.system) + 1 + seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]))
