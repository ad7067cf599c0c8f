"""DIST: a student keeps the teacher's relations between classes and between items.

Instead of matching probabilities, DIST asks that they correlate: along each row, how an item ranks
the classes (inter-class), and along each column, how a class ranks the items (intra-class).
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from telme_kd import _checks
from telme_kd._dispatch import Implementation, Operator, choose, decided
from telme_kd._precision import accumulation_dtype, is_autocast, outside_autocast
from telme_kd._typing import Backend, Group
from telme_kd.distributed import agree, for_averaging, outside_graphs
from telme_kd.memory import RelationMemory


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    class_dim: int = -1,
    mask: Tensor | None = None,
    eps: float | None = None,
    group: Group = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Penalise lost correlation between student and teacher predictions.

    .. math::

        Y_s = \mathrm{softmax}(Z_s / \tau), \qquad Y_t = \mathrm{softmax}(Z_t / \tau)

        L = \frac{\beta \tau^2}{B} \sum_{i=1}^{B} \bigl(1 - \rho(Y_{s,i:}, Y_{t,i:})\bigr)
          + \frac{\gamma \tau^2}{C} \sum_{j=1}^{C} \bigl(1 - \rho(Y_{s,:j}, Y_{t,:j})\bigr)

    with :math:`\rho` the Pearson correlation. Source: :cite:t:`huang2022dist`, Eq. 7-10, and
    :cite:t:`yun2024telme`, Eq. 7-12. It deviates from both in the correlation of vectors that
    hardly vary, where their formula divides rounding noise by a constant; see ``eps`` and the
    theory page.

    Args:
        student_logits: :math:`Z_s` (B, C) or, with any number of batch axes, (..., C); floating,
            unnormalised; -inf leaves a class out. Receives the gradient.
        teacher_logits: :math:`Z_t`, of the same shape. Receives a gradient only if it requires one.
        temperature: :math:`\tau`, dimensionless, > 0.
        inter_weight: :math:`\beta` >= 0 of the inter-class term (rows); 0 skips its work.
        intra_weight: :math:`\gamma` >= 0 of the intra-class term (columns); 0 skips its work.
        class_dim: the axis of the classes; all others are the batch, as in (B, C, H, W) with
            ``class_dim=1``.
        mask: bool over the batch axes; False leaves an item out of every count and statistic, as
            if it were absent, whatever it holds. If every item is masked the loss is 0.
        eps: None for the scale-free correlation: exact wherever a vector varies by more than 0.1 %
            of its norm, 0 where it is constant, gradient bounded for any input. A number for the
            released formula :math:`\langle a, b\rangle / (\|a\|\|b\| + \epsilon)` of the centred
            vectors; theirs is 1e-8. With 0, constant vectors give NaN.
        group: None for the local batch; a process group or ``"world"`` for the whole batch of its
            processes, with the gradient that DistributedDataParallel's mean expects; a process may
            then have no items. See :mod:`telme_kd.distributed`.
        backend: ``"auto"``, or a name out of :func:`telme_kd.available_backends`.

    Returns:
        Scalar (), in float32 or, if an input is float64, float64; within
        [0, :math:`2\tau^2(\beta + \gamma)`] up to rounding.

    Raises:
        ShapeError: shapes differ, fewer than two axes, or no items.
        DTypeError: an input is no floating tensor, or the mask not bool.
        DeviceError: the tensors lie on different devices.
        RangeError: a number or word is out of range.
        BackendError: the named backend cannot serve this call.
        DistributedError: the group is not there, or its processes disagree.

    Note:
        The columns couple the items: the intra-class term of a batch is not the mean of its parts.
        A batch of one has a constant intra-class term, :math:`\gamma\tau^2`; with two items, or two
        classes, the correlations are +1, -1 or 0. Each warns once
        (:class:`~telme_kd.errors.DegenerateBatchWarning`). NaN in is NaN out. Half precision and
        autocast regions compute in float32.

    Example:
        >>> import torch
        >>> from telme_kd.functional import dist_loss
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0], [1.0, 4.0, 0.0]])
        >>> dist_loss(teacher, teacher).abs() < 1e-6
        tensor(True)
        >>> round(dist_loss(teacher.flip(-1), teacher, temperature=2.0).item(), 3)
        8.678
    """
    if group is not None:
        group = _checks.group_of_several(group)
    options = (temperature, inter_weight, intra_weight, class_dim, eps, group, backend)
    call = _decided(student_logits, teacher_logits, mask, options, group)
    if is_autocast(student_logits.device):
        with outside_autocast(student_logits.device):
            return _loss(student_logits, teacher_logits, mask, group, call)
    return _loss(student_logits, teacher_logits, mask, group, call)


def inter_class_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int = -1,
    mask: Tensor | None = None,
    eps: float | None = None,
    group: Group = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Penalise lost correlation along each item's classes: the first term of DIST (Eq. 10).

    .. math:: L_\mathrm{inter} = \frac{\tau^2}{B} \sum_i \bigl(1 - \rho(Y_{s,i:}, Y_{t,i:})\bigr)

    It is :func:`dist_loss` with ``intra_weight=0``; arguments, errors and notes are the same. Items
    are independent of each other here.

    Returns:
        Scalar (), in float32 or float64, within [0, :math:`2\tau^2`] up to rounding.
    """
    return dist_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        intra_weight=0.0,
        class_dim=class_dim,
        mask=mask,
        eps=eps,
        group=group,
        backend=backend,
    )


def intra_class_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int = -1,
    mask: Tensor | None = None,
    eps: float | None = None,
    group: Group = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Penalise lost correlation along each class's items: the second term of DIST (Eq. 11).

    .. math:: L_\mathrm{intra} = \frac{\tau^2}{C} \sum_j \bigl(1 - \rho(Y_{s,:j}, Y_{t,:j})\bigr)

    It is :func:`dist_loss` with ``inter_weight=0``; arguments, errors and notes are the same.

    Returns:
        Scalar (), in float32 or float64, within [0, :math:`2\tau^2`] up to rounding.
    """
    return dist_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        inter_weight=0.0,
        class_dim=class_dim,
        mask=mask,
        eps=eps,
        group=group,
        backend=backend,
    )


class DISTLoss(nn.Module):
    """:func:`dist_loss` with its options fixed at construction, where they are checked.

    Args:
        temperature: τ > 0.
        inter_weight: β >= 0, of the inter-class term.
        intra_weight: γ >= 0, of the intra-class term.
        class_dim: the axis of the classes.
        eps: None for the scale-free correlation, a number for the released formula.
        group: None for the local batch, a process group or ``"world"``.
        memory_size: how many items of earlier steps the intra-class term takes into its columns in
            training mode, as they were then. The attribute ``memory`` keeps them, a
            :class:`~telme_kd.memory.RelationMemory`, or None with the size 0.
        backend: ``"auto"`` or a backend's name.

    Raises:
        RangeError: a number or word is out of range.
        DTypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from telme_kd import DISTLoss
        >>> criterion = DISTLoss(temperature=4.0)
        >>> student, teacher = torch.randn(2, 8, 7, generator=torch.manual_seed(0))
        >>> criterion(student, teacher).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        *,
        class_dim: int = -1,
        eps: float | None = None,
        group: Group = None,
        memory_size: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.group_word(group)
        _checks.backend_word(backend)
        memory_size = _checks.memory_size(memory_size)
        self.temperature = _checks.positive_temperature(temperature)
        self.inter_weight = _checks.non_negative("inter_weight", inter_weight)
        self.intra_weight = _checks.non_negative("intra_weight", intra_weight)
        self.eps = _checks.optional_eps(eps)
        self.class_dim = _checks.integer("class_dim", class_dim)
        self.group = group
        self.backend = backend
        self.memory = RelationMemory(memory_size) if memory_size else None

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch; shapes and errors as :func:`dist_loss`.

        In training mode a memory extends it; a loss in evaluation mode is that of its batch.
        """
        if self.memory is None or not self.training or not self.intra_weight:
            return self._loss(
                student_logits,
                teacher_logits,
                mask,
                class_dim=self.class_dim,
                inter_weight=self.inter_weight,
                intra_weight=self.intra_weight,
            )
        group = None if self.group is None else _checks.group_of_several(self.group)
        weights = self.inter_weight, self.intra_weight
        options = (self.temperature, *weights, self.class_dim, self.eps, group, self.backend)
        call = _decided(student_logits, teacher_logits, mask, options, group)
        student = class_matrix(student_logits, call.class_axis)
        teacher = class_matrix(teacher_logits, call.class_axis)
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
        """Return the loss of rows (B, C) whose columns the memory makes longer; remember them."""
        usable = _has_softmax(student) & _has_softmax(teacher)
        batch = memory.extend(student, teacher, mask, usable=usable, group=group)
        inter, intra = self.inter_weight, self.intra_weight
        if batch.is_first:
            loss = self._loss(student, teacher, mask, inter_weight=inter, intra_weight=intra)
        else:
            extended = batch.student, batch.teacher, batch.mask
            loss = self._loss(*extended, inter_weight=0.0, intra_weight=intra)
            loss = batch.compensated(loss)
            if inter:  # what is remembered has no gradient there, and would only make it smaller
                loss = loss + self._loss(
                    student, teacher, mask, inter_weight=inter, intra_weight=0.0
                )
        memory.remember(batch)
        return loss

    def _loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None,
        *,
        inter_weight: float,
        intra_weight: float,
        class_dim: int = -1,
    ) -> Tensor:
        return dist_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            class_dim=class_dim,
            mask=mask,
            eps=self.eps,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return (
            f"temperature={self.temperature}, inter_weight={self.inter_weight}, "
            f"intra_weight={self.intra_weight}, class_dim={self.class_dim}, eps={self.eps}, "
            f"backend={self.backend!r}"
        )


class _Call(NamedTuple):
    """What was passed, checked, and who computes it."""

    class_axis: int
    is_matrix: bool
    options: dict[str, float | None]
    intra_weight: float
    implementation: Implementation


def _decided(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    group: Group,
) -> _Call:
    if group is None:
        return decided(_decide, student_logits, teacher_logits, mask, options)
    return _decide(student_logits, teacher_logits, mask, *options)  # a group is not kept alive


def _decide(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    class_dim: int,
    eps: float | None,
    group: Group,
    backend: Backend,
) -> _Call:
    class_axis = _checks.logits_pair(
        student_logits,
        teacher_logits,
        class_dim=class_dim,
        mask=mask,
        may_be_empty=group is not None,
    )
    intra_weight = _checks.non_negative("intra_weight", intra_weight)
    options = {
        "temperature": _checks.positive_temperature(temperature),
        "inter_weight": _checks.non_negative("inter_weight", inter_weight),
        "intra_weight": intra_weight,
        "eps": _checks.optional_eps(eps),
    }
    is_matrix = student_logits.ndim == 2 and class_axis in (-1, 1)
    operator: Operator = "dist_loss" if group is None else "dist_loss over a group"
    implementation = choose(operator, backend, (student_logits, teacher_logits))
    return _Call(class_axis, is_matrix, options, intra_weight, implementation)


def _loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    group: Group,
    call: _Call,
) -> Tensor:
    """Return the loss of logits (..., C, ...), outside autocast."""
    if not call.is_matrix:  # a view costs a step of backward
        student = class_matrix(student, call.class_axis)
        teacher = class_matrix(teacher, call.class_axis)
        mask = None if mask is None else mask.reshape(-1)
    if not call.implementation.widens:
        dtype = accumulation_dtype(student, teacher)
        student, teacher = student.to(dtype), teacher.to(dtype)
    if group is not None:
        return outside_graphs(_over_group)(student, teacher, mask, group, call)
    _checks.relations_exist(*student.shape, intra_weight=call.intra_weight)
    return call.implementation.function(student, teacher, mask=mask, **call.options)


def _over_group(
    student: Tensor, teacher: Tensor, mask: Tensor | None, group: Group, call: _Call
) -> Tensor:
    """Return the loss of the rows (b, C) of all processes."""
    settings = ("dist_loss", call.options, call.implementation.backend)
    agreement = agree(student, teacher, mask, group, settings)
    rows, classes = sum(agreement.rows), student.shape[1]
    _checks.relations_exist(rows, classes, intra_weight=call.intra_weight)
    loss = call.implementation.function(
        student, teacher, mask=mask, items=agreement.items, **call.options
    )
    return for_averaging(loss, group)


def _has_softmax(logits: Tensor) -> Tensor:
    """Whether rows (B, C) have probabilities: no NaN, no infinity, not -inf alone."""
    return logits.detach().amax(dim=-1).isfinite()


def class_matrix(logits: Tensor, class_axis: int) -> Tensor:
    """Return logits (..., C, ...) as a matrix (B, C) over all their batch axes."""
    if class_axis not in (-1, logits.ndim - 1):
        logits = logits.movedim(class_axis, -1)
    return logits.flatten(0, -2)
