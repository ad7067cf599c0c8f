"""The picture: frames of a clip, fitted to the encoder that watches, and that encoder."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor, nn

from examples.erc.clips import ClipStore
from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError, Media, window
from examples.erc.pretrained import Head, Pretrained, load_body
from examples.erc.source import JSON, EncoderOutput

DEFAULT_ENCODER = "facebook/timesformer-base-finetuned-k400"
"""The encoder of the paper."""

_REORDERING = 1.0
"""Seconds by which the order of decoding may differ from the order of presentation."""

_GEOMETRY = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
"""The settings of an image processor that say where its pixels come from."""


class _Key(NamedTuple):
    """A picture from which decoding can start: when it is shown, and when it is decoded."""

    shown: int
    decoded: int


class _Index(NamedTuple):
    """The pictures of a window, found without decoding any; in units of the time base."""

    shown: list[int]
    keys: list[_Key]


def decode_frames(clip: Clip, count: int, max_seconds: float) -> tuple[list[Image.Image], int]:
    """Decode evenly spaced pictures of a clip.

    The window is cut into ``count`` equal parts; each gives the picture that is shown at its
    middle. A clip of fewer pictures repeats some. What is not needed is not decoded: from one
    picture to the next the file is read on, or, if that is nearer, from the last key frame
    before it.

    Args:
        clip: A file with a video stream, or a part of it; as for the voice, its first
            ``max_seconds`` count.
        count: How many pictures, >= 1.
        max_seconds: > 0.

    Returns:
        The pictures in order, RGB, and how many damaged packets were left out.

    Raises:
        ClipError: No picture can be decoded there.
    """
    start, stop = window(clip, max_seconds)
    with Media(clip.path) as media:
        stream = media.video
        if stream.time_base is None:
            raise ClipError("a video stream without a time base")
        index = _find_pictures(media, stream, start, stop)
        wanted = _spread(index.shown, start / stream.time_base, stop / stream.time_base, count)
        found = _decode(media, stream, index.keys, wanted)
        return [found[shown] for shown in wanted], media.damaged


def _find_pictures(media: Media, stream: VideoStream, start: float, stop: float) -> _Index:
    """List the pictures from the last key frame before a window to its end."""
    base = stream.time_base or Fraction(1)
    if start > _REORDERING:
        media.seek(stream, int((start - _REORDERING) / base))
    shown, keys = [], []
    for packet in media.packets(stream):
        # AVI need not say when a picture is shown; then it is shown when it is decoded.
        decoded = packet.pts if packet.dts is None else packet.dts
        if decoded is None:
            continue
        if decoded * base >= stop:
            break
        shown.append(decoded if packet.pts is None else packet.pts)
        if packet.is_keyframe:
            keys.append(_Key(shown[-1], decoded))
    if not shown:
        raise ClipError("no picture in the window")
    return _Index(sorted(shown), sorted(keys) or [_Key(min(shown), min(shown))])


def _spread(shown: Sequence[int], start: float, stop: float, count: int) -> list[int]:
    """Choose the pictures shown at the middles of ``count`` equal parts of a window."""
    period = (shown[-1] - shown[0]) / max(len(shown) - 1, 1)
    begin, end = max(start, shown[0]), min(stop, shown[-1] + period)
    if begin > end:
        raise ClipError("no picture in the window")
    times = [begin + (part + 0.5) * (end - begin) / count for part in range(count)]
    return [shown[bisect_right(shown, time) - 1] for time in times]


def _decode(
    media: Media, stream: VideoStream, keys: Sequence[_Key], wanted: Sequence[int]
) -> dict[int, Image.Image]:
    """Decode the pictures that are shown at the wanted times.

    In the place of a damaged one comes the next, or at the end of the file the last.
    """
    found = {}
    pictures: Iterator[VideoFrame] = iter(())
    current, at = None, None
    # One converter for all: a picture that converts itself sets up a new one, with its threads.
    converter = VideoReformatter()
    for shown in sorted(set(wanted)):
        key = keys[max(bisect_right(keys, shown, key=lambda key: key.shown) - 1, 0)]
        if at is None or key.shown > at:
            media.seek(stream, key.decoded)
            pictures = media.pictures(stream)
        while at is None or at < shown:
            following = next(pictures, None)
            if following is None:
                break
            if following.pts is not None:
                current, at = following, following.pts
        if current is None:
            raise ClipError("no picture that can be decoded")
        found[shown] = Image.fromarray(converter.reformat(current, format="rgb24").to_ndarray())
    return found


class FrameFitter:
    """Fits pictures to a video encoder as its own image processor says, without torchvision.

    Args:
        encoder: A video encoder such as TimeSformer.

    Attributes:
        count: The number of pictures that the encoder watches.
        size: The height and the width that they have to have.

    Raises:
        InputError: The encoder is not of this kind.
    """

    def __init__(self, encoder: Pretrained) -> None:
        count: int | None = getattr(encoder.config, "num_frames", None)
        image_size = getattr(encoder.config, "image_size", None)
        if count is None or image_size is None:
            raise InputError(
                f"{encoder.name}: expected a video encoder with num_frames and image_size, got "
                f"one of the kind {encoder.config.model_type!r}; choose one such as TimeSformer"
            )
        self.count = count
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._processor: Any = encoder.load("AutoImageProcessor", backend="pil")
        got = self.fit([Image.new("RGB", (2 * self.size[1], 3 * self.size[0]))]).shape[-2:]
        if got != self.size:
            raise InputError(
                f"{encoder.name}: expected an image processor that makes pictures of {self.size}, "
                f"got {got}; mend preprocessor_config.json"
            )

    @property
    def settings(self) -> dict[str, JSON]:
        """Everything that fitted pictures depend on."""
        processor = self._processor.to_dict()
        return {
            "frames": self.count,
            **{name: processor[name] for name in _GEOMETRY},
        }

    def fit(self, pictures: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
        """Resize and crop pictures.

        Args:
            pictures: F pictures, RGB, of any size.

        Returns:
            ``[F, 3, H, W]``.
        """
        batch = self._processor.preprocess(
            [list(pictures)], do_rescale=False, do_normalize=False, return_tensors="np"
        )
        fitted: npt.NDArray[np.uint8] = batch["pixel_values"][0].astype(np.uint8)
        return fitted

    def normalise(self, frames: Tensor) -> Tensor:
        """Scale and centre fitted pictures.

        Args:
            frames: uint8, ``[..., 3, H, W]``.

        Returns:
            float32, of the same shape.
        """
        values = frames.float()
        if self._processor.do_rescale:
            values = values * self._processor.rescale_factor
        if self._processor.do_normalize:
            mean, deviation = (
                torch.tensor(channels).reshape(3, 1, 1)
                for channels in (self._processor.image_mean, self._processor.image_std)
            )
            values = (values - mean) / deviation
        return values


class VisualDataset:
    """The pictures of a split, decoded before.

    A batch has ``pixel_values`` (float32, ``[B, F, 3, H, W]``) and ``present`` (bool, ``[B]``:
    false where there is no picture; the row is zero then).

    Args:
        clips: One row for each utterance: uint8, ``[F, 3, H, W]``.
        fitter: What fitted them.
    """

    def __init__(self, clips: ClipStore, fitter: FrameFitter) -> None:
        self._clips = clips
        self._fitter = fitter

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._clips)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        found = [self._clips[row] for row in rows]
        nothing = torch.zeros(self._fitter.count, 3, *self._fitter.size)
        return {
            "pixel_values": torch.stack(
                [nothing if frames is None else self._fitter.normalise(frames) for frames in found]
            ),
            "present": torch.tensor([frames is not None for frames in found]),
        }


class VisualEncoder(nn.Module):
    """A video encoder with a linear classifier over its class token.

    Args:
        encoder: A video encoder with a class token such as TimeSformer, with its weights.
        num_classes: C.
        feature_size: d, the width of the feature; the hidden size is projected if it differs.
    """

    def __init__(self, encoder: Pretrained, num_classes: int, feature_size: int) -> None:
        super().__init__()
        self.body = load_body(encoder)
        self.head = Head(encoder.hidden_size, feature_size, num_classes)

    def forward(self, pixel_values: Tensor, present: Tensor) -> EncoderOutput:
        """Encode a batch.

        Args:
            pixel_values: ``[B, F, 3, H, W]``, normalised.
            present: ``[B]``, bool; the feature is zero where it is false.

        Returns:
            Features ``[B, d]`` and logits ``[B, C]``, both float32.
        """
        hidden = self.body(pixel_values).last_hidden_state
        output: EncoderOutput = self.head(hidden[:, 0], present)
        return output
