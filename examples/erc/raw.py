"""A corpus of raw clips as the input of the pipeline."""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.erc import audio, text, visual
from examples.erc.audio import (
    AudioDataset,
    AudioEncoder,
    WaveformCollator,
    decode_waveform,
    quantise,
)
from examples.erc.clips import ClipStore, decode_clips
from examples.erc.dialogue import Clip, Corpus, Utterance
from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, MODALITIES, SPLITS, Dataset, Phase
from examples.erc.text import Prompter, TextDataset, TextEncoder
from examples.erc.visual import FrameFitter, VisualDataset, VisualEncoder, decode_frames

DEFAULT_ENCODERS: dict[str, str | None] = {
    "text": text.DEFAULT_ENCODER,
    "audio": audio.DEFAULT_ENCODER,
    "visual": visual.DEFAULT_ENCODER,
}
"""The encoders of the paper."""


class RawSource:
    """Words, voices and pictures, each through a pretrained encoder; a :class:`Source`.

    Args:
        corpus: What a reader returned.
        title: The corpus as people write it.
        encoders: For each modality an encoder by its name on the Hugging Face Hub or its folder.
            A modality that is not there, or is ``None``, is left out; text is needed.
        revisions: The branch, tag or commit on the Hub, for the modalities that need another than
            the main branch.
        max_text_tokens: The length of the longest prompt; older words are cut.
        max_seconds: The longest part of a clip that is decoded: its first, > 0.
        workers: Threads that decode, >= 1; ``None``: one for each processor, at most 8.

    Attributes:
        feature_size: The width of every encoder's feature: the smallest hidden size among them
            (768 for the encoders of the paper, as there). Wider ones are projected.

    Raises:
        InputError: An encoder, an option or the corpus does not fit.
    """

    def __init__(
        self,
        corpus: Corpus,
        title: str,
        *,
        encoders: Mapping[str, str | None] = DEFAULT_ENCODERS,
        revisions: Mapping[str, str] | None = None,
        max_text_tokens: int = 512,
        max_seconds: float = 30.0,
        workers: int | None = None,
    ) -> None:
        chosen = {modality: name for modality, name in encoders.items() if name is not None}
        _check_options(chosen, revisions or {}, max_seconds, workers)
        self.name = corpus.name
        self.title = title
        self.labels = corpus.labels
        self.modalities = tuple(modality for modality in MODALITIES if modality in chosen)
        self._corpus = corpus
        self._max_seconds = max_seconds
        self._max_text_tokens = max_text_tokens
        self._workers = workers
        self._clips: dict[tuple[str, str], ClipStore] = {}
        self._check_clips()
        self._encoders = {
            modality: Pretrained(chosen[modality], (revisions or {}).get(modality))
            for modality in self.modalities
        }
        self.feature_size = min(encoder.hidden_size for encoder in self._encoders.values())
        self.description: dict[str, JSON] = {
            "kind": "raw",
            "corpus": corpus.name,
            "annotations": _digest(corpus),
            "encoders": {
                modality: encoder.description for modality, encoder in self._encoders.items()
            },
            "max_text_tokens": max_text_tokens,
            "max_seconds": max_seconds,
        }

    def targets(self, split: str) -> Tensor:
        """The labels of a split: int64, ``[N]``."""
        return torch.tensor([utterance.label for utterance in self._corpus.utterances(split)])

    def prepare(self, folder: Path) -> None:
        """Load every encoder once, so that a bad one is found before any work; decode the clips.

        Args:
            folder: The run folder; the clips go into ``clips/<modality>/<split>``.

        Raises:
            InputError: An encoder cannot be loaded, or a split has no clip that can be decoded.
        """
        # What the trial loads draw at random must not move the seed of the run.
        with torch.random.fork_rng(devices=[]):
            for modality in self.modalities:
                self.encoder(modality)
        settings = {modality: self._settings(modality) for modality in self.modalities[1:]}
        for modality in self.modalities[1:]:
            for split in SPLITS:
                self._clips[modality, split] = decode_clips(
                    [
                        (utterance.identity, _clip(utterance, modality))
                        for utterance in self._corpus.utterances(split)
                    ],
                    self._decode_audio if modality == "audio" else self._decode_visual,
                    folder / "clips" / modality / split,
                    title=f"{self.title} {modality}, {split}",
                    settings=settings[modality],
                    workers=self._workers,
                )

    def dataset(self, modality: str, split: str) -> Dataset:
        """The encoder inputs of one modality in one split; audio and visual after `prepare`."""
        if modality == "text":
            return TextDataset(self._corpus.splits[split], self._prompter)
        if (modality, split) not in self._clips:
            raise RuntimeError(f"{modality}, {split}: call prepare first")
        clips = self._clips[modality, split]
        if modality == "audio":
            return AudioDataset(clips, self._collator)
        return VisualDataset(clips, self._fitter)

    def encoder(self, modality: str) -> nn.Module:
        """A fresh encoder; what it initialises at random follows torch's global seed."""
        encoder, classes, width = self._encoders[modality], len(self.labels), self.feature_size
        if modality == "text":
            return TextEncoder(encoder, self._prompter, classes, width)
        if modality == "audio":
            return AudioEncoder(encoder, classes, width)
        return VisualEncoder(encoder, classes, width)

    def optimisation(self, phase: Phase) -> Optimisation | None:
        """``None``: pretrained encoders are trained with the recipe's numbers."""
        return None

    @cached_property
    def _prompter(self) -> Prompter:
        return Prompter(self._encoders["text"], self._corpus.speakers, self._max_text_tokens)

    @cached_property
    def _collator(self) -> WaveformCollator:
        return WaveformCollator(self._encoders["audio"])

    @cached_property
    def _fitter(self) -> FrameFitter:
        return FrameFitter(self._encoders["visual"])

    def _decode_audio(self, clip: Clip) -> tuple[npt.NDArray[np.int16], int]:
        waveform, damaged = decode_waveform(clip, self._max_seconds)
        return quantise(waveform), damaged

    def _decode_visual(self, clip: Clip) -> tuple[npt.NDArray[np.uint8], int]:
        pictures, damaged = decode_frames(clip, self._fitter.count, self._max_seconds)
        return self._fitter.fit(pictures), damaged

    def _settings(self, modality: str) -> dict[str, JSON]:
        preprocessor = self._collator if modality == "audio" else self._fitter
        return {"max_seconds": self._max_seconds, **preprocessor.settings}

    def _check_clips(self) -> None:
        for modality in self.modalities[1:]:
            for split in SPLITS:
                rows = self._corpus.utterances(split)
                if not any(_clip(utterance, modality) for utterance in rows):
                    raise InputError(
                        f"{self.title} {modality}, {split}: expected clips in the folder of the "
                        f"corpus, got none for {len(rows)} utterances such as {rows[0].identity}; "
                        f"unpack the corpus, or leave {modality} out"
                    )


def _clip(utterance: Utterance, modality: str) -> Clip | None:
    return utterance.audio if modality == "audio" else utterance.visual


def _check_options(
    encoders: Mapping[str, str],
    revisions: Mapping[str, str],
    max_seconds: float,
    workers: int | None,
) -> None:
    unknown = sorted({*encoders, *revisions} - {*MODALITIES})
    if unknown or "text" not in encoders:
        raise InputError(
            f"encoders: expected text, and audio or visual besides, got "
            f"{', '.join(sorted({*encoders, *revisions})) or 'none'}; name one for each modality"
        )
    if not (math.isfinite(max_seconds) and max_seconds > 0):
        raise InputError(
            f"max_seconds: expected a finite number > 0, got {max_seconds}; 30 suits both corpora"
        )
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected at least 1, got {workers}; leave it out for a default")


def _digest(corpus: Corpus) -> str:
    """The SHA-256 of everything that was read: annotations, windows, and sizes of the clips."""
    sizes: dict[Path, int] = {}

    def describe(clip: Clip | None) -> list[Any] | None:
        if clip is None:
            return None
        if clip.path not in sizes:
            sizes[clip.path] = clip.path.stat().st_size
        return [clip.path.name, sizes[clip.path], clip.start, clip.end]

    rows = [
        [
            split,
            dialogue.identity,
            row.identity,
            row.text,
            row.speaker,
            row.label,
            describe(row.audio),
            describe(row.visual),
        ]
        for split in SPLITS
        for dialogue in corpus.splits[split]
        for row in dialogue.utterances
    ]
    text = json.dumps([corpus.name, corpus.labels, rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
