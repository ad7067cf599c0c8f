"""DIST of tensor-parallel models: every process has the logits of some of the classes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from telme_kd import _checks
from telme_kd._precision import outside_autocast
from telme_kd._typing import Group
from telme_kd.dist import class_matrix
from telme_kd.distributed import agree, agree_on_classes, for_averaging, outside_graphs
from telme_kd.kernels.distributed import dist
from telme_kd.kernels.distributed.spread import Spread


def sharded_dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    class_group: Group,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    class_dim: int = -1,
    mask: Tensor | None = None,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""Penalise lost correlation between predictions whose classes lie on several processes.

    It is :func:`telme_kd.dist.dist_loss` of the whole logits, in value and in the gradient of the
    own ones; no process ever has a row of all classes. What a vocabulary-parallel layer gives goes
    in as it is, both sides split alike.

    Args:
        student_logits: :math:`Z_s` (B, c) or, with any number of batch axes, (..., c): all items,
            the own classes, any number of them; floating, unnormalised. Receives the gradient.
        teacher_logits: :math:`Z_t`, of the same shape. Receives a gradient only if it requires one.
        class_group: the processes that share the classes, as a process group or ``"world"``; None
            if this one has them all. They must have the same items in the same order.
        temperature: :math:`\tau`, dimensionless, > 0.
        inter_weight: :math:`\beta` >= 0 of the inter-class term (rows); 0 skips its work.
        intra_weight: :math:`\gamma` >= 0 of the intra-class term (columns); 0 skips its work.
        class_dim: the axis of the classes; all others are the batch.
        mask: bool over the batch axes, the same in all processes of the class group; False leaves
            an item out. If every item is masked the loss is 0.
        eps: None for the scale-free correlation, a number for the released formula; as in
            :func:`telme_kd.dist.dist_loss`.
        group: the processes that share the items, each with the same classes; None if this one has
            them all. As in :func:`telme_kd.dist.dist_loss`, the gradient is the one that
            DistributedDataParallel's mean over this group expects, and a process may have no items.

    Returns:
        Scalar (), in float32 or, if an input is float64, float64; the same in every process.

    Raises:
        ShapeError: shapes differ, fewer than two axes, no own classes, or no items.
        DTypeError: an input is no floating tensor, or the mask not bool.
        DeviceError: the tensors lie on different devices.
        RangeError: a number or word is out of range.
        DistributedError: a group is not there, or its processes disagree.

    Note:
        The gradient is not multiplied by the number of processes that share the classes: each has
        that of its own logits, whole. All communication happens in the forward pass. NaN in one
        process is NaN in all.

    Example:
        >>> import torch
        >>> from telme_kd.functional import dist_loss, sharded_dist_loss
        >>> student, teacher = torch.randn(2, 8, 7, generator=torch.manual_seed(0))
        >>> whole = dist_loss(student, teacher)
        >>> torch.allclose(sharded_dist_loss(student, teacher, class_group=None), whole)
        True
    """
    class_group = _checks.group_of_several(class_group, "class_group")
    group = _checks.group_of_several(group)
    class_axis = _checks.logits_pair(
        student_logits,
        teacher_logits,
        class_dim=class_dim,
        mask=mask,
        may_be_empty=group is not None,
    )
    temperature = _checks.positive_temperature(temperature)
    inter_weight = _checks.non_negative("inter_weight", inter_weight)
    intra_weight = _checks.non_negative("intra_weight", intra_weight)
    eps = _checks.optional_eps(eps)
    student = class_matrix(student_logits, class_axis)
    teacher = class_matrix(teacher_logits, class_axis)
    kept = None if mask is None else mask.reshape(-1)
    compute = partial(
        dist.sharded_dist_loss,
        temperature=temperature,
        inter_weight=inter_weight,
        intra_weight=intra_weight,
        mask=kept,
        eps=eps,
    )
    settings = ("sharded_dist_loss", temperature, inter_weight, intra_weight, eps)
    return outside_graphs(_over_groups)(
        compute, student, teacher, kept, class_group, group, settings
    )


def _over_groups(
    compute: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    class_group: Group,
    group: Group,
    settings: object,
) -> Tensor:
    """Return the loss of the rows and classes (b, c) of all processes."""
    classes = Spread((student.shape[1],))
    if class_group is not None:
        # A gradient takes a collective of its own.
        wanted = torch.is_grad_enabled() and (student.requires_grad, teacher.requires_grad)
        classes = agree_on_classes(student, teacher, mask, class_group, (settings, wanted))
    rows: tuple[int, ...] = (student.shape[0],)
    items = Spread(rows if mask is None else (int(mask.sum()),))
    if group is not None:
        items, rows, *_ = agree(student, teacher, mask, group, settings)
    _checks.relations_exist(sum(rows), classes.total)
    with outside_autocast(student.device):
        loss = compute(student, teacher, items=items, classes=classes)
    return for_averaging(loss, group)
