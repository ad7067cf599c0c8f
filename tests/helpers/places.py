"""Where an invariant must hold: in every backend, and every dtype that it takes."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest
import torch

from telme_kd._typing import Backend
from tests.helpers.tolerances import UNIT

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Place(NamedTuple):
    """A backend and the dtype of its inputs."""

    backend: Backend
    dtype: torch.dtype

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of the loss: half precision is computed in float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def unit(self) -> float:
        """Unit roundoff of the dtype it computes in."""
        return UNIT[self.computed_in]

    @property
    def is_interpreted(self) -> bool:
        """Whether it takes some 10 ms where the others take 0.2."""
        return self.backend == "triton"

    def tries(self, seed: int) -> bool:
        """Whether it tries what takes more than one call: in the interpreter, of every fifth.

        There a call takes a hundred times as long. Each result is held to the definition all the
        same, from which the others follow within twice its bounds.
        """
        return not self.is_interpreted or seed % 5 == 0

    def lost_in_storage(self, size: float, entries: int) -> float:
        """By how much a tensor of this norm changes, in the Euclidean norm, where it is stored."""
        if self.dtype is self.computed_in:
            return 0.0
        unit, normal = UNIT[self.dtype], torch.finfo(self.dtype).smallest_normal
        if self.is_interpreted and self.dtype is torch.bfloat16:
            # Triton's interpreter cuts bits off, and stores no subnormal numbers; GPUs round.
            return 2 * unit * size + normal * math.sqrt(entries)
        return unit * (size + normal * math.sqrt(entries))


@contextmanager
def bad_numbers() -> Iterator[None]:
    """Where NaN and infinity are meant: NumPy, which interprets Triton's kernels, warns of them."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield


def _parameter(place: Place) -> object:
    name = f"{place.backend}-{str(place.dtype).removeprefix('torch.')}"
    missing = place.is_interpreted and find_spec("triton") is None
    return pytest.param(
        place, id=name, marks=pytest.mark.skipif(missing, reason="Triton is not installed")
    )


INTERPRETED = Place("triton", torch.float32)
PLACES = pytest.mark.parametrize(
    "place",
    [
        *(
            _parameter(Place(backend, dtype))
            for backend in ("reference", "cpu")
            for dtype in DTYPES
        ),
        _parameter(INTERPRETED),
    ],
)
PLACES_OF_FULL_PRECISION = pytest.mark.parametrize(
    "place",
    [
        *(
            _parameter(Place(backend, dtype))
            for backend in ("reference", "cpu")
            for dtype in (torch.float64, torch.float32)
        ),
        _parameter(INTERPRETED),
    ],
)
INTERPRETED_HALVES = pytest.mark.parametrize(
    "place", [_parameter(Place("triton", dtype)) for dtype in (torch.float16, torch.bfloat16)]
)
