"""Released checkpoints in: weights that others trained, as modules of this library.

Only mappings of tensors are taken. Read files with ``safetensors.torch.load_file``, or with
``torch.load(path, weights_only=True, map_location="cpu")``; an unrestricted pickle runs code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from telme_kd import _checks
from telme_kd.errors import CheckpointError
from telme_kd.fusion import AttentionShiftingFusion

_RELEASED_EPS = 1e-6

# Released name -> name here. The gate is not among them: its columns change places.
_RENAMED = {
    "multihead_attn.in_proj_weight": "attention.query_key_value.weight",
    "multihead_attn.in_proj_bias": "attention.query_key_value.bias",
    "multihead_attn.out_proj.weight": "attention.output.weight",
    "multihead_attn.out_proj.bias": "attention.output.bias",
    "AV_LayerNorm.weight": "attention_norm.weight",
    "AV_LayerNorm.bias": "attention_norm.bias",
    "W_hav.bias": "shift.gate.bias",
    "W_av.weight": "shift.value.weight",
    "W_av.bias": "shift.value.bias",
    "LayerNorm.weight": "norm.weight",
    "LayerNorm.bias": "norm.bias",
    "W.weight": "classifier.weight",
    "W.bias": "classifier.bias",
}
_GATE = "W_hav.weight"


def load_released_fusion(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    threshold: float,
    student_dims: Sequence[int] | None = None,
    dropout: float = 0.2,
) -> AttentionShiftingFusion:
    """Build the fusion head of a released TelME checkpoint.

    The result attends over the batch, as the released head does (see
    :class:`~telme_kd.fusion.AttentionShiftingFusion`), and divides by the norm plus 1e-6. Call it
    as ``fusion(text, visual, acoustic)``. The order of the last two is that of the checkpoint's
    training: the released training scripts pass audio second and video third, whatever their
    parameters are called.

    Args:
        state_dict: the released head's tensors by name; a ``module.`` prefix is dropped.
        num_heads: the heads it was trained with: 3 for MELD, 4 for IEMOCAP.
        threshold: θ it was trained with: 0.1 for MELD, 0.2 for IEMOCAP.
        student_dims: widths of the two students, whose sum the checkpoint fixes; None for equal.
        dropout: for further training; the released code uses 0.2.

    Returns:
        The head in evaluation mode, on the CPU, in the checkpoint's dtype.

    Raises:
        CheckpointError: entries are missing, unexpected, misshapen, of mixed dtypes, or not finite;
            the message lists every one.
        RangeError: a number is out of range, or ``num_heads`` does not divide the width.
        DTypeError: an argument is of another type.

    Example:
        >>> import torch
        >>> from telme_kd.interop import load_released_fusion
        >>> weights = {
        ...     "multihead_attn.in_proj_weight": torch.zeros(12, 4),
        ...     "multihead_attn.in_proj_bias": torch.zeros(12),
        ...     "multihead_attn.out_proj.weight": torch.zeros(4, 4),
        ...     "multihead_attn.out_proj.bias": torch.zeros(4),
        ...     "AV_LayerNorm.weight": torch.ones(4), "AV_LayerNorm.bias": torch.zeros(4),
        ...     "W_hav.weight": torch.zeros(3, 7), "W_hav.bias": torch.zeros(3),
        ...     "W_av.weight": torch.zeros(3, 4), "W_av.bias": torch.zeros(3),
        ...     "LayerNorm.weight": torch.ones(3), "LayerNorm.bias": torch.zeros(3),
        ...     "W.weight": torch.zeros(2, 3), "W.bias": torch.zeros(2),
        ... }
        >>> fusion = load_released_fusion(weights, num_heads=2, threshold=0.1)
        >>> fusion(torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    heads = _checks.positive_integer("num_heads", num_heads)
    entries = _without_prefix(state_dict)
    anchor_dim, nonverbal_dim, num_classes = _sizes(entries)
    _check_entries(entries, anchor_dim, nonverbal_dim, num_classes)
    _checks.divides("num_heads", heads, nonverbal_dim, "the attention's width")
    if student_dims is None:
        _checks.divides("the number of students", 2, nonverbal_dim, "the attention's width")
        student_dims = (nonverbal_dim // 2, nonverbal_dim // 2)
    _checks.sum_is("student_dims", _checks.widths("student_dims", student_dims), nonverbal_dim)

    fusion = AttentionShiftingFusion(
        anchor_dim,
        tuple(student_dims),
        num_heads=heads,
        threshold=threshold,
        dropout=dropout,
        attend_over="batch",
        num_classes=num_classes,
        eps=_RELEASED_EPS,
    )
    renamed = {ours: entries[released] for released, ours in _RENAMED.items()}
    gate = entries[_GATE]  # reads <non-verbal, anchor>; here the anchor comes first, as in Eq. 16
    renamed["shift.gate.weight"] = torch.cat(
        (gate[:, nonverbal_dim:], gate[:, :nonverbal_dim]), dim=1
    )
    fusion.to(dtype=gate.dtype).load_state_dict(renamed)
    return fusion.eval()


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            "state_dict: expected a mapping of names to tensors, "
            f"got a {type(state_dict).__name__}; load the file with safetensors, or with "
            "torch.load(..., weights_only=True)"
        )
    entries = {str(name).removeprefix("module."): value for name, value in state_dict.items()}
    expected = {*_RENAMED, _GATE}
    faults = [f"missing {name}" for name in sorted(expected - entries.keys())]
    faults += [f"unexpected {name}" for name in sorted(entries.keys() - expected)]
    faults += [
        f"{name} is no dense floating tensor"
        for name, value in entries.items()
        if not (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.layout is torch.strided
        )
    ]
    _refuse(faults)
    return entries


def _sizes(entries: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Anchor width, non-verbal width and number of classes, read off the weights."""
    matrices = {name: entries[name] for name in ("W_av.weight", "W.weight")}
    _refuse(
        [
            f"{name}: expected 2 axes, got {value.ndim}"
            for name, value in matrices.items()
            if value.ndim != 2
        ]
    )
    anchor_dim, nonverbal_dim = matrices["W_av.weight"].shape
    return anchor_dim, nonverbal_dim, matrices["W.weight"].shape[0]


def _check_entries(
    entries: Mapping[str, Tensor], anchor_dim: int, nonverbal_dim: int, num_classes: int
) -> None:
    shapes = {
        "multihead_attn.in_proj_weight": (3 * nonverbal_dim, nonverbal_dim),
        "multihead_attn.in_proj_bias": (3 * nonverbal_dim,),
        "multihead_attn.out_proj.weight": (nonverbal_dim, nonverbal_dim),
        "multihead_attn.out_proj.bias": (nonverbal_dim,),
        "AV_LayerNorm.weight": (nonverbal_dim,),
        "AV_LayerNorm.bias": (nonverbal_dim,),
        "W_hav.weight": (anchor_dim, nonverbal_dim + anchor_dim),
        "W_hav.bias": (anchor_dim,),
        "W_av.weight": (anchor_dim, nonverbal_dim),
        "W_av.bias": (anchor_dim,),
        "LayerNorm.weight": (anchor_dim,),
        "LayerNorm.bias": (anchor_dim,),
        "W.weight": (num_classes, anchor_dim),
        "W.bias": (num_classes,),
    }
    faults = [
        f"{name}: expected {shape}, got {tuple(entries[name].shape)}"
        for name, shape in shapes.items()
        if tuple(entries[name].shape) != shape
    ]
    dtypes = sorted({str(value.dtype) for value in entries.values()})
    if len(dtypes) > 1:
        faults.append(f"expected one dtype, got {', '.join(dtypes)}")
    faults += [
        f"{name} holds NaN or infinity"
        for name, value in entries.items()
        if not bool(torch.isfinite(value).all())
    ]
    _refuse(faults)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise CheckpointError(
            f"state_dict: expected the released fusion head, got {'; '.join(faults)}; "
            "check that the file is a fusion checkpoint and complete"
        )
