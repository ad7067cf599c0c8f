"""The bounded shift, the gate before it and the attention before that."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from telme_kd import AttentionShiftingFusion, ShiftingFusion
from telme_kd.errors import RangeError
from telme_kd.functional import bounded_shift
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Shift

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
MODES = pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
ATTENTIONS = pytest.mark.parametrize("attend_over", ["modalities", "dialogue", "batch"])


def lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors.double(), dim=-1)


# --- bounded_shift: values ------------------------------------------------------------------------


def test_anchor_is_kept_to_the_bit_beside_a_displacement_that_vanishes_in_its_unit() -> None:
    anchor, displacement = torch.tensor([1e30, 0.0]), torch.tensor([0.0, 1e-30])
    assert torch.equal(bounded_shift(anchor, displacement, threshold=0.0), anchor)


@given(case=strategies.shifts())
def test_shift_points_along_the_displacement(case: Shift) -> None:
    anchor, displacement = case.tensors()
    moved = bounded_shift(anchor, displacement, threshold=case.threshold) - anchor
    along = (moved * displacement).sum(-1)
    parallel = lengths(moved) * lengths(displacement)
    rounding = 16 * tolerances.UNIT[torch.float64] * lengths(anchor) * lengths(displacement)
    assert ((along - parallel).abs() <= rounding + 1e-15 * parallel).all()


def test_released_constant_shortens_the_shift_of_short_displacements() -> None:
    anchor = torch.tensor([1e-7, 0.0], dtype=torch.float64)
    displacement = torch.tensor([0.0, 1e-7], dtype=torch.float64)
    exact = bounded_shift(anchor, displacement, threshold=0.1) - anchor
    released = bounded_shift(anchor, displacement, threshold=0.1, eps=1e-6) - anchor
    assert exact.norm().item() == pytest.approx(1e-8)
    assert released.norm().item() == pytest.approx(1e-7 * 0.1 * 1e-7 / 1.1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("other", [1e-30, 1.0, 1e30])
def test_vectors_of_any_magnitude_shift_by_the_right_length(size: float, other: float) -> None:
    anchor, displacement = torch.randn(2, 6, 16, generator=torch.manual_seed(0))
    anchor, displacement = size * anchor, other * displacement
    shifted = bounded_shift(anchor, displacement, threshold=0.5)
    expected = truth.bounded_shift(
        anchor.double().numpy(), displacement.double().numpy(), threshold=0.5
    )
    error = np.linalg.norm(shifted.double().numpy() - expected, axis=-1)
    assert (error <= 16 * tolerances.UNIT[torch.float32] * lengths(anchor).numpy()).all()


@PRECISIONS
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_norms_beyond_the_largest_number_bound_the_shift(
    threshold: float, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    anchor = torch.full((1, 16), 0.5 * largest, dtype=dtype)
    displacement = torch.full((1, 16), -0.5 * largest, dtype=dtype)
    shifted = bounded_shift(anchor, displacement, threshold=threshold)
    torch.testing.assert_close(shifted, (1 - threshold) * anchor, rtol=1e-6, atol=0.0)


@MODES
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["anchor", "displacement"])
def test_nan_and_infinity_stay_in_their_row_and_are_seen(
    side: int, value: float, eps: float | None
) -> None:
    pair = torch.randn(2, 4, 5, generator=torch.manual_seed(0))
    clean = bounded_shift(*pair, threshold=0.1, eps=eps)
    pair[side, 2, 1] = value
    shifted = bounded_shift(*pair, threshold=0.1, eps=eps)
    others = [0, 1, 3]
    assert torch.equal(shifted[others], clean[others])
    assert not shifted[2, 1].isfinite()


@MODES
@pytest.mark.parametrize("side", [0, 1], ids=["anchor", "displacement"])
def test_nan_anywhere_never_lets_a_shift_through_unbounded(side: int, eps: float | None) -> None:
    anchor = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    displacement = torch.tensor([[0.0, 0.0, 1e6, 0.0]])
    (anchor, displacement)[side][0, 3] = math.nan
    shifted = bounded_shift(anchor, displacement, threshold=0.1, eps=eps)
    assert shifted[0, 2].isnan() or abs(shifted[0, 2].item()) <= 0.5


# --- bounded_shift: gradients, shapes and dtypes --------------------------------------------------


@MODES
@pytest.mark.parametrize("threshold", [0.1, 10.0], ids=["bounded", "free"])
def test_upstream_gradient_of_any_layout_is_used(threshold: float, eps: float | None) -> None:
    anchor, displacement = torch.randn(2, 6, 5, dtype=torch.float64).requires_grad_().unbind()
    shifted = bounded_shift(anchor, displacement, threshold=threshold, eps=eps)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    layouts = [
        (upstream.T, upstream.T.contiguous()),
        (upstream[:, :1].T.expand(6, 5), upstream[:, :1].T.repeat(6, 1)),
        (torch.repeat_interleave(upstream.T, 2, dim=1)[:, ::2], upstream.T.contiguous()),
    ]
    for laid_out, plain in layouts:
        for gradient, expected in zip(
            torch.autograd.grad(shifted, (anchor, displacement), 2 * laid_out, retain_graph=True),
            torch.autograd.grad(shifted, (anchor, displacement), plain, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, 2 * expected, rtol=1e-14, atol=1e-14)


@MODES
def test_any_batch_axes_and_layouts_are_those_of_the_rows(eps: float | None) -> None:
    anchor, displacement = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    shifted = bounded_shift(anchor, displacement, threshold=0.3, eps=eps)
    rows = bounded_shift(anchor.reshape(-1, 5), displacement.reshape(-1, 5), threshold=0.3, eps=eps)
    assert torch.equal(shifted.reshape(-1, 5), rows)
    permuted = bounded_shift(
        anchor.permute(2, 0, 1, 3), displacement.permute(2, 0, 1, 3), threshold=0.3, eps=eps
    )
    assert torch.equal(permuted, shifted.permute(2, 0, 1, 3))
    transposed = bounded_shift(
        anchor.mT.contiguous().mT, displacement.mT.contiguous().mT, threshold=0.3, eps=eps
    )
    torch.testing.assert_close(transposed, shifted, rtol=1e-14, atol=1e-15)
    one = anchor[:1].expand_as(anchor)
    expanded = bounded_shift(one, displacement, threshold=0.3, eps=eps)
    assert torch.equal(expanded, bounded_shift(one.clone(), displacement, threshold=0.3, eps=eps))


@MODES
def test_inputs_are_never_modified(eps: float | None) -> None:
    anchor, displacement = torch.randn(4, 5), torch.randn(4, 5)
    originals = anchor.clone(), displacement.clone()
    bounded_shift(
        anchor.requires_grad_(), displacement.requires_grad_(), threshold=0.1, eps=eps
    ).sum().backward()
    for now, original in zip((anchor, displacement), originals, strict=True):
        assert torch.equal(now, original)
        assert now._version == 0


@MODES
@HALVES
@given(case=strategies.shifts(scale=(1e-2, 100)))
def test_half_precision_computes_in_float32(
    case: Shift, dtype: torch.dtype, eps: float | None
) -> None:
    anchor, displacement = case.tensors(dtype)
    options = {"threshold": case.threshold, "eps": eps}
    shifted = bounded_shift(anchor, displacement, **options)
    expected = bounded_shift(anchor.float(), displacement.float(), **options)
    assert shifted.dtype is dtype
    assert torch.equal(shifted, expected.to(dtype))
    wide = truth.bounded_shift(
        anchor.double().numpy(), displacement.double().numpy(), threshold=case.threshold
    )
    if eps is None:
        error = np.abs(shifted.double().numpy() - wide)
        stored = tolerances.units("bounded_shift", dtype) * np.abs(wide)
        computed = 16 * tolerances.UNIT[torch.float32] * lengths(anchor).numpy()[:, None]
        assert (error <= stored + computed + torch.finfo(dtype).tiny).all()


@MODES
@HALVES
def test_autocast_changes_nothing(dtype: torch.dtype, eps: float | None) -> None:
    anchor, displacement = torch.randn(2, 4, 5)
    expected = bounded_shift(anchor, displacement, threshold=0.1, eps=eps)
    with torch.autocast("cpu", dtype=dtype):
        shifted = bounded_shift(anchor, displacement, threshold=0.1, eps=eps)
    assert torch.equal(shifted, expected)


def test_mixed_dtypes_return_the_anchors() -> None:
    anchor, displacement = torch.randn(2, 4, 5, dtype=torch.float64)
    shifted = bounded_shift(anchor.half(), displacement, threshold=0.1)
    expected = bounded_shift(anchor.half().double(), displacement, threshold=0.1)
    assert shifted.dtype is torch.float16
    assert torch.equal(shifted, expected.half())
    assert bounded_shift(anchor, displacement.bfloat16(), threshold=0.1).dtype is torch.float64


# --- ShiftingFusion -------------------------------------------------------------------------------


def test_gate_and_shift_equal_numpy() -> None:
    torch.manual_seed(0)
    fusion = ShiftingFusion(6, 4, threshold=0.3).double()
    anchor, nonverbal = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    weights = {name: value.numpy() for name, value in fusion.state_dict().items()}
    both = np.concatenate((anchor.numpy(), nonverbal.numpy()), axis=1)  # <F, A>: the anchor first
    gate = np.maximum(both @ weights["gate.weight"].T + weights["gate.bias"], 0)
    value = nonverbal.numpy() @ weights["value.weight"].T + weights["value.bias"]
    expected = truth.bounded_shift(anchor.numpy(), gate * value, threshold=0.3)
    np.testing.assert_allclose(fusion(anchor, nonverbal).detach().numpy(), expected, rtol=1e-12)


@given(seed=strategies.seeds, threshold=st.sampled_from([0.0, 0.1, 0.2, 1.0]))
def test_fused_features_stay_near_the_anchor(seed: int, threshold: float) -> None:
    torch.manual_seed(seed)
    fusion = ShiftingFusion(6, 4, threshold=threshold)
    anchor, nonverbal = 10 * torch.randn(5, 6), 100 * torch.randn(5, 4)
    moved = lengths(fusion(anchor, nonverbal) - anchor)
    assert (moved <= threshold * lengths(anchor) + 1e-5 * lengths(anchor)).all()
    if threshold == 0:
        assert torch.equal(fusion(anchor, nonverbal), anchor)


def test_closed_gate_keeps_the_anchor_to_the_bit() -> None:
    fusion = ShiftingFusion(6, 4)
    nn.init.zeros_(fusion.gate.weight)
    nn.init.constant_(fusion.gate.bias, -1.0)
    anchor, nonverbal = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    shifted = fusion(anchor, nonverbal)
    assert torch.equal(shifted, anchor)
    shifted.sum().backward()
    assert torch.equal(anchor.grad, torch.ones(5, 6))
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_features_of_1e18_are_fused_in_float32() -> None:
    torch.manual_seed(0)
    fusion = ShiftingFusion(8, 4, threshold=0.1)
    anchor, nonverbal = 1e18 * torch.randn(5, 8), 1e18 * torch.randn(5, 4)
    leaf = nonverbal.clone().requires_grad_()
    fused = fusion(anchor, leaf)
    expected = copy.deepcopy(fusion).double()(anchor.double(), nonverbal.double())
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e13)
    moved = lengths(fused - anchor) / lengths(anchor)
    assert (moved > 0.01).all()
    assert (moved <= 0.1 * (1 + 1e-5)).all()
    fused.sum().backward()
    assert leaf.grad.isfinite().all()


def test_shifting_fusion_takes_any_batch_axes() -> None:
    torch.manual_seed(0)
    fusion = ShiftingFusion(6, 4)
    anchor, nonverbal = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    fused = fusion(anchor, nonverbal)
    rows = fusion(anchor.reshape(6, 6), nonverbal.reshape(6, 4)).reshape(2, 3, 6)
    torch.testing.assert_close(fused, rows, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fusion(anchor[0, 0], nonverbal[0, 0]), fused[0, 0])


def test_shifting_fusion_state_survives_a_round_trip() -> None:
    fusion, other = ShiftingFusion(6, 4, 0.2), ShiftingFusion(6, 4, 0.2)
    anchor, nonverbal = torch.randn(5, 6), torch.randn(5, 4)
    expected = fusion(anchor, nonverbal)
    assert set(fusion.state_dict()) == {"gate.weight", "gate.bias", "value.weight", "value.bias"}
    other.load_state_dict(_through_a_file(fusion.state_dict()))
    for copied in (other, copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert torch.equal(copied(anchor, nonverbal), expected)
    assert "threshold=0.2, eps=None" in repr(fusion)


def _through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return loaded


# --- AttentionShiftingFusion ----------------------------------------------------------------------


def head(
    attend_over: str = "modalities",
    *,
    student_dims: tuple[int, ...] = (4, 8),
    num_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> AttentionShiftingFusion:
    """A head in evaluation mode with weights that are the same in every test."""
    torch.manual_seed(11)
    fusion = AttentionShiftingFusion(6, student_dims, num_heads, attend_over=attend_over, **options)
    for parameter in fusion.parameters():  # biases and gains too: nothing is neutral by chance
        nn.init.normal_(parameter, std=0.5)
    return fusion.to(dtype).eval()


def inputs(
    *batch: int, student_dims: tuple[int, ...] = (4, 8), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.manual_seed(5)
    return [
        torch.randn(*batch, width, dtype=dtype, generator=generator) for width in (6, *student_dims)
    ]


def multihead(fusion: AttentionShiftingFusion) -> nn.MultiheadAttention:
    """PyTorch's attention with the head's weights."""
    ours = fusion.attention
    width = ours.output.out_features
    theirs = nn.MultiheadAttention(width, ours.num_heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.query_key_value.weight)
        theirs.in_proj_bias.copy_(ours.query_key_value.bias)
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    return theirs.to(ours.output.weight.dtype).eval()


def after_attention(
    fusion: AttentionShiftingFusion, anchor: Tensor, tokens: Tensor, attended: Tensor
) -> Tensor:
    """What follows the attention, from PyTorch's functions and the paper's equations."""
    weights = fusion.state_dict()
    functional = nn.functional
    normalised = functional.layer_norm(
        tokens + attended,
        attended.shape[-1:],
        weights["attention_norm.weight"],
        weights["attention_norm.bias"],
    )
    nonverbal = normalised.reshape(*anchor.shape[:-1], -1)
    gate = torch.relu(
        functional.linear(
            torch.cat((anchor, nonverbal), -1),
            weights["shift.gate.weight"],
            weights["shift.gate.bias"],
        )
    )
    value = functional.linear(nonverbal, weights["shift.value.weight"], weights["shift.value.bias"])
    shifted = torch.tensor(
        truth.bounded_shift(
            anchor.numpy(), (gate * value).numpy(), threshold=fusion.shift.threshold
        )
    )
    fused = functional.layer_norm(shifted, (6,), weights["norm.weight"], weights["norm.bias"])
    if "classifier.weight" in weights:
        fused = functional.linear(fused, weights["classifier.weight"], weights["classifier.bias"])
    return fused


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("num_classes", [None, 7])
def test_modalities_equal_torch_attention_over_students(
    num_heads: int, num_classes: int | None
) -> None:
    fusion = head(num_heads=num_heads, num_classes=num_classes)
    anchor, *students = inputs(5)
    tokens = torch.stack(
        [embed(x) for embed, x in zip(fusion.embeddings, students, strict=True)], dim=1
    )
    attended, _ = multihead(fusion)(tokens, tokens, tokens)
    expected = after_attention(fusion, anchor, tokens, attended)
    torch.testing.assert_close(fusion(anchor, *students), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [1, 3, 4])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_dialogue_equals_torch_attention_over_utterances(
    num_heads: int, causal: bool, padded: bool
) -> None:
    fusion = head("dialogue", num_heads=num_heads, causal=causal, num_classes=3)
    anchor, *students = inputs(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if padded else None
    tokens = torch.cat(students, dim=-1)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    attended, _ = multihead(fusion)(
        tokens,
        tokens,
        tokens,
        attn_mask=future,
        key_padding_mask=None if mask is None else ~mask,
    )
    expected = after_attention(fusion, anchor, tokens, attended)
    fused = fusion(anchor, *students, mask=mask)
    kept = torch.ones(2, 5, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(fused[kept], expected[kept], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_batch_equals_torch_attention_over_the_batch() -> None:
    fusion = head("batch", num_heads=3)
    anchor, *students = inputs(5)
    tokens = torch.cat(students, dim=-1)
    attended, _ = multihead(fusion)(tokens, tokens, tokens)  # 2-D: the batch is the sequence
    expected = after_attention(fusion, anchor, tokens, attended)
    torch.testing.assert_close(fusion(anchor, *students), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@PRECISIONS
@given(items=st.integers(1, 12), seed=strategies.seeds)
def test_modalities_output_is_that_of_the_item_alone(
    items: int, seed: int, dtype: torch.dtype
) -> None:
    fusion = head(dtype=dtype, num_classes=7)
    generator = torch.manual_seed(seed)
    batch = [torch.randn(items, width, dtype=dtype, generator=generator) for width in (6, 4, 8)]
    fused = fusion(*batch)
    alone = torch.cat([fusion(*(x[index : index + 1] for x in batch)) for index in range(items)])
    unbatched = torch.stack([fusion(*(x[index] for x in batch)) for index in range(items)])
    allowed = tolerances.units("fusion head", dtype) * max(1.0, fused.abs().max().item())
    assert (fused - alone).abs().max().item() <= allowed
    assert (fused - unbatched).abs().max().item() <= allowed


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1, 2], ids=["anchor", "first student", "last student"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=str)
def test_modalities_output_does_not_see_another_items_fault(which: int, value: float) -> None:
    fusion = head(dtype=torch.float32)
    batch = inputs(8, dtype=torch.float32)
    clean = fusion(*batch)
    batch[which][3] = value
    fused = fusion(*batch)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(fused[others], clean[others])
    if not math.isfinite(value):
        assert not fused[3].isfinite().any()


def test_modalities_gradient_does_not_reach_other_items() -> None:
    fusion = head()
    batch = [x.requires_grad_() for x in inputs(4)]
    fusion(*batch)[1].sum().backward()
    others = [0, 2, 3]
    assert all((x.grad[others] == 0).all() for x in batch)
    assert all((x.grad[1] != 0).any() for x in batch)


@torch.no_grad()
def test_batch_output_depends_on_the_others_as_documented() -> None:
    fusion = head("batch")
    batch = inputs(5)
    fused = fusion(*batch)
    alone = torch.cat([fusion(*(x[index : index + 1] for x in batch)) for index in range(5)])
    assert (fused - alone).abs().max() > 1e-3
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(fusion(*(x[order] for x in batch)), fused[order])


@torch.no_grad()
def test_batch_is_one_dialogue_of_all_items() -> None:
    batch, dialogue = head("batch"), head("dialogue")
    features = inputs(2, 3)
    flat = [x.reshape(6, -1) for x in features]
    mask = torch.tensor([[True, True, False], [True, False, True]])
    expected = dialogue(*flat).reshape(2, 3, 6)
    torch.testing.assert_close(batch(*features), expected)
    masked = dialogue(*flat, mask=mask.reshape(6)).reshape(2, 3, 6)
    torch.testing.assert_close(batch(*features, mask=mask)[mask], masked[mask])


MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("junk", [0.0, -7.0, 1e6, 1e30], ids=str)
def test_what_padding_holds_changes_no_bit(junk: float, causal: bool) -> None:
    fusion = head("dialogue", causal=causal)
    plain, junky = inputs(3, 5), inputs(3, 5)
    for features in junky:
        features[~MASK] = junk
    results = []
    for batch in (plain, junky):
        leaves = [x.clone().requires_grad_() for x in batch]
        fused = fusion(*leaves, mask=MASK)
        fused[MASK].square().sum().backward()
        assert all((x.grad[~MASK] == 0).all() for x in leaves)
        results.append((fused[MASK], *(x.grad[MASK] for x in leaves)))
    assert all(torch.equal(ours, other) for ours, other in zip(*results, strict=True))


@pytest.mark.parametrize("junk", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("attend_over", ["dialogue", "batch"])
def test_padding_may_hold_anything(attend_over: str, junk: float) -> None:
    fusion = head(attend_over)
    plain, junky = inputs(3, 5), inputs(3, 5)
    for features in junky:
        features[~MASK] = junk
    assert torch.equal(fusion(*junky, mask=MASK)[MASK], fusion(*plain, mask=MASK)[MASK])


def test_padding_of_any_size_leaves_gradients_finite() -> None:
    fusion = head("dialogue", dtype=torch.float32)
    batch = inputs(3, 5, dtype=torch.float32)
    for features in batch:
        features[~MASK] = 1e20
    fusion(*batch, mask=MASK)[MASK].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_padded_dialogue_equals_the_short_one(causal: bool) -> None:
    fusion = head("dialogue", causal=causal)
    features = inputs(3, 5)
    fused = fusion(*features, mask=MASK)
    for index, length in ((0, 5), (1, 3), (2, 1)):
        short = fusion(*(x[index, :length] for x in features))
        torch.testing.assert_close(fused[index, :length], short, rtol=1e-12, atol=1e-12)


def test_dialogue_of_padding_alone_stays_finite() -> None:
    fusion = head("dialogue")
    features = [x.requires_grad_() for x in inputs(3, 5)]
    mask = MASK.clone()
    mask[2] = False
    fused = fusion(*features, mask=mask)
    assert fused.isfinite().all()
    fused[mask].sum().backward()
    assert all(x.grad.isfinite().all() for x in features)
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@torch.no_grad()
def test_mask_that_keeps_all_is_no_mask() -> None:
    fusion = head("dialogue")
    features = inputs(3, 5)
    everything = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(fusion(*features, mask=everything), fusion(*features))


def test_causal_dialogue_does_not_see_the_future() -> None:
    fusion = head("dialogue", causal=True)
    features = inputs(2, 5)
    fused = fusion(*features)
    for now in range(5):
        changed = [x.clone() for x in features]
        for x in changed:
            x[:, now + 1 :] = 9.0
        torch.testing.assert_close(
            fusion(*changed)[:, : now + 1], fused[:, : now + 1], rtol=1e-12, atol=1e-12
        )
    leaves = [x.clone().requires_grad_() for x in features]
    fusion(*leaves)[:, 2].sum().backward()
    assert all((x.grad[:, 3:] == 0).all() for x in leaves)
    assert all((x.grad[:, :2] != 0).any() for x in leaves[1:])


def test_dialogue_sees_the_future_unless_causal() -> None:
    fusion = head("dialogue")
    leaves = [x.requires_grad_() for x in inputs(2, 5)]
    fusion(*leaves)[:, 2].sum().backward()
    assert all((x.grad[:, 3:] != 0).any() for x in leaves[1:])


@torch.no_grad()
def test_dialogues_do_not_see_each_other() -> None:
    fusion = head("dialogue")
    features = inputs(3, 5)
    fused = fusion(*features)
    for index in range(3):
        alone = fusion(*(x[index] for x in features))
        torch.testing.assert_close(fused[index], alone, rtol=1e-12, atol=1e-12)


@ATTENTIONS
@pytest.mark.parametrize("student_dims", [(5,), (4, 8), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("num_heads", [1, 3, 4, 7])
def test_any_number_of_students_of_any_widths_with_any_number_of_heads(
    student_dims: tuple[int, ...], num_heads: int, attend_over: str
) -> None:
    fusion = head(attend_over, student_dims=student_dims, num_heads=num_heads, num_classes=3)
    leaves = [x.requires_grad_() for x in inputs(2, 4, student_dims=student_dims)]
    logits = fusion(*leaves)
    assert logits.shape == (2, 4, 3)
    logits.square().sum().backward()
    for tensor in (*leaves, *fusion.parameters()):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).any()


@ATTENTIONS
def test_heads_that_divide_the_width_have_the_usual_number_of_weights(attend_over: str) -> None:
    fusion = head(attend_over, num_heads=4)
    usual = nn.MultiheadAttention(fusion.attention.output.out_features, 4)
    count = sum(parameter.numel() for parameter in usual.parameters())
    assert sum(parameter.numel() for parameter in fusion.attention.parameters()) == count


@ATTENTIONS
def test_dropout_works_in_training_and_not_in_evaluation(attend_over: str) -> None:
    fusion = head(attend_over, dropout=0.5)
    features = inputs(2, 4)
    assert torch.equal(fusion(*features), fusion(*features))
    fusion.train()
    torch.manual_seed(0)
    first = fusion(*features)
    assert (first == 0).any()
    assert not torch.equal(first, fusion(*features))
    torch.manual_seed(0)
    assert torch.equal(fusion(*features), first)
    assert torch.equal(
        head(attend_over, dropout=0.0).train()(*features), head(attend_over)(*features)
    )


@ATTENTIONS
def test_dropout_comes_after_each_norm(attend_over: str) -> None:
    fusion = head(attend_over, dropout=0.5).train()
    seen = []
    fusion.shift.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    fused = fusion(*inputs(2, 4))
    # A norm would have moved the zeros off zero, and scaled what is left.
    assert (seen[0] == 0).any()
    assert (fused == 0).any()


@ATTENTIONS
def test_zero_threshold_lets_the_anchor_speak_alone(attend_over: str) -> None:
    fusion = head(attend_over, threshold=0.0)
    anchor, *students = inputs(2, 4)
    others = [torch.randn_like(x) for x in students]
    assert torch.equal(fusion(anchor, *students), fusion(anchor, *others))


@ATTENTIONS
def test_head_state_survives_a_round_trip(attend_over: str) -> None:
    fusion = head(attend_over, num_classes=3)
    other = AttentionShiftingFusion(6, (4, 8), 2, attend_over=attend_over, num_classes=3)
    other = other.double().eval()
    features = inputs(2, 4)
    expected = fusion(*features)
    assert not torch.equal(other(*features), expected)
    other.load_state_dict(_through_a_file(fusion.state_dict()))
    for copied in (other, copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert torch.equal(copied(*features), expected)


def test_head_shows_its_options() -> None:
    shown = repr(head("dialogue", causal=True, threshold=0.2))
    assert "attend_over='dialogue', causal=True" in shown
    assert "threshold=0.2, eps=None" in shown


def test_new_head_starts_from_usual_weights() -> None:
    attention = AttentionShiftingFusion(6, (4, 8), 2).attention
    assert (attention.query_key_value.bias == 0).all()
    assert (attention.output.bias == 0).all()
    weight = attention.query_key_value.weight
    assert weight.abs().max().item() <= math.sqrt(6 / sum(weight.shape))


@ATTENTIONS
@HALVES
def test_head_runs_under_autocast_near_its_float32_output(
    attend_over: str, dtype: torch.dtype
) -> None:
    fusion = head(attend_over, dtype=torch.float32)
    features = inputs(2, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        fused = fusion(*features)
    expected = fusion(*features)
    allowed = 32 * tolerances.UNIT[dtype] * expected.abs().max().item()
    assert (fused.float() - expected).abs().max().item() <= allowed


@ATTENTIONS
@HALVES
def test_half_precision_head_returns_its_dtype(attend_over: str, dtype: torch.dtype) -> None:
    fusion = head(attend_over, dtype=dtype)
    features = inputs(2, 4, dtype=dtype)
    fused = fusion(*features)
    assert fused.dtype is dtype
    assert fused.isfinite().all()


# --- backends -------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer with an addition, as adapters make it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False, dtype=layer.weight.dtype)
        self.up = nn.Linear(2, layer.out_features, bias=False, dtype=layer.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features) + self.up(self.down(features))


class Doubled(nn.LayerNorm):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def _adapt_gate(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.gate = LowRank(fusion.shift.gate)


def _adapt_value(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.value = LowRank(fusion.shift.value)


def _hook_gate(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.gate.register_forward_hook(lambda module, given, output: 2 * output)


def _hook_value(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.value.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def _hook_shift(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.register_forward_hook(lambda module, given, output: 2 * output)


def _hook_norm(fusion: AttentionShiftingFusion) -> None:
    fusion.norm.register_forward_hook(lambda module, given, output: 2 * output)


def _hook_dropout(fusion: AttentionShiftingFusion) -> None:
    fusion.dropout.register_forward_hook(lambda module, given, output: 2 * output)


def _replace_norm(fusion: AttentionShiftingFusion) -> None:
    fusion.norm = Doubled(6).double()


def _patch_forward(fusion: AttentionShiftingFusion) -> None:
    usual = fusion.norm.forward
    fusion.norm.forward = lambda features: 2 * usual(features)


def _drop_biases(fusion: AttentionShiftingFusion) -> None:
    fusion.shift.gate.bias = fusion.shift.value.bias = fusion.norm.bias = None


def _drop_gains(fusion: AttentionShiftingFusion) -> None:
    fusion.norm = nn.LayerNorm(6, elementwise_affine=False)


def _weight_norm(fusion: AttentionShiftingFusion) -> None:
    nn.utils.parametrizations.weight_norm(fusion.shift.gate)


CHANGES = (
    _adapt_gate,
    _adapt_value,
    _hook_gate,
    _hook_value,
    _hook_shift,
    _hook_norm,
    _hook_dropout,
    _replace_norm,
    _patch_forward,
    _drop_biases,
    _drop_gains,
    _weight_norm,
)


@pytest.mark.parametrize("change", [lambda fusion: None, *CHANGES])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_changed_modules_count_whatever_the_backend(
    backend: str, change: Callable[[AttentionShiftingFusion], None]
) -> None:
    outcomes = []
    for name in (backend, "reference"):
        fusion = head(backend=name, num_classes=3)
        change(fusion)
        leaves = [x.requires_grad_() for x in inputs(2, 3)]
        fused = fusion(*leaves)
        fused.square().sum().backward()
        outcomes.append([fused, *(x.grad for x in (*leaves, *fusion.parameters()))])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_listener_to_every_module_hears_those_of_the_head() -> None:
    heard: list[type[nn.Module]] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: heard.append(type(module))
    )
    try:
        head()(*inputs(2))
    finally:
        handle.remove()
    assert heard.count(nn.LayerNorm) == 2
    assert heard.count(ShiftingFusion) == 1


@ATTENTIONS
def test_backend_does_not_show_in_the_state(attend_over: str) -> None:
    states = [head(attend_over, backend=name).state_dict() for name in ("auto", "reference")]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_unknown_backend_is_refused_where_the_module_is_made() -> None:
    for make in (
        lambda: ShiftingFusion(6, 4, backend="cuda"),  # type: ignore[arg-type]
        lambda: AttentionShiftingFusion(6, (4,), backend="cuda"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RangeError, match=r"^backend: expected one of 'auto', "):
            make()


def test_module_shows_its_backend() -> None:
    assert "backend='reference'" in repr(head(backend="reference"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_batch_passes(backend: str) -> None:
    fusion = head(backend=backend).train()
    features = [x.requires_grad_() for x in inputs(0)]
    fused = fusion(*features)
    assert fused.shape == (0, 6)
    fused.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in features)


def test_frozen_anchor_and_weights_get_no_gradient() -> None:
    fusion = head()
    fusion.shift.gate.requires_grad_(False)
    anchor, *students = inputs(3)
    fusion(anchor, *(x.requires_grad_() for x in students)).square().sum().backward()
    assert anchor.grad is None
    assert fusion.shift.gate.weight.grad is None
    assert all(x.grad is not None for x in (*students, fusion.shift.value.weight))


COMPILED: dict[str, Callable[[], tuple[nn.Module, list[Tensor], dict[str, Any]]]] = {
    "gate and shift": lambda: (ShiftingFusion(6, 4).double(), inputs(5)[:2], {}),
    "modalities": lambda: (head(num_classes=3), inputs(5), {}),
    "dialogue": lambda: (head("dialogue", causal=True), inputs(3, 5), {"mask": MASK}),
    "batch": lambda: (head("batch", eps=1e-6), inputs(5), {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_modules_compile_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    module, features, options = COMPILED[name]()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    fused, expected = compiled(*features, **options), module(*features, **options)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(fused.square().sum(), parameters)
    for name, gradient, other in zip(
        names, gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10, msg=name)
