"""Processes that decode media files: a bad file can cost its own clips, and nothing else."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from examples.erc.dialogue import Clip
from examples.erc.source import JSON

_ROOT = Path(__file__).parents[2]

_TICK = 0.5
"""Seconds between two looks at a process that says nothing."""

_PATIENCE = 3
"""So many clips of a file may stop their process before the others of it are given up too."""

_START = 300.0
"""Seconds for a process to start, on a machine that is busy with everything else."""

_FAREWELL = 10.0
"""Seconds that a killed process is waited for."""

_LONGEST_HEADER = 1 << 16

_LONGEST_REASON = 400

_MOST_AXES = 8

NOT_LIMITED = (
    "note: this system does not limit the memory of a process; a hostile clip may use all of it"
)


@dataclass(frozen=True)
class Limits:
    """What decoding a clip may cost.

    Attributes:
        seconds: Of processor time, >= 1.
        silence: Seconds without an answer; a process that waits for a disk uses no processor.
        memory: Bytes, beyond those of an idle process.
    """

    seconds: int = 20
    silence: float = 28.0
    memory: int = 1 << 30


@dataclass(frozen=True)
class Decoding:
    """How clips become arrays.

    Attributes:
        function: ``"module:name"`` of a function that takes the clips of one file and yields
            :data:`~examples.erc.media.Decoded`; the processes import it.
        options: Its keyword arguments.
        finish: Makes of its values those that are wanted, for every clip of one dtype and, but for
            the first axis, of one shape; called here, from several threads.
    """

    function: str
    options: Mapping[str, JSON]
    finish: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class Result(NamedTuple):
    """What came of a clip.

    Attributes:
        values: ``None`` where there are none.
        kind: ``"whole"``; ``"damaged"``: some of it was left out; ``"broken"``: it cannot be
            decoded within the limits; ``"late"``: no answer came, and the file need not be at
            fault.
        reason: Why it is not whole, in one line.
    """

    values: npt.NDArray[Any] | None
    kind: Literal["whole", "damaged", "broken", "late"] = "whole"
    reason: str = ""


Results: TypeAlias = "Future[dict[int, Result]]"
"""A result for each of the clips of a file, by position."""


class Crew:
    """Processes that decode, started when they are needed and replaced when they die.

    Used as a context: at its end, be it an interruption, no process is left.

    Args:
        size: How many processes, >= 1.
        limits: What a clip may cost; beyond, its process is killed and the clip is broken.
    """

    def __init__(self, size: int, limits: Limits | None = None) -> None:
        self.size = size
        self._limits = limits or Limits()
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._all: set[_Process] = set()
        self._lock = Lock()
        self._closed = False
        self._noted = False
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="crew")

    def __enter__(self) -> Self:
        """Return the crew itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill all processes, whatever they are at."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.close()

    def decode(self, clips: Sequence[Clip], decoding: Decoding) -> Results:
        """Decode clips of one file, all by one process.

        Args:
            clips: At least one.
            decoding: How.

        Returns:
            A future with a result for every clip. It raises :class:`RuntimeError` if a process
            cannot be started.
        """
        return self._threads.submit(self._decode, clips, decoding)

    def each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Do other work in the threads that serve the processes; its results, in order."""
        return self._threads.map(work, items)

    def _decode(self, clips: Sequence[Clip], decoding: Decoding) -> dict[int, Result]:
        results: dict[int, Result] = {}
        todo = sorted(range(len(clips)), key=lambda position: clips[position].end or 0.0)
        blamed, suspect = 0, None
        while todo:
            process = self._take()
            asked = [clips[position] for position in todo]
            try:
                for number, result in process.run(asked, decoding, self._limits):
                    results[todo[number]] = result
            except _LostError as lost:
                self._drop(process)
                left = [position for position in todo if position not in results]
                # The system may kill a process for what others do: only a second death counts.
                if lost.chance and left[0] != suspect:
                    suspect = left[0]
                else:
                    blamed += 1
                    guilty = left[:1] if blamed < _PATIENCE else left
                    results |= dict.fromkeys(guilty, lost.result)
            else:
                self._idle.put(process)
            todo = [position for position in todo if position not in results]
        return results

    def _take(self) -> "_Process":
        try:
            return self._idle.get_nowait()
        except Empty:
            pass
        with self._lock:
            if self._closed:
                raise CancelledError
            process = _Process(self._limits)
            self._all.add(process)
        limited = process.wait_until_ready()
        with self._lock:
            if not limited and not self._noted:
                print(NOT_LIMITED, file=sys.stderr, flush=True)
            self._noted = self._noted or not limited
        return process

    def _drop(self, process: "_Process") -> None:
        with self._lock:
            if self._closed:
                raise CancelledError
            self._all.discard(process)
        process.kill()
        process.close()


class _LostError(Exception):
    """A process is of no use any more.

    Args:
        result: That of the clip that it was at.
        chance: Whether it might not happen again.
    """

    def __init__(self, result: Result, *, chance: bool = False) -> None:
        super().__init__(result.reason)
        self.result = result
        self.chance = chance


class _Process:
    """The other end of :mod:`examples.erc.worker`."""

    def __init__(self, limits: Limits) -> None:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        # A session of its own: Ctrl-C in the terminal is for the parent, which kills its processes.
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "examples.erc.worker", str(limits.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._orders: IO[bytes] = self._popen.stdin
        self._messages: IO[bytes] = self._popen.stdout
        self._poll = select.poll()
        self._poll.register(self._messages, select.POLLIN)

    def wait_until_ready(self) -> bool:
        """Wait until it has started; whether its memory is limited.

        Raises:
            RuntimeError: It did not start.
        """
        try:
            header, _ = self._receive(_START, 0)
        except _LostError:
            self.kill()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise RuntimeError(f"a process for decoding did not start: {said}") from None
        return bool(header["limited"])

    def run(
        self, clips: Sequence[Clip], decoding: Decoding, limits: Limits
    ) -> Iterator[tuple[int, Result]]:
        """Decode clips of one file.

        Yields:
            The position and the result of each.

        Raises:
            _LostError: It died, or has to.
        """
        order = {
            "function": decoding.function,
            "path": os.path.abspath(clips[0].path),  # noqa: PTH100 - symbolic links may stay
            "windows": [[clip.start, clip.end, clip.side] for clip in clips],
            "options": dict(decoding.options),
            "seconds": limits.seconds,
        }
        self._tell(order)
        left = set(range(len(clips)))
        while True:
            header, values = self._receive(limits.silence, limits.memory)
            if "fatal" in header:
                raise _LostError(Result(None, "broken", _line(header["fatal"])))
            if "done" in header:
                if left:
                    raise _nonsense()
                return
            if (values is None) != ("broken" in header):
                raise _nonsense()
            if values is None and "position" not in header:
                for position in left:
                    yield position, Result(None, "broken", _line(header["broken"]))
                return
            said = header.get("position")
            if type(said) is not int or said not in left:
                raise _nonsense()
            position = said
            left.discard(position)
            if values is None:
                yield position, Result(None, "broken", _line(header["broken"]))
            elif damaged := header["damaged"]:
                reason = f"damaged packets left out: {damaged}"
                yield position, Result(decoding.finish(values), "damaged", reason)
            else:
                yield position, Result(decoding.finish(values))

    def kill(self) -> None:
        """End it at once."""
        self._popen.kill()

    def close(self) -> None:
        """Wait until it has ended, and give back what it took."""
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk ends with it
            self._popen.wait(_FAREWELL)
        for file in (self._orders, self._messages, self._errors):
            file.close()

    def _tell(self, order: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(order).encode() + b"\n"
            while line:
                line = line[self._orders.write(line) :]
        except BrokenPipeError:
            raise self._explain_end() from None

    def _receive(
        self, silence: float, largest: int
    ) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
        """Wait for a message: its header and its array, if it has one."""
        patience = _Patience(silence)
        length = int.from_bytes(self._read(4, patience), "little")
        if length > _LONGEST_HEADER:
            raise _nonsense()
        data = self._read(length, patience)
        try:
            header, described = _parse(data)
        # A hostile file may say anything by way of the process that it has taken.
        except Exception as error:
            raise _nonsense() from error
        if described is None:
            return header, None
        kind, shape = described
        size = kind.itemsize * math.prod(shape)
        if size > largest:
            raise _nonsense()
        return header, np.frombuffer(self._read(size, patience), kind).reshape(shape)

    def _read(self, size: int, patience: "_Patience") -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if not self._poll.poll(1000 * _TICK):
                patience.wear()
            elif count := self._messages.readinto(view):  # type: ignore[attr-defined]
                view = view[count:]
            else:
                raise self._explain_end()
        return data

    def _explain_end(self) -> _LostError:
        status = self._popen.wait()
        if status == -signal.SIGXCPU:
            return _LostError(Result(None, "broken", "it needs more time than a clip may"))
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return _LostError(Result(None, "broken", f"the decoder crashed ({how})"), chance=True)


def _line(said: object) -> str:
    """What a process says of a clip, in one line that is not too long."""
    return " ".join(str(said).split())[:_LONGEST_REASON]


def _parse(
    data: bytes | bytearray,
) -> tuple[dict[str, Any], tuple[np.dtype[Any], tuple[int, ...]] | None]:
    """A header, and the dtype and shape of the array that follows, if one does.

    Raises:
        ValueError: It is none; so do other errors.
    """
    header = json.loads(data)
    if not isinstance(header, dict):
        raise ValueError("no object")
    if "dtype" not in header:
        return header, None
    if type(header.get("damaged")) is not int:
        raise ValueError("no count of damaged packets")
    kind, shape = np.dtype(header["dtype"]), tuple(map(int, header["shape"]))
    if kind.kind not in "biuf" or min(shape, default=0) < 0 or len(shape) > _MOST_AXES:
        raise ValueError("no array of numbers")
    return header, (kind, shape)


def _nonsense() -> _LostError:
    return _LostError(Result(None, "broken", "its process talks nonsense"))


class _Patience:
    """Counts the time that a process says nothing.

    It is counted in ticks, not read from a clock: if all of this is stopped for a while, as by
    Ctrl-Z, no process is to blame.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left = seconds

    def wear(self) -> None:
        """Note that a tick went by."""
        self._left -= _TICK
        if self._left <= 0:
            raise _LostError(Result(None, "late", f"no answer for {self._seconds:g} s"))
