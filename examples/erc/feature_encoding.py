"""How extracted features become the inputs of light encoders, in training and later on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from examples.erc import light
from examples.erc.errors import InputError
from examples.erc.feature_folder import ARRAYS, Array, FeatureFolder, Measured
from examples.erc.light import DialogueEncoder, DialogueRows, FeatureEncoder, FeatureRows
from examples.erc.source import JSON, Dataset

LARGEST = 5.0
"""Standardised features are cut here: acoustic functionals have outliers far beyond."""

SCALES = "scales.safetensors"


@dataclass(frozen=True)
class FeatureEncoding:
    """What the arrays of a run are called, and how their columns are standardised.

    Attributes:
        scales: For each modality its arrays in order, for each of them mean and deviation of its
            columns, float64, ``[2, width]``; those of text are not standardised (0 and 1).
        classes: C.
    """

    scales: Mapping[str, Mapping[str, Array]]
    classes: int

    @classmethod
    def fit(cls, found: FeatureFolder, modalities: tuple[str, ...]) -> "FeatureEncoding":
        """Take the scales from the rows of train that are there.

        Raises:
            InputError: An array has none.
        """
        scales = {
            modality: {
                measured.name: _plain(measured)
                if modality == "text"
                else _fit(measured, found.rows["train"])
                for measured in found.modalities[modality]
            }
            for modality in modalities
        }
        return cls(scales, len(found.labels))

    @classmethod
    def restore(cls, folder: Path, record: Mapping[str, Any]) -> "FeatureEncoding":
        """Make what :meth:`keep` kept.

        Args:
            folder: With the file.
            record: The settings, and the ``labels`` of the run.
        """
        kept = load_file(folder / SCALES)
        scales = {
            modality: {name: kept[name] for name in names}
            for modality, names in record["arrays"].items()
        }
        return cls(scales, len(record["labels"]))

    def keep(self, folder: Path) -> dict[str, JSON]:
        """Keep the scales; see :meth:`examples.erc.source.Source.keep_encoding`."""
        arrays = {name: scale for held in self.scales.values() for name, scale in held.items()}
        save_file(arrays, folder / SCALES)
        return {
            "kind": "features",
            "modalities": list(self.scales),
            "arrays": {modality: list(held) for modality, held in self.scales.items()},
        }

    def encoder(self, modality: str) -> nn.Module:
        """A fresh light encoder, initialised from torch's global seed."""
        width = sum(scale.shape[1] for scale in self.scales[modality].values())
        encoder = DialogueEncoder if modality == "text" else FeatureEncoder
        return encoder(width, self.classes)

    def check(self, found: FeatureFolder, modality: str) -> None:
        """Make sure that a folder has the arrays of a modality.

        Raises:
            InputError: One is not there, or has another width.
        """
        held = {measured.name: measured for measured in found.modalities.get(modality, ())}
        for name, scale in self.scales[modality].items():
            width = scale.shape[1]
            if name not in held or held[name].values.shape[1] != width:
                got = f"{held[name].values.shape[1]} columns" if name in held else "no such array"
                raise InputError(
                    f"{ARRAYS}, {name}: expected {width} columns, as those that the run was "
                    f"trained on, got {got}; extract the same features, or leave {modality} out "
                    "with --modalities"
                )

    def values(self, found: FeatureFolder, modality: str) -> Tensor:
        """All arrays of a modality side by side, standardised: float32, ``[N, width]``.

        Where there was nothing to extract from they are 0, which is then the mean.
        """
        parts = []
        for measured in found.modalities[modality]:
            if (scale := self.scales[modality].get(measured.name)) is None:
                continue
            values = measured.values
            if modality != "text":
                standard = (values - scale[0]) / scale[1]
                values = standard.clip(-LARGEST, LARGEST).astype(np.float32)
            parts.append(np.where(measured.there[:, None], values, np.float32(0)))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def dataset(self, found: FeatureFolder, modality: str, rows: Array) -> Dataset:
        """The inputs of one encoder for some rows of a folder."""
        values = self.values(found, modality)
        if modality == "text":
            windows = light.context_windows(torch.from_numpy(found.start))
            return DialogueRows(values, torch.from_numpy(found.speaker), windows[rows])
        return FeatureRows(values[rows])


def _plain(measured: Measured) -> Array:
    width = measured.values.shape[1]
    return np.stack([np.zeros(width), np.ones(width)])


def _fit(measured: Measured, train: Array) -> Array:
    known = measured.values[train[measured.there[train]]].astype(np.float64)
    if not len(known):
        raise InputError(
            f"{ARRAYS}, {measured.name}: expected rows of train to standardise by, got a mask "
            "without any; mend the mask, or leave the array out"
        )
    deviation = known.std(axis=0)
    deviation[deviation == 0] = 1.0
    return np.stack([known.mean(axis=0), deviation])
