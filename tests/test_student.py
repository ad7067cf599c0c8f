"""The student's objective (Eq. 6): its terms, its weights and its masks."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss
from telme_kd.functional import batch_similarity_loss, dist_loss
from tests.helpers import strategies, truth

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def batch(*shape: int, classes: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Logits, features and labels over batch axes, by the names of the arguments."""
    generator = torch.manual_seed(3)
    logits = torch.randn(2, *shape, classes, dtype=dtype, generator=generator)
    features = torch.randn(2, *shape, 4, dtype=dtype, generator=generator)
    return {
        "student_logits": logits[0],
        "teacher_logits": logits[1],
        "labels": torch.randint(classes, shape, generator=generator),
        "student_features": features[0],
        "teacher_features": features[1],
    }


@pytest.mark.parametrize("response_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("feature_weight", [0.0, 2.0])
def test_total_is_the_weighted_sum_of_the_terms(
    response_weight: float, feature_weight: float
) -> None:
    tensors = batch(8)
    response, feature = DISTLoss(4.0, eps=1e-8), BatchSimilarityLoss(0.5)
    criterion = StudentLoss(response_weight, feature_weight, response=response, feature=feature)
    terms = criterion(**tensors)
    assert terms._fields == ("total", "classification", "response", "feature")
    expected = truth.cross_entropy(tensors["student_logits"].numpy(), tensors["labels"].numpy())
    assert terms.classification.item() == pytest.approx(expected, rel=1e-14)
    logits = tensors["student_logits"], tensors["teacher_logits"]
    features = tensors["student_features"], tensors["teacher_features"]
    if response_weight:
        assert torch.equal(terms.response, dist_loss(*logits, temperature=4.0, eps=1e-8))
    else:
        assert terms.response.item() == 0
    if feature_weight:
        assert torch.equal(terms.feature, batch_similarity_loss(*features, temperature=0.5))
    else:
        assert terms.feature.item() == 0
    total = terms.classification + response_weight * terms.response
    assert torch.equal(terms.total, total + feature_weight * terms.feature)


def test_defaults_are_the_two_losses_at_weight_one() -> None:
    tensors = batch(8)
    explicit = StudentLoss(1.0, 1.0, response=DISTLoss(), feature=BatchSimilarityLoss())
    assert torch.equal(StudentLoss()(**tensors).total, explicit(**tensors).total)


def test_features_are_not_needed_without_their_weight() -> None:
    tensors = batch(8)
    without = {name: value for name, value in tensors.items() if "features" not in name}
    criterion = StudentLoss(feature_weight=0)
    assert torch.equal(criterion(**without).total, criterion(**tensors).total)


def test_gradient_is_the_weighted_sum_and_spares_the_teacher() -> None:
    tensors = batch(8)
    logits = tensors["student_logits"].requires_grad_()
    features = tensors["student_features"].requires_grad_()
    terms = StudentLoss(0.5, 2.0)(**tensors)
    parts = [torch.autograd.grad(term, logits, retain_graph=True)[0] for term in terms[:3]]
    (to_features,) = torch.autograd.grad(terms.feature, features, retain_graph=True)
    terms.total.backward()
    torch.testing.assert_close(parts[0], parts[1] + 0.5 * parts[2])
    torch.testing.assert_close(logits.grad, parts[0])
    torch.testing.assert_close(features.grad, 2.0 * to_features)
    assert tensors["teacher_logits"].grad is None


CROSS_ENTROPIES: list[dict[str, Any]] = [
    {},
    {"class_weight": torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])},
    {"label_smoothing": 0.1},
    {"class_weight": torch.tensor([0.5, 1.0, 0.0, 3.0, 0.1]), "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", CROSS_ENTROPIES, ids=range(4))
@pytest.mark.parametrize("ignored", [0, 3])
def test_classification_is_torch_cross_entropy(options: dict[str, Any], ignored: int) -> None:
    tensors = batch(8)
    labels = tensors["labels"]
    labels[:ignored] = -100
    weight = options.get("class_weight")
    expected = torch.nn.functional.cross_entropy(
        tensors["student_logits"],
        labels,
        weight=None if weight is None else weight.double(),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    terms = StudentLoss(0, 0, **options)(**tensors)
    torch.testing.assert_close(terms.classification, expected, rtol=1e-12, atol=0.0)


def test_ignored_labels_still_respond_and_relate() -> None:
    tensors = batch(8)
    plain = StudentLoss()(**tensors)
    tensors["labels"] = torch.full((8,), -100)
    terms = StudentLoss()(**tensors)
    assert terms.classification.item() == 0
    assert torch.equal(terms.response, plain.response)
    assert torch.equal(terms.feature, plain.feature)
    assert terms.total.isfinite()


@pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")
@given(
    seed=strategies.seeds,
    junk=st.sampled_from([0.0, 7.0, math.inf, math.nan]),
    options=st.sampled_from(CROSS_ENTROPIES),
)
def test_masked_items_are_absent_from_every_term(
    seed: int, junk: float, options: dict[str, Any]
) -> None:
    tensors = batch(8)
    mask = torch.tensor(np.random.default_rng(seed).random(8) < 0.6)
    mask[seed % 8] = True
    kept = {name: value[mask] for name, value in tensors.items()}
    for name, value in tensors.items():
        value[~mask] = 0 if name == "labels" else junk
    tensors["student_logits"].requires_grad_()
    criterion = StudentLoss(0.5, 2.0, response=DISTLoss(2.0), **options)
    terms, expected = criterion(**tensors, mask=mask), criterion(**kept)
    for ours, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-11, atol=1e-13)
    terms.total.backward()
    gradient = tensors["student_logits"].grad
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()


def test_all_masked_gives_zero_and_no_gradient() -> None:
    tensors = batch(8)
    tensors["student_logits"].requires_grad_()
    weights = torch.rand(5)
    for criterion in (StudentLoss(), StudentLoss(class_weight=weights, label_smoothing=0.1)):
        terms = criterion(**tensors, mask=torch.zeros(8, dtype=torch.bool))
        assert all(term.item() == 0 for term in terms)
        (gradient,) = torch.autograd.grad(terms.total, tensors["student_logits"])
        assert (gradient == 0).all()


def test_batch_axes_and_class_dim_are_those_of_the_flattened_batch() -> None:
    tensors = batch(2, 4)
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    flat = {name: value.flatten(0, 1) for name, value in tensors.items()}
    expected = StudentLoss()(**flat, mask=mask.flatten())
    assert torch.equal(StudentLoss()(**tensors, mask=mask).total, expected.total)
    for name in ("student_logits", "teacher_logits"):
        tensors[name] = tensors[name].movedim(-1, 1)
    criterion = StudentLoss(response=DISTLoss(class_dim=1))
    torch.testing.assert_close(criterion(**tensors, mask=mask).total, expected.total)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "student_features"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_are_never_laundered(name: str, value: float) -> None:
    tensors = batch(8)
    tensors[name][3, 2] = value
    assert StudentLoss()(**tensors).total.isnan()


@HALVES
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    tensors = batch(8, dtype=dtype)
    wide = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    criterion = StudentLoss(class_weight=torch.rand(5, generator=torch.manual_seed(0)))
    terms, expected = criterion(**tensors), criterion(**wide)
    for ours, other in zip(terms, expected, strict=True):
        assert ours.dtype is torch.float32
        assert torch.equal(ours, other)


@HALVES
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    tensors = batch(8, dtype=torch.float32)
    expected = StudentLoss()(**tensors)
    with torch.autocast("cpu", dtype=dtype):
        terms = StudentLoss()(**tensors)
    assert all(torch.equal(ours, other) for ours, other in zip(terms, expected, strict=True))


def test_inputs_are_never_modified() -> None:
    tensors = batch(8)
    originals = {name: value.clone() for name, value in tensors.items()}
    mask = torch.tensor([True, False] * 4)
    StudentLoss()(**tensors, mask=mask)
    for name, value in tensors.items():
        assert torch.equal(value, originals[name])
    assert torch.equal(mask, torch.tensor([True, False] * 4))


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.ones(8)},
        {"mask": torch.ones(4, 2, dtype=torch.bool)},
        {"mask": torch.ones(3, dtype=torch.bool)},
        {"teacher_logits": torch.ones(3, 5)},
        {"teacher_logits": None},
    ],
    ids=["mask dtype", "mask shape", "mask size", "teacher shape", "no teacher"],
)
def test_mistakes_are_told_even_where_the_term_is_skipped(change: dict[str, Any]) -> None:
    from telme_kd.errors import TelmeKDError

    with pytest.raises(TelmeKDError, match=r"^(mask|teacher_logits): expected "):
        StudentLoss(0, 0)(**batch(8) | change)


def test_class_weight_moves_with_the_module_but_is_no_state() -> None:
    criterion = StudentLoss(class_weight=torch.ones(5))
    assert criterion.state_dict() == {}
    assert criterion.double().class_weight.dtype is torch.float64
    assert criterion.to("meta").class_weight.device.type == "meta"


def test_module_survives_copying_and_shows_its_options() -> None:
    tensors = batch(8)
    criterion = StudentLoss(0.5, 2.0, response=DISTLoss(4.0), class_weight=torch.rand(5))
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(**tensors).total, criterion(**tensors).total)
        assert repr(copied) == repr(criterion)
    shown = repr(criterion)
    assert "response_weight=0.5, feature_weight=2.0, label_smoothing=0.0" in shown
    assert "(response): DISTLoss(temperature=4.0" in shown


def test_module_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    tensors = batch(8)
    criterion = StudentLoss(0.5, 2.0, class_weight=torch.rand(5))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([True] * 7 + [False])
    logits = tensors["student_logits"].requires_grad_()
    terms, expected = compiled(**tensors, mask=mask), criterion(**tensors, mask=mask)
    for ours, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        torch.autograd.grad(terms.total, logits), torch.autograd.grad(expected.total, logits)
    )


def test_a_memory_is_one_of_both_terms() -> None:
    criterion = StudentLoss(0.5, 2.0, memory_size=6)
    response, feature = DISTLoss(memory_size=6), BatchSimilarityLoss(memory_size=6)
    for shift in range(3):
        tensors = batch(8)
        tensors["student_logits"] = tensors["student_logits"].roll(shift, 0)
        mask = torch.arange(8) != shift
        terms = criterion(**tensors, mask=mask)
        logits = tensors["student_logits"], tensors["teacher_logits"]
        features = tensors["student_features"], tensors["teacher_features"]
        assert torch.equal(terms.response, response(*logits, mask))
        assert torch.equal(terms.feature, feature(*features, mask))
    given = StudentLoss(response=response, feature=feature, memory_size=6)
    assert given.response is response
    assert (
        StudentLoss(response=response).response.memory is response.memory
    )  # each may have its own


def test_a_mistake_in_one_term_leaves_the_memories_of_both() -> None:
    criterion = StudentLoss(memory_size=6)
    criterion(**batch(8))
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    with pytest.raises(ValueError, match="memory: expected rows of width 5"):
        criterion(**batch(8, classes=3))
    assert all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())
    criterion.eval()(**batch(8, classes=3))  # which does without


def test_a_skipped_term_remembers_nothing() -> None:
    criterion = StudentLoss(0.0, 1.0, memory_size=6)
    criterion(**batch(8))
    assert criterion.response.memory.is_unused
    assert not criterion.feature.memory.is_unused
