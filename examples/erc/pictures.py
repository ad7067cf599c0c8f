"""The pictures of clips, decoded in one pass through their file."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from examples.erc.dialogue import Clip
from examples.erc.media import ClipError, Decoded, Media, window

Picture = npt.NDArray[np.uint8]
"""``[H, W, 3]``, RGB."""

_LONGEST = 16
"""So many times as long as wide a picture may be: who fits a line into a square gets a giant."""

_REORDERING = 1.0
"""Seconds by which the order of decoding may differ from the order of presentation."""


class _Key(NamedTuple):
    """A picture from which decoding can start: when it is shown, and when it is decoded."""

    shown: int
    decoded: int


@dataclass(frozen=True)
class _Index:
    """The pictures of a part of a film, found without decoding any; in units of the time base.

    Attributes:
        shown: When each is shown, in order; at least one.
        keys: Those from which decoding can start, in order; at least one.
        last: How long the last one is shown.
        reached: When the last packet that was looked at is decoded.
    """

    shown: list[int]
    keys: list[_Key]
    last: int
    reached: int


def decode(
    clips: Sequence[Clip], *, count: int, max_seconds: float, crop: bool = False
) -> Iterator[Decoded]:
    """Decode evenly spaced pictures of clips of one film, which is opened and read once for all.

    The window of a clip is cut into ``count`` equal parts; each gives the picture that is shown at
    its middle. A clip of fewer pictures repeats some. Which pictures a clip gets does not depend
    on the clips that it is decoded with.

    What is not needed is not decoded. First the packets are listed, which says where the key frames
    are. Then from one picture to the next the film is read on or, where a key frame lies between
    the two, entered anew at that key frame: whichever decodes less.

    Args:
        clips: Any number of one file; as for the voice, the first ``max_seconds`` of each count.
        count: How many pictures of each, >= 1.
        max_seconds: > 0.
        crop: Cut out the half in which the speaker is seen, where the clip says which it is.

    Yields:
        For each clip, in the order in which they end, its position and its pictures in order,
        uint8, ``[count, H, W, 3]``, or why there are none.

    Raises:
        ClipError: No picture of the file can be decoded.
    """
    windows = [window(clip, max_seconds) for clip in clips]
    with Media(clips[0].path) as media:
        stream = media.video
        if stream.time_base is None:
            raise ClipError("a video stream without a time base")
        begin, end = min(start for start, _ in windows), max(stop for _, stop in windows)
        index = _find_pictures(media, stream, begin, end)
        wanted: dict[int, list[int]] = {}
        for position, (start, stop) in enumerate(windows):
            try:
                wanted[position] = _spread(
                    index, start / stream.time_base, stop / stream.time_base, count
                )
            except ClipError as error:
                yield position, error, 0
        reader = _Reader(media, stream, index.keys)
        for position in sorted(wanted, key=lambda position: wanted[position][-1]):
            others = [times for other, times in wanted.items() if other != position]
            before = media.damaged
            pictures = reader.read(wanted.pop(position), earlier=others)
            side = clips[position].side if crop else None
            yield position, _stack(pictures, side), media.damaged - before


def decode_frames(clip: Clip, count: int, max_seconds: float) -> tuple[Picture, int]:
    """Decode evenly spaced pictures of one clip; see :func:`decode`.

    Returns:
        The pictures in order, ``[count, H, W, 3]``, and how many damaged packets were left out.

    Raises:
        ClipError: No picture can be decoded there.
    """
    ((_, pictures, damaged),) = decode([clip], count=count, max_seconds=max_seconds)
    if isinstance(pictures, ClipError):
        raise pictures
    return pictures, damaged


def _find_pictures(media: Media, stream: VideoStream, start: float, stop: float) -> _Index:
    """List the pictures from the last key frame before a part of a film to its end."""
    base = stream.time_base or Fraction(1)
    if start > _REORDERING:
        media.seek(stream, int((start - _REORDERING) / base))
    shown, keys = [], []
    reached, duration = 0, 0
    for packet in media.packets(stream):
        # AVI need not say when a picture is shown; then it is shown when it is decoded.
        decoded = packet.pts if packet.dts is None else packet.dts
        if decoded is None:
            continue
        reached = max(reached, decoded)
        if decoded * base >= stop:
            break
        shown.append(decoded if packet.pts is None else packet.pts)
        duration = packet.duration or duration
        if packet.is_keyframe:
            keys.append(_Key(shown[-1], decoded))
    if not shown:
        raise ClipError("no picture in the window")
    shown.sort()
    if not duration and len(shown) > 1:
        duration = shown[-1] - shown[-2]
    return _Index(shown, sorted(keys) or [_Key(shown[0], shown[0])], duration, reached)


def _spread(index: _Index, start: float, stop: float, count: int) -> list[int]:
    """Choose the pictures shown at the middles of ``count`` equal parts of a window.

    The part of a window that lies beyond either end of the film does not count.
    """
    shown = index.shown
    begin = max(start, shown[0])
    end = stop if index.reached >= stop else min(stop, shown[-1] + index.last)
    if begin > end:
        raise ClipError("no picture in the window")
    times = [begin + (part + 0.5) * (end - begin) / count for part in range(count)]
    return [shown[bisect_right(shown, time) - 1] for time in times]


class _Reader:
    """Decodes pictures by when they are shown, in one pass.

    In the place of a damaged one comes the next, or at the end of the file the last.
    """

    def __init__(self, media: Media, stream: VideoStream, keys: Sequence[_Key]) -> None:
        self._media = media
        self._stream = stream
        self._keys = keys
        self._pictures: Iterator[VideoFrame] = iter(())
        self._current: VideoFrame | None = None
        self._at: int | None = None
        self._kept: dict[int, Picture] = {}
        # One converter for all: a picture that converts itself sets up a new one.
        self._converter = VideoReformatter()

    def read(self, wanted: Sequence[int], earlier: Sequence[Sequence[int]]) -> list[Picture]:
        """Decode the pictures that are shown at the wanted times.

        Args:
            wanted: In order.
            earlier: What is wanted later on: of it, what is shown before the end is kept.

        Returns:
            A picture for each time.
        """
        last = wanted[-1]
        also = {time for times in earlier for time in times[: bisect_right(times, last)]}
        for shown in sorted({*wanted, *also} - self._kept.keys()):
            self._kept[shown] = self._decode(shown)
        pictures = [self._kept[shown] for shown in wanted]
        self._kept = {shown: self._kept[shown] for shown in also}
        return pictures

    def _decode(self, shown: int) -> Picture:
        number = max(bisect_right(self._keys, shown, key=lambda key: key.shown) - 1, 0)
        key = self._keys[number]
        if self._at is None or key.shown > self._at:
            self._media.seek(self._stream, key.shown if self._media.shown_order else key.decoded)
            self._pictures = self._media.pictures(self._stream)
        while self._at is None or self._at < shown:
            following = next(self._pictures, None)
            if following is None:
                break
            if following.pts is not None:
                self._current, self._at = following, following.pts
        if self._current is None:
            raise ClipError("no picture that can be decoded")
        picture = self._converter.reformat(self._current, format="rgb24").to_ndarray()
        return np.asarray(picture, np.uint8)


def _stack(pictures: Sequence[Picture], side: str | None) -> Picture | ClipError:
    """Put the pictures of a clip together, or one half of each."""
    if len({picture.shape for picture in pictures}) > 1:
        return ClipError("pictures that change their size midway")
    height, width, _ = pictures[0].shape
    if max(height, width) > _LONGEST * min(height, width):
        return ClipError(f"pictures of {width} x {height}")
    stacked = np.stack(pictures)
    half = stacked.shape[2] // 2
    if side == "left":
        return stacked[:, :, :half]
    return stacked[:, :, -half:] if side == "right" else stacked
