"""DIST behind two linear layers: a large vocabulary's logits are never whole in memory."""

from torch import Tensor

from telme_kd import _checks
from telme_kd._dispatch import choose
from telme_kd._precision import layer_dtype, outside_autocast
from telme_kd._typing import Backend

_CHUNK_BYTES = 512 * 2**20
"""Half a gigabyte is a thousand rows of 128 thousand classes in half precision: enough that adding
to the weight's gradient, once per chunk, costs little beside the products."""


def linear_dist_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    mask: Tensor | None = None,
    eps: float | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
    backend: Backend = "auto",
) -> Tensor:
    r"""Penalise lost correlation between the predictions of two language-model heads.

    .. math::

        Z_s = H_s W_s^\top + b_s, \qquad Z_t = H_t W_t^\top + b_t, \qquad
        L = L_\mathrm{DIST}(Z_s, Z_t)

    which is :func:`telme_kd.dist.dist_loss` of the logits of two linear layers, in value and
    gradient, with nothing of the size of the logits in memory. They are computed a chunk of rows at
    a time, once for the statistics of rows and columns and, in the backward pass, once more for the
    gradient: 1.5 times the arithmetic of logits that are kept. The backends ``"cpu"`` and
    ``"triton"`` do so; ``"reference"`` is the definition and keeps the logits.

    Args:
        student_hidden: :math:`H_s` (..., d_s), with one or more batch axes; floating. Receives a
            gradient, as do weight and bias; what requires none costs nothing.
        student_weight: :math:`W_s` (V, d_s), as :class:`torch.nn.Linear` and a head of a language
            model have it.
        teacher_hidden: :math:`H_t` (..., d_t), with the batch axes of the student's. The teacher's
            tensors receive gradients only if they require them.
        teacher_weight: :math:`W_t` (V, d_t), for the same V classes.
        student_bias: :math:`b_s` (V,), or None.
        teacher_bias: :math:`b_t` (V,), or None.
        temperature: :math:`\tau`, dimensionless, > 0.
        inter_weight: :math:`\beta` >= 0 of the inter-class term (rows); 0 skips its work.
        intra_weight: :math:`\gamma` >= 0 of the intra-class term (columns); 0 skips its work.
        mask: bool over the batch axes; False leaves an item out, as padding should be, whatever it
            holds. If every item is masked the loss is 0.
        eps: None for the scale-free correlation, a number for the released formula; as in
            :func:`telme_kd.dist.dist_loss`.
        chunk_bytes: what the logits of one chunk, of student and teacher together, may take; at
            least one row. The backward pass takes as much again for their gradients.
        backend: ``"auto"``, or a name out of :func:`telme_kd.available_backends`.

    Returns:
        Scalar (), in float32 or, if an input is float64, float64; within
        [0, :math:`2\tau^2(\beta + \gamma)`] up to rounding.

    Raises:
        ShapeError: shapes do not fit each other, or there are no items.
        DTypeError: an input is no floating tensor, a layer's tensors differ in dtype outside of
            autocast, or the mask is not bool.
        DeviceError: the tensors lie on different devices.
        RangeError: a number or word is out of range.
        BackendError: the named backend cannot serve this call.

    Note:
        Logits have the precision that :class:`torch.nn.Linear` would give them: the dtype of hidden
        states and weight or, in an autocast region, that of autocast. From there on everything is
        computed in float32 at least, and weight gradients of several chunks are added up in it.
        The chunks decide how sums are rounded, never what they are sums of.

    Example:
        >>> import torch
        >>> from telme_kd.functional import dist_loss, linear_dist_loss
        >>> teacher, student = torch.nn.Linear(8, 100), torch.nn.Linear(4, 100)
        >>> h_t, h_s = torch.randn(16, 8), torch.randn(16, 4)
        >>> loss = linear_dist_loss(h_s, student.weight, h_t, teacher.weight,
        ...                         student_bias=student.bias, teacher_bias=teacher.bias)
        >>> torch.allclose(loss, dist_loss(student(h_s), teacher(h_t)), atol=1e-5)
        True
    """
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    _checks.linear_heads(student, teacher, mask)
    temperature = _checks.positive_temperature(temperature)
    inter_weight = _checks.non_negative("inter_weight", inter_weight)
    intra_weight = _checks.non_negative("intra_weight", intra_weight)
    eps = _checks.optional_eps(eps)
    chunk_bytes = _checks.positive_integer("chunk_bytes", chunk_bytes)
    given = [tensor for tensor in (*student, *teacher) if tensor is not None]
    implementation = choose("linear_dist_loss", backend, given)

    rows = student_hidden.shape[:-1].numel()
    _checks.relations_exist(rows, student_weight.shape[0], intra_weight=intra_weight)
    options = {} if implementation.backend == "reference" else {"chunk_bytes": chunk_bytes}
    with outside_autocast(student_hidden.device):
        return implementation.function(
            *_as_layer_takes(*student),
            *_as_layer_takes(*teacher),
            temperature=temperature,
            inter_weight=inter_weight,
            intra_weight=intra_weight,
            mask=None if mask is None else mask.reshape(-1),
            eps=eps,
            **options,
        )


def _as_layer_takes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states as a matrix, weight and bias, in the dtype of the layer's product."""
    dtype = layer_dtype(hidden)
    return (
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
