"""What a process tells the others: its collectives, listed while they do their work."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed

_LISTED = ("all_reduce", "all_gather")


class Collective(NamedTuple):
    """One call of a collective.

    Attributes:
        name: what torch.distributed calls it.
        numbers: in the tensor that is reduced, or in all that is gathered.
        dtype: of the numbers.
    """

    name: str
    numbers: int
    dtype: str

    @property
    def bytes(self) -> int:
        """The size of the tensor that is reduced, or of all that is gathered."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numbers * dtype.itemsize


class Traffic:
    """A context in which this process's collectives are listed."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []

    def __enter__(self) -> "Traffic":
        self._originals = {name: getattr(torch.distributed, name) for name in _LISTED}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._listing(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)

    def _listing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def listed(tensors: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            moved = tensors if isinstance(tensors, list) else [tensors]
            dtype = str(moved[0].dtype).removeprefix("torch.")
            self.calls.append(Collective(name, sum(tensor.numel() for tensor in moved), dtype))
            return original(tensors, *arguments, **options)

        return listed
