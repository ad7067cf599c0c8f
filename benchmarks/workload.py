"""What is measured: an operator, the cases it is measured in, and one provider's work on a case."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

REFERENCE: Final = "reference"
# A gradient of 1 is the one that a kernel may skip multiplying by; no scaled training sends it.
UPSTREAM = 3.0


@dataclass(frozen=True)
class Case:
    """One size of an operator's input.

    Attributes:
        shape: what the operator calls its size, outermost axis first: the batch.
        dtype: of the inputs, as PyTorch calls it.
        variant: what else sets the case apart; empty for the plain operator.
        floor_bytes: the least that forward and backward must read and write.
        flop: multiplications and additions of the matrix products that the definition needs.
        plan_bytes: what the fused plan for this size reads and writes; 0 where it is the floor.
        plan_flop: the products that the fused plan takes; 0 where they are the definition's.
        compiled: whether the compiled reference is measured too.
        repeatable: whether the same inputs give the same output; dropout does not.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    variant: str = ""
    floor_bytes: int = 0
    flop: int = 0
    plan_bytes: int = 0
    plan_flop: int = 0
    compiled: bool = True
    repeatable: bool = True

    @property
    def name(self) -> str:
        """What a result file and a target call this case."""
        shape = "x".join(map(str, self.shape))
        return " ".join(word for word in (self.variant, shape, self.dtype) if word)

    def described(self) -> dict[str, Any]:
        """The case as a result file holds it."""
        return {"case": self.name, **asdict(self)}


class Work(NamedTuple):
    """One provider's forward and backward pass on given tensors."""

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    upstream: Tensor

    def forward(self) -> Tensor:
        """The output, with or without a graph, as the caller's gradient mode has it."""
        return self.function(*self.arguments)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the leaves; the graph of ``output`` is used up."""
        return torch.autograd.grad(output, self.leaves, self.upstream)


@dataclass(frozen=True)
class Benchmark:
    """An operator and how to measure it.

    Attributes:
        operator: its name, and that of its result files.
        cases: for ``"cpu"`` or ``"cuda"``, and whether it is a quick run.
        draw: random tensors for a case, from and on the generator's device; those that want a
            gradient require it.
        work: a provider's work on such tensors; ``"reference"`` is the definition, called directly.
        providers: those measured beside the reference and what is compiled of it.
    """

    operator: str
    cases: Callable[[str, bool], Sequence[Case]]
    draw: Callable[[Case, torch.Generator], tuple[Tensor, ...]]
    work: Callable[[Case, str, tuple[Tensor, ...]], Work]
    providers: tuple[str, ...] = ("cpu", "triton")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that PyTorch calls so."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def bytes_per_element(dtype: str) -> int:
    """The size of an element of the dtype that PyTorch calls so."""
    return dtype_named(dtype).itemsize


def normal(case: Case, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values of a case's dtype, on the generator's device."""
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return drawn.mul_(scale).to(dtype_named(case.dtype))


def scalar_upstream(student: Tensor) -> Tensor:
    """The gradient that reaches a loss over such a tensor, in the dtype that losses return."""
    return torch.full(
        (), UPSTREAM, dtype=torch.promote_types(student.dtype, torch.float32), device=student.device
    )
