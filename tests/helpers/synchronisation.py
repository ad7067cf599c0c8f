"""Refuse whatever would make a GPU wait: a tensor's value that Python wants to know."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

WAITING = (
    _aten._local_scalar_dense,  # item(), tolist(), bool, int, float, and as an index
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.repeat_interleave,
)
"""Operators whose result, or its shape, is known only when the device has computed it."""

INDEXING = (_aten.index, _aten.index_put, _aten.index_put_)
"""The same of these, if an index is a mask."""


class NoValueIsRead(TorchDispatchMode):
    """While it is entered, operators that read a tensor's value on the host raise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket
        masks = operator in INDEXING and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if masks or operator in WAITING:
            raise AssertionError(f"{func} would make a GPU wait")
        return func(*args, **(kwargs or {}))
