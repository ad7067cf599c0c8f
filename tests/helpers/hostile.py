"""A decoder for files that do harm, each in the way that its first word says."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.erc.dialogue import Clip
from examples.erc.media import ClipError, Decoded


def decode(
    clips: Sequence[Clip], *, log: str, at: float | None = None, **_: Any
) -> Iterator[Decoded]:
    """Give each clip as many numbers as its file has bytes, all the first byte's.

    Args:
        clips: Of one file.
        log: A file that receives a line for each clip.
        at: The start of the clip at which a file does its harm; ``None``: at the first.
    """
    data = clips[0].path.read_bytes()
    for position, clip in enumerate(clips):
        with Path(log).open("a") as file:
            file.write(f"{clip.path.name}\n")
        if at is None or clip.start == at:
            harm(data)
        if data == b"no clip":
            yield position, ClipError("Invalid data found when processing input"), 0
        else:
            yield position, np.full(len(data), data[0], np.int16), int(data[0] == 7)


def harm(data: bytes) -> None:
    """Do what a file says."""
    match data.split():
        case [b"loop", *_]:
            while True:
                pass
        case [b"sleep", *_]:
            time.sleep(1000)
        case [b"crash", *_]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case [b"once", b"killed", flag]:
            if not Path(os.fsdecode(flag)).exists():
                Path(os.fsdecode(flag)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case [b"once", b"asleep", flag]:
            if not Path(os.fsdecode(flag)).exists():
                Path(os.fsdecode(flag)).touch()
                time.sleep(1000)
        case [b"bomb", *_]:
            hoard = [bytes(1 << 24) for _ in range(1 << 12)]
            raise AssertionError(len(hoard))
        case [b"error", *_]:
            raise ZeroDivisionError("by\nzero")
        case [b"refuse", *_]:
            raise ClipError("not a film")
        case [b"lie", *_]:
            os.write(3, b"\xff\xff\xff\xff nonsense")
            time.sleep(1000)
        case [b"print", *_]:
            print("hello")
