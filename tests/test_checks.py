"""What the checks return, what they never look at, and the warnings they give."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss, _checks
from telme_kd.errors import DegenerateBatchWarning, DTypeError, RangeError
from telme_kd.functional import (
    batch_similarity_loss,
    bounded_shift,
    dist_loss,
    linear_dist_loss,
)

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), Fraction(2)])
def test_numbers_of_any_kind_become_floats(value: Any) -> None:
    for number in (_checks.positive_temperature(value), _checks.non_negative("x", value)):
        assert number == 2.0
        assert type(number) is float
    assert DISTLoss(temperature=value).temperature == 2.0


@given(value=st.floats(min_value=1e-150, max_value=1e150))
def test_temperature_is_what_it_is_given(value: float) -> None:
    assert _checks.positive_temperature(value) == value


@given(
    value=st.floats(max_value=1e-170)
    | st.floats(min_value=1e160)
    | st.sampled_from([float("nan"), float("inf")])
)
def test_temperature_is_refused_where_its_square_is_no_positive_number(value: float) -> None:
    with pytest.raises(RangeError, match=r"^temperature: expected a finite number > 0"):
        _checks.positive_temperature(value)


@given(value=st.floats(min_value=0, allow_infinity=False))
def test_non_negative_returns_what_it_is_given(value: float) -> None:
    assert _checks.non_negative("x", value) == value


@pytest.mark.parametrize("value", [3, np.int32(3), np.int64(3)])
def test_integers_of_any_kind_become_ints(value: Any) -> None:
    assert type(_checks.integer("x", value)) is int
    assert type(_checks.positive_integer("x", value)) is int
    assert _checks.widths("x", [value, 2]) == (3, 2)


def test_bools_are_no_numbers() -> None:
    for check in (
        _checks.non_negative,
        _checks.probability,
        _checks.integer,
        _checks.positive_integer,
    ):
        with pytest.raises(DTypeError, match=r"^x: expected .*, got a bool; "):
            check("x", True)
    with pytest.raises(DTypeError, match=r"^temperature: expected .*, got a bool; "):
        _checks.positive_temperature(True)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, np.float32(0.25)])
def test_probability_lies_in_a_half_open_interval(value: float) -> None:
    assert _checks.probability("x", value) == value


def test_environment_decides_or_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("auto", "streaming", "chunked")
    monkeypatch.delenv("PLAN", raising=False)
    assert _checks.environment_word("PLAN", words) == "auto"
    assert _checks.environment_integer("PLAN", 7) == 7
    for word in words:
        monkeypatch.setenv("PLAN", word)
        assert _checks.environment_word("PLAN", words) == word
    monkeypatch.setenv("PLAN", "12")
    assert _checks.environment_integer("PLAN", 7) == 12


@pytest.mark.parametrize("held", ["", "Streaming", "0", "-1", "1.5", "1e9"])
def test_environment_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    monkeypatch.setenv("PLAN", held)
    with pytest.raises(RangeError, match="PLAN: expected one of 'auto', 'chunked' in the"):
        _checks.environment_word("PLAN", ("auto", "chunked"))
    with pytest.raises(RangeError, match="PLAN: expected an integer >= 1 in the"):
        _checks.environment_integer("PLAN", 7)


def test_eps_may_be_none_or_zero() -> None:
    assert _checks.optional_eps(None) is None
    assert _checks.optional_eps(0) == 0.0


@pytest.mark.parametrize(("axis", "ndim"), [(0, 2), (1, 2), (-1, 2), (-2, 2), (3, 4), (-4, 4)])
def test_axis_that_a_tensor_has_is_returned(axis: int, ndim: int) -> None:
    assert _checks._axis_of("class_dim", axis, "x", torch.ones([2] * ndim)) == axis


# --- tensors --------------------------------------------------------------------------------------


def test_checks_look_at_no_tensor_values() -> None:
    # Tensors on the meta device have none: whatever looked would fail, and make a GPU wait.
    logits, features = torch.empty(2, 4, 7, device="meta"), torch.empty(2, 4, 5, device="meta")
    mask = torch.empty(4, dtype=torch.bool, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    assert dist_loss(*logits, mask=mask).device.type == "meta"
    assert batch_similarity_loss(*features, mask=mask).device.type == "meta"
    assert bounded_shift(*features, threshold=0.1).device.type == "meta"
    linear_heads = features[0], features[0], features[1], features[1]
    assert linear_dist_loss(*linear_heads, mask=mask).device.type == "meta"
    _checks.class_labels(labels, (4,), logits[0])


def test_only_checks_raise_to_users() -> None:
    from telme_kd import batch_similarity, dist, functional, fusion, linear_dist, student

    for module in (batch_similarity, dist, functional, fusion, linear_dist, student):
        assert "raise " not in inspect.getsource(module), module


# --- warnings of degenerate batches ---------------------------------------------------------------


def dist(items: int, classes: int, **options: Any) -> None:
    dist_loss(torch.randn(items, classes), torch.randn(items, classes), **options)


def similarity(items: int, width: int = 4, **options: Any) -> None:
    batch_similarity_loss(torch.randn(items, width), torch.randn(items, width), **options)


KINDS: dict[str, tuple[Callable[[], None], str]] = {
    "one item": (lambda: dist(1, 7), r"^batch_size=1: the intra-class term is constant"),
    "two items": (lambda: dist(2, 7), r"^batch_size=2: every intra-class correlation is \+1, -1"),
    "one class": (lambda: dist(7, 1), r"^num_classes=1: both terms are constant"),
    "two classes": (lambda: dist(7, 2), r"^num_classes=2: every inter-class correlation is \+1"),
    "one feature row": (lambda: similarity(1), r"^batch_size=1: the batch-similarity loss is 0"),
}


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_batch_warns_exactly_once(
    kind: str, caught: list[warnings.WarningMessage]
) -> None:
    call, pattern = KINDS[kind]
    for _ in range(3):
        call()
    assert [message.category for message in caught] == [DegenerateBatchWarning]
    with pytest.warns(DegenerateBatchWarning, match=pattern):
        warnings.warn_explicit(caught[0].message, None, "", 0)


def test_every_kind_warns_apart(caught: list[warnings.WarningMessage]) -> None:
    for _ in range(2):
        for call, _ in KINDS.values():
            call()
    assert len(caught) == len(KINDS)
    assert len({str(message.message) for message in caught}) == len(KINDS)


def test_small_in_both_directions_warns_of_both(caught: list[warnings.WarningMessage]) -> None:
    dist(2, 2)
    assert sorted(str(message.message).split(":")[0] for message in caught) == [
        "batch_size=2",
        "num_classes=2",
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda: dist(3, 3),
        lambda: dist(3, 3, mask=torch.tensor([True, False, False])),  # no values are looked at
        lambda: dist(1, 3, intra_weight=0.0),  # whose items are not related
        lambda: similarity(2),
        lambda: similarity(3, width=1),
        lambda: dist_loss(*torch.randn(2, 1, 3, 3)),  # the batch axes count together
    ],
)
def test_batch_with_relations_does_not_warn(call: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_class_dim_decides_what_is_small(caught: list[warnings.WarningMessage]) -> None:
    dist_loss(*torch.randn(2, 5, 1), class_dim=0)
    assert [str(message.message).split(":")[0] for message in caught] == ["batch_size=1"]


def test_modules_warn_like_the_functions(caught: list[warnings.WarningMessage]) -> None:
    logits, features = torch.randn(2, 1, 7), torch.randn(2, 1, 4)
    DISTLoss()(*logits)
    BatchSimilarityLoss()(*features)
    StudentLoss()(
        *logits, torch.zeros(1).long(), student_features=features[0], teacher_features=features[1]
    )
    assert len(caught) == 2


def test_warning_points_at_the_caller(caught: list[warnings.WarningMessage]) -> None:
    dist(1, 7)
    similarity(1)
    weight = torch.ones(2, 4)
    linear_dist_loss(weight[None], weight, weight[None], weight)  # two items, two classes
    DISTLoss()(torch.randn(5, 1), torch.randn(5, 1))
    assert len(caught) == 5
    assert {message.filename for message in caught} == {__file__}


def test_warning_turned_into_an_error_is_raised_once() -> None:
    with pytest.raises(DegenerateBatchWarning, match="batch_size=1"):  # pytest's own filter
        dist(1, 7)
    dist(1, 7)


def test_compiled_losses_do_not_warn(caught: list[warnings.WarningMessage]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(DISTLoss(), backend="eager", fullgraph=True)
    compiled(torch.randn(1, 7), torch.randn(1, 7))
    assert not [m for m in caught if m.category is DegenerateBatchWarning]
