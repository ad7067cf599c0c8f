"""Linear DIST as an operator: what PyTorch may do with it, and how much memory it takes."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from telme_kd.functional import dist_loss, linear_dist_loss
from telme_kd.kernels import linear_dist as operator
from tests.helpers.conditions import conditions

pytest.importorskip("triton")

BACKENDS = ("cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def heads(
    items: int = 6,
    classes: int = 20,
    *,
    widths: tuple[int, int] = (5, 4),
    dtype: torch.dtype = torch.float32,
    needed: tuple[bool, ...] = (True, True, True, False, False, False),
    seed: int = 0,
) -> list[Tensor]:
    """Hidden states, weight and bias of the student, then of the teacher."""
    generator = torch.manual_seed(seed)
    shapes = [shape for width in widths for shape in ((items, width), (classes, width), (classes,))]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]


def loss_of(tensors: list[Tensor], **options: Any) -> Tensor:
    h_s, w_s, b_s, h_t, w_t, b_t = tensors
    return linear_dist_loss(h_s, w_s, h_t, w_t, student_bias=b_s, teacher_bias=b_t, **options)


class _PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive together, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def test_memory_is_that_of_a_few_chunks_not_of_the_logits() -> None:
    items, classes, chunk_bytes = 2048, 8192, 2**20
    tensors = heads(items, classes, widths=(16, 16))
    with _PeakMemory() as ours:
        loss_of(tensors, backend="cpu", chunk_bytes=chunk_bytes).backward()
    with _PeakMemory() as theirs:
        loss_of(tensors, backend="reference").backward()
    logits = 2 * 4 * items * classes
    assert theirs.peak > logits  # the measure sees what is there
    of_weights = sum(2 * 4 * tensor.numel() for tensor in tensors[:3])
    assert ours.peak < logits / 8 + of_weights
    assert ours.peak < theirs.peak / 10


def test_nothing_as_large_as_the_logits_is_saved(backend: Any) -> None:
    saved: list[Tensor] = []
    items, classes = 40, 90

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tensors = heads(items, classes)
    own = {tensor.data_ptr() for tensor in tensors}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(tensors, backend=backend)
    others = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) <= 32 * (items + classes)


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_give_the_loss_of_the_materialised_logits(
    backend: Any, rows: int, masked: bool
) -> None:
    mask = torch.tensor([True, True, False, True, False, True]) if masked else None
    needed = (True,) * 6
    tensors = heads(needed=needed)
    loss = loss_of(tensors, backend=backend, chunk_bytes=rows * 8 * 20, mask=mask)
    gradients = torch.autograd.grad(loss, tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    logits = [torch.nn.functional.linear(*exact[i : i + 3]) for i in (0, 3)]
    expected = dist_loss(*logits, mask=mask, backend="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=2e-5 * largest)


def _outcomes(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the student's hidden states and weight."""
    student = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
    loss = function([*student, *tensors[2:]])
    return loss.detach(), *torch.autograd.grad(loss, student)


def _materialised(tensors: list[Tensor], **options: Any) -> Tensor:
    h_s, w_s, b_s, h_t, w_t, b_t = tensors
    student, teacher = linear(h_s, w_s, b_s), linear(h_t, w_t, b_t)
    return dist_loss(student, teacher, **options, backend="reference")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_float32_error_is_at_most_half_more_than_that_of_materialised_logits(
    temperature: float,
) -> None:
    """Of 200 draws, in units of what a draw makes of roundings.

    Not so the gradient of the student's bias: a sum over rows, in which the rounding of what a
    column has in common adds up, errs 1.5 to 1.7 times as much at temperature 4.
    """
    materialised = partial(_materialised, temperature=temperature)
    in_chunks = partial(loss_of, temperature=temperature, backend="cpu", chunk_bytes=2**11)
    errors: dict[str, list[Tensor]] = {"ours": [], "eager": []}
    for seed in range(200):
        tensors = [tensor.detach() for tensor in heads(24, 40, widths=(12, 10), seed=seed)]
        wide = [tensor.double() for tensor in tensors]
        truth = _outcomes(materialised, wide)
        units = conditions(lambda *given: _outcomes(materialised, given), wide)
        for name, function in (("ours", in_chunks), ("eager", materialised)):
            found = zip(_outcomes(function, tensors), truth, strict=True)
            errors[name].append(torch.stack([(x - y).norm() for x, y in found]) / units)
    ours, eager = (torch.stack(errors[name]) for name in ("ours", "eager"))
    assert (ours.amax(0) <= 1.5 * eager.amax(0)).all()
    assert (ours.square().mean(0) <= 1.5**2 * eager.square().mean(0)).all()


@pytest.mark.parametrize(
    "needed", [(True, True, True, False, False, False), (True,) * 6, (False, True) * 3]
)
def test_operator_passes_pytorchs_own_checks(backend: str, needed: tuple[bool, ...]) -> None:
    mask = torch.tensor([True, False, True, True, True, False])
    for given_mask in (None, mask):
        tensors = heads(needed=needed)
        torch.library.opcheck(
            operator._linear_dist_loss,
            (*tensors, given_mask, 2.0, 1.0, 0.5, None, 3 * 8 * 20, backend),
        )
    tensors[2] = tensors[5] = None  # type: ignore[call-overload]
    torch.library.opcheck(
        operator._linear_dist_loss, (*tensors, None, 2.0, 1.0, 0.5, 1e-8, 1, backend)
    )


@pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)], ids=str)
def test_operator_passes_pytorchs_own_checks_on_degenerate_shapes(
    backend: str, shape: tuple[int, int]
) -> None:
    tensors = heads(*shape, widths=(1, 2), needed=(True,) * 6)
    torch.library.opcheck(
        operator._linear_dist_loss,
        (*tensors, None, 2.0, 1.0, 0.5, None, 1, backend),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("needed", [(True, True, True, False, False, False), (False, True) * 3])
def test_compiled_loss_is_the_eager_one_to_the_bit_and_has_no_graph_break(
    backend: Any, needed: tuple[bool, ...]
) -> None:
    def criterion(*tensors: Tensor) -> Tensor:
        return loss_of(list(tensors), temperature=2.0, backend=backend, chunk_bytes=480)

    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    outcomes = []
    for loss in (criterion, compiled):
        tensors = heads(needed=needed)
        value = loss(*tensors)
        (value * 0.7).backward()
        outcomes.append([value.detach(), *(tensor.grad for tensor in tensors)])
    for eager, traced in zip(*outcomes, strict=True):
        assert (eager is None) is (traced is None)
        if eager is not None:
            assert torch.equal(eager, traced)


def test_compiles_under_autocast() -> None:
    tensors = heads()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(tensors), loss_of(tensors))


def test_backward_inside_autocast_keeps_its_precision(backend: Any) -> None:
    gradients = []
    for enabled in (False, True):
        tensors = heads()
        loss = loss_of(tensors, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append(tensors[0].grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_second_derivative_is_that_of_the_definition() -> None:
    second = []
    for backend in ("cpu", "reference"):
        tensors = heads(dtype=torch.float64, needed=(True,) * 6)
        loss = loss_of(tensors, backend=backend)
        gradients = torch.autograd.grad(loss, tensors[:2], create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        second.append(torch.autograd.grad(total, tensors))  # type: ignore[arg-type]
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("index", range(6))
def test_only_products_of_needed_gradients_are_taken(index: int) -> None:
    """Of six inputs one requires a gradient; the logits are computed again whatever it is."""
    items, classes, widths = 6, 20, (5, 4)
    tensors = heads(items, classes, widths=widths, needed=(True,) * 6)
    everything = torch.autograd.grad(loss_of(tensors, backend="cpu"), tensors)
    for position, tensor in enumerate(tensors):
        tensor.requires_grad_(position == index)
    loss = loss_of(tensors, backend="cpu")
    with FlopCounterMode(display=False) as counter:
        (alone,) = torch.autograd.grad(loss, tensors[index])
    assert torch.equal(alone, everything[index])
    product = 2 * items * classes * widths[index // 3] if index % 3 < 2 else 0
    assert counter.get_total_flops() == 2 * items * classes * sum(widths) + product


@pytest.mark.parametrize("product_bytes", [1, 2**20])
def test_sums_over_chunks_are_taken_in_float32(product_bytes: int) -> None:
    """Six hundred ones: in bfloat16 their sum stops growing at 256."""
    head = operator._Head(*heads(600, 7, dtype=torch.bfloat16)[:3])
    ones = operator._Head(torch.ones_like(head.hidden), head.weight, head.bias)
    side = operator._Gradients(ones, (False, True, True), torch.float32, False, product_bytes)
    for row in range(600):
        side.add(slice(row, row + 1), torch.ones(1, 7, dtype=torch.bfloat16), None)
    _, weight, bias = side.finished()
    assert weight is not None
    assert bias is not None
    assert (weight == 600).all()
    assert (bias == 600).all()


def test_repeats_agree_to_the_bit(backend: Any) -> None:
    repeats = 250 if backend == "cpu" else 3  # the interpreter takes milliseconds per program
    outcomes = set()
    for _ in range(repeats):
        tensors = heads()
        loss = loss_of(tensors, backend=backend, chunk_bytes=2 * 8 * 20)
        loss.backward()
        numbers = torch.cat([loss.detach()[None], *(x.grad.flatten() for x in tensors[:3])])  # type: ignore[union-attr]
        outcomes.add(tuple(numbers.tolist()))
    assert len(outcomes) == 1
