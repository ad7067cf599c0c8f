"""Everything that is drawn at random in a process, held as tensors so that it can be put back."""

import hashlib
import random

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

RandomState = dict[str, Tensor]
"""The generators of Python, NumPy, PyTorch and, unless that is the CPU, the device."""


def read(device: torch.device) -> RandomState:
    """Read the state of every global generator.

    Args:
        device: The accelerator whose generator counts too.

    Returns:
        Tensors on the CPU. Reading draws nothing.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    assert kind == "MT19937"
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def restore(state: RandomState, device: torch.device) -> None:
    """Put back what :func:`read` read.

    Args:
        state: Of the same kind of device.
        device: The accelerator.

    Raises:
        KeyError: A generator's state is missing; nothing was changed.
    """
    names = ["python", "python_gauss", "numpy", "numpy_gauss", "torch"]
    python, python_gauss, keys, numpy_gauss, processor = (state[name] for name in names)
    accelerator = None if device.type == "cpu" else state["device"]
    version, *words = python.tolist()
    random.setstate((version, tuple(words), next(iter(python_gauss.tolist()), None)))
    *words, position, has_gauss = keys.tolist()
    np.random.set_state(
        ("MT19937", np.array(words, np.uint32), position, has_gauss, numpy_gauss.item())
    )
    torch.set_rng_state(processor)
    if accelerator is not None:
        torch.get_device_module(device).set_rng_state(accelerator)


def seed(number: int, part: int) -> None:
    """Seed every global generator for one part of the batches.

    Args:
        number: The seed of the run.
        part: Which part draws from it; the first has the seed itself.
    """
    digest = hashlib.sha256(f"{number}/{part}".encode()).digest()
    set_seed(number if part == 0 else int.from_bytes(digest[:4], "big"))
