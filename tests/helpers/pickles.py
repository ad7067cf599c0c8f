"""Hostile pickles, made on the spot: files that run code if they are read carelessly."""

import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Trap:
    """Calls a function when it is unpickled.

    Args:
        function: The function.
        arguments: Its own.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def corpus(marker: Path) -> dict[str, bytes]:
    """Hostile files by name, each of which makes the marker if it is read carelessly.

    Args:
        marker: A file that is not there.
    """
    statement = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": Trap(os.system, f"touch {marker}"),
        "subprocess": Trap(subprocess.check_call, ["touch", str(marker)]),
        "eval": Trap(eval, statement),
        "exec": Trap(exec, statement),
        "touch": Trap(Path.touch, marker),
    }
    files = {
        f"{name}, protocol {protocol}": pickle.dumps(call, protocol)
        for name, call in calls.items()
        for protocol in PROTOCOLS
    }
    trap = calls["os.system"]
    nested: Any = trap
    for depth in range(20):
        nested = {"a": [torch.zeros(2), nested], "depth": depth}
    held = {
        "alone": trap,
        "in a state dict": {"a": torch.zeros(2), "b": trap},
        "as a key": {trap: torch.zeros(2)},
        "nested": nested,
    }
    for name, value in held.items():
        files[f"torch, {name}"] = saved(value)
        files[f"torch, legacy, {name}"] = saved(value, _use_new_zipfile_serialization=False)
    files |= {
        f"torch, {name} as data.pkl, protocol {protocol}": rewritten(pickle.dumps(call, protocol))
        for name, call in calls.items()
        for protocol in (0, 2, 4)
    }
    objects = np.array([trap, trap], dtype=object)
    for name, write in (("npy", np.save), ("npz", np.savez)):
        buffer = io.BytesIO()
        write(buffer, objects)  # type: ignore[operator]
        files[f"{name} of objects"] = buffer.getvalue()
    files["npz with a pickle in it"] = archive({"label.npy": files["os.system, protocol 2"]})
    files["opcodes by hand"] = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    return files


def saved(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rewritten(data: bytes) -> bytes:
    """What torch.save writes of a tensor, but for its pickle, which is another one."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(2)}))) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    return archive(
        {name: data if name.endswith("data.pkl") else held for name, held in parts.items()}
    )


def archive(parts: dict[str, bytes]) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return buffer.getvalue()


def read_carelessly(data: bytes) -> None:
    """Read a file of the corpus as nothing of this project does."""
    readers: list[Callable[[], object]] = [
        lambda: torch.load(io.BytesIO(data), weights_only=False),
        lambda: np.load(io.BytesIO(data), allow_pickle=True),
        lambda: pickle.loads(data),
        lambda: pickle.loads(zipfile.ZipFile(io.BytesIO(data)).read("label.npy")),
        lambda: dict(np.load(io.BytesIO(data), allow_pickle=True)),
    ]
    for read in readers:
        try:
            read()
        except Exception:  # the wrong reader, or the trap's own result is no tensor
            continue
