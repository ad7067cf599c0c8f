"""Batch similarity as an operator: what PyTorch may do with it beside calling it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from telme_kd import BatchSimilarityLoss
from telme_kd.errors import BackendError
from telme_kd.functional import batch_similarity_loss
from telme_kd.kernels import batch_similarity as operator

pytest.importorskip("triton")

BACKENDS = ("cpu", "triton")
OF_PYTORCH = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
"""PyTorch's own rules of forward mode are written with it."""

OF_EAGER = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Whether compiled code does the same is tried on ordinary shapes, once."""

SHAPES = {"small": (6, 20), "beyond": (90, 33)}


def _pair(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, teacher_needs_grad: bool = False
) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(teacher_needs_grad)


@pytest.fixture(autouse=True)
def forgotten_compilations() -> None:
    torch._dynamo.reset()  # or the tests together run into its limit of variants


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("teacher_needs_grad", [False, True])
def test_operator_passes_pytorchs_own_checks(backend: str, teacher_needs_grad: bool) -> None:
    mask = torch.tensor([True, False, True, True, True, False])
    student, teacher = _pair(SHAPES["small"], teacher_needs_grad=teacher_needs_grad)
    for given_mask in (None, mask):
        torch.library.opcheck(
            operator._batch_similarity_loss,
            (student, teacher, given_mask, 0.5, True, teacher_needs_grad, backend),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_operator_passes_pytorchs_own_checks_for_every_dtypes_plan(
    backend: str, dtype: torch.dtype
) -> None:
    student, teacher = _pair((66, 8), dtype)
    torch.library.opcheck(
        operator._batch_similarity_loss,
        (student, teacher, None, 0.5, True, False, backend),
        test_utils=OF_EAGER,
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)], ids=str)
def test_operator_passes_pytorchs_own_checks_on_degenerate_shapes(
    backend: str, shape: tuple[int, int]
) -> None:
    student, teacher = _pair(shape, teacher_needs_grad=True)
    zeros = torch.zeros(shape, requires_grad=True)
    nothing = torch.zeros(shape[0], dtype=torch.bool)
    for features, mask in ((student, None), (zeros, None), (student, nothing)):
        torch.library.opcheck(
            operator._batch_similarity_loss,
            (features, teacher, mask, 0.5, True, True, backend),
            test_utils=OF_EAGER,
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiled_loss_is_the_eager_one_to_the_bit_and_has_no_graph_break(
    backend: Any, shape: tuple[int, int]
) -> None:
    criterion = BatchSimilarityLoss(temperature=0.5, backend=backend)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for teacher_needs_grad in (False, True):
        outcomes = []
        for loss in (criterion, compiled):
            student, teacher = _pair(shape, teacher_needs_grad=teacher_needs_grad)
            value = loss(student, teacher)
            (value * 0.7).backward()
            outcomes.append((value.detach(), student.grad, teacher.grad))
        for eager, traced in zip(*outcomes, strict=True):
            assert (eager is None) is (traced is None)
            if eager is not None:
                assert torch.equal(eager, traced)


def test_backward_inside_autocast_keeps_its_precision(backend: Any) -> None:
    for shape in SHAPES.values():
        gradients = []
        for enabled in (False, True):
            student, teacher = _pair(shape)
            loss = batch_similarity_loss(student, teacher, temperature=0.5, backend=backend)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss.backward()
            gradients.append(student.grad)
        assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_second_derivative_is_that_of_the_definition() -> None:
    second = []
    for backend in ("cpu", "reference"):
        student, teacher = _pair((6, 5), torch.float64, teacher_needs_grad=True)
        loss = batch_similarity_loss(student, teacher, temperature=0.5, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), (student, teacher)))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_second_derivative_with_a_teacher_made_from_the_student() -> None:
    second = []
    for backend in ("cpu", "reference"):
        student, _ = _pair((6, 5), torch.float64)
        loss = batch_similarity_loss(student, student.sin() * 2.0, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), student)[0])
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-14)


def _vmapped(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return torch.vmap(lambda one, other: batch_similarity_loss(one, other, **options))(
        student.expand(3, -1, -1), teacher.expand(3, -1, -1)
    )


def _jacobian(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    gradient: Tensor = torch.func.jacrev(partial(batch_similarity_loss, **options))(
        student, teacher
    )
    return gradient


@pytest.mark.parametrize("transform", [_vmapped, _jacobian])
def test_auto_falls_back_under_transforms_and_a_named_backend_refuses(
    backend: Any, transform: Callable[..., Tensor]
) -> None:
    student, teacher = _pair((4, 7))
    ours = transform(student, teacher, backend="auto")
    assert torch.equal(ours, transform(student, teacher, backend="reference"))
    with pytest.raises(BackendError, match=r"torch\.func"):
        transform(student, teacher, backend=backend)


@OF_PYTORCH
def test_named_backend_refuses_forward_mode(backend: Any) -> None:
    student, teacher = _pair((4, 7))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), torch.ones_like(student))
        with pytest.raises(BackendError, match="it has no forward-mode derivative"):
            batch_similarity_loss(dual, teacher, backend=backend)


def test_no_matrix_of_all_pairs_is_saved(backend: Any) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    batch, width = 300, 8
    student, teacher = _pair((batch, width))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_similarity_loss(student, teacher, backend=backend)
    loss.backward()
    own = {student.data_ptr(), teacher.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) <= batch * (width + 8)


def test_repeats_agree_to_the_bit(backend: Any) -> None:
    repeats = 250 if backend == "cpu" else 5  # the interpreter takes milliseconds per program
    student, teacher = _pair(SHAPES["small"])
    outcomes = set()
    for _ in range(repeats):
        student.grad = None
        loss = batch_similarity_loss(student, teacher, temperature=0.5, backend=backend)
        loss.backward()
        assert student.grad is not None
        outcomes.add((loss.item(), tuple(student.grad.flatten().tolist())))
    assert len(outcomes) == 1


def test_training_follows_the_reference() -> None:
    """Two hundred steps of a linear student: the losses agree to 1e-5 throughout.

    Larger steps make training chaotic: either backend then leaves the float64 path by more.
    """
    generator = torch.manual_seed(0)
    items = torch.randn(64, 16, generator=generator)
    teacher = torch.randn(64, 12, generator=generator)
    start = 0.3 * torch.randn(16, 12, generator=generator)
    histories = []
    for backend in ("cpu", "reference"):
        weight = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
        losses = []
        for _ in range(200):
            optimiser.zero_grad()
            loss = batch_similarity_loss(items @ weight, teacher, temperature=0.2, backend=backend)  # type: ignore[arg-type]
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert histories[1][-1] < 0.8 * histories[1][0]
    torch.testing.assert_close(*histories, rtol=1e-5, atol=0.0)
