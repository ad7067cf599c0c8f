"""Room on Python's stack of frames for all that a test calls.

CPython keeps the frames of Python functions in chunks of 16 KiB. A loop whose calls cross from one
chunk into the next maps memory and gives it back in each round, which took half of the time of
tests that run kernels in Triton's interpreter. A frame that is larger than a chunk gets one of its
size, and what it calls lies behind it: a megabyte is never crossed.
"""

from collections.abc import Callable

_SLOTS = 2**17


def with_room(call: Callable[[], object]) -> object:
    """Call a function in a frame of a megabyte."""
    return call()


with_room.__code__ = with_room.__code__.replace(
    co_varnames=("call", *(f"room_{slot}" for slot in range(1, _SLOTS))), co_nlocals=_SLOTS
)
