"""Linear DIST as users meet it: the loss of a layer's logits, in value, gradient and dtype."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from telme_kd.errors import BackendError
from telme_kd.functional import dist_loss, linear_dist_loss
from tests.helpers import strategies

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CLASSES, STUDENT_WIDTH, TEACHER_WIDTH = 11, 4, 6


class Heads:
    """A student's and a teacher's last layer and what they read."""

    def __init__(
        self, *batch: int, dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.student = nn.Linear(STUDENT_WIDTH, CLASSES, bias, dtype=torch.float64).to(dtype)
            self.teacher = nn.Linear(TEACHER_WIDTH, CLASSES, bias, dtype=torch.float64).to(dtype)
            self.student_hidden = torch.randn(*batch, STUDENT_WIDTH, dtype=torch.float64).to(dtype)
            self.teacher_hidden = torch.randn(*batch, TEACHER_WIDTH, dtype=torch.float64).to(dtype)
        self.student_hidden.requires_grad_()
        self.teacher.requires_grad_(False)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student_hidden, *self.student.parameters()]

    def fused(self, **options: Any) -> Tensor:
        return linear_dist_loss(
            self.student_hidden,
            self.student.weight,
            self.teacher_hidden,
            self.teacher.weight,
            student_bias=self.student.bias,
            teacher_bias=self.teacher.bias,
            **options,
        )

    def materialised(self, **options: Any) -> Tensor:
        student, teacher = self.student(self.student_hidden), self.teacher(self.teacher_hidden)
        return dist_loss(student, teacher, **options, backend="reference")

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves, torch.full_like(loss, 0.75)))


@BACKENDS
@given(
    items=st.integers(3, 12),
    rows=st.integers(1, 12),
    seed=strategies.seeds,
    temperature=st.sampled_from(strategies.TEMPERATURES),
    weights=st.sampled_from([(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]),
    eps=st.sampled_from([None, 1e-8]),
    masked=st.booleans(),
    bias=st.booleans(),
)
def test_loss_and_gradients_are_those_of_the_materialised_logits(
    backend: Any,
    items: int,
    rows: int,
    seed: int,
    temperature: float,
    weights: tuple[float, float],
    eps: float | None,
    masked: bool,
    bias: bool,
) -> None:
    heads = Heads(items, bias=bias, seed=seed)
    options = {
        "temperature": temperature,
        "inter_weight": weights[0],
        "intra_weight": weights[1],
        "eps": eps,
        "mask": torch.arange(items) % 3 != 1 if masked else None,
    }
    loss = heads.fused(**options, backend=backend, chunk_bytes=rows * 16 * CLASSES)
    expected = heads.materialised(**options)
    scale = temperature**2 * sum(weights)
    # Correlations of softened probabilities are ill-conditioned: at most 1e4 roundings, squared.
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=1e-9 * scale)
    for gradient, exact in zip(heads.gradients(loss), heads.gradients(expected), strict=True):
        largest = exact.abs().max().item()
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-8 * largest + 1e-12 * scale)


@BACKENDS
def test_batch_axes_are_those_of_the_flattened_matrix(backend: Any) -> None:
    heads = Heads(2, 3, 4)
    mask = torch.arange(24).reshape(2, 3, 4) % 5 != 0
    loss = heads.fused(mask=mask, backend=backend)
    gradient = heads.gradients(loss)[0]
    assert gradient.shape == (2, 3, 4, STUDENT_WIDTH)
    assert (gradient[~mask] == 0).all()
    flat = linear_dist_loss(
        heads.student_hidden.flatten(0, 2),
        heads.student.weight,
        heads.teacher_hidden.flatten(0, 2),
        heads.teacher.weight,
        student_bias=heads.student.bias,
        teacher_bias=heads.teacher.bias,
        mask=mask.flatten(),
        backend=backend,
    )
    assert torch.equal(loss, flat)


@BACKENDS
def test_what_masked_items_hold_changes_no_bit(backend: Any) -> None:
    outcomes = []
    mask = torch.tensor([True, False, True, True, False, True])
    for junk in (0.0, torch.nan, torch.inf):
        heads = Heads(6)
        with torch.no_grad():
            heads.student_hidden[~mask], heads.teacher_hidden[~mask] = junk, -junk
        loss = heads.fused(mask=mask, backend=backend, chunk_bytes=3 * 16 * CLASSES)
        outcomes.append([loss, *heads.gradients(loss)])
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))


@BACKENDS
def test_all_masked_gives_zero_and_no_gradient(backend: Any) -> None:
    heads = Heads(4)
    loss = heads.fused(mask=torch.zeros(4, dtype=torch.bool), backend=backend)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in heads.gradients(loss))


@BACKENDS
@pytest.mark.parametrize("side", ["student_hidden", "teacher_hidden"])
def test_nan_is_never_laundered(backend: Any, side: str) -> None:
    heads = Heads(4)
    with torch.no_grad():
        getattr(heads, side)[1, 2] = torch.nan
    loss = heads.fused(backend=backend)
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in heads.gradients(loss))


@BACKENDS
def test_teacher_gets_gradients_only_if_it_requires_them(backend: Any) -> None:
    heads = Heads(5)
    heads.fused(backend=backend).backward()
    assert heads.teacher_hidden.grad is heads.teacher.weight.grad is heads.teacher.bias.grad is None
    leaves = [heads.teacher_hidden, *heads.teacher.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = torch.autograd.grad(heads.fused(backend=backend), leaves)
    theirs = torch.autograd.grad(heads.materialised(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@BACKENDS
@pytest.mark.parametrize("index", range(3))
def test_any_one_input_may_be_trained_alone(backend: Any, index: int) -> None:
    heads = Heads(5)
    expected = heads.gradients(heads.fused(backend=backend))
    for position, leaf in enumerate(heads.leaves):
        leaf.requires_grad_(position == index)
    (alone,) = torch.autograd.grad(heads.fused(backend=backend) * 0.75, heads.leaves[index])
    torch.testing.assert_close(alone, expected[index], rtol=1e-14, atol=0.0)


@BACKENDS
def test_without_gradients_the_value_is_the_same(backend: Any) -> None:
    heads = Heads(5)
    with torch.no_grad():
        loss = heads.fused(backend=backend)
    assert not loss.requires_grad
    assert torch.equal(loss, heads.fused(backend=backend).detach())


@BACKENDS
@HALVES
def test_half_precision_layers_give_the_loss_of_their_logits(
    backend: Any, dtype: torch.dtype
) -> None:
    heads = Heads(9, dtype=dtype)
    loss, expected = heads.fused(backend=backend), heads.materialised()
    assert loss.dtype is torch.float32
    # The products may add up in another order, which moves a few logits by one rounding.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=unit)
    for gradient, exact in zip(heads.gradients(loss), heads.gradients(expected), strict=True):
        assert gradient.dtype is dtype
        largest = exact.abs().max().item()
        torch.testing.assert_close(gradient, exact, rtol=0.0, atol=4 * unit * largest)


@BACKENDS
@HALVES
def test_autocast_is_that_of_the_layer_and_its_loss(backend: Any, dtype: torch.dtype) -> None:
    heads = Heads(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss, expected = heads.fused(backend=backend), heads.materialised()
    assert loss.dtype is expected.dtype is torch.float32
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=unit)
    for gradient, exact in zip(heads.gradients(loss), heads.gradients(expected), strict=True):
        assert gradient.dtype is torch.float32
        largest = exact.abs().max().item()
        torch.testing.assert_close(gradient, exact, rtol=0.0, atol=4 * unit * largest)


@BACKENDS
def test_autocast_leaves_float64_alone_and_reconciles_dtypes(backend: Any) -> None:
    heads = Heads(5)
    expected = heads.fused(backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads.fused(backend=backend), expected)
    mixed = Heads(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_dist_loss(
            mixed.student_hidden.bfloat16(),
            mixed.student.weight,
            mixed.teacher_hidden,
            mixed.teacher.weight,
            backend=backend,
        )
    assert loss.isfinite()


@BACKENDS
def test_student_and_teacher_may_differ_in_dtype(backend: Any) -> None:
    heads = Heads(5, dtype=torch.float32)
    heads.teacher.bfloat16()
    heads.teacher_hidden = heads.teacher_hidden.bfloat16()
    loss = heads.fused(backend=backend)
    torch.testing.assert_close(loss, heads.materialised(), rtol=1e-5, atol=1e-5)
    assert {gradient.dtype for gradient in heads.gradients(loss)} == {torch.float32}


def test_tied_weights_and_shared_hidden_states_add_their_gradients() -> None:
    hidden = torch.randn(6, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    weight = torch.randn(9, 4, generator=torch.manual_seed(1), dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    pairs = []
    for backend in ("cpu", "reference"):
        loss = linear_dist_loss(hidden, weight, 2.0 * hidden.roll(1, 0), weight, backend=backend)  # type: ignore[arg-type]
        pairs.append(torch.autograd.grad(loss, (hidden, weight)))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_named_backend_refuses_what_it_cannot_do() -> None:
    heads = Heads(4)
    with pytest.raises(BackendError, match="linear_dist_loss: it computes in float32, got float64"):
        heads.fused(backend="triton")
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.vmap(
            lambda hidden: linear_dist_loss(
                hidden,
                heads.student.weight,
                heads.teacher_hidden,
                heads.teacher.weight,
                backend="cpu",
            )
        )(heads.student_hidden.expand(2, -1, -1))


def test_inputs_are_never_modified() -> None:
    heads = Heads(5)
    tensors = [*heads.leaves, heads.teacher_hidden, *heads.teacher.parameters()]
    copies = [tensor.detach().clone() for tensor in tensors]
    heads.fused(chunk_bytes=1).backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
