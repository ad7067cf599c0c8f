"""Which implementation computes an operator, and under which precision rules it runs.

The choice looks at the operator, the device and dtype of its tensors, their shapes and whether they
need gradients; never at their values. A backend changes the speed, never the definition.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from telme_kd import _checks
from telme_kd._typing import Backend
from telme_kd.errors import BackendError
from telme_kd.reference.batch_similarity import batch_similarity_loss
from telme_kd.reference.dist import dist_loss

# Asked once: torch.compile of torch 2.6 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)

Operator: TypeAlias = Literal["dist_loss", "batch_similarity_loss"]


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one operator.

    Attributes:
        backend: its name.
        function: tensors and keyword options in, a tensor out.
        reasons_against: why it cannot serve these tensors; none if it can.
    """

    backend: Backend
    function: Callable[..., Tensor]
    reasons_against: Callable[[Sequence[Tensor]], list[str]]


def _serves_all(tensors: Sequence[Tensor]) -> list[str]:
    return []


# In order of preference: "auto" takes the first that has no reason against it.
_IMPLEMENTATIONS: dict[Operator, tuple[Implementation, ...]] = {
    "dist_loss": (Implementation("reference", dist_loss, _serves_all),),
    "batch_similarity_loss": (Implementation("reference", batch_similarity_loss, _serves_all),),
}


def available_backends() -> tuple[str, ...]:
    """Return the names that ``backend=`` accepts here, beside ``"auto"``.

    Example:
        >>> import telme_kd
        >>> "reference" in telme_kd.available_backends()
        True
    """
    names = (row.backend for rows in _IMPLEMENTATIONS.values() for row in rows)
    return tuple(dict.fromkeys(names))


def choose(operator: Operator, backend: Backend, tensors: Sequence[Tensor]) -> Implementation:
    """Return the implementation that computes an operator.

    Args:
        operator: the operator's name.
        backend: ``"auto"`` for the first that serves these tensors, or a name, which is never
            replaced by another.
        tensors: the operator's tensor arguments.

    Raises:
        RangeError: no backend is called that.
        BackendError: the named backend cannot serve this call; the message lists every reason.
    """
    _checks.backend_word(backend)
    rows = _IMPLEMENTATIONS[operator]
    if backend == "auto":
        return next(row for row in rows if not row.reasons_against(tensors))
    for row in rows:
        if row.backend == backend:
            reasons = row.reasons_against(tensors)
            if not reasons:
                return row
            break
    else:
        reasons = [f"this version has no {backend!r} implementation of {operator}"]
    raise BackendError(
        f"backend: {backend!r} cannot compute {operator}: {'; '.join(reasons)}; "
        f"use backend='auto' or one of {available_backends()}"
    )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that losses compute in and return: the widest given, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves the dtypes on a device alone."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
