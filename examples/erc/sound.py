"""The sound of a clip, decoded."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from av import AudioFrame, AudioResampler

from examples.erc.dialogue import Clip
from examples.erc.media import ClipError, Decoded, Media, window

SAMPLE_RATE = 16_000
"""Samples per second that speech encoders are trained on."""

FULL_SCALE = 32767
"""The largest sample of 16 bits."""

_PREROLL = 0.2
"""Seconds decoded before a window: a lossy decoder needs a frame to settle."""

_SLACK = 1.0
"""Seconds by which frames may overlap the edges of a window."""


def decode(clips: Sequence[Clip], *, max_seconds: float) -> Iterator[Decoded]:
    """Decode the voices of clips of one file, as 16-bit samples at 16 kHz.

    Args:
        clips: Any number.
        max_seconds: As for :func:`decode_waveform`.

    Yields:
        For each clip its position and int16 samples, ``[n]``, or why there are none.
    """
    for position, clip in enumerate(clips):
        try:
            waveform, damaged = decode_waveform(clip, max_seconds)
        except ClipError as error:
            yield position, error, 0
        else:
            yield position, quantise(waveform), damaged


def decode_waveform(clip: Clip, max_seconds: float) -> tuple[npt.NDArray[np.float32], int]:
    """Decode the voice of a clip: 16 kHz, the mean of its channels.

    The channels are averaged after resampling, more than two after a mix down to stereo: a
    resampler that is asked for mono makes stereo louder by the square root of 2.

    A clip longer than ``max_seconds`` keeps its first part, so that the work is bounded whatever
    the file claims. In MELD only clips that were cut in wrong places are longer than 30 s: of the
    two longest, one has the utterance at its beginning and one at its end. In IEMOCAP one turn
    is, by 4 s.

    Args:
        clip: A file with an audio stream, or a part of it.
        max_seconds: The length of the longest waveform in seconds, > 0.

    Returns:
        The waveform, ``[n]`` in [-1, 1] with n >= 1, and how many damaged packets were left out.

    Raises:
        ClipError: Nothing can be decoded there.
    """
    start, stop = window(clip, max_seconds)
    with Media(clip.path) as media:
        stream = media.audio
        if stream.time_base is None:
            raise ClipError("an audio stream without a time base")
        if start > _PREROLL:
            media.seek(stream, int((start - _PREROLL) / stream.time_base))
        frames: list[AudioFrame] = []
        began = clock = length = 0.0
        for frame in media.sound(stream):
            time = clock if frame.time is None else frame.time
            clock = time + frame.samples / frame.sample_rate
            # A file may lie about its times: no more than this is kept whatever it says.
            if time >= stop or length > stop - start + _SLACK:
                break
            if clock > start:
                began = began if frames else time
                length += frame.samples / frame.sample_rate
                frames.append(frame)
        waveform = _resample(frames)
        damaged = media.damaged
    start = max(start, began)
    origin = round((start - began) * SAMPLE_RATE)
    waveform = waveform[origin : origin + round((stop - start) * SAMPLE_RATE)]
    if not waveform.size:
        raise ClipError("no sound in the window")
    if not np.isfinite(waveform).all():
        raise ClipError("samples that are not finite")
    return np.clip(waveform, -1.0, 1.0), damaged


def _resample(frames: Sequence[AudioFrame]) -> npt.NDArray[np.float32]:
    """Resample frames that follow one another to 16 kHz and average their channels."""
    if not frames:
        raise ClipError("no sound in the window")
    first = frames[0]
    kind = (first.sample_rate, first.layout.name, first.format.name)
    layout = "mono" if first.layout.nb_channels == 1 else "stereo"
    resampler = AudioResampler(format="fltp", layout=layout, rate=SAMPLE_RATE)
    pieces = []
    for frame in (*frames, None):
        if frame and (frame.sample_rate, frame.layout.name, frame.format.name) != kind:
            raise ClipError("sound that changes its format midway")
        pieces += [piece.to_ndarray() for piece in resampler.resample(frame)]
    # The last piece carries the resampler's padding beyond the end.
    length = round(sum(frame.samples for frame in frames) * SAMPLE_RATE / first.sample_rate)
    mean: npt.NDArray[np.float32] = np.concatenate(pieces, axis=1)[:, :length].mean(axis=0)
    return mean


def quantise(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Round samples in [-1, 1] to 16 bits, as the released recordings have them."""
    return np.round(waveform * FULL_SCALE).astype(np.int16)
