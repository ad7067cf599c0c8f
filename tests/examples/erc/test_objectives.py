from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from examples.erc.fusion import FusionOutput
from examples.erc.objectives import (
    Classification,
    Distillation,
    Share,
    Stateful,
    class_weights,
    focal_sum,
)
from examples.erc.recipe import ClassificationRecipe, Optimisation, StudentRecipe
from examples.erc.source import EncoderOutput
from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0, 1])
PLAIN = ClassificationRecipe()
ROWS = torch.tensor([9, 1, 3, 6, 11, 2, 0])
OPTIMISATION = Optimisation(1e-3, 1, 4, 0.0, 0.0, 1.0, None)


def outputs(count: int = len(ROWS), seed: int = 0) -> EncoderOutput:
    generator = torch.Generator().manual_seed(seed)
    return EncoderOutput(
        torch.randn(count, 5, generator=generator), 3 * torch.randn(count, 3, generator=generator)
    )


def whole(rows: torch.Tensor) -> Share:
    return Share(rows, rows)


def test_plain_classification_is_the_mean_cross_entropy() -> None:
    output = outputs()
    loss = Classification(LABELS, 3, PLAIN)(output, whole(ROWS))
    assert torch.equal(loss, cross_entropy(output.logits, LABELS[ROWS]))


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_a_balanced_classification_is_pytorch_s_weighted_mean(power: float) -> None:
    output = FusionOutput(outputs().logits)
    recipe = ClassificationRecipe(class_balance=power)
    loss = Classification(LABELS, 3, recipe)(output, whole(ROWS))
    weight = class_weights(LABELS, 3, power)
    assert torch.allclose(loss, cross_entropy(output.logits, LABELS[ROWS], weight), rtol=1e-6)


def test_a_power_of_one_gives_scikit_learn_s_balanced_weights() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    balanced, half = class_weights(LABELS, 3, 1.0), class_weights(LABELS, 3, 0.5)
    assert balanced is not None
    assert half is not None
    assert np.allclose(balanced.numpy(), expected, rtol=1e-6)
    assert np.allclose(half.numpy(), np.sqrt(expected), rtol=1e-6)
    assert class_weights(LABELS, 3, 0.0) is None


def test_a_class_that_never_occurs_has_weight_one() -> None:
    weights = class_weights(LABELS, 5, 1.0)
    assert weights is not None
    assert weights[3:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_its_definition_in_float64(gamma: float) -> None:
    logits, labels = outputs().logits, LABELS[ROWS]
    weight = torch.tensor([0.5, 1.0, 2.0])
    values = logits.double().numpy()
    shifted = values - values.max(axis=1, keepdims=True)
    p = (np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True))[range(len(ROWS)), labels]
    expected = (weight.double().numpy()[labels] * (1 - p) ** gamma * -np.log(p)).sum()
    assert focal_sum(logits, labels, weight, gamma).item() == pytest.approx(expected, rel=1e-5)


@given(
    gamma=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    margin=st.floats(-1e4, 1e4, width=32),
    label=st.integers(0, 2),
)
def test_the_focal_loss_has_a_finite_gradient(gamma: float, margin: float, label: int) -> None:
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    loss = focal_sum(logits, torch.tensor([label]), None, gamma)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_focal_loss_of_nan_is_nan() -> None:
    assert focal_sum(torch.full((1, 3), torch.nan), torch.tensor([0]), None, 2.0).isnan()


@pytest.mark.parametrize(
    "recipe", [PLAIN, ClassificationRecipe(0.7, 0.0), ClassificationRecipe(1.0, 2.0)]
)
@pytest.mark.parametrize("ends", [[0, 4, 7], [0, 1, 3, 7]])
def test_shares_average_to_the_whole_in_value_and_gradient(
    recipe: ClassificationRecipe, ends: list[int]
) -> None:
    output = outputs()
    logits = output.logits.requires_grad_()
    loss = Classification(LABELS, 3, recipe)(output, whole(ROWS))
    (expected,) = torch.autograd.grad(loss, logits)
    processes = len(ends) - 1
    objective = Classification(LABELS, 3, recipe, processes)
    losses = [
        objective(FusionOutput(logits[start:end]), Share(ROWS[start:end], ROWS))
        for start, end in pairwise(ends)
    ]
    mean = torch.stack(losses).mean()
    assert torch.allclose(mean, loss, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(mean, logits)[0], expected, rtol=1e-5, atol=1e-8)


def test_distillation_is_equation_6() -> None:
    taught = outputs(len(LABELS), seed=1)
    recipe = StudentRecipe(OPTIMISATION, 2.0, 0.3, 1.0, 0.5, 0.7, 0.4)
    objective = Distillation(
        Classification(LABELS, 3, PLAIN), recipe, taught.logits, taught.features
    )
    output = outputs()
    criterion = StudentLoss(
        0.3, 0.7, response=DISTLoss(2.0, 1.0, 0.5), feature=BatchSimilarityLoss(0.4)
    )
    terms = criterion(
        output.logits,
        taught.logits[ROWS],
        LABELS[ROWS],
        student_features=output.features,
        teacher_features=taught.features[ROWS],
    )
    assert torch.equal(objective(output, whole(ROWS)), terms.total)


def test_a_balanced_distillation_balances_the_labels_alone() -> None:
    taught = outputs(len(LABELS), seed=1)
    recipe = StudentRecipe(OPTIMISATION, 2.0, 0.3, 1.0, 0.5, 0.7, 0.4)
    output, share = outputs(), whole(ROWS)
    plain, balanced = (
        Classification(LABELS, 3, numbers) for numbers in (PLAIN, ClassificationRecipe(1.0))
    )
    losses = [
        Distillation(first, recipe, taught.logits, taught.features)(output, share)
        - first(output, share)
        for first in (plain, balanced)
    ]
    assert torch.allclose(*losses, rtol=1e-6)


def test_a_distillation_remembers_and_its_state_goes_on() -> None:
    taught = outputs(len(LABELS), seed=1)
    recipe = StudentRecipe(OPTIMISATION, 2.0, 0.3, 1.0, 0.5, 0.7, 0.4, memory_size=5)

    def distillation(numbers: StudentRecipe) -> Distillation:
        first = Classification(LABELS, 3, PLAIN)
        return Distillation(first, numbers, taught.logits, taught.features)

    objective, plain = distillation(recipe), distillation(replace(recipe, memory_size=0))
    first, second = (whole(torch.arange(start, start + 4)) for start in (0, 4))
    assert torch.equal(objective(outputs(4), first), plain(outputs(4), first))
    again = distillation(recipe)
    again.load_state_dict(objective.state_dict())
    loss = objective(outputs(4, seed=2), second)
    assert torch.equal(again(outputs(4, seed=2), second), loss)
    assert not torch.allclose(plain(outputs(4, seed=2), second), loss, rtol=1e-3)
    assert plain.state_dict() == {}
    assert isinstance(objective, Stateful)
    assert not isinstance(Classification(LABELS, 3, PLAIN), Stateful)
