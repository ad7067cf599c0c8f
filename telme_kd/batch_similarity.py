"""Batch similarity: a student's features stand to the teacher's as the teacher's to each other."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from telme_kd import _checks
from telme_kd._dispatch import Implementation, Operator, choose, decided
from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd._typing import Backend, Group
from telme_kd.distributed import agree, for_averaging, outside_graphs
from telme_kd.memory import RelationMemory


def batch_similarity_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    group: Group = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Penalise a student whose features relate differently to the teacher's batch.

    .. math::

        P_{i:} = \mathrm{softmax}_j(\hat t_i \cdot \hat t_j / \tau), \qquad
        Q_{i:} = \mathrm{softmax}_j(\hat t_i \cdot \hat s_j / \tau), \qquad
        L = \frac{1}{B} \sum_{i=1}^{B} \mathrm{KL}(P_{i:} \,\|\, Q_{i:})

    with :math:`\hat s, \hat t` the features over their Euclidean norm. Source:
    :cite:t:`yun2024telme`, Eq. 13-15. Note the asymmetry: :math:`Q` compares students with
    teachers, not with each other, so the loss also draws :math:`\hat s_j` towards
    :math:`\hat t_j`. The one deviation: a zero feature row has similarity 0 to all and gradient 0,
    where the released normalisation divides by 1e-12.

    Args:
        student_features: (B, d) or, with any number of batch axes, (..., d); floating, any
            magnitude. Receives the gradient.
        teacher_features: of the same shape. Receives a gradient only if it requires one.
        temperature: :math:`\tau`, dimensionless, > 0.
        mask: bool over the batch axes; False leaves an item out of rows and columns, as if it were
            absent, whatever it holds. If every item is masked the loss is 0.
        group: None for the local batch; a process group or ``"world"`` for the whole batch of its
            processes, with the gradient that DistributedDataParallel's mean expects; a process may
            then have no items. See :mod:`telme_kd.distributed`.
        backend: ``"auto"``, or a name out of :func:`telme_kd.available_backends`.

    Returns:
        Scalar (), in nats, in float32 or, if an input is float64, float64; within
        [0, min(4/τ, 2/τ²)] up to rounding: tiny negative values occur and are not hidden.

    Raises:
        ShapeError: shapes differ, fewer than two axes, or no items.
        DTypeError: an input is no floating tensor, or the mask not bool.
        DeviceError: the tensors lie on different devices.
        RangeError: a number or word is out of range.
        BackendError: the named backend cannot serve this call.
        DistributedError: the group is not there, or its processes disagree.

    Note:
        The rows couple the items: the loss of a batch is not the mean of its parts, and for a batch
        of one it is 0 whatever the student does (which warns once). NaN in is NaN out. Half
        precision and autocast regions compute in float32.

    Example:
        >>> import torch
        >>> from telme_kd.functional import batch_similarity_loss
        >>> teacher = torch.eye(3)
        >>> batch_similarity_loss(5.0 * teacher, teacher).abs() < 1e-6
        tensor(True)
        >>> round(batch_similarity_loss(-teacher, teacher).item(), 4)
        0.4628
    """
    if group is not None:
        group = _checks.group_of_several(group)
    call = _decided(student_features, teacher_features, mask, (temperature, group, backend), group)
    with outside_autocast(student_features.device):
        return _loss(student_features, teacher_features, mask, group, call)


class BatchSimilarityLoss(nn.Module):
    """:func:`batch_similarity_loss` with its options fixed at construction, where they are checked.

    Args:
        temperature: τ > 0.
        group: None for the local batch, a process group or ``"world"``.
        memory_size: how many items of earlier steps stand beside the batch in training mode, in
            rows and columns, as they were then. The attribute ``memory`` keeps them, a
            :class:`~telme_kd.memory.RelationMemory`, or None with the size 0.
        backend: ``"auto"`` or a backend's name.

    Raises:
        RangeError: a number or word is out of range.
        DTypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from telme_kd import BatchSimilarityLoss
        >>> criterion = BatchSimilarityLoss(temperature=0.5)
        >>> student, teacher = torch.randn(2, 8, 32, generator=torch.manual_seed(0))
        >>> criterion(student, teacher) > 0
        tensor(True)
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        group: Group = None,
        memory_size: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.group_word(group)
        _checks.backend_word(backend)
        memory_size = _checks.memory_size(memory_size)
        self.temperature = _checks.positive_temperature(temperature)
        self.group = group
        self.backend = backend
        self.memory = RelationMemory(memory_size) if memory_size else None

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch; shapes and errors as :func:`batch_similarity_loss`.

        In training mode a memory extends it; a loss in evaluation mode is that of its batch.
        """
        if self.memory is None or not self.training:
            return self._loss(student_features, teacher_features, mask)
        group = None if self.group is None else _checks.group_of_several(self.group)
        options = self.temperature, group, self.backend
        _decided(student_features, teacher_features, mask, options, group)
        student, teacher = student_features.flatten(0, -2), teacher_features.flatten(0, -2)
        mask = None if mask is None else mask.reshape(-1)
        self.memory.check(student.shape[1], student.device)
        with_memory = self._with_memory if group is None else outside_graphs(self._with_memory)
        return with_memory(self.memory, student, teacher, mask, group)

    def _with_memory(
        self,
        memory: RelationMemory,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        group: Group,
    ) -> Tensor:
        """Return the loss of rows (B, d) and those that the memory holds; remember them."""
        usable = _is_finite(student) & _is_finite(teacher)
        batch = memory.extend(student, teacher, mask, usable=usable, group=group)
        if batch.is_first:
            loss = self._loss(student, teacher, mask)
        else:
            loss = batch.compensated(self._loss(batch.student, batch.teacher, batch.mask))
        memory.remember(batch)
        return loss

    def _loss(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None
    ) -> Tensor:
        return batch_similarity_loss(
            student_features,
            teacher_features,
            temperature=self.temperature,
            mask=mask,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return f"temperature={self.temperature}, backend={self.backend!r}"


def _is_finite(features: Tensor) -> Tensor:
    """Whether rows (B, d) are without NaN and infinity."""
    return features.detach().abs().amax(dim=-1).isfinite()


class _Call(NamedTuple):
    """What was passed, checked, and who computes it."""

    temperature: float
    implementation: Implementation


def _decided(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    group: Group,
) -> _Call:
    if group is None:
        return decided(_decide, student_features, teacher_features, mask, options)
    return _decide(student_features, teacher_features, mask, *options)  # a group is not kept alive


def _decide(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor | None,
    temperature: float,
    group: Group,
    backend: Backend,
) -> _Call:
    _checks.features_pair(
        student_features, teacher_features, mask=mask, may_be_empty=group is not None
    )
    operator: Operator = (
        "batch_similarity_loss" if group is None else "batch_similarity_loss over a group"
    )
    return _Call(
        _checks.positive_temperature(temperature),
        choose(operator, backend, (student_features, teacher_features)),
    )


def _loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group, call: _Call
) -> Tensor:
    """Return the loss of features (..., d), outside autocast."""
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    mask = None if mask is None else mask.reshape(-1)
    if not call.implementation.widens:
        dtype = accumulation_dtype(student, teacher)
        student, teacher = student.to(dtype), teacher.to(dtype)
    if group is not None:
        return outside_graphs(_over_group)(student, teacher, mask, group, call)
    _checks.similarities_exist(student.shape[0])
    return call.implementation.function(student, teacher, temperature=call.temperature, mask=mask)


def _over_group(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group, call: _Call
) -> Tensor:
    """Return the loss of the rows (b, d) of all processes."""
    settings = ("batch_similarity_loss", call.temperature)
    agreement = agree(student, teacher, mask, group, settings)
    _checks.similarities_exist(sum(agreement.rows))
    if not agreement.same_teacher_dtype:
        teacher = teacher.to(accumulation_dtype(student, teacher))
    loss = call.implementation.function(
        student,
        teacher,
        temperature=call.temperature,
        mask=mask,
        items=agreement.items,
        teacher_needs_grad=agreement.teacher_needs_grad,
    )
    return for_averaging(loss, group)
