"""A corpus of features that were extracted before, as the input of the pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.erc import light
from examples.erc.errors import InputError
from examples.erc.feature_folder import ARRAYS, Array, FeatureFolder, Measured, read
from examples.erc.light import DialogueEncoder, DialogueRows, FeatureEncoder, FeatureRows
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, Dataset, Phase

LARGEST = 5.0
"""Standardised features are cut here: acoustic functionals have outliers far beyond."""


class FeatureSource:
    """Extracted features through light encoders; a :class:`examples.erc.source.Source`.

    The arrays of a modality are put side by side. Audio and visual columns are standardised by the
    rows of train; where there was nothing to extract from, they are 0, which is then the mean.

    Args:
        folder: See :mod:`examples.erc.feature_folder`.
        corpus: The name of the corpus that it has to be of, in any case.
        modalities: Those to use; ``None``: all that are present. Text is always used.

    Raises:
        InputError: The folder has a fault, or lacks a modality that was asked for or the text.
    """

    def __init__(
        self, folder: Path, corpus: str, modalities: tuple[str, ...] | None = None
    ) -> None:
        found = read(folder, corpus)
        self.name = corpus.lower()
        self.title = found.dataset
        self.labels = found.labels
        self.modalities = _choose_modalities(tuple(found.modalities), modalities)
        self.description: dict[str, JSON] = {
            "kind": "features",
            "folder": folder.resolve().name,
            "sha256": found.sha256,
            "encoders": light.SETTINGS,
        }
        self._rows = found.rows
        self._targets = torch.from_numpy(found.label)
        self._speakers = torch.from_numpy(found.speaker)
        self._windows = light.context_windows(torch.from_numpy(found.start))
        self._values = {
            modality: torch.from_numpy(_join(modality, found)) for modality in self.modalities
        }

    def describe(self, modalities: Sequence[str]) -> dict[str, JSON]:
        """The whole folder: it has one digest."""
        return self.description

    def targets(self, split: str) -> Tensor:
        """The labels of a split: int64, ``[N]``."""
        return self._targets[self._rows[split]]

    def prepare(self, folder: Path) -> None:
        """Nothing is left to do."""

    def dataset(self, modality: str, split: str) -> Dataset:
        """The encoder inputs of one modality in one split."""
        rows = self._rows[split]
        if modality == "text":
            return DialogueRows(self._values["text"], self._speakers, self._windows[rows])
        return FeatureRows(self._values[modality][rows])

    def encoder(self, modality: str) -> nn.Module:
        """A fresh light encoder, initialised from torch's global seed."""
        width = self._values[modality].shape[1]
        encoder = DialogueEncoder if modality == "text" else FeatureEncoder
        return encoder(width, len(self.labels))

    def optimisation(self, phase: Phase) -> Optimisation | None:
        """What suits the light encoders, which no recipe is about."""
        return light.OPTIMISATION[phase]


def _choose_modalities(present: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    if "text" not in present:
        raise InputError(
            f"{ARRAYS}: expected arrays text_* for the text teacher, got only "
            f"{', '.join(present) or 'none of any modality'}; extract sentence embeddings too"
        )
    missing = [modality for modality in wanted or () if modality not in present]
    if missing:
        raise InputError(
            f"--modalities: expected some of {', '.join(present)}, which are in {ARRAYS}, got "
            f"{', '.join(missing)}; leave it out, or add arrays {missing[0]}_*"
        )
    return tuple(
        modality for modality in present if wanted is None or modality in {*wanted, "text"}
    )


def _join(modality: str, found: FeatureFolder) -> Array:
    """All arrays of a modality side by side: float32, ``[N, width]``."""
    train = found.rows["train"]
    parts = [
        measured.values if modality == "text" else _standardise(measured, train)
        for measured in found.modalities[modality]
    ]
    there = [measured.there[:, None] for measured in found.modalities[modality]]
    return np.concatenate(
        [np.where(mask, part, np.float32(0)) for mask, part in zip(there, parts, strict=True)],
        axis=1,
    )


def _standardise(measured: Measured, train: Array) -> Array:
    """Give each column mean 0 and deviation 1 on the rows of train that are there."""
    known = measured.values[train[measured.there[train]]].astype(np.float64)
    if not len(known):
        raise InputError(
            f"{ARRAYS}, {measured.name}: expected rows of train to standardise by, got a mask "
            "without any; mend the mask, or leave the array out"
        )
    deviation = known.std(axis=0)
    deviation[deviation == 0] = 1.0
    standard: Array = (measured.values - known.mean(axis=0)) / deviation
    return standard.clip(-LARGEST, LARGEST).astype(np.float32)
