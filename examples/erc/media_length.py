"""How long a media file is, without decoding it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from examples.erc.media import ClipError, Media

_TAIL = 1.0
"""Seconds before the end of a stream from where its packets are read."""


class Length(NamedTuple):
    """The length of a file.

    Attributes:
        seconds: As its header says, > 0.
        reached: Where what is there ends, >= 0; less than ``seconds`` by more than a packet if the
            end of the file is not there.
    """

    seconds: float
    reached: float


def measure(path: Path, streams: Sequence[str]) -> Length:
    """Measure a file by its header and the packets at its end.

    Args:
        path: The file: mp4, avi, wav or mkv.
        streams: What it must have: "audio", "visual" or both.

    Returns:
        Its length.

    Raises:
        ClipError: It cannot be opened, lacks a stream, or does not say how long it is.
    """
    with Media(path) as media:
        held = [media.audio if name == "audio" else media.video for name in streams]
        ends = [(_declared(stream), _reached(stream)) for stream in held]
    seconds = max(declared for declared, _ in ends)
    # One stream may well end before another, if its header says so.
    lacking = max(0.0, *(declared - reached for declared, reached in ends))
    return Length(seconds, max(0.0, seconds - lacking))


def _declared(stream: AudioStream | VideoStream) -> float:
    """The length of a stream by the header, in seconds."""
    seconds = float((stream.duration or 0) * (stream.time_base or 0))
    if isinstance(stream, VideoStream) and stream.frames and stream.average_rate:
        # What is left of an avi file tells its own duration, but the number of all its pictures.
        seconds = max(seconds, float(stream.frames / stream.average_rate))
    seconds = seconds or (_container(stream).duration or 0) / 1e6
    if seconds <= 0:
        raise ClipError("length unknown")
    return seconds


def _reached(stream: AudioStream | VideoStream) -> float:
    """Where the last packet of a stream ends, in seconds."""
    base = stream.time_base
    if not base:
        raise ClipError("length unknown")
    container = _container(stream)
    tail = int(max(0.0, _declared(stream) - _TAIL) / base)
    # Nothing is decoded, so that any picture will do to start from.
    container.seek(tail, stream=stream, any_frame=True)
    return max(
        (
            float((packet.pts + (packet.duration or 0)) * base)
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None
        ),
        default=0.0,
    )


def _container(stream: AudioStream | VideoStream) -> InputContainer:
    container = stream.container
    assert isinstance(container, InputContainer)
    return container
