"""Encoders of the released code in: weights that its authors' scripts saved, as our encoders.

For the fusion head see :func:`telme_kd.interop.load_released_fusion`; :func:`read` reads its file
too. What the weights compute is what they computed there only if the input is the same, and it is
not on purpose: see the list of differences in ``docs/pipelines.rst``.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.erc.audio import AudioEncoder
from examples.erc.errors import InputError
from examples.erc.pretrained import MENDED, may_unpickle
from examples.erc.text import TextEncoder
from examples.erc.visual import VisualEncoder

_SHOWN = 20
"""Faults that an error lists before it only counts."""

_EMBEDDINGS = "body.embeddings.word_embeddings.weight"


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running anything that is in the file.

    Args:
        path: Of safetensors, or of what ``torch.save`` writes of a state dict. Other pickles are
            refused, as reading one may run any code, and so are all with a PyTorch before 2.10.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        InputError: The file is not there, damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not may_unpickle():
            raise RuntimeError(
                f"before {'.'.join(map(str, MENDED))} PyTorch's restricted unpickler has known "
                f"faults, and this is {torch.__version__}; upgrade, or convert to safetensors"
            )
        state = torch.load(path, weights_only=True, map_location="cpu")
    # What reads hostile bytes may fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: expected a state dict, as safetensors or saved with torch.save, got an error "
            f"({reason}); fetch the file anew, and never load it with an unrestricted pickle"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(
            f"{path}: expected a state dict of tensors by name, got a {type(state).__name__} with "
            "other things in it; save model.state_dict() alone"
        )
    return dict(state)


def load_text(encoder: TextEncoder, path: Path) -> None:
    """Put the released teacher's weights into a text encoder.

    It has nine tokens for speakers, of which the encoder takes as many as it has.

    Args:
        encoder: A roberta-large with features 768 wide, as the released code has it.
        path: ``teacher.bin``; see :func:`read`.

    Raises:
        InputError: The file cannot be read, or does not fit; the message lists every entry that is
            missing, unexpected, of another shape, or not finite. The encoder is as it was then.
    """

    def rename(name: str) -> str:
        for theirs, ours in (("text_model.", "body."), ("W.", "head.projection."),
                             ("classifier.", "head.classifier.")):  # fmt: skip
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    state = _renamed(read(path), rename)
    rows = encoder.state_dict()[_EMBEDDINGS].shape[0]
    if _EMBEDDINGS in state and state[_EMBEDDINGS].ndim == 2:
        state[_EMBEDDINGS] = state[_EMBEDDINGS][:rows]
    _load(encoder, state, path, "teacher")


def load_student(encoder: AudioEncoder | VisualEncoder, path: Path) -> None:
    """Put a released student's weights into an audio or visual encoder.

    Args:
        encoder: A data2vec-audio or TimeSformer whose features are as wide as its hidden states.
        path: ``student_audio/total_student.bin`` or ``student_video/total_student.bin``; see
            :func:`read`.

    Raises:
        InputError: As for :func:`load_text`.
    """

    def rename(name: str) -> str:
        if name.startswith("model."):
            return "body." + name.removeprefix("model.")
        return "head.classifier." + name.removeprefix("W.") if name.startswith("W.") else name

    _load(encoder, _renamed(read(path), rename), path, "student")


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Our names; what older versions of transformers kept, and nothing reads, is left out."""
    renamed = {rename(name.removeprefix("module.")): value for name, value in state.items()}
    return {
        name: value
        for name, value in renamed.items()
        if not name.endswith((".position_ids", ".token_type_ids"))
        and not name.startswith("body.pooler.")
    }


def _load(encoder: nn.Module, state: dict[str, Tensor], path: Path, kind: str) -> None:
    own = encoder.state_dict()
    # A parameter of SpecAugment, which either side may have left out.
    mask = "body.masked_spec_embed"
    if mask in own and mask not in state:
        state[mask] = own[mask]
    elif mask not in own:
        state.pop(mask, None)
    if faults := list(_faults(own, state)):
        shown = "; ".join(faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(
            f"{path}: expected the weights of the released {kind} for this encoder, got {shown}"
            f"{more}; choose the file and the encoder that belong together"
        )
    encoder.load_state_dict(state)


def _faults(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"missing {name}" for name in sorted(own.keys() - state.keys()))
    yield from (f"unexpected {name}" for name in sorted(state.keys() - own.keys()))
    for name in sorted(own.keys() & state.keys()):
        theirs = state[name]
        if theirs.layout is not torch.strided or not theirs.is_floating_point():
            yield f"{name} is no dense floating tensor"
        elif theirs.shape != own[name].shape:
            yield f"{name}: expected {tuple(own[name].shape)}, got {tuple(theirs.shape)}"
        elif not theirs.isfinite().all():
            yield f"{name} holds NaN or infinity"
