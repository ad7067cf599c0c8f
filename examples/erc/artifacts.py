"""The results of finished stages on disk: whole or not there, fingerprinted, verified, reused.

A stage is a folder with ``model.safetensors`` (its weights), ``outputs.safetensors`` (all that its
model says about the three splits) and ``stage.json``, which is written last and makes it valid.
Until then it may have a folder ``checkpoints``; see :mod:`examples.erc.checkpoint`.

Where several processes train one model, the first of them reads and writes, and the others wait.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from examples.erc import processes
from examples.erc.errors import InputError
from examples.erc.source import JSON

if TYPE_CHECKING:
    from examples.erc.training import Trained

FORMAT = 2
"""Raised whenever the same settings would give another result, or the files change their form."""

WEIGHTS = "model.safetensors"
OUTPUTS = "outputs.safetensors"
STAGE = "stage.json"
CHECKPOINTS = "checkpoints"

Outputs: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""For each split the fields of a model's output, each ``[N, ...]``."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage.

    Attributes:
        folder: Where it is.
        record: Its history, selected epoch and seconds.
        identity: The SHA-256 of its settings and its content: what a stage that builds on it names
            in its own settings.
        settings: Everything that its result depends on.
    """

    folder: Path
    record: Mapping[str, Any]
    identity: str
    settings: Mapping[str, Any]

    def outputs(self, split: str) -> dict[str, Tensor]:
        """What its model says about a split: ``logits`` and, of an encoder, ``features``."""
        with safe_open(self.folder / OUTPUTS, framework="pt") as file:
            prefix = f"{split}."
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }


class DamageError(Exception):
    """Files that claim to be valid and are not; the message says which one and how."""


def obtain(
    folder: Path,
    title: str,
    settings: Mapping[str, JSON],
    compute: Callable[[str], "Trained"],
    evaluate: Callable[[Mapping[str, Tensor]], Outputs],
) -> Artifact:
    """Take a stage from its folder, or compute it and put it there.

    Prints one line: the stage was kept, or what it scored and how long it took. A stage with other
    settings is computed again; so is a damaged one, after a warning. Where only its outputs are
    damaged, they are computed again from its weights, and nothing is trained.

    Args:
        folder: Of this stage alone.
        title: Of the stage, for that line.
        settings: Everything that the result depends on, upstream identities included.
        compute: Trains it, given the fingerprint of its settings.
        evaluate: Computes its outputs, given its weights.

    Returns:
        The stage.
    """
    fingerprint = _fingerprint(settings)
    artifact, mute = processes.tell(
        _find(folder, title, fingerprint) if processes.first() else (None, False)
    )
    kept = mute or artifact is not None
    if mute:
        outputs = evaluate(load_file(folder / WEIGHTS))
        artifact = processes.tell(_mend(folder, outputs) if processes.first() else None)
    elif artifact is None:
        trained = compute(fingerprint)
        artifact = processes.tell(
            _write(folder, fingerprint, settings, trained) if processes.first() else None
        )
    assert artifact is not None
    if not processes.first():
        return artifact
    # Only now, as from here on the stage itself is what is gone on from.
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    record = artifact.record
    best = max(epoch["dev_weighted_f1"] for epoch in record["history"])
    with tqdm.external_write_mode():  # above a bar, if there is one
        print(
            f"{title}: {'kept, ' if kept else ''}dev {100 * best:.2f} (epoch "
            f"{record['selected_epoch']} of {len(record['history'])}), {record['seconds']:.1f} s",
            flush=True,
        )
    return artifact


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder, which is made if it is not there.

    Raises:
        InputError: Another run is at work there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(
            f"{folder}: expected a folder to write to ({error.strerror}); choose another --output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder}: expected no other run in this folder, but one is at work there; "
                "wait for it, or choose another --output"
            ) from error
        yield


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and make sure that it stays.

    The old file is there until the new one is whole and on the disk, whatever happens in between.

    Args:
        path: The file; its folder exists.
        write: Writes the content to the path that it is given, in the same folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; see :func:`replace`.

    Raises:
        OSError: They cannot be written; safetensors' own error for a full disk is none.
    """

    def write(partial: Path) -> None:
        try:
            save_file(dict(tensors), partial)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error

    replace(path, write)


def write_record(path: Path, record: Mapping[str, JSON]) -> None:
    """Write JSON with a digest of itself, the seal; see :func:`replace`."""
    sealed = {**record, "seal": sha256(canonical(record))}
    text = json.dumps(sealed, indent=2, ensure_ascii=False) + "\n"
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """Read what :func:`write_record` wrote, without the seal.

    Raises:
        DamageError: It is not what was written.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        intact = record.pop("seal") == sha256(canonical(record))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamageError(f"{path.name} is damaged")
    return record


def canonical(value: JSON) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(folder: Path, title: str, fingerprint: str) -> tuple[Artifact | None, bool]:
    """Read a stage; a damaged one is as good as none, but for a warning.

    Returns:
        The stage, if it is whole; and whether it lacks nothing but its outputs.
    """
    try:
        stage = _read(folder, fingerprint)
    except DamageError as damage:
        _warn(f"{title}: {damage}; computing it again")
        return None, False
    if stage is None:
        return None, False
    try:
        verify(folder, {OUTPUTS: stage["files"][OUTPUTS]})
    except DamageError as damage:
        _warn(f"{title}: {damage}; computing them again from its weights")
        return None, True
    return _artifact(folder, stage), False


def open_stage(folder: Path) -> Artifact | None:
    """Open a finished stage, whatever its settings.

    Args:
        folder: Of the stage.

    Returns:
        The stage, verified; ``None`` if there is none, or one of another version.

    Raises:
        DamageError: Its files are not those that were written.
    """
    if not (folder / STAGE).exists():
        return None
    stage = read_record(folder / STAGE)
    if stage["fingerprint"] != _fingerprint(stage["settings"]):
        return None
    verify(folder, stage["files"])
    return _artifact(folder, stage)


def verify(folder: Path, files: Mapping[str, str]) -> None:
    """Make sure that files are those whose SHA-256 was written down.

    Raises:
        DamageError: One is missing, or another.
    """
    for name, expected in files.items():
        if not (folder / name).exists():
            raise DamageError(f"{name} is missing")
        if file_sha256(folder / name) != expected:
            raise DamageError(f"{name} is damaged")


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr, flush=True)


def _read(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read a record and verify its weights; ``None`` if it is not there, or of other settings."""
    if not (folder / STAGE).exists():
        return None
    stage = read_record(folder / STAGE)
    if stage["fingerprint"] != fingerprint:
        return None
    verify(folder, {WEIGHTS: stage["files"][WEIGHTS]})
    return stage


def _fingerprint(settings: Mapping[str, JSON]) -> str:
    return sha256(canonical({"format": FORMAT, **settings}))


def _write(
    folder: Path, fingerprint: str, settings: Mapping[str, JSON], trained: "Trained"
) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    # From here until the new one stands, the folder holds no valid stage.
    (folder / STAGE).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, trained.weights)
    _write_outputs(folder, trained.outputs)
    stage: dict[str, JSON] = {
        "fingerprint": fingerprint,
        "settings": settings,
        "files": {name: file_sha256(folder / name) for name in (WEIGHTS, OUTPUTS)},
        "record": trained.record(),
    }
    write_record(folder / STAGE, stage)
    return _artifact(folder, stage)


def _mend(folder: Path, outputs: Outputs) -> Artifact:
    """Put the outputs of a stage back; where other bits came out, they are its outputs from now."""
    stage = read_record(folder / STAGE)
    _write_outputs(folder, outputs)
    digest = file_sha256(folder / OUTPUTS)
    if digest != stage["files"][OUTPUTS]:
        stage["files"][OUTPUTS] = digest
        write_record(folder / STAGE, stage)
    return _artifact(folder, stage)


def _write_outputs(folder: Path, outputs: Outputs) -> None:
    tensors = {
        f"{split}.{name}": values.contiguous()
        for split, fields in outputs.items()
        for name, values in fields.items()
    }
    write_tensors(folder / OUTPUTS, tensors)


def _artifact(folder: Path, stage: Mapping[str, Any]) -> Artifact:
    identity = sha256(canonical({key: stage[key] for key in ("fingerprint", "files")}))
    return Artifact(folder, stage["record"], identity, stage["settings"])
