"""What is minimised: the loss of a whole batch, of which each process holds a share.

Processes average their gradients. A loss here is therefore such that the *mean* over the processes
of its gradients is the gradient of the loss of the whole batch, and the mean of its values that
loss: the classification sums over the own rows, divides by what the whole batch weighs, and
multiplies by the number of processes; the distillation gathers the rows of all.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from examples.erc.fusion import FusionOutput
from examples.erc.recipe import ClassificationRecipe, StudentRecipe
from examples.erc.source import EncoderOutput
from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss


class Share(NamedTuple):
    """The rows of the training split that a process has of a batch.

    Attributes:
        rows: Its own: int64, ``[b]``.
        batch: Everybody's: int64, ``[B]``.
    """

    rows: Tensor
    batch: Tensor


@runtime_checkable
class Stateful(Protocol):
    """An objective that depends on what it has seen."""

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""


class Classification:
    """Cross-entropy, weighted by class and focused on what is hard.

    A class c with ``n_c`` of the N rows weighs ``(N / (C n_c)) ** class_balance``, and a row whose
    label is predicted with probability p counts ``(1 - p) ** focal_gamma`` times; the sum is
    divided by the weights of the batch, as PyTorch's own weighted mean is. The factor of the focal
    loss (Lin et al., ICCV 2017) is differentiated too, as there.

    Args:
        labels: Of the training split, int64, ``[N]``, on the device of the losses.
        num_classes: C.
        recipe: The numbers.
        processes: How many share a batch, >= 1.

    Attributes:
        labels: As given.
    """

    def __init__(
        self, labels: Tensor, num_classes: int, recipe: ClassificationRecipe, processes: int = 1
    ) -> None:
        self.labels = labels
        self._weight = class_weights(labels, num_classes, recipe.class_balance)
        self._gamma = recipe.focal_gamma
        self._processes = processes

    def __call__(self, output: EncoderOutput | FusionOutput, share: Share) -> Tensor:
        """The loss of a batch, ``()``; see the module for what it is with several processes."""
        labels = self.labels[share.rows]
        if self._gamma:
            summed = focal_sum(output.logits, labels, self._weight, self._gamma)
        else:
            summed = cross_entropy(output.logits, labels, self._weight, reduction="sum")
        if self._weight is None:
            return summed / (len(share.batch) / self._processes)
        return summed / (self._weight[self.labels[share.batch]].sum() / self._processes)


class Distillation:
    """Equation 6: the labels, and what the frozen teacher said of the same rows.

    Args:
        classification: The first term.
        recipe: The numbers of the other two.
        logits: The teacher's for every row of the training split, ``[N, C]``.
        features: The teacher's, ``[N, d]``.
        everywhere: Whether a batch is shared by several processes, whose rows are gathered then.
    """

    def __init__(
        self,
        classification: Classification,
        recipe: StudentRecipe,
        logits: Tensor,
        features: Tensor,
        *,
        everywhere: bool = False,
    ) -> None:
        self._classification = classification
        self._recipe = recipe
        self._logits = logits
        self._features = features
        group: Literal["world"] | None = "world" if everywhere else None
        self._criterion = StudentLoss(
            recipe.response_weight,
            recipe.feature_weight,
            response=DISTLoss(
                recipe.temperature,
                recipe.inter_weight,
                recipe.intra_weight,
                group=group,
                memory_size=recipe.memory_size,
            ),
            feature=BatchSimilarityLoss(
                recipe.feature_temperature, group=group, memory_size=recipe.memory_size
            ),
        ).to(logits.device)

    def __call__(self, output: EncoderOutput, share: Share) -> Tensor:
        """The loss of a batch, ``()``; see the module for what it is with several processes."""
        terms = self._criterion(
            output.logits,
            self._logits[share.rows],
            self._classification.labels[share.rows],
            student_features=output.features,
            teacher_features=self._features[share.rows],
        )
        # Of the classification it knows the own rows alone, and no focus.
        total: Tensor = (
            self._classification(output, share)
            + self._recipe.response_weight * terms.response
            + self._recipe.feature_weight * terms.feature
        )
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered of earlier batches; the same in every process."""
        return dict(self._criterion.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what was remembered."""
        self._criterion.load_state_dict(state)


def class_weights(labels: Tensor, num_classes: int, power: float) -> Tensor | None:
    """Weigh rare classes more: ``(N / (C n_c)) ** power``.

    Args:
        labels: int64, ``[N]``.
        num_classes: C.
        power: 0 for none; 1 gives every class the same say in the end, as scikit-learn's
            ``"balanced"`` does; 0.5 is half-way.

    Returns:
        float32, ``[C]``, 1 for a class that never occurs; ``None`` for a power of 0.
    """
    if not power:
        return None
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = (len(labels) / (num_classes * counts)) ** power
    return weights.where(counts > 0, 1.0).float()


def focal_sum(logits: Tensor, labels: Tensor, weight: Tensor | None, gamma: float) -> Tensor:
    """Sum the focal losses of rows.

    Args:
        logits: ``[b, C]``, float32.
        labels: int64, ``[b]``.
        weight: ``[C]``, or ``None`` for ones.
        gamma: > 0.

    Returns:
        ``()``; its gradient is finite for any finite logits.
    """
    likelihood = log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    # 1 - p without cancellation; at exactly 0 a power below 1 would have an infinite slope.
    doubt = (-torch.expm1(likelihood)).clamp(min=torch.finfo(logits.dtype).tiny)
    losses = -(doubt**gamma) * likelihood
    return (losses if weight is None else losses * weight[labels]).sum()
