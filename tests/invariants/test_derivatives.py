"""Derivatives equal differences, first and second, in float64; upstream gradients are used.

Kernels that compute in float32 are held to the definition instead (the other files here). A loss
over a group refuses a second derivative by name: tests/test_distributed.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.functional import (
    batch_similarity_loss,
    bounded_shift,
    dist_loss,
    linear_dist_loss,
)
from telme_kd.kernels import fusion

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 1), (1, 5), (5, 1), (2, 2), (2, 4), (4, 2), (4, 5)], ids=str
)
EPS = pytest.mark.parametrize("eps", [None, 1e-8, 0.05], ids=["scale-free", "released", "large"])


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64, generator=torch.manual_seed(7))
    return student.clone().requires_grad_(), teacher.clone().requires_grad_()


def mask_of(items: int) -> Tensor | None:
    return torch.arange(items) != 1 if items > 2 else None


def assert_differentiable(function: Callable[..., Tensor], inputs: Any, **tolerances: Any) -> None:
    assert gradcheck(function, inputs, **tolerances)
    assert gradgradcheck(function, inputs, **tolerances)


@BACKENDS
@SHAPES
@EPS
def test_dist(backend: str, shape: tuple[int, int], eps: float | None) -> None:
    loss = partial(dist_loss, temperature=2.0, intra_weight=0.5, eps=eps, backend=backend)
    assert_differentiable(loss, pair(*shape))
    if (mask := mask_of(shape[0])) is not None:
        assert_differentiable(partial(loss, mask=mask), pair(*shape))


@BACKENDS
@pytest.mark.parametrize("term", ["inter_weight", "intra_weight"])
def test_dist_of_one_term(backend: str, term: str) -> None:
    options: dict[str, Any] = {term: 0.0, "backend": backend}
    assert_differentiable(partial(dist_loss, **options), pair(3, 4))


@BACKENDS
def test_dist_at_a_constant_student(backend: str) -> None:
    """The attenuation is cubic over 0.1 % of a vector's norm: differences must stay well inside."""
    _, teacher = pair(4, 5)
    student = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    loss = partial(dist_loss, temperature=2.0, backend=backend)
    assert gradcheck(loss, (student, teacher), eps=1e-7, atol=1e-4)
    gradient = torch.autograd.grad(loss(student, teacher), student, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), (student, teacher))
    assert all(part.isfinite().all() for part in second)


@BACKENDS
def test_released_dist_at_a_constant_student(backend: str) -> None:
    """Its rows and columns bend without bound towards a constant; there, the second is defined."""
    _, teacher = pair(4, 5)
    student = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    loss = dist_loss(student, teacher, eps=1e-8, backend=backend)
    gradient = torch.autograd.grad(loss, student, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), (student, teacher))
    assert all(part.isfinite().all() for part in (gradient, *second))


@BACKENDS
@SHAPES
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_batch_similarity(backend: str, shape: tuple[int, int], temperature: float) -> None:
    loss = partial(batch_similarity_loss, temperature=temperature, backend=backend)
    assert_differentiable(loss, pair(*shape))
    if (mask := mask_of(shape[0])) is not None:
        assert_differentiable(partial(loss, mask=mask), pair(*shape))


@BACKENDS
def test_batch_similarity_beside_zero_rows(backend: str) -> None:
    student, teacher = (x.detach() for x in pair(4, 5))
    student[1] = teacher[2] = 0.0
    inputs = student.requires_grad_(), teacher.requires_grad_()
    loss = batch_similarity_loss(*inputs, temperature=0.5, backend=backend)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)
    assert all(part.isfinite().all() for part in (*gradients, *second))


@BACKENDS
@pytest.mark.parametrize("threshold", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5)], ids=str)
def test_gate_and_shift(
    backend: str, shape: tuple[int, int], eps: float | None, threshold: float
) -> None:
    anchor, value = pair(*shape)
    gate = pair(2, *shape)[0].detach().abs()[0].add(0.1).requires_grad_()
    if backend == "reference":

        def fused(anchor: Tensor, gate: Tensor, value: Tensor) -> Tensor:
            return bounded_shift(anchor, gate.relu() * value, threshold=threshold, eps=eps)
    else:

        def fused(anchor: Tensor, gate: Tensor, value: Tensor) -> Tensor:
            options: Any = {"threshold": threshold, "eps": eps, "norm_eps": None, "rate": 0.0}
            options |= {"output_dtype": torch.float64, "backend": backend}
            return fusion.gate_and_shift(anchor, gate, value, *[None] * 4, **options)

    assert_differentiable(fused, (anchor, gate, value))


@BACKENDS
@pytest.mark.parametrize("eps", [None, 1e-8], ids=["scale-free", "released"])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 2), (4, 3)], ids=str)
def test_linear_dist(backend: str, shape: tuple[int, int], eps: float | None) -> None:
    items, classes = shape
    generator = torch.manual_seed(3)
    sizes = [(items, 3), (classes, 3), (items, 2), (classes, 2)]
    inputs = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    loss = partial(linear_dist_loss, temperature=2.0, eps=eps, backend=backend)
    assert_differentiable(loss, inputs)


# --- upstream gradients ---------------------------------------------------------------------------


def _uses() -> Iterator[tuple[float, Callable[[Tensor], Tensor]]]:
    """Ways that a loss is used, and what they multiply its gradient by."""
    yield 2.0, lambda loss: 2 * loss
    yield 8.0, lambda loss: loss.expand(8).sum()
    yield -0.5, lambda loss: torch.stack((loss, loss))[::2].squeeze() * -0.5
    yield 3.0, lambda loss: (loss.expand(2, 3).T * torch.tensor([[1.0, 0.0]]).to(loss)).sum()
    yield 0.0, lambda loss: 0 * loss


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("loss", [dist_loss, batch_similarity_loss], ids=lambda loss: loss.__name__)
def test_upstream_gradient_of_a_loss_is_used(loss: Callable[..., Tensor], backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    student, teacher = (x.detach().float() for x in pair(5, 4))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, backend=backend), student)
    assert gradient.any()
    for factor, use in _uses():
        used = use(loss(student, teacher, backend=backend))
        (scaled,) = torch.autograd.grad(used, student)
        largest = 1e-6 * gradient.abs().max().item() * max(1.0, abs(factor))
        torch.testing.assert_close(scaled, factor * gradient, rtol=0.0, atol=largest)
