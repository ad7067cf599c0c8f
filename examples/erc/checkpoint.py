"""The state of a stage in the middle of its training: complete, verified, the last two kept.

A checkpoint is a pair of files, one of safetensors with every tensor and one of JSON with the rest,
which holds the digest of the first and is written last. Their name says how many steps and epochs
are done, so that a file that is written again is written with what was in it.

Accelerate's own are not used: it pickles optimiser and generators, writes in place, verifies
nothing, and goes on if the generators cannot be put back.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from examples.erc.artifacts import (
    DamageError,
    file_sha256,
    read_record,
    write_record,
    write_tensors,
)
from examples.erc.source import JSON

FORMAT = 2
"""Raised whenever the state changes its form."""

KEPT = 2
"""How many checkpoints stay: if the newest is damaged, there is one more."""

_TENSOR = "$tensor"


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: Of these alone; made when it is needed.
        fingerprint: Of the stage's settings: checkpoints of others are not taken.
        every: Optimiser steps from one to the next, >= 1; ``None``: one at the end of each epoch.
        title: Of the stage, for warnings.
    """

    def __init__(self, folder: Path, fingerprint: str, every: int | None, title: str) -> None:
        self._folder = folder
        self._fingerprint = f"{FORMAT} {fingerprint}"
        self._every = every
        self._title = title

    def due(self, step: int, *, epoch_ends: bool) -> bool:
        """Whether one is to be saved now.

        Args:
            step: Optimiser steps done.
            epoch_ends: Whether the epoch is done and evaluated.
        """
        return epoch_ends if self._every is None else not epoch_ends and step % self._every == 0

    def save(self, step: int, epochs: int, state: Mapping[str, Any]) -> None:
        """Save the state, and let go of all but the last two.

        Args:
            step: Optimiser steps done.
            epochs: Epochs done and evaluated.
            state: Mappings with string keys, sequences, tensors and what JSON can hold.

        Raises:
            OSError: The disk is full, say; the checkpoints from before are still there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        plain = _take_out_tensors(state, "", tensors)
        record = self._folder / f"step-{step:09d}-{epochs:05d}.json"
        data = record.with_suffix(".safetensors")
        write_tensors(data, tensors)
        write_record(
            record,
            {"fingerprint": self._fingerprint, "sha256": file_sha256(data), "state": plain},
        )
        self._drop_all_but(record)

    def newest(self) -> Path | None:
        """Find the newest checkpoint that is whole; warn of each that is not.

        Returns:
            Its file, for :meth:`load`; ``None`` if there is none of these settings.
        """
        for path in sorted(self._folder.glob("step-*.json"), reverse=True):
            try:
                record = read_record(path)
                if record["fingerprint"] != self._fingerprint:
                    continue
                _verify(path.with_suffix(".safetensors"), record["sha256"])
            except DamageError as damage:
                print(
                    f"warning: {self._title}: checkpoint {damage}; going back to the "
                    "one before, or else to the start",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                return path
        return None

    def load(self, path: Path) -> dict[str, Any]:
        """Load what was saved: sequences as lists, tensors on the CPU.

        Args:
            path: As :meth:`newest` gave it.
        """
        tensors = load_file(path.with_suffix(".safetensors"))
        state: dict[str, Any] = _put_in_tensors(read_record(path)["state"], tensors)
        return state

    def _drop_all_but(self, newest: Path) -> None:
        """Remove older ones, later ones that were passed over, and what a kill left half-written.

        A record goes before its tensors, so that none ever lacks them.
        """
        found = sorted(path for path in self._folder.glob("step-*.json") if path <= newest)
        kept = {path.stem for path in found[-KEPT:]}
        for path in sorted(self._folder.iterdir()):
            if path.stem not in kept or path.name.startswith("."):
                path.unlink()


def _verify(path: Path, digest: str) -> None:
    if not path.exists():
        raise DamageError(f"{path.name} is missing")
    if file_sha256(path) != digest:
        raise DamageError(f"{path.name} is damaged")


def _take_out_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> JSON:  # noqa: ANN401
    """Put the tensor's name in the place of each tensor."""
    if isinstance(value, Tensor):
        # Copied, as a file holds no tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), f"{name}: JSON would change the keys"
        return {
            key: _take_out_tensors(held, f"{name}/{key}", tensors) for key, held in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_take_out_tensors(held, f"{name}/{i}", tensors) for i, held in enumerate(value)]
    plain: JSON = value
    return plain


def _put_in_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_in_tensors(held, tensors) for key, held in value.items()}
    if isinstance(value, list):
        return [_put_in_tensors(held, tensors) for held in value]
    return value
