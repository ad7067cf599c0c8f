"""The voice: normalising it, and the encoder that listens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.erc.clips import ClipStore
from examples.erc.errors import InputError
from examples.erc.pretrained import Head, Pretrained, load_body
from examples.erc.sound import FULL_SCALE, SAMPLE_RATE
from examples.erc.source import JSON, EncoderOutput

DEFAULT_ENCODER = "facebook/data2vec-audio-base-960h"
"""The encoder of the paper."""

MASK_TIME_LENGTH = 3
"""Frames in each span that training hides from the encoder (SpecAugment), as in the released code.

The encoder's own 10 frames, 0.2 s, would hide short words altogether.
"""


class WaveformCollator:
    """Normalises and pads waveforms as the encoder's own feature extractor says.

    Args:
        encoder: A speech encoder such as data2vec-audio.

    Raises:
        InputError: The encoder is not of this kind, or not for 16 kHz.
    """

    def __init__(self, encoder: Pretrained) -> None:
        self._extract: Any = encoder.load("AutoFeatureExtractor")
        rate = getattr(self._extract, "sampling_rate", None)
        if rate != SAMPLE_RATE or not hasattr(encoder.config, "conv_stride"):
            raise InputError(
                f"{encoder.name}: expected a speech encoder of waveforms at {SAMPLE_RATE} Hz, got "
                f"one of the kind {encoder.config.model_type!r} at {rate} Hz; "
                "choose one such as data2vec-audio"
            )
        # One frame to average, and for SpecAugment a batch longer than one of its spans.
        self._shortest_clip = _count_samples(encoder, 1)
        self._shortest_batch = _count_samples(encoder, MASK_TIME_LENGTH + 1)

    @property
    def settings(self) -> dict[str, JSON]:
        """Everything that decoded waveforms depend on."""
        return {"sample_rate": SAMPLE_RATE, "channels": "mean"}

    def collate(self, clips: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            clips: For each of B rows its samples, int16, ``[n]``; ``None``: there is no voice.

        Returns:
            ``input_values`` (float32, ``[B, T]``: normalised, padded with zeros on the right),
            ``attention_mask`` (int64, ``[B, T]``: 1 for samples, 0 for padding) and ``present``
            (bool, ``[B]``). A row without a voice is silence, as is the end of a clip that is too
            short for one frame.
        """
        waveforms = [self._pad(samples) for samples in clips]
        batch = self._extract(
            waveforms,
            sampling_rate=SAMPLE_RATE,
            padding="max_length",
            max_length=max(self._shortest_batch, *map(len, waveforms)),
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            "input_values": batch["input_values"],
            "attention_mask": batch["attention_mask"].long(),
            "present": torch.tensor([samples is not None for samples in clips]),
        }

    def _pad(self, samples: Tensor | None) -> npt.NDArray[np.float32]:
        if samples is None:
            return np.zeros(self._shortest_clip, np.float32)
        waveform = samples.numpy() / np.float32(FULL_SCALE)
        return np.pad(waveform, (0, max(self._shortest_clip - len(waveform), 0)))


def _count_samples(encoder: Pretrained, frames: int) -> int:
    """How many samples the encoder's convolutions need for so many frames."""
    count = frames
    layers = zip(encoder.config.conv_kernel, encoder.config.conv_stride, strict=True)
    for kernel, stride in reversed(list(layers)):
        count = (count - 1) * stride + kernel
    return count


class AudioDataset:
    """The voices of a split, decoded before; for the batches see :class:`WaveformCollator`.

    Args:
        clips: One row for each utterance: int16 samples at 16 kHz.
        collator: What makes the batches.
    """

    def __init__(self, clips: ClipStore, collator: WaveformCollator) -> None:
        self._clips = clips
        self._collator = collator

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._clips)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        return self._collator.collate([self._clips[row] for row in rows])


class AudioEncoder(nn.Module):
    """A speech encoder with a linear classifier over the mean of its frames.

    The mean runs over the frames of the voice alone, so that it uses the whole utterance, and
    a clip has the same feature whatever it is batched with. The released code takes the first
    frame of a row that is padded on the left without a mask: in all but the longest clip of
    a batch a frame of padding, which changes with the other clips of the batch.

    Args:
        encoder: A speech encoder such as data2vec-audio, with its weights.
        num_classes: C.
        feature_size: d, the width of the feature; the hidden size is projected if it differs.

    Raises:
        InputError: The encoder cannot be loaded.
    """

    def __init__(self, encoder: Pretrained, num_classes: int, feature_size: int) -> None:
        super().__init__()
        self.body = load_body(encoder, mask_time_length=MASK_TIME_LENGTH)
        self.head = Head(encoder.hidden_size, feature_size, num_classes)
        self._frames: Tensor | None = None
        # data2vec stacks its position convolutions and would let padding, zero before the first,
        # grow between them and into the last 45 frames of the voice.
        for layer in getattr(self.body.encoder.pos_conv_embed, "layers", ()):
            layer.register_forward_hook(self._silence_padding)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor, present: Tensor
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            input_values: ``[B, T]``, normalised samples, padded on the right.
            attention_mask: ``[B, T]``, 1 for samples, 0 for padding.
            present: ``[B]``, bool; the feature is zero where it is false.

        Returns:
            Features ``[B, d]`` and logits ``[B, C]``, both float32.
        """
        count = self.body._get_feat_extract_output_lengths(input_values.shape[1])
        frames: Tensor = self.body._get_feature_vector_attention_mask(int(count), attention_mask)
        self._frames = frames.unsqueeze(1)
        hidden = self.body(input_values, attention_mask=attention_mask).last_hidden_state
        weights = frames.unsqueeze(-1).float()
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
        output: EncoderOutput = self.head(pooled, present)
        return output

    def _silence_padding(self, layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if self._frames is None else output * self._frames
