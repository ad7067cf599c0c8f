"""The oracle of DIST behind linear layers: NumPy's logits, SciPy's correlations, differences."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from telme_kd.reference.linear_dist import linear_dist_loss
from tests.helpers import truth

OPTIONS = {"temperature": 2.0, "inter_weight": 1.0, "intra_weight": 0.5}


def heads(items: int = 5, classes: int = 4) -> list[Tensor]:
    """Hidden states, weight and bias of a student of width 3 and a teacher of width 2."""
    generator = torch.manual_seed(0)
    shapes = [(items, 3), (classes, 3), (classes,), (items, 2), (classes, 2), (classes,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_loss_equals_scipy_on_the_logits() -> None:
    given = heads()
    h_s, w_s, b_s, h_t, w_t, b_t = (tensor.numpy() for tensor in given)
    expected = truth.exact_dist(h_s @ w_s.T + b_s, h_t @ w_t.T + b_t, **OPTIONS)
    loss = linear_dist_loss(*given, mask=None, eps=None, **OPTIONS)
    assert loss.item() == pytest.approx(expected, abs=1e-13)
    without_bias = truth.exact_dist(h_s @ w_s.T, h_t @ w_t.T, **OPTIONS)
    given[2] = given[5] = None  # type: ignore[call-overload]
    loss = linear_dist_loss(*given, mask=None, eps=None, **OPTIONS)
    assert loss.item() == pytest.approx(without_bias, abs=1e-13)


@pytest.mark.parametrize("eps", [None, 1e-8], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_equal_differences(eps: float | None, masked: bool) -> None:
    mask = torch.tensor([True, False, True, True, True]) if masked else None
    inputs = [tensor.requires_grad_() for tensor in heads()]
    loss = partial(linear_dist_loss, mask=mask, eps=eps, **OPTIONS)
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_masked_items_are_absent_whatever_they_hold() -> None:
    mask = torch.tensor([True, False, True, True, False])
    given = heads()
    kept = [tensor[mask] if i in (0, 3) else tensor for i, tensor in enumerate(given)]
    expected = linear_dist_loss(*kept, mask=None, eps=None, **OPTIONS)
    given[0][~mask], given[3][~mask] = np.nan, np.inf
    inputs = [tensor.requires_grad_() for tensor in given]
    loss = linear_dist_loss(*inputs, mask=mask, eps=None, **OPTIONS)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0.0)
    gradients = torch.autograd.grad(loss, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_have_the_precision_of_the_layer_and_the_loss_that_of_float32(
    dtype: torch.dtype,
) -> None:
    given = [tensor.to(dtype) for tensor in heads()]
    h_s, w_s, b_s, h_t, w_t, b_t = given
    student = torch.nn.functional.linear(h_s, w_s, b_s).double().numpy()
    teacher = torch.nn.functional.linear(h_t, w_t, b_t).double().numpy()
    loss = linear_dist_loss(*given, mask=None, eps=None, **OPTIONS)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(truth.exact_dist(student, teacher, **OPTIONS), abs=1e-5)
