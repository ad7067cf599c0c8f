"""Golden files: numbers of the released implementation, float64; ``tests/golden/README.md``."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

COMMITTED = Path(__file__).parents[1] / "golden"
NAMES = ("dist", "batch_similarity", "released_fusion")

Case = dict[str, NDArray[Any]]


def cases(name: str) -> list[Any]:
    """The committed cases of an operator, as parameters named after their index."""
    return [pytest.param(case, id=f"case-{key}") for key, case in load(COMMITTED, name).items()]


def load(directory: Path, name: str) -> dict[str, Case]:
    """Every case of a file: index -> key -> array."""
    loaded: dict[str, Case] = {}
    with np.load(directory / f"{name}.npz") as arrays:
        for path in arrays.files:
            index, key = path.split("/", 1)
            loaded.setdefault(index, {})[key] = arrays[path]
    return loaded


def full_directory() -> Path:
    """Where all golden files are; skips the test by name where they are not."""
    root = os.environ.get("TELME_KD_SHARED")
    shared = Path(root) if root else Path(__file__).parents[3] / "shared"
    directory = shared / "golden"
    missing = [name for name in NAMES if not (directory / f"{name}.npz").is_file()]
    if missing:
        pytest.skip(
            f"no golden files {', '.join(missing)} in {directory}; set TELME_KD_SHARED to the "
            "folder that holds golden/"
        )
    return directory
