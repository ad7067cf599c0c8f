"""The numbers of a run: how each stage is optimised, and what losses and heads are made of.

The values stand in ``examples/<corpus>/recipes.py``, each beside its source.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Optimisation:
    """How one stage is optimised: AdamW, linear warm-up, then linear decay to zero.

    Attributes:
        learning_rate: The peak learning rate, > 0.
        epochs: The largest number of passes over the training split, >= 1.
        batch_size: Utterances per optimiser step, >= 1; the relational losses need 3 or more.
        warmup: The share of all optimiser steps during which the rate rises, in [0, 1].
        weight_decay: AdamW's decoupled decay, >= 0.
        max_gradient_norm: The 2-norm that gradients are clipped to, > 0.
        patience: Epochs without a better dev score before training stops; ``None``: any number.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    warmup: float
    weight_decay: float
    max_gradient_norm: float
    patience: int | None


@dataclass(frozen=True)
class ClassificationRecipe:
    """The cross-entropy of every stage; as it stands here, the plain one.

    Attributes:
        class_balance: The power of the inverse class frequency that classes are weighted by, in
            [0, 1]: 0 counts every utterance alike, 1 every class.
        focal_gamma: How much utterances that are predicted well count less, >= 0: each is
            multiplied by (1 - p) to this power, where p is the probability of its label.
    """

    class_balance: float = 0.0
    focal_gamma: float = 0.0


@dataclass(frozen=True)
class TeacherRecipe:
    """The text teacher, trained with cross-entropy."""

    optimisation: Optimisation


@dataclass(frozen=True)
class StudentRecipe:
    """An audio or visual student, trained with Eq. 6 of the paper.

    Attributes:
        optimisation: How it is optimised.
        temperature: Of the response distillation (Eq. 8-11), > 0.
        response_weight: alpha of Eq. 6, >= 0.
        inter_weight: The weight of the inter-class relation (Eq. 10), >= 0.
        intra_weight: The weight of the intra-class relation (Eq. 11), >= 0.
        feature_weight: beta of Eq. 6, >= 0.
        feature_temperature: Of the feature distillation (Eq. 13-14), > 0.
        memory_size: How many utterances of earlier steps both distillations relate a batch to, as
            student and teacher put them then, >= 0; nobody's numbers but ours have any.
    """

    optimisation: Optimisation
    temperature: float
    response_weight: float
    inter_weight: float
    intra_weight: float
    feature_weight: float
    feature_temperature: float
    memory_size: int = 0


@dataclass(frozen=True)
class FusionRecipe:
    """The fusion head over the frozen features.

    Attributes:
        optimisation: How it is optimised.
        threshold: The largest shift as a share of the text feature's norm (theta of Eq. 19), >= 0.
        num_heads: Heads of the self-attention over the students' features, >= 1.
        dropout: After the attention and before the classifier, in [0, 1).
        attend_over: What the tokens are; see :class:`telme_kd.AttentionShiftingFusion`.
    """

    optimisation: Optimisation
    threshold: float
    num_heads: int
    dropout: float
    attend_over: Literal["modalities", "dialogue", "batch"]


@dataclass(frozen=True)
class Recipe:
    """Every number of a run, under one name."""

    name: str
    teacher: TeacherRecipe
    student: StudentRecipe
    fusion: FusionRecipe
    classification: ClassificationRecipe = ClassificationRecipe()
