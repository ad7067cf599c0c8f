"""Run Triton kernels over many draws at once: their own source, in NumPy, with an axis of draws.

Triton's interpreter takes as long for one small batch as NumPy for a thousand of them, and a claim
about errors needs hundreds of batches each of many kinds. Blocks have the arithmetic that they have
in the interpreter; sums may be added up in another order.

Launchers see only tensors of the first draw; those that they make are told apart by their storage.
Pointers, sizes and masks are therefore the same in all draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class Size(int):
    """An integer that a kernel may convert, as it does Triton's."""

    def to(self, dtype: Any) -> Any:
        return dtype(self) if dtype is np.float32 else self

    def __add__(self, other: Any) -> Any:
        return Size(int(self) + other) if isinstance(other, int) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return Size(int(self) - other) if isinstance(other, int) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        return Size(int(self) * other) if isinstance(other, int) else NotImplemented

    def __floordiv__(self, other: Any) -> Any:
        return Size(int(self) // other) if isinstance(other, int) else NotImplemented


class Block:
    """A block of values (draws or 1, ...) of which a kernel sees all axes but the first."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.values.shape[1:]
        return shape

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return Block(
            np.ascontiguousarray(self.values).view(dtype) if bitcast else self.values.astype(dtype)
        )

    def __getitem__(self, index: Any) -> Block:
        return Block(self.values[(slice(None), *index)])

    def __bool__(self) -> bool:
        return bool(self.values.all())

    def __neg__(self) -> Block:
        return Block(-self.values)

    def __invert__(self) -> Block:
        return Block(~self.values)


def _apply(function: Callable[..., Any], *blocks: Any) -> Block:
    """A NumPy function of blocks and numbers, with scalars of each draw spread over its block."""
    axes = max(each.values.ndim for each in blocks if isinstance(each, Block))
    return Block(function(*(_spread(each, axes) for each in blocks)))


def _spread(block: Any, axes: int) -> Any:
    if not isinstance(block, Block):
        return block
    values = block.values
    return values.reshape(-1, *(1,) * (axes - 1)) if values.ndim == 1 else values


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[[Any, Any], Any]:
    def operate(block: Block, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = np.uint32(other) if isinstance(other, int) and _is_bits(block) else other
        return _apply(function, *((other, block) if swapped else (block, other)))

    return operate


def _is_bits(block: Block) -> bool:
    return bool(block.values.dtype == np.uint32)


for _name, _function in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}.items():
    setattr(Block, f"__{_name}__", _operator(_function))
    setattr(Block, f"__r{_name}__", _operator(_function, swapped=True))


class Pointer:
    """An address, or a block of them, in the storage (draws, elements) of a tensor."""

    def __init__(self, storage: Any, offset: Any) -> None:
        self.storage, self.offset = storage, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.offset + offset)


class Language:
    """In the place of ``triton.language``, for one program of a grid."""

    float32, int32, uint32, int64 = np.float32, np.int32, np.uint32, np.int64

    def __init__(self) -> None:
        self.program, self.grid = (0, 0), (1, 1)

    def program_id(self, axis: int) -> Size:
        return Size(self.program[axis])

    def num_programs(self, axis: int) -> Size:
        return Size(self.grid[axis])

    def range(self, *bounds: int, num_stages: int = 0) -> Iterator[Size]:
        return map(Size, range(*bounds))

    def arange(self, start: int, end: int) -> Block:
        return Block(np.arange(start, end)[None])

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Block:
        return Block(np.full((1, *shape), value, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Block:
        return self.full(shape, 0.0, dtype)

    def zeros_like(self, block: Block) -> Block:
        return Block(np.zeros_like(block.values))

    def cast(self, value: Any, dtype: Any) -> Any:
        return value

    def cdiv(self, number: int, divisor: int) -> int:
        return -(-number // divisor)

    def debug_barrier(self) -> None:
        """All of a program is done when its next line begins."""

    def minimum(self, first: Any, second: Any) -> Any:
        if isinstance(first, Block) or isinstance(second, Block):
            return _apply(np.minimum, first, second)
        return Size(min(first, second))

    def maximum(self, first: Any, second: Any) -> Any:
        if isinstance(first, Block) or isinstance(second, Block):
            return _apply(np.maximum, first, second)
        return max(first, second)

    def where(self, condition: Block, first: Any, second: Any) -> Block:
        chosen = _apply(np.where, condition, first, second)
        return chosen.to(np.float32) if chosen.values.dtype == np.float64 else chosen

    def exp2(self, block: Block) -> Block:
        return _apply(np.exp2, block)

    def log2(self, block: Block) -> Block:
        return _apply(np.log2, block)

    def ceil(self, block: Block) -> Block:
        return _apply(np.ceil, block)

    def sqrt(self, block: Block) -> Block:
        return _apply(np.sqrt, block)

    def rsqrt(self, block: Block) -> Block:
        return _apply(lambda values: np.float32(1.0) / np.sqrt(values), block)

    def sum(self, block: Block, axis: int) -> Block:
        values = np.ascontiguousarray(block.values)  # else NumPy would add up in another order
        return Block(values.sum(axis + 1, dtype=values.dtype))

    def max(self, block: Block, axis: int) -> Block:
        return Block(block.values.max(axis + 1))

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Block:
        offsets, read = _addresses(pointer, mask)
        values = np.ascontiguousarray(pointer.storage[:, np.where(read, offsets, 0)])
        return Block(np.where(read, values, np.asarray(other, values.dtype)))

    def store(
        self, pointer: Pointer, value: Any, mask: Any = None, cache_modifier: str = ""
    ) -> None:
        offsets, written = _addresses(pointer, mask)
        values = value.values if isinstance(value, Block) else np.asarray(value)
        values = np.broadcast_to(values, (len(pointer.storage), *offsets.shape))
        pointer.storage[:, offsets[written]] = values[:, written]


def _addresses(pointer: Pointer, mask: Any) -> tuple[Any, Any]:
    offsets = pointer.offset
    offsets = offsets.values[0] if isinstance(offsets, Block) else np.asarray(offsets)
    mask = True if mask is None else mask
    mask = mask.values[0] if isinstance(mask, Block) else mask
    return offsets, np.broadcast_to(mask, offsets.shape)


class Memory:
    """The storage that tensors of the first draw stand for."""

    def __init__(self, inputs: Mapping[Tensor, Tensor]) -> None:
        (self.draws,) = {len(each) for each in inputs.values()}
        self._known = list(inputs)  # a storage that nobody keeps may be given to another tensor
        self._storages = {
            _storage(tensor): draws.reshape(self.draws, -1).numpy().copy()
            for tensor, draws in inputs.items()
        }

    def pointer(self, tensor: Tensor) -> Pointer:
        if _storage(tensor) not in self._storages:
            elements = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).numpy()
            self._known.append(tensor)
            self._storages[_storage(tensor)] = np.repeat(elements[None], self.draws, 0)
        return Pointer(self._storages[_storage(tensor)], Size(tensor.storage_offset()))

    def of(self, tensor: Tensor) -> Tensor:
        """All draws (draws, ...) of a tensor that a launcher returned."""
        storage = torch.from_numpy(self._storages[_storage(tensor)])
        return storage.reshape(self.draws, *tensor.shape)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def at_once(module: ModuleType, inputs: Mapping[Tensor, Tensor]) -> Iterator[Memory]:
    """Run the kernels that a module launches on all draws of its inputs.

    Args:
        module: of ``telme_kd.kernels.triton``.
        inputs: contiguous tensors to be given to its launchers, each with its draws (draws, ...).
    """
    language, memory = Language(), Memory(inputs)
    names = dict(vars(module), tl=language)
    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if isinstance(function, FunctionType):
            names[name] = FunctionType(function.__code__, names, name, function.__defaults__)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for kernel in {shipped.kernel.__name__ for shipped in module.shipped()}:
            patch.setattr(module, kernel, _Launcher(names[kernel], language, memory))
        yield memory


class _Launcher:
    def __init__(self, kernel: Callable[..., None], language: Language, memory: Memory) -> None:
        self.kernel, self.language, self.memory = kernel, language, memory

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, (*grid, 1)[:2])

    def launch(
        self,
        grid: tuple[int, int],
        *arguments: Any,
        num_warps: int,
        maxnreg: int = 0,
        **constants: int,
    ) -> None:
        given = [self._given(each) for each in arguments]
        self.language.grid = grid
        for program in np.ndindex(grid):
            self.language.program = program
            self.kernel(*given, **constants)

    def _given(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.memory.pointer(argument)
        if isinstance(argument, int):
            return Size(argument)
        return np.float32(argument) if isinstance(argument, float) else argument
