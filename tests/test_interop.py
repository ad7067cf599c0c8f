"""Released fusion checkpoints: golden logits and gradients, and every refusal."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from telme_kd.errors import CheckpointError, RangeError
from telme_kd.interop import load_released_fusion
from tests.helpers import golden, tolerances

NAMES = ("text", "visual", "acoustic")
State = dict[str, Tensor]


def state_of(case: golden.Case) -> State:
    prefix = "state/"
    return {
        key.removeprefix(prefix): torch.tensor(value)
        for key, value in case.items()
        if key.startswith(prefix)
    }


def released_state(
    anchor: int = 3, nonverbal: int = 4, classes: int = 2, dtype: torch.dtype = torch.float32
) -> State:
    """Weights under the released names, in small."""
    shapes = {
        "multihead_attn.in_proj_weight": (3 * nonverbal, nonverbal),
        "multihead_attn.in_proj_bias": (3 * nonverbal,),
        "multihead_attn.out_proj.weight": (nonverbal, nonverbal),
        "multihead_attn.out_proj.bias": (nonverbal,),
        "AV_LayerNorm.weight": (nonverbal,),
        "AV_LayerNorm.bias": (nonverbal,),
        "W_hav.weight": (anchor, nonverbal + anchor),
        "W_hav.bias": (anchor,),
        "W_av.weight": (anchor, nonverbal),
        "W_av.bias": (anchor,),
        "LayerNorm.weight": (anchor,),
        "LayerNorm.bias": (anchor,),
        "W.weight": (classes, anchor),
        "W.bias": (classes,),
    }
    generator = torch.manual_seed(0)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


# --- golden values --------------------------------------------------------------------------------


def assert_golden(case: golden.Case) -> None:
    fusion = load_released_fusion(
        state_of(case), num_heads=int(case["num_heads"]), threshold=float(case["threshold"])
    )
    leaves = [torch.tensor(case[name]).requires_grad_() for name in NAMES]
    logits = fusion(*leaves)
    (logits**2).sum().backward()
    # Nothing here is ill-conditioned, B = 1 included: measured 2e-14 and 2e-15.
    tolerance = tolerances.GOLDEN_WELL_CONDITIONED
    error = np.abs(logits.detach().numpy() - case["logits"])
    assert (error <= tolerance * np.abs(case["logits"]).max()).all()
    for name, leaf in zip(NAMES, leaves, strict=True):
        expected = case[f"{name}_grad"]
        error = np.linalg.norm(leaf.grad.numpy() - expected)
        assert error <= tolerance * np.linalg.norm(expected), name


@pytest.mark.parametrize("case", golden.cases("released_fusion"))
def test_golden_logits_and_gradients(case: golden.Case) -> None:
    assert_golden(case)


def test_golden_logits_and_gradients_of_all_files() -> None:
    for case in golden.load(golden.full_directory(), "released_fusion").values():
        assert_golden(case)


# --- what is built --------------------------------------------------------------------------------


def test_head_is_in_evaluation_mode_attends_over_the_batch_and_keeps_the_constant() -> None:
    fusion = load_released_fusion(released_state(), num_heads=2, threshold=0.2)
    assert not fusion.training
    assert fusion.attend_over == "batch"
    assert fusion.student_dims == (2, 2)
    assert fusion.shift.threshold == 0.2
    assert fusion.shift.eps == 1e-6
    assert fusion.dropout.p == fusion.attention_dropout.p == 0.2
    assert all(parameter.requires_grad for parameter in fusion.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_head_has_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    fusion = load_released_fusion(released_state(dtype=dtype), num_heads=2, threshold=0.1)
    assert all(parameter.dtype is dtype for parameter in fusion.parameters())
    assert torch.equal(fusion.classifier.weight, released_state(dtype=dtype)["W.weight"])


def test_students_may_have_different_widths() -> None:
    fusion = load_released_fusion(
        released_state(), num_heads=2, threshold=0.1, student_dims=(1, 3), dropout=0.0
    )
    even = load_released_fusion(released_state(), num_heads=2, threshold=0.1)
    text, nonverbal = torch.randn(5, 3), torch.randn(5, 4)
    assert fusion.student_dims == (1, 3)
    assert torch.equal(
        fusion(text, nonverbal[:, :1], nonverbal[:, 1:]),
        even(text, nonverbal[:, :2], nonverbal[:, 2:]),
    )


@pytest.mark.parametrize("mapping", [dict, OrderedDict])
def test_parallel_prefix_is_dropped(mapping: Callable[[Any], Any]) -> None:
    state = released_state()
    plain = load_released_fusion(state, num_heads=2, threshold=0.1)
    prefixed = mapping((f"module.{name}", value) for name, value in state.items())
    fusion = load_released_fusion(prefixed, num_heads=2, threshold=0.1)
    for name, value in fusion.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_state_is_copied_and_not_modified() -> None:
    state = released_state()
    originals = {name: value.clone() for name, value in state.items()}
    fusion = load_released_fusion(state, num_heads=2, threshold=0.1)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.zero_()
    assert list(state) == list(originals)
    assert all(torch.equal(value, originals[name]) for name, value in state.items())


def test_gate_reads_the_nonverbal_side_from_its_own_columns() -> None:
    state = released_state()
    fusion = load_released_fusion(state, num_heads=2, threshold=0.1)
    gate, released = fusion.shift.gate.weight, state["W_hav.weight"]
    assert torch.equal(gate[:, :3], released[:, 4:])  # the anchor's, first here, last there
    assert torch.equal(gate[:, 3:], released[:, :4])


# --- refusals -------------------------------------------------------------------------------------


def _without(*names: str) -> State:
    return {name: value for name, value in released_state().items() if name not in names}


def _with(**changes: Any) -> State:
    return released_state() | {name.replace("__", "."): value for name, value in changes.items()}


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no mapping": (
        lambda: [("W.weight", torch.ones(2, 3))],
        r"expected a mapping of names to tensors, got a list; load the file with safetensors, or "
        r"with torch\.load\(\.\.\., weights_only=True\)",
    ),
    "a module": (lambda: torch.nn.Linear(2, 2), r"expected a mapping.*got a Linear"),
    "missing": (lambda: _without("W.bias"), r"got missing W\.bias;"),
    "all missing": (dict, r"missing AV_LayerNorm\.bias; missing AV_LayerNorm\.weight; missing L"),
    "two missing": (
        lambda: _without("W.bias", "W_av.weight"),
        r"missing W\.bias; missing W_av\.weight;",
    ),
    "unexpected": (lambda: _with(extra=torch.ones(1)), r"got unexpected extra;"),
    "missing and unexpected": (
        lambda: _without("W.bias") | {"w.bias": torch.ones(2)},
        r"missing W\.bias; unexpected w\.bias;",
    ),
    "integers": (
        lambda: _with(W__bias=torch.ones(2, dtype=torch.int64)),
        r"W\.bias is no dense floating tensor",
    ),
    "a list": (lambda: _with(W__bias=[1.0, 2.0]), r"W\.bias is no dense floating tensor"),
    "sparse": (
        lambda: _with(W__weight=torch.ones(2, 3).to_sparse()),
        r"W\.weight is no dense floating tensor",
    ),
    "no matrix": (lambda: _with(W__weight=torch.ones(6)), r"W\.weight: expected 2 axes, got 1"),
    "two no matrices": (
        lambda: _with(W__weight=torch.ones(6), W_av__weight=torch.ones(1, 3, 4)),
        r"W_av\.weight: expected 2 axes, got 3; W\.weight: expected 2 axes, got 1",
    ),
    "shape": (
        lambda: _with(W_hav__weight=torch.ones(3, 6)),
        r"W_hav\.weight: expected \(3, 7\), got \(3, 6\)",
    ),
    "several shapes": (
        lambda: _with(LayerNorm__bias=torch.ones(4), W__bias=torch.ones(1)),
        r"LayerNorm\.bias: expected \(3,\), got \(4,\); W\.bias: expected \(2,\), got \(1,\)",
    ),
    "attention's shape": (
        lambda: _with(multihead_attn__in_proj_weight=torch.ones(12, 5)),
        r"in_proj_weight: expected \(12, 4\), got \(12, 5\)",
    ),
    "mixed dtypes": (
        lambda: _with(W__bias=torch.ones(2).half()),
        r"expected one dtype, got torch\.float16, torch\.float32",
    ),
    "nan": (
        lambda: _with(W__bias=torch.tensor([1.0, torch.nan])),
        r"W\.bias holds NaN or infinity",
    ),
    "infinity": (
        lambda: _with(
            W__bias=torch.tensor([1.0, -torch.inf]), AV_LayerNorm__bias=torch.full((4,), torch.inf)
        ),
        r"(W\.bias|AV_LayerNorm\.bias) holds NaN or infinity; .*holds NaN or infinity;",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_faulty_state_is_refused_with_every_fault(name: str) -> None:
    state, pattern = REFUSALS[name]
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load_released_fusion(state(), num_heads=2, threshold=0.1)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("state_dict: expected ")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"num_heads": 3}, r"^num_heads: expected a divisor of the attention's width, 4, got 3; "),
        ({"num_heads": 0}, r"^num_heads: expected an integer >= 1, got 0; "),
        ({"threshold": -0.1}, r"^threshold: expected a finite number >= 0, got -0.1; "),
        ({"dropout": 1.0}, r"^dropout: expected a number in \[0, 1\), got 1.0; "),
        (
            {"student_dims": (2, 3)},
            r"^student_dims: expected widths that add up to 4, got \(2, 3\); ",
        ),
        ({"student_dims": ()}, r"^student_dims: expected at least one width, got none; "),
        ({"student_dims": (4, 0)}, r"^student_dims\[1\]: expected an integer >= 1, got 0; "),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_checkpoint_are_refused(
    options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(RangeError, match=pattern):
        load_released_fusion(released_state(), **{"num_heads": 2, "threshold": 0.1} | options)


def test_odd_width_needs_the_students_widths() -> None:
    state = released_state(nonverbal=5)
    with pytest.raises(RangeError, match="number of students"):
        load_released_fusion(state, num_heads=1, threshold=0.1)
    fusion = load_released_fusion(state, num_heads=1, threshold=0.1, student_dims=(2, 3))
    assert fusion(torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 3)).shape == (4, 2)
