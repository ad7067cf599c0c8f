"""Media files, opened so that a bad one costs nothing but itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import av
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.format import Flags
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from examples.erc.dialogue import Clip

# What looks like a clip may be a playlist, which FFmpeg would follow to other places.
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,avi,wav,matroska"}

_MOST_PIXELS = 8192 * 4320
"""The largest picture that is decoded: 8K."""

# The size of a stream's pictures may change midway, so that the decoder has to look out too.
_DECODER_OPTIONS = {"max_pixels": str(_MOST_PIXELS)}


class ClipError(Exception):
    """A clip that cannot be decoded; the message says why, in one line."""


Decoded: TypeAlias = "tuple[int, npt.NDArray[Any] | ClipError, int]"
"""What came of one of several clips: its position, its values or why there are none, and how many
damaged packets were left out."""


def window(clip: Clip, max_seconds: float) -> tuple[float, float]:
    """Where a clip starts and ends in its file, in seconds, cut to its first ``max_seconds``."""
    start = clip.start or 0.0
    stop = start + max_seconds
    return start, stop if clip.end is None else min(clip.end, stop)


class Media:
    """An open media file; what FFmpeg finds wrong with it becomes a :class:`ClipError`.

    Packets that cannot be decoded are left out and counted. One thread decodes.

    Args:
        path: The file: mp4, avi, wav or mkv.

    Attributes:
        damaged: How many packets have been left out so far.
    """

    def __init__(self, path: Path) -> None:
        self.damaged = 0
        try:
            self._container = av.open(str(path), options=_OPTIONS, metadata_errors="replace")
        except av.FFmpegError as error:
            raise ClipError(_reason(error)) from error

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._container.close()
        if isinstance(error, av.FFmpegError):
            raise ClipError(_reason(error)) from error

    @property
    def audio(self) -> AudioStream:
        """The first audio stream.

        Raises:
            ClipError: There is none, or nothing here can decode it.
        """
        if not self._container.streams.audio:
            raise ClipError("no audio stream")
        stream = self._container.streams.audio[0]
        if stream.codec_context is None:
            raise ClipError("sound of an unknown kind")
        stream.codec_context.thread_count = 1
        return stream

    @property
    def video(self) -> VideoStream:
        """The first video stream.

        Raises:
            ClipError: There is none, nothing here can decode it, or its pictures are beyond 8K.
        """
        if not self._container.streams.video:
            raise ClipError("no video stream")
        stream = self._container.streams.video[0]
        if stream.codec_context is None:
            raise ClipError("pictures of an unknown kind")
        if stream.width * stream.height > _MOST_PIXELS:
            raise ClipError(f"pictures of {stream.width} x {stream.height}, larger than 8K")
        # Clips are decoded side by side, one to a processor: threads would only take memory.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = dict(_DECODER_OPTIONS)
        return stream

    @property
    def shown_order(self) -> bool:
        """Whether the file is searched by when a picture is shown, not by when it is decoded."""
        return Flags.seek_to_pts in Flags(self._container.format.flags)

    def seek(self, stream: AudioStream | VideoStream, timestamp: int) -> None:
        """Go to the last place at or before a time from where the stream can be decoded.

        Args:
            stream: A stream of this file.
            timestamp: In units of the stream's time base; see :attr:`shown_order`.
        """
        self._container.seek(timestamp, stream=stream)

    def packets(self, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
        """The packets that carry data, from the present place on, not decoded."""
        return (packet for packet in self._container.demux(stream) if packet.size)

    def sound(self, stream: AudioStream) -> Iterator[AudioFrame]:
        """Decode from the present place on."""
        for packet in self._container.demux(stream):
            with self._leave_out_damage():
                yield from stream.decode(packet)

    def pictures(self, stream: VideoStream) -> Iterator[VideoFrame]:
        """Decode from the present place on, in the order of presentation."""
        for packet in self._container.demux(stream):
            with self._leave_out_damage():
                yield from stream.decode(packet)

    @contextmanager
    def _leave_out_damage(self) -> Iterator[None]:
        try:
            yield
        except av.InvalidDataError:
            self.damaged += 1


def _reason(error: av.FFmpegError) -> str:
    return error.strerror or type(error).__name__
