"""Where it is measured: the devices of this machine, and the versions on it."""

import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import telme_kd


@dataclass(frozen=True)
class Machine:
    """A device to measure on.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        name: what the maker calls it.
        tensors_on: where its tensors live.
        threads: the thread counts to measure with, the usual one first.
    """

    kind: str
    name: str
    tensors_on: torch.device
    threads: tuple[int, ...]

    @property
    def slug(self) -> str:
        """The device's part of a result file's name."""
        return "cpu" if self.kind == "cpu" else slug(self.name)

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


def machines() -> list[Machine]:
    """The CPU, and the current CUDA device if there is one."""
    usual = torch.get_num_threads()
    threads = tuple(dict.fromkeys((usual, 1)))
    found = [Machine("cpu", _processor(), torch.device("cpu"), threads)]
    if torch.cuda.is_available():
        # The CPU only launches: its thread count is left alone.
        found.append(Machine("cuda", torch.cuda.get_device_name(), torch.device("cuda"), (usual,)))
    return found


def slug(name: str) -> str:
    """A device's name for a file: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\w*", word))


def versions(kind: str) -> dict[str, str]:
    """The versions that a measurement depends on."""
    found = {"telme_kd": telme_kd.__version__, "torch": torch.__version__}
    if kind == "cuda":
        found["CUDA"] = str(torch.version.cuda)
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return {**found, "python": platform.python_version()}


def _processor() -> str:
    """The processor's name, as the kernel or the platform knows it."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", table.read_text("utf-8"), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()
