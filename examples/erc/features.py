"""A corpus of features that were extracted before, as the input of the pipeline."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.erc import light
from examples.erc.errors import InputError
from examples.erc.feature_encoding import FeatureEncoding
from examples.erc.feature_folder import ARRAYS, read
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, Dataset, Line, Phase


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
        self._found = found
        self._targets = torch.from_numpy(found.label)
        self._encoding = FeatureEncoding.fit(found, self.modalities)

    def describe(self, modalities: Sequence[str]) -> dict[str, JSON]:
        """The whole folder: it has one digest."""
        return self.description

    def targets(self, split: str) -> Tensor:
        """The labels of a split: int64, ``[N]``."""
        return self._targets[self._found.rows[split]]

    def lines(self, split: str) -> list[Line]:
        """Who says what in a split."""
        return [self._found.lines[row] for row in self._found.rows[split]]

    def keep_encoding(self, folder: Path) -> dict[str, JSON]:
        """Keep the names and the scales of the arrays."""
        return self._encoding.keep(folder)

    def without_prompt(self) -> "FeatureSource":
        """Not to be had: sentences were embedded before, each on its own.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{ARRAYS}: expected words, to ask for the emotion or not, got sentence embeddings, "
            "which no question ends; use --raw or --synthetic"
        )

    def prepare(self, folder: Path) -> None:
        """Nothing is left to do."""

    def dataset(self, modality: str, split: str) -> Dataset:
        """The encoder inputs of one modality in one split."""
        return self._encoding.dataset(self._found, modality, self._found.rows[split])

    def encoder(self, modality: str) -> nn.Module:
        """A fresh light encoder, initialised from torch's global seed."""
        return self._encoding.encoder(modality)

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
