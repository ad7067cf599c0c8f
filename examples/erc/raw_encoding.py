"""How raw clips become the inputs of pretrained encoders, in training and later on."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from examples.erc.audio import AudioDataset, AudioEncoder, WaveformCollator
from examples.erc.clips import ClipStore
from examples.erc.crew import Decoding
from examples.erc.dialogue import Dialogue
from examples.erc.pretrained import Pretrained
from examples.erc.source import JSON, Dataset
from examples.erc.text import Prompter, TextDataset, TextEncoder
from examples.erc.visual import FrameFitter, VisualDataset, VisualEncoder


class RawEncoding:
    """The encoders of a run, and what makes their inputs of words and decoded clips.

    Args:
        encoders: For each modality its encoder; text among them.
        classes: C.
        speakers: The largest number of speakers in a dialogue, >= 1.
        max_text_tokens: The length of the longest prompt; older words are cut.
        max_seconds: The longest part of a clip that is decoded: its first, > 0.
        crop: See only the half of a picture in which the speaker is, where two people share it.
        ask: Whether a text ends in the question for the emotion.

    Attributes:
        feature_size: The width of every encoder's feature: the smallest hidden size among them.
    """

    def __init__(
        self,
        encoders: Mapping[str, Pretrained],
        classes: int,
        *,
        speakers: int,
        max_text_tokens: int,
        max_seconds: float,
        crop: bool,
        ask: bool = True,
    ) -> None:
        self.encoders = dict(encoders)
        self.speakers = speakers
        self.max_text_tokens = max_text_tokens
        self.max_seconds = max_seconds
        self.crop = crop
        self.ask = ask
        self.feature_size = min(encoder.hidden_size for encoder in encoders.values())
        self._classes = classes

    @classmethod
    def restore(cls, folder: Path, record: Mapping[str, Any]) -> "RawEncoding":
        """Make what :meth:`keep` kept; encoders have random weights, to be loaded.

        Args:
            folder: With the files.
            record: The settings, and the ``labels`` of the run.
        """
        encoders = {
            modality: Pretrained(str(folder / modality), blank=True)
            for modality in record["modalities"]
        }
        return cls(encoders, len(record["labels"]), **record["options"])

    def keep(self, folder: Path) -> dict[str, JSON]:
        """Keep everything but the weights; see :meth:`examples.erc.source.Source.keep_encoding`."""
        kinds = {"text": "AutoTokenizer", "audio": "AutoFeatureExtractor"}
        for modality, encoder in self.encoders.items():
            encoder.config.save_pretrained(folder / modality)
            if modality == "visual":
                self.fitter.keep(folder / modality)
            else:
                encoder.load(kinds[modality]).save_pretrained(folder / modality)
        return {
            "kind": "raw",
            "modalities": list(self.encoders),
            "options": {
                "speakers": self.speakers,
                "max_text_tokens": self.max_text_tokens,
                "max_seconds": self.max_seconds,
                "crop": self.crop,
            },
        }

    def without_prompt(self) -> "RawEncoding":
        """The same encoders, of texts that do not end in the question for the emotion."""
        return RawEncoding(
            self.encoders,
            self._classes,
            speakers=self.speakers,
            max_text_tokens=self.max_text_tokens,
            max_seconds=self.max_seconds,
            crop=self.crop,
            ask=False,
        )

    def encoder(self, modality: str) -> nn.Module:
        """A fresh encoder; what it initialises at random follows torch's global seed."""
        encoder, classes, width = self.encoders[modality], self._classes, self.feature_size
        if modality == "text":
            return TextEncoder(encoder, self.prompter, classes, width)
        if modality == "audio":
            return AudioEncoder(encoder, classes, width)
        return VisualEncoder(encoder, classes, width)

    def texts(self, dialogues: Sequence[Dialogue]) -> Dataset:
        """The inputs of the text encoder."""
        return TextDataset(dialogues, self.prompter)

    def clips(self, modality: str, clips: ClipStore) -> Dataset:
        """The inputs of the audio or of the visual encoder."""
        if modality == "audio":
            return AudioDataset(clips, self.collator)
        return VisualDataset(clips, self.fitter)

    @cached_property
    def prompter(self) -> Prompter:
        """What makes the prompts."""
        return Prompter(self.encoders["text"], self.speakers, self.max_text_tokens, ask=self.ask)

    @cached_property
    def collator(self) -> WaveformCollator:
        """What makes batches of voices."""
        return WaveformCollator(self.encoders["audio"])

    @cached_property
    def fitter(self) -> FrameFitter:
        """What fits pictures."""
        return FrameFitter(self.encoders["visual"])

    def decoding(self, modality: str) -> Decoding:
        """How the clips of a modality are decoded."""
        options: dict[str, JSON] = {"max_seconds": self.max_seconds}
        if modality == "audio":
            return Decoding("examples.erc.sound:decode", options, lambda samples: samples)
        options = {"count": self.fitter.count, **options, "crop": self.crop}
        return Decoding("examples.erc.pictures:decode", options, self.fitter.fit)

    def preprocessing(self, modality: str) -> dict[str, JSON]:
        """Everything that decoded clips depend on, besides the options of their decoding."""
        return self.collator.settings if modality == "audio" else self.fitter.settings
