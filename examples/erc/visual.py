"""The picture: frames of a clip fitted to the encoder that watches, and that encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.erc.clips import ClipStore
from examples.erc.errors import InputError
from examples.erc.pretrained import Head, Pretrained, load_body
from examples.erc.source import JSON, EncoderOutput

DEFAULT_ENCODER = "facebook/timesformer-base-finetuned-k400"
"""The encoder of the paper."""

_GEOMETRY = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
"""The settings of an image processor that say where its pixels come from."""


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
        got = self.fit(np.zeros((1, 3 * self.size[0], 2 * self.size[1], 3), np.uint8)).shape[-2:]
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

    def fit(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize and crop pictures.

        Args:
            pictures: ``[F, H', W', 3]``, RGB, of any size.

        Returns:
            ``[F, 3, H, W]``.
        """
        batch = self._processor.preprocess(
            [list(pictures)],
            do_rescale=False,
            do_normalize=False,
            input_data_format="channels_last",  # a picture may be three pixels high
            return_tensors="np",
        )
        fitted: npt.NDArray[np.uint8] = batch["pixel_values"][0].astype(np.uint8)
        return fitted

    def keep(self, folder: Path) -> None:
        """Keep the settings in a folder, as the encoder's own had them."""
        self._processor.save_pretrained(folder)

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
