"""Fusion heads over frozen features: TelME's shifting, and concatenation to compare it with."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.erc.recipe import FusionRecipe
from telme_kd import AttentionShiftingFusion


class FusionOutput(NamedTuple):
    """What every fusion head returns: logits ``[B, C]``, unnormalised."""

    logits: Tensor


class FrozenFeatures:
    """The features of several encoders for one split, computed before.

    A batch has one ``[B, d]`` tensor for each modality, under its name.

    Args:
        features: ``[N, d]`` for each modality; d may differ.
    """

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        self._features = features

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self._features.values())))

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        return {modality: features[rows] for modality, features in self._features.items()}


class ShiftingHead(nn.Module):
    """The students' features shift the teacher's: :class:`telme_kd.AttentionShiftingFusion`.

    Args:
        widths: The feature width of each modality, the teacher's first, then one or more students.
        num_classes: C.
        recipe: The numbers.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, recipe: FusionRecipe) -> None:
        super().__init__()
        anchor, *students = widths.values()
        self._modalities = tuple(widths)
        self.fusion = AttentionShiftingFusion(
            anchor,
            tuple(students),
            num_heads=recipe.num_heads,
            threshold=recipe.threshold,
            dropout=recipe.dropout,
            attend_over=recipe.attend_over,
            num_classes=num_classes,
        )

    def forward(self, **features: Tensor) -> FusionOutput:
        """Fuse a batch: ``[B, d]`` for each modality, under its name."""
        return FusionOutput(self.fusion(*(features[name] for name in self._modalities)))


class ConcatenationHead(nn.Module):
    """All features side by side, then what follows the shift in TelME: LayerNorm, dropout, linear.

    There is no hidden layer: what the comparison is about is how the modalities come together.

    Args:
        widths: The feature width of each modality.
        num_classes: C.
        recipe: The numbers; of those only the dropout matters.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, recipe: FusionRecipe) -> None:
        super().__init__()
        self._modalities = tuple(widths)
        width = sum(widths.values())
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(recipe.dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, **features: Tensor) -> FusionOutput:
        """Fuse a batch: ``[B, d]`` for each modality, under its name."""
        joined = torch.cat([features[name] for name in self._modalities], dim=1)
        return FusionOutput(self.classifier(self.dropout(self.norm(joined))))
