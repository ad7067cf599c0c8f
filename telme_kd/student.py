"""The student's objective: classify, respond like the teacher, relate like the teacher (Eq. 6)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from telme_kd import _checks
from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd._typing import Group
from telme_kd.batch_similarity import BatchSimilarityLoss
from telme_kd.dist import DISTLoss
from telme_kd.distributed import mean_over_processes, outside_graphs


class StudentLossTerms(NamedTuple):
    """The terms of Eq. 6, scalars () in float32 or float64.

    Attributes:
        total: the weighted sum, which has the gradient of a training step.
        classification: the cross-entropy.
        response: the DIST loss before its weight; 0 if the weight is 0.
        feature: the batch-similarity loss before its weight; 0 if the weight is 0.
    """

    total: Tensor
    classification: Tensor
    response: Tensor
    feature: Tensor


class StudentLoss(nn.Module):
    r"""Cross-entropy, response distillation and feature distillation in one objective.

    .. math:: L = L_\mathrm{cls} + \alpha L_\mathrm{response} + \beta L_\mathrm{feature}

    Source: :cite:t:`yun2024telme`, Eq. 6; the response is DIST (:func:`~telme_kd.dist.dist_loss`),
    the feature term the batch similarity
    (:func:`~telme_kd.batch_similarity.batch_similarity_loss`).

    Args:
        response_weight: :math:`\alpha` >= 0; 0 skips the term.
        feature_weight: :math:`\beta` >= 0; 0 skips the term, and no features are needed.
        response: the response term; None for ``DISTLoss()``, over the same group.
        feature: the feature term; None for ``BatchSimilarityLoss()``, over the same group.
        class_weight: (C,) floating, weights of the classes in the cross-entropy, or None.
        label_smoothing: of the cross-entropy, in [0, 1).
        group: None for the local batch; a process group or ``"world"`` for the whole batch of its
            processes, in every term, with the gradient that DistributedDataParallel's mean expects.
            Terms that are given must be over the same group.
        memory_size: how many items of earlier steps both distillation terms take into the relations
            of a batch, which small batches lack; 0 for none. Terms that are given must have the
            same. See :class:`~telme_kd.memory.RelationMemory`.

    Raises:
        RangeError: a number is out of range, or a term is over another group or has another memory.
        DTypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from telme_kd import DISTLoss, StudentLoss
        >>> criterion = StudentLoss(response=DISTLoss(temperature=4.0))
        >>> logits, features = torch.randn(2, 8, 7), torch.randn(2, 8, 32)
        >>> terms = criterion(logits[0], logits[1], torch.arange(8) % 7,
        ...                   student_features=features[0], teacher_features=features[1])
        >>> torch.equal(terms.total, terms.classification + terms.response + terms.feature)
        True
    """

    class_weight: Tensor | None

    def __init__(
        self,
        response_weight: float = 1.0,
        feature_weight: float = 1.0,
        *,
        response: DISTLoss | None = None,
        feature: BatchSimilarityLoss | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        group: Group = None,
        memory_size: int = 0,
    ) -> None:
        super().__init__()
        _checks.group_word(group)
        memory_size = _checks.memory_size(memory_size)
        self.response_weight = _checks.non_negative("response_weight", response_weight)
        self.feature_weight = _checks.non_negative("feature_weight", feature_weight)
        if response is None:
            response = DISTLoss(group=group, memory_size=memory_size)
        if feature is None:
            feature = BatchSimilarityLoss(group=group, memory_size=memory_size)
        self.response = response
        self.feature = feature
        _checks.module("response", self.response, DISTLoss)
        _checks.module("feature", self.feature, BatchSimilarityLoss)
        if group is not None:
            _checks.same_group("response", self.response.group, group)
            _checks.same_group("feature", self.feature.group, group)
        if memory_size:
            for name, term in (("response", response), ("feature", feature)):
                held = 0 if term.memory is None else term.memory.size
                _checks.same_memory_size(name, held, memory_size)
        self.group = group
        if class_weight is not None:
            _checks.class_weight(class_weight)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.label_smoothing = _checks.probability("label_smoothing", label_smoothing)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        student_features: Tensor | None = None,
        teacher_features: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> StudentLossTerms:
        """Return the terms and their weighted sum.

        Args:
            student_logits: (..., C), or with C at the response term's ``class_dim``; gradient: yes.
            teacher_logits: of the same shape.
            labels: int64 class indices over the batch axes; -100 leaves an item out of the
                cross-entropy alone.
            student_features: (..., d), needed unless ``feature_weight=0``; gradient: yes.
            teacher_features: of the same shape, needed unless ``feature_weight=0``.
            mask: bool over the batch axes; False leaves an item out of every term.

        Returns:
            The named terms, scalars in float32 or float64; a skipped term is 0.

        Raises:
            ShapeError: shapes do not fit each other.
            DTypeError: a dtype does not fit, or features are missing.
            DeviceError: the tensors lie on different devices.
            DistributedError: a group is not there, or its processes disagree.
        """
        # The terms would check all this too, but one after another, and nothing is computed before
        # everything is checked.
        class_axis = _checks.logits_pair(
            student_logits,
            teacher_logits,
            class_dim=self.response.class_dim,
            mask=mask,
            may_be_empty=self.response.group is not None,
        )
        logits = student_logits.movedim(class_axis, -1)
        _checks.class_labels(labels, logits.shape[:-1], student_logits)
        if self.class_weight is not None:
            _checks.class_weight_fits(self.class_weight, student_logits, class_axis)
        if self.response_weight:
            _check_memory(self.response, logits.shape[-1], logits.device)
        response = feature = student_logits.new_zeros(
            (), dtype=accumulation_dtype(student_logits, teacher_logits)
        )
        if self.feature_weight:
            student_features = _checks.feature_given("student_features", student_features)
            teacher_features = _checks.feature_given("teacher_features", teacher_features)
            _checks.features_pair(
                student_features,
                teacher_features,
                mask=mask,
                may_be_empty=self.feature.group is not None,
            )
            _check_memory(self.feature, student_features.shape[-1], student_features.device)
            feature = self.feature(student_features, teacher_features, mask)
        if self.response_weight:
            response = self.response(student_logits, teacher_logits, mask)
        classification = self._classification(logits, labels, mask)
        total = classification + self.response_weight * response + self.feature_weight * feature
        return StudentLossTerms(total, classification, response, feature)

    def _classification(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Mean cross-entropy over the items that count; 0, not NaN, if none does."""
        labels = labels.reshape(-1)
        logits = logits.reshape(-1, logits.shape[-1])
        if mask is not None:
            labels = labels.masked_fill(~mask.reshape(-1), -100)
            logits = logits.masked_fill(~mask.reshape(-1, 1), 0.0)
        weight = self.class_weight
        dtype = accumulation_dtype(logits)
        with outside_autocast(logits.device):
            summed = nn.functional.cross_entropy(
                logits.to(dtype),
                labels,
                weight=None if weight is None else weight.to(dtype),
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
        counted = labels != -100
        if weight is None:
            count = counted.sum().to(dtype)
        else:
            count = (weight.to(dtype)[labels.clamp(min=0)] * counted).sum()
        if _checks.group_of_several(self.group) is not None:
            return outside_graphs(mean_over_processes)(summed, count, self.group)
        return summed / count.where(count > 0, 1.0)

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return (
            f"response_weight={self.response_weight}, feature_weight={self.feature_weight}, "
            f"label_smoothing={self.label_smoothing}"
        )


def _check_memory(term: DISTLoss | BatchSimilarityLoss, width: int, device: torch.device) -> None:
    if term.memory is not None and term.training:
        term.memory.check(width, device)
