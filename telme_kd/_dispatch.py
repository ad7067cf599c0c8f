"""Which implementation computes an operator.

The choice looks at the operator, the device and dtype of its tensors, their shapes and whether they
need gradients; never at their values. A backend changes the speed, never the definition.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from telme_kd import _checks
from telme_kd._typing import Backend
from telme_kd.errors import BackendError
from telme_kd.kernels import batch_similarity, dist, fusion, linear_dist
from telme_kd.kernels.distributed import batch_similarity as spread_batch_similarity
from telme_kd.kernels.distributed import dist as spread_dist
from telme_kd.reference.batch_similarity import batch_similarity_loss
from telme_kd.reference.dist import dist_loss
from telme_kd.reference.fusion import gate_and_shift
from telme_kd.reference.linear_dist import linear_dist_loss

# Asked once; importing Triton itself waits until a call needs it.
_TRITON_INSTALLED = find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Decision = TypeVar("Decision")

_PLAIN = (Tensor, torch.nn.Parameter)

_decisions: dict[Hashable, Any] = {}
_MOST_DECISIONS = 1024

# torch 2.6 cannot tell.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)

Operator: TypeAlias = Literal[
    "dist_loss",
    "dist_loss over a group",
    "batch_similarity_loss",
    "batch_similarity_loss over a group",
    "linear_dist_loss",
    "gate_and_shift",
]


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one operator.

    Attributes:
        backend: its name.
        function: tensors and keyword options in, a tensor out.
        reasons_against: why it cannot serve these tensors; none if it can.
        widens: whether it takes half precision and mixed dtypes as they are. If not, its tensors
            must come in the dtype that it computes in.
    """

    backend: Backend
    function: Callable[..., Tensor]
    reasons_against: Callable[[Sequence[Tensor]], list[str]]
    widens: bool = False


def _serves_all(tensors: Sequence[Tensor]) -> list[str]:
    return []


def _against_cpu(tensors: Sequence[Tensor]) -> list[str]:
    reasons = _against_kernels(tensors)
    others = sorted({tensor.device.type for tensor in tensors} - {"cpu"})
    if others:
        reasons.append(f"it computes on the CPU, got tensors on {', '.join(others)}")
    return reasons


def _against_triton(tensors: Sequence[Tensor]) -> list[str]:
    reasons = _against_kernels(tensors)
    if not _TRITON_INSTALLED:
        reasons.append("Triton is not installed; pip install 'telme-kd[triton]'")
    device = "cpu" if _TRITON_INTERPRETED else "cuda"
    others = sorted({tensor.device.type for tensor in tensors} - {device})
    if others:
        where = "in Triton's interpreter, on the CPU" if _TRITON_INTERPRETED else "on CUDA devices"
        reasons.append(f"it computes {where}, got tensors on {', '.join(others)}")
    if any(tensor.dtype is torch.float64 for tensor in tensors):
        reasons.append("it computes in float32, got float64")
    return reasons


def _against_kernels(tensors: Sequence[Tensor]) -> list[str]:
    """What no hand-written pass knows: other kinds of tensors and other ways to differentiate."""
    reasons = []
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        kinds = sorted({type(tensor).__name__ for tensor in tensors} - {"Tensor", "Parameter"})
        reasons.append(f"it takes plain tensors, got {', '.join(kinds)}")
    if torch.compiler.is_compiling():
        return reasons
    if torch._C._are_functorch_transforms_active():
        reasons.append("it does not run inside torch.func's transforms")
    elif any(_is_dual(tensor) for tensor in tensors):
        reasons.append("it has no forward-mode derivative")
    return reasons


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _against_cpu_fusion(tensors: Sequence[Tensor]) -> list[str]:
    return _against_cpu(tensors) + _against_tracing()


def _against_triton_fusion(tensors: Sequence[Tensor]) -> list[str]:
    reasons = _against_triton(tensors) + _against_tracing()
    if reasons:
        return reasons
    from telme_kd.kernels.triton.fusion import reasons_against  # Triton may be absent elsewhere

    return reasons_against(tensors[0].shape[-1])


def _against_tracing() -> list[str]:
    """A traced or exported head must run where this library is not installed."""
    if torch._C._get_tracing_state() is not None or _is_exporting():
        return ["it is no part of a traced or exported program"]
    return []


# In order of preference: "auto" takes the first that has no reason against it. Only "triton" may be
# interpreted instead of compiled, and then nobody wants it for its speed.
_IMPLEMENTATIONS: dict[Operator, tuple[Implementation, ...]] = {
    "dist_loss": (
        Implementation("cpu", partial(dist.dist_loss, backend="cpu"), _against_cpu, widens=True),
        Implementation(
            "triton", partial(dist.dist_loss, backend="triton"), _against_triton, widens=True
        ),
        Implementation("reference", dist_loss, _serves_all),
    ),
    "dist_loss over a group": (
        Implementation(
            "cpu", partial(spread_dist.dist_loss, backend="cpu"), _against_cpu, widens=True
        ),
        Implementation(
            "triton", partial(spread_dist.dist_loss, backend="triton"), _against_triton, widens=True
        ),
        Implementation(
            "reference",
            partial(spread_dist.dist_loss, backend="reference"),
            _serves_all,
            widens=True,
        ),
    ),
    "batch_similarity_loss": (
        Implementation(
            "cpu",
            partial(batch_similarity.batch_similarity_loss, backend="cpu"),
            _against_cpu,
            widens=True,
        ),
        Implementation(
            "triton",
            partial(batch_similarity.batch_similarity_loss, backend="triton"),
            _against_triton,
            widens=True,
        ),
        Implementation("reference", batch_similarity_loss, _serves_all),
    ),
    # Matrix products of PyTorch's and what lies between them, on any device.
    "batch_similarity_loss over a group": (
        Implementation(
            "cpu", spread_batch_similarity.batch_similarity_loss, _against_cpu, widens=True
        ),
        Implementation(
            "reference", spread_batch_similarity.batch_similarity_loss, _serves_all, widens=True
        ),
    ),
    "linear_dist_loss": (
        Implementation(
            "cpu", partial(linear_dist.linear_dist_loss, backend="cpu"), _against_cpu, widens=True
        ),
        Implementation(
            "triton",
            partial(linear_dist.linear_dist_loss, backend="triton"),
            _against_triton,
            widens=True,
        ),
        Implementation("reference", linear_dist_loss, _serves_all, widens=True),
    ),
    "gate_and_shift": (
        Implementation(
            "cpu",
            partial(fusion.gate_and_shift, backend="cpu"),
            _against_cpu_fusion,
            widens=True,
        ),
        Implementation(
            "triton",
            partial(fusion.gate_and_shift, backend="triton"),
            _against_triton_fusion,
            widens=True,
        ),
        Implementation("reference", gate_and_shift, _serves_all),
    ),
}


def available_backends() -> tuple[str, ...]:
    """Return the names that ``backend=`` accepts on this machine, beside ``"auto"``.

    Example:
        >>> import telme_kd
        >>> "reference" in telme_kd.available_backends()
        True
    """
    names = dict.fromkeys(row.backend for rows in _IMPLEMENTATIONS.values() for row in rows)
    if not (_TRITON_INSTALLED and (_TRITON_INTERPRETED or torch.cuda.is_available())):
        names.pop("triton", None)
    return tuple(names)


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


def decided(
    decide: Callable[..., Decision],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    options: tuple[object, ...],
) -> Decision:
    """Return ``decide(student, teacher, mask, *options)``, as decided before if it was.

    Checks and choice look at types, shapes, dtypes and devices only. Asked anew they take half as
    long as the loss of a small batch, so that of plain tensors, called eagerly, the answer is kept.
    """
    if not (
        type(student) in _PLAIN
        and type(teacher) in _PLAIN
        and (mask is None or type(mask) is Tensor)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    ):
        return decide(student, teacher, mask, *options)
    key = (
        decide,
        student.shape,
        student.dtype,
        student.device,
        teacher.shape,
        teacher.dtype,
        teacher.device,
        None if mask is None else (mask.shape, mask.dtype, mask.device),
        options,
        *map(type, options),  # True equals 1.0, and is no temperature
    )
    try:
        decision: Decision | None = _decisions.get(key)
    except TypeError:  # an option that cannot be hashed is a mistake, which decide explains
        return decide(student, teacher, mask, *options)
    if decision is None:
        decision = decide(student, teacher, mask, *options)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = decision
    return decision
