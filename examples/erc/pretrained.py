"""Pretrained encoders: found, checked and loaded the same way for every modality."""

import hashlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from examples.erc.errors import InputError
from examples.erc.source import JSON, EncoderOutput

MENDED = (2, 10)
"""The first PyTorch whose restricted unpickler has no known way around it (CVE-2026-24747)."""

_BLOCK = 1 << 20

_LONGEST_REASON = 400


@dataclass(frozen=True)
class Pretrained:
    """An encoder on the Hugging Face Hub or in a local folder.

    Code that comes with an encoder is never run. Weights are read as safetensors or, where the
    publisher has none, by PyTorch's restricted unpickler, which builds tensors and refuses
    everything else; PyTorch has to be 2.10 or later for that. All parts are of one commit, even if
    a branch moves meanwhile.

    Attributes:
        name: The name on the Hub, or the path of a folder.
        revision: The branch, tag or commit on the Hub; ``None``: its main branch.
        blank: Whether there is everything but the weights, which others take the place of.
    """

    name: str
    revision: str | None = None
    blank: bool = False

    @classmethod
    def parse(cls, typed: str, revision: str | None = None) -> Self:
        """Read ``NAME``, ``NAME@REVISION`` or ``FOLDER``.

        Args:
            typed: What the user typed. A folder that is there is a folder, whatever it is called.
            revision: For a name without one of its own.

        Raises:
            InputError: There is an ``@`` with nothing before or after it, or a folder or a second
                revision beside it.
        """
        name, at, own = typed.rpartition("@")
        if not at or Path(typed).is_dir():
            return cls(typed, revision)
        if not name or not own or revision is not None or Path(name).is_dir():
            raise InputError(
                f"{typed}: expected NAME@REVISION, a name on the Hugging Face Hub and one branch, "
                "tag or commit there; leave @ and what follows out for a folder or the main branch"
            )
        return cls(name, own)

    @cached_property
    def commit(self) -> str | None:
        """The commit on the Hub that everything is loaded from; ``None`` for a folder.

        Raises:
            InputError: There is no such encoder.
        """
        if Path(self.name).is_dir():
            return None
        with self._explain("AutoConfig"):
            download = import_module("huggingface_hub").hf_hub_download
            # The cache keeps the files of a commit in a folder that is named by it.
            return Path(download(self.name, "config.json", revision=self.revision)).parent.name

    @cached_property
    def config(self) -> Any:  # noqa: ANN401
        """Its configuration.

        Raises:
            InputError: There is no such encoder.
        """
        return self.load("AutoConfig")

    @property
    def hidden_size(self) -> int:
        """The width of its hidden states.

        Raises:
            InputError: There is no such encoder, or its configuration has no such number.
        """
        size = getattr(self.config, "hidden_size", None)
        if not isinstance(size, int) or size < 1:
            raise InputError(
                f"{self.name}: expected an encoder with a hidden_size >= 1, got {size!r}; "
                "choose another encoder"
            )
        return size

    @property
    def description(self) -> dict[str, JSON]:
        """What identifies it: the commit on the Hub, or the digest of a folder's files."""
        folder = Path(self.name)
        if folder.is_dir():
            return {"name": folder.resolve().name, "sha256": _digest(folder)}
        return {"name": self.name, "revision": self.commit}

    def load(self, kind: str, **options: object) -> Any:  # noqa: ANN401
        """Load a part of it by way of one of transformers' Auto classes.

        Args:
            kind: The name of the class.
            options: For its ``from_pretrained``.

        Returns:
            What ``from_pretrained`` returns.

        Raises:
            InputError: It is not there, or not what its name says.
        """
        loader = getattr(_transformers(), kind)
        with self._explain(kind):
            return loader.from_pretrained(
                self.name,
                revision=self.commit or "main",
                trust_remote_code=False,
                **options,
            )

    @contextmanager
    def _explain(self, kind: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        # What reads hostile files may fail in any way.
        except Exception as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
            raise InputError(
                f"{self.name}: expected an encoder for {kind}, on the Hugging Face Hub or in a "
                f"folder with its weights, got an error ({reason}); "
                "check the name, the revision and the connection"
            ) from error


def load_body(encoder: Pretrained, **overrides: object) -> Any:  # noqa: ANN401
    """Load an encoder with its weights in float32, without a pooling layer.

    One that is blank gets random weights.

    Args:
        encoder: Which.
        overrides: Values that replace those of its configuration.

    Returns:
        The module.

    Raises:
        InputError: It cannot be loaded, or its weights are incomplete or not finite.
    """
    options = dict(overrides)
    architecture = _transformers().MODEL_MAPPING.get(type(encoder.config), None)
    if inspect.isclass(architecture) and "add_pooling_layer" in _parameters(architecture):
        # Its weights are often not in the checkpoint, and nothing here reads its output.
        options["add_pooling_layer"] = False
    if encoder.blank:
        config = encoder.load("AutoConfig", **overrides)
        pooling = {name: options[name] for name in options.keys() - overrides.keys()}
        return _transformers().AutoModel.from_config(config, dtype=torch.float32, **pooling)
    if not may_unpickle():
        options["use_safetensors"] = True
    body, report = encoder.load(
        "AutoModel",
        dtype=torch.float32,
        weights_only=True,
        output_loading_info=True,
        **options,
    )
    # SpecAugment's mask is a parameter of training that a checkpoint need not have.
    missing = sorted(key for key in report["missing_keys"] if key != "masked_spec_embed")
    if missing:
        raise InputError(
            f"{encoder.name}: expected the weights of a whole {type(body).__name__}, "
            f"got none for {', '.join(missing[:3])} and {len(missing)} in all; "
            "choose an encoder of that kind"
        )
    broken = [name for name, weights in body.named_parameters() if not weights.isfinite().all()]
    if broken:
        raise InputError(
            f"{encoder.name}: expected finite weights, got others in {', '.join(broken[:3])}; "
            "fetch the encoder anew"
        )
    return body


def may_unpickle() -> bool:
    """Whether weights may be read by PyTorch's restricted unpickler; safetensors always may."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= MENDED


class Head(nn.Module):
    """From a pooled hidden state to the feature and the logits.

    Batch-similarity distillation compares features of the teacher and of a student, so that all
    encoders need one width: where the hidden size is another, a linear layer projects it.

    Args:
        hidden_size: The width of the hidden state.
        feature_size: d, the width of the feature.
        num_classes: C.
    """

    def __init__(self, hidden_size: int, feature_size: int, num_classes: int) -> None:
        super().__init__()
        self.projection = (
            nn.Identity() if hidden_size == feature_size else nn.Linear(hidden_size, feature_size)
        )
        self.classifier = nn.Linear(feature_size, num_classes)

    def forward(self, pooled: Tensor, present: Tensor | None = None) -> EncoderOutput:
        """Project and classify.

        Args:
            pooled: ``[B, hidden_size]``.
            present: ``[B]``, bool: the feature is zero where it is false; ``None``: all are there.

        Returns:
            Features ``[B, d]`` and logits ``[B, C]``, float32 under any autocast.
        """
        features = self.projection(pooled).float()
        if present is not None:
            features = features.masked_fill(~present.unsqueeze(-1), 0.0)
        return EncoderOutput(features, self.classifier(features).float())


def _transformers() -> Any:  # noqa: ANN401
    """Import transformers, which takes seconds, only when an encoder is wanted.

    Its reports about loaded weights are silenced, as :func:`load_body` checks them, and so is its
    progress bar; that of downloads stays. It asks no service of the Hub to convert what it loads.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    transformers = import_module("transformers")
    downloads = import_module("huggingface_hub.utils")
    transformers.logging.set_verbosity_error()
    if not downloads.are_progress_bars_disabled():
        transformers.logging.disable_progress_bar()
        downloads.enable_progress_bars()
    return transformers


def _parameters(architecture: type) -> set[str]:
    return set(inspect.signature(architecture).parameters)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
