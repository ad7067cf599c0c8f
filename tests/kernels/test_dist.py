"""DIST as an operator: what PyTorch may do with it beside calling it."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from telme_kd import DISTLoss, _dispatch
from telme_kd.errors import BackendError
from telme_kd.functional import dist_loss
from telme_kd.kernels import dist as operator

pytest.importorskip("triton")

BACKENDS = ("cpu", "triton")
OF_PYTORCH = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
"""PyTorch's own rules of forward mode are written with it."""

DEGENERATE = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")
OF_EAGER = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Whether compiled code does the same is tried on ordinary shapes, once."""

SHAPES = {"small": (4, 7), "blocked": (96, 301)}
EPS = (None, 1e-8)


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


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("teacher_needs_grad", [False, True])
def test_operator_passes_pytorchs_own_checks(
    backend: str, teacher_needs_grad: bool, eps: float | None
) -> None:
    mask = torch.tensor([True, False, True, True])
    student, teacher = _pair(SHAPES["small"], teacher_needs_grad=teacher_needs_grad)
    for given_mask in (None, mask):
        torch.library.opcheck(
            operator._dist_loss,
            (student, teacher, given_mask, 2.0, 1.0, 0.5, eps, True, teacher_needs_grad, backend),
        )


@DEGENERATE
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)], ids=str)
def test_operator_passes_pytorchs_own_checks_on_degenerate_shapes(
    backend: str, shape: tuple[int, int]
) -> None:
    student, teacher = _pair(shape, teacher_needs_grad=True)
    constant = torch.zeros(shape, requires_grad=True)
    for logits in (student, constant):
        torch.library.opcheck(
            operator._dist_loss,
            (logits, teacher, None, 2.0, 1.0, 0.5, None, True, True, backend),
            test_utils=OF_EAGER,
        )
    nothing = torch.zeros(shape[0], dtype=torch.bool)
    torch.library.opcheck(
        operator._dist_loss,
        (student, teacher, nothing, 2.0, 0.0, 1.0, 1e-8, True, True, backend),
        test_utils=OF_EAGER,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eps", EPS)
def test_compiled_loss_is_the_eager_one_to_the_bit_and_has_no_graph_break(
    backend: Any, eps: float | None, shape: tuple[int, int]
) -> None:
    criterion = DISTLoss(temperature=4.0, eps=eps, backend=backend)
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
            loss = dist_loss(student, teacher, temperature=2.0, backend=backend)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss.backward()
            gradients.append(student.grad)
        assert torch.equal(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", EPS)
def test_second_derivative_is_that_of_the_definition(eps: float | None) -> None:
    second = []
    for backend in ("cpu", "reference"):
        student, teacher = _pair((6, 5), torch.float64, teacher_needs_grad=True)
        loss = dist_loss(student, teacher, temperature=2.0, eps=eps, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), (student, teacher)))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_second_derivative_reaches_through_what_made_the_logits() -> None:
    weights = []
    for backend in ("cpu", "reference"):
        weight = torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(1))
        weight.requires_grad_()
        items = torch.randn(6, 5, dtype=torch.float64, generator=torch.manual_seed(2))
        teacher = torch.randn(6, 3, dtype=torch.float64, generator=torch.manual_seed(3))
        loss = dist_loss(items @ weight.tanh(), teacher, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        weights.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-14)


def test_second_derivative_with_a_teacher_made_from_the_student() -> None:
    second = []
    for backend in ("cpu", "reference"):
        student, _ = _pair((6, 5), torch.float64)
        loss = dist_loss(student, student.sin() * 2.0, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), student)[0])
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-14)


def _vmapped(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return torch.vmap(lambda one, other: dist_loss(one, other, **options))(
        student.expand(3, -1, -1), teacher.expand(3, -1, -1)
    )


def _jacobian(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    gradient: Tensor = torch.func.jacrev(partial(dist_loss, **options))(student, teacher)
    return gradient


def _tangent(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), torch.ones_like(student))
        return forward_ad.unpack_dual(dist_loss(dual, teacher, **options)).tangent


TRANSFORMS = (_vmapped, _jacobian, _tangent)


@OF_PYTORCH
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_auto_falls_back_under_transforms_and_forward_mode(
    transform: Callable[..., Tensor],
) -> None:
    student, teacher = _pair((4, 7))
    ours = transform(student, teacher, backend="auto")
    assert torch.equal(ours, transform(student, teacher, backend="reference"))


@OF_PYTORCH
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_named_backend_refuses_transforms_and_forward_mode(
    backend: Any, transform: Callable[..., Tensor]
) -> None:
    student, teacher = _pair((4, 7))
    with pytest.raises(BackendError, match=r"torch\.func|forward-mode"):
        transform(student, teacher, backend=backend)


def test_tensor_subclass_falls_back_or_is_refused(backend: Any) -> None:
    class Tagged(Tensor):
        pass

    student, teacher = (tensor.detach().as_subclass(Tagged) for tensor in _pair((4, 7)))
    assert _dispatch.choose("dist_loss", "auto", (student, teacher)).backend == "reference"
    with pytest.raises(BackendError, match="it takes plain tensors, got Tagged"):
        dist_loss(student, teacher, backend=backend)


def test_without_gradients_nothing_is_kept(backend: Any) -> None:
    passes = operator._passes(backend)
    student, teacher = _pair(SHAPES["small"])
    options = {"temperature": 1.0, "inter_weight": 1.0, "intra_weight": 1.0, "eps": None}
    for shape in SHAPES.values():
        assert passes.saved_shapes(*shape, student_needs_grad=False, teacher_needs_grad=False) == (
            (0,),
            (0,),
        )
    with torch.no_grad():
        value = dist_loss(student, teacher, backend=backend)
    assert not value.requires_grad
    expected, rows, columns = passes.forward(
        student.detach(),
        teacher,
        None,
        student_needs_grad=False,
        teacher_needs_grad=False,
        **options,
    )
    assert torch.equal(value, expected)
    assert rows.numel() == columns.numel() == 0


def test_large_batch_saves_its_logits_and_a_number_or_so_per_row_and_column(backend: Any) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    batch, classes = 900, 301
    student, teacher = _pair((batch, classes))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = dist_loss(student, teacher, backend=backend)
    loss.backward()
    own = {student.data_ptr(), teacher.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) <= 32 * (batch + classes)


def test_graph_is_freed_with_the_loss(backend: Any) -> None:
    import weakref

    student, teacher = _pair(SHAPES["small"])
    logits = student * 1.0
    watch = weakref.ref(logits)
    loss = dist_loss(logits, teacher, backend=backend)
    del logits, loss
    gc.collect()
    assert watch() is None


def test_repeats_agree_to_the_bit(backend: Any) -> None:
    repeats = 250 if backend == "cpu" else 5  # the interpreter takes milliseconds per program
    student, teacher = _pair(SHAPES["small"])
    outcomes = set()
    for _ in range(repeats):
        student.grad = None
        loss = dist_loss(student, teacher, temperature=2.0, backend=backend)
        loss.backward()
        assert student.grad is not None
        outcomes.add((loss.item(), tuple(student.grad.flatten().tolist())))
    assert len(outcomes) == 1


@pytest.mark.parametrize("eps", EPS)
def test_training_follows_the_reference(eps: float | None) -> None:
    """Two hundred steps of a linear student: the losses agree to 1e-5 throughout."""
    generator = torch.manual_seed(0)
    items = torch.randn(64, 16, generator=generator)
    teacher = 2.0 * torch.randn(64, 7, generator=generator)
    start = 0.3 * torch.randn(16, 7, generator=generator)
    histories = []
    for backend in ("cpu", "reference"):
        weight = start.clone().requires_grad_()
        optimiser = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
        losses = []
        for _ in range(200):
            optimiser.zero_grad()
            loss = dist_loss(items @ weight, teacher, temperature=2.0, eps=eps, backend=backend)  # type: ignore[arg-type]
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert histories[1][-1] < 0.7 * histories[1][0]
    torch.testing.assert_close(*histories, rtol=1e-5, atol=0.0)


def test_threads_do_not_share_what_is_kept_between_calls() -> None:
    pairs = [torch.randn(2, 4, 7, generator=torch.manual_seed(seed)) for seed in range(8)]

    def outcome(pair: Tensor) -> tuple[float, Tensor]:
        student = pair[0].clone().requires_grad_()
        loss = dist_loss(student, pair[1], temperature=2.0, backend="cpu")
        loss.backward()
        assert student.grad is not None
        return loss.item(), student.grad

    expected = [outcome(pair) for pair in pairs]
    with ThreadPoolExecutor(max_workers=4) as threads:
        found = list(threads.map(outcome, pairs * 50))
    for (loss, gradient), (expected_loss, expected_gradient) in zip(
        found, expected * 50, strict=True
    ):
        assert loss == expected_loss
        assert torch.equal(gradient, expected_gradient)
