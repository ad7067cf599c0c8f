"""The gate and the shift as an operator: values, gradients, and what PyTorch may do with it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from telme_kd import AttentionShiftingFusion, ShiftingFusion, _dispatch
from telme_kd.errors import BackendError
from telme_kd.kernels import fusion as operator
from telme_kd.reference import fusion as reference
from tests.helpers import tolerances
from tests.helpers.conditions import conditions

pytest.importorskip("triton")

BACKENDS = ("cpu", "triton")
EPS = pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
NORMS = pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["shift", "normalised"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def tensors_of(
    batch: int = 7,
    width: int = 37,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    biases: bool = True,
    normalised: bool = True,
) -> list[Tensor | None]:
    """Anchor, gate, value and four parameters; one row free whatever the threshold, and so on."""
    generator = torch.manual_seed(seed)
    rows = [torch.randn(batch, width, generator=generator) for _ in range(3)]
    parameters = [torch.randn(width, generator=generator) for _ in range(4)]
    if batch > 4:
        rows[0][1] = 0.0  # no anchor: no shift
        rows[1][2] = -99.0  # the gate is shut
        rows[2][3] *= 1e-3  # short
    given: list[Tensor | None] = [tensor.to(dtype).requires_grad_() for tensor in rows + parameters]
    for index, wanted in ((3, biases), (4, biases), (5, normalised), (6, normalised)):
        if not wanted:
            given[index] = None
    return given


def options_of(**changed: Any) -> dict[str, Any]:
    return {
        "threshold": 0.1,
        "eps": None,
        "norm_eps": 1e-5,
        "rate": 0.0,
        "output_dtype": torch.float32,
        **changed,
    }


def outcome(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], **options: Any
) -> list[Tensor]:
    """The output, and the gradients of a projection of it, in float64."""
    leaves = [tensor for tensor in tensors if tensor is not None]
    output = function(*tensors, **options)
    upstream = torch.randn(output.shape, generator=torch.manual_seed(9)).bfloat16()
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype), allow_unused=True)
    return [x.double() for x in (output.detach(), *gradients) if x is not None]


def exact(tensors: Sequence[Tensor | None], **options: Any) -> list[Tensor]:
    """The same from the definition in float64."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    kept = {name: options[name] for name in ("threshold", "eps", "norm_eps")}
    return outcome(reference.gate_and_shift, wide, **kept)


def assert_near(ours: Sequence[Tensor], truth: Sequence[Tensor], unit: float) -> None:
    """Within 32 roundings of the largest entry of each.

    Sums over a row of up to some hundred features, a norm, LayerNorm's two moments and its backward
    each add a few; the sums over seven rows that give the parameters' gradients a few more.
    """
    assert len(ours) == len(truth)
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).abs().max() <= 32 * unit * true.abs().max().clamp_min(1e-30)


# --- values and gradients -------------------------------------------------------------------------


@EPS
@NORMS
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_rows_equal_the_definition(
    backend: Any, threshold: float, eps: float | None, norm_eps: float | None, biases: bool
) -> None:
    tensors = tensors_of(biases=biases, normalised=norm_eps is not None)
    options = options_of(threshold=threshold, eps=eps, norm_eps=norm_eps)
    ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
    assert_near(ours, exact(tensors, **options), tolerances.UNIT[torch.float32])


@EPS
@NORMS
@pytest.mark.parametrize("threshold", [0.0, 0.1, 10.0])
def test_float64_rows_equal_the_definition(
    threshold: float, eps: float | None, norm_eps: float | None
) -> None:
    tensors = tensors_of(dtype=torch.float64, normalised=norm_eps is not None)
    options = options_of(
        threshold=threshold, eps=eps, norm_eps=norm_eps, output_dtype=torch.float64
    )
    ours = outcome(operator.gate_and_shift, tensors, **options, backend="cpu")
    assert_near(ours, exact(tensors, **options), tolerances.UNIT[torch.float64])


@pytest.mark.parametrize("width", [1, 2, 16, 31, 64, 129])
@pytest.mark.parametrize("batch", [1, 3])
def test_ragged_widths_equal_the_definition(backend: Any, batch: int, width: int) -> None:
    # Of a single feature LayerNorm makes its bias; its gradient is a difference of equals.
    norm_eps = None if width == 1 else 1e-5
    tensors = tensors_of(batch, width, normalised=width != 1)
    options = options_of(norm_eps=norm_eps)
    ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
    truth = exact(tensors, **options)
    # Two features are normalised to one sign each: gradients vanish but for norm_eps.
    unit = tolerances.UNIT[torch.float32] * (100 if width == 2 else 1)
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).abs().max() <= 64 * unit * max(1.0, true.abs().max().item())


@pytest.mark.parametrize("anchor_scale", [1e-25, 1e-8, 1.0, 1e20])
@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1.0, 1e20])
@pytest.mark.parametrize("threshold", [0.1, 10.0])
def test_rows_of_any_magnitude_shift_as_defined(
    backend: Any, anchor_scale: float, scale: float, threshold: float
) -> None:
    if anchor_scale / scale < torch.finfo(torch.float32).tiny:
        pytest.skip("lambda itself, and with it the gradient of the gate, is below float32")
    anchor, gate, value, *_ = tensors_of(7, 16)
    assert anchor is not None
    assert gate is not None
    assert value is not None
    rows = [
        (anchor * anchor_scale).detach().requires_grad_(),
        gate,
        (value * scale).detach().requires_grad_(),
    ]
    tensors = [*rows, None, None, None, None]
    options = options_of(threshold=threshold, norm_eps=None)
    ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
    truth = exact(tensors, **options)
    for our, true in zip(ours, truth, strict=True):
        size = true.abs().amax(dim=-1, keepdim=True)
        # A gradient of 1e-45 is a denormal of few bits: below the smallest normal nothing is asked.
        assert ((our - true).abs() <= 2e-6 * size + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("anchor_scale", [0.0, 1e-25, 1e-8, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-8, 1.0])
@pytest.mark.parametrize("threshold", [0.1, 10.0])
def test_released_formula_keeps_its_gradients_where_its_squares_vanish(
    backend: Any, anchor_scale: float, scale: float, threshold: float
) -> None:
    anchor, gate, value, *_ = tensors_of(7, 16)
    assert anchor is not None
    assert gate is not None
    assert value is not None
    rows = [
        (anchor * anchor_scale).detach().requires_grad_(),
        gate,
        (value * scale).detach().requires_grad_(),
    ]
    tensors = [*rows, None, None, None, None]
    options = options_of(threshold=threshold, eps=1e-6, norm_eps=None)
    ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
    kept = {name: options[name] for name in ("threshold", "eps", "norm_eps")}
    eager = outcome(reference.gate_and_shift, tensors, **kept)
    for our, theirs in zip(ours, eager, strict=True):
        size = theirs.abs().amax(dim=-1, keepdim=True)
        assert ((our - theirs).abs() <= 2e-6 * size + torch.finfo(torch.float32).tiny).all()


def test_displacement_is_added_to_the_bit_where_it_is_free(backend: Any) -> None:
    anchor, gate, value, *_ = tensors_of()
    options = options_of(threshold=1e6, norm_eps=None)
    shifted = operator.gate_and_shift(
        anchor, gate, value, None, None, None, None, **options, backend=backend
    )
    assert anchor is not None
    assert gate is not None
    expected = anchor + gate.relu() * value
    assert torch.equal(shifted[2:], expected[2:])
    assert torch.equal(shifted[1], anchor[1])


def test_shut_gate_keeps_the_anchor_to_the_bit(backend: Any) -> None:
    anchor, gate, value, *_ = tensors_of()
    for threshold in (0.0, 0.1):
        shifted = operator.gate_and_shift(
            anchor,
            -gate.abs(),  # type: ignore[union-attr]
            value,
            None,
            None,
            None,
            None,
            **options_of(threshold=threshold, norm_eps=None),
            backend=backend,
        )
        assert torch.equal(shifted, anchor)


@EPS
@NORMS
@pytest.mark.parametrize("which", [0, 1, 2], ids=["anchor", "gate", "value"])
def test_nan_reaches_its_row_and_no_other(
    backend: Any, which: int, eps: float | None, norm_eps: float | None
) -> None:
    tensors = tensors_of()
    clean = operator.gate_and_shift(
        *tensors, **options_of(eps=eps, norm_eps=norm_eps), backend=backend
    )
    with torch.no_grad():
        tensors[which][4, 5] = torch.nan  # type: ignore[index]
    spoilt = operator.gate_and_shift(
        *tensors, **options_of(eps=eps, norm_eps=norm_eps), backend=backend
    )
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(spoilt[others], clean[others])
    if eps is None or norm_eps is not None:
        assert spoilt[4].isnan().all()
    (gradient,) = torch.autograd.grad(spoilt[4].sum(), tensors[:1])  # type: ignore[arg-type]
    assert gradient[4].isnan().any()
    assert not gradient[others].isnan().any()


@HALVES
@EPS
@NORMS
def test_half_precision_is_as_good_as_its_rounding(
    backend: Any, dtype: torch.dtype, eps: float | None, norm_eps: float | None
) -> None:
    tensors = tensors_of(dtype=dtype, normalised=norm_eps is not None)
    options = options_of(eps=eps, norm_eps=norm_eps, output_dtype=dtype)
    ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
    # Triton's interpreter cuts bits off where it stores bfloat16; GPUs round.
    roundings = 2 if backend == "triton" and dtype is torch.bfloat16 else 1
    for our, true in zip(ours, exact(tensors, **options), strict=True):
        # Computed in float32, then rounded once, when stored.
        allowed = roundings * tolerances.UNIT[dtype] * true.abs() + 1e-5 * true.abs().max() + 1e-7
        assert ((our - true).abs() <= allowed).all()


def test_mixed_dtypes_compute_in_the_widest(backend: Any) -> None:
    tensors = tensors_of()
    mixed = [
        tensor.detach().to(dtype).requires_grad_()  # type: ignore[union-attr]
        for tensor, dtype in zip(
            tensors,
            [
                torch.float32,
                *[torch.bfloat16] * 2,
                torch.float32,
                torch.float16,
                *[torch.float32] * 2,
            ],
            strict=True,
        )
    ]
    options = options_of()
    output = operator.gate_and_shift(*mixed, **options, backend=backend)
    gradients = torch.autograd.grad(output.sum(), mixed)
    assert output.dtype is torch.float32
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in mixed]
    ours = outcome(operator.gate_and_shift, mixed, **options, backend=backend)
    assert (ours[0] - exact(mixed, **options)[0]).abs().max() <= 1e-5


def test_strided_tensors_are_those_of_their_values(backend: Any) -> None:
    tensors = tensors_of(6, 20)
    plain = outcome(operator.gate_and_shift, tensors, **options_of(), backend=backend)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda rows: rows.T.contiguous().T if rows.ndim == 2 else rows.repeat_interleave(2)[::2],
        lambda rows: torch.cat((rows, rows), dim=-1)[..., : rows.shape[-1]],
    ]
    for layout in layouts:
        strided = [layout(tensor.detach()).requires_grad_() for tensor in tensors]  # type: ignore[union-attr]
        ours = outcome(operator.gate_and_shift, strided, **options_of(), backend=backend)
        for our, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(our, expected, rtol=1e-5, atol=1e-6)
    anchor, *rest = tensors
    one = anchor[:1].expand(6, 20)  # type: ignore[index]
    expanded = operator.gate_and_shift(one, *rest, **options_of(), backend=backend)
    copied = operator.gate_and_shift(one.clone(), *rest, **options_of(), backend=backend)
    assert torch.equal(expanded, copied)
    (gradient,) = torch.autograd.grad(expanded.sum(), rest[:1])  # type: ignore[arg-type]
    assert gradient.isfinite().all()  # its upstream is a number, expanded


def test_empty_batch_has_gradients_of_zero(backend: Any) -> None:
    tensors = tensors_of(0, 5)
    output = operator.gate_and_shift(*tensors, **options_of(rate=0.5), backend=backend)
    assert output.shape == (0, 5)
    gradients = torch.autograd.grad(output.sum(), tensors)  # type: ignore[arg-type]
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))  # type: ignore[arg-type]


def test_only_needed_gradients_are_made(backend: Any) -> None:
    every = outcome(operator.gate_and_shift, tensors_of(), **options_of(), backend=backend)[1:]
    for frozen in ([0], [3, 4, 5, 6], [0, 1, 2], [1, 3], [0, 1, 2, 3, 4], [5], [1, 2, 3, 4, 5, 6]):
        tensors = tensors_of()
        for index in frozen:
            tensors[index].requires_grad_(False)  # type: ignore[union-attr]
        output = operator.gate_and_shift(*tensors, **options_of(), backend=backend)
        output.backward(
            torch.randn(output.shape, generator=torch.manual_seed(9)).bfloat16().float()
        )
        for index, (tensor, gradient) in enumerate(zip(tensors, every, strict=True)):
            assert tensor is not None
            if index in frozen:
                assert tensor.grad is None
            else:
                assert torch.equal(tensor.grad.double(), gradient)  # type: ignore[union-attr]


def test_inputs_are_never_modified(backend: Any) -> None:
    tensors = tensors_of()
    originals = [tensor.clone() for tensor in tensors]  # type: ignore[union-attr]
    operator.gate_and_shift(*tensors, **options_of(rate=0.5), backend=backend).sum().backward()
    for tensor, original in zip(tensors, originals, strict=True):
        assert torch.equal(tensor, original)  # type: ignore[arg-type]


def _eager(*tensors: Tensor, **options: Any) -> Tensor:
    del options["rate"], options["output_dtype"]
    return reference.gate_and_shift(*tensors, **options)


@EPS
def test_float32_error_is_at_most_one_and_a_half_times_that_of_eager(
    backend: Any, eps: float | None
) -> None:
    """Of 200 draws, in units of what a draw makes of roundings, and of entries as they are."""
    errors: dict[str, list[Tensor]] = {"ours": [], "eager": []}
    squares: dict[str, list[Tensor]] = {"ours": [], "eager": []}
    options = options_of(eps=eps)
    for seed in range(200):
        tensors = tensors_of(4, 48, seed=seed)
        truth = exact(tensors, **options)
        wide = [tensor.detach().double() for tensor in tensors if tensor is not None]
        units = conditions(lambda *given: exact(given, **options), wide)
        ours = outcome(operator.gate_and_shift, tensors, **options, backend=backend)
        for name, found in (("ours", ours), ("eager", outcome(_eager, tensors, **options))):
            differences = [x - y for x, y in zip(found, truth, strict=True)]
            errors[name].append(torch.stack([x.norm() for x in differences]) / units)
            squares[name].append(torch.stack([x.square().mean() for x in differences]))
    ours_of_draws, eager_of_draws = (torch.stack(errors[name]) for name in ("ours", "eager"))
    assert (ours_of_draws.amax(0) <= 1.5 * eager_of_draws.amax(0)).all()
    assert (ours_of_draws.square().mean(0) <= 1.5**2 * eager_of_draws.square().mean(0)).all()
    ours_of_draws, eager_of_draws = (torch.stack(squares[name]) for name in ("ours", "eager"))
    assert (ours_of_draws.mean(0) <= 1.5**2 * eager_of_draws.mean(0)).all()


def test_repeats_agree_to_the_bit(backend: Any) -> None:
    repeats = 250 if backend == "cpu" else 5  # the interpreter takes milliseconds per program
    tensors = tensors_of()
    first = outcome(operator.gate_and_shift, tensors, **options_of(), backend=backend)
    for _ in range(repeats):
        again = outcome(operator.gate_and_shift, tensors, **options_of(), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_expectation(backend: Any, rate: float) -> None:
    rows = torch.empty(64, 256)
    torch.manual_seed(0)
    passes = operator._passes(backend)
    noise = passes.draw(rows)
    kept = passes.kept(noise, rows.shape, rate, torch.float32)
    deviation = (rate * (1 - rate) / rows.numel()) ** 0.5
    assert abs((kept == 0).float().mean().item() - rate) <= 4 * deviation
    assert set(kept.unique().tolist()) == {0.0, kept.max().item()}
    assert kept.max().item() == pytest.approx(1 / (1 - rate), rel=2e-4)
    for axis in (0, 1):  # no row and no column is privileged
        spread = (kept == 0).float().mean(axis).std().item()
        assert spread <= 2 * (rate * (1 - rate) / rows.shape[axis]) ** 0.5
    assert not torch.equal(kept, passes.kept(passes.draw(rows), rows.shape, rate, torch.float32))


@NORMS
def test_dropout_is_the_same_forward_and_backward(backend: Any, norm_eps: float | None) -> None:
    tensors = tensors_of(batch=4, width=64)
    options = options_of(norm_eps=norm_eps, rate=0.5)
    torch.manual_seed(3)
    dropped = operator.gate_and_shift(*tensors, **options, backend=backend)
    whole = operator.gate_and_shift(*tensors, **{**options, "rate": 0.0}, backend=backend)
    gone = dropped == 0
    assert 0.3 < gone.float().mean() < 0.7
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone])
    leaves = [tensor for tensor in tensors if tensor is not None]
    upstream = torch.randn(dropped.shape, generator=torch.manual_seed(4))
    ours = torch.autograd.grad(dropped, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(whole, leaves, 2 * upstream * ~gone, allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) is (their is None)
        if our is not None:
            torch.testing.assert_close(our, their)


def test_dropout_follows_the_generator(backend: Any) -> None:
    tensors, outputs = tensors_of(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(operator.gate_and_shift(*tensors, **options_of(rate=0.5), backend=backend))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    state = torch.get_rng_state()
    operator.gate_and_shift(*tensors, **options_of(rate=0.0), backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


# --- what PyTorch may do with it ------------------------------------------------------------------


@EPS
@NORMS
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_operator_passes_pytorchs_own_checks(
    backend: Any, rate: float, eps: float | None, norm_eps: float | None
) -> None:
    tensors = tensors_of(normalised=norm_eps is not None)
    noise = operator._passes(backend).draw(tensors[0]) if rate else None
    options = operator.Options(0.1, eps, norm_eps, rate, torch.float32, backend)
    torch.library.opcheck(operator._gate_and_shift, (*tensors, noise, *options, True))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 6), (3, 1)], ids=str)
def test_operator_passes_pytorchs_own_checks_on_degenerate_shapes(
    backend: Any, shape: tuple[int, int]
) -> None:
    options = operator.Options(0.1, None, None, 0.0, torch.float32, backend)
    for biases in (True, False):
        tensors = tensors_of(*shape, biases=biases, normalised=False)
        torch.library.opcheck(
            operator._gate_and_shift,
            (*tensors, None, *options, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def _head(backend: Any, **options: Any) -> AttentionShiftingFusion:
    torch.manual_seed(11)
    return AttentionShiftingFusion(12, (4, 8), 2, num_classes=3, backend=backend, **options)


def _features(*batch: int) -> list[Tensor]:
    generator = torch.manual_seed(5)
    return [torch.randn(*batch, width, generator=generator) for width in (12, 4, 8)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_head_is_the_eager_one_and_has_no_graph_break(
    backend: Any, dropout: float
) -> None:
    torch._dynamo.reset()
    head, features = _head(backend, dropout=dropout), _features(3, 2)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    outcomes = []
    for module in (head, compiled):
        head.zero_grad()
        torch.manual_seed(0)
        fused = module(*features)
        fused.square().sum().backward()
        outcomes.append([fused, *(parameter.grad for parameter in head.parameters())])
    for eager, traced in zip(*outcomes, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-6)


def test_compiled_evaluation_keeps_nothing(backend: Any) -> None:
    torch._dynamo.reset()
    head, features = _head(backend).eval(), _features(3)
    with torch.no_grad():
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*features), head(*features))


def test_compiling_for_any_batch_size_compiles_once(backend: Any) -> None:
    torch._dynamo.reset()
    fusion = ShiftingFusion(6, 4, backend=backend)
    compiled = torch.compile(fusion, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 8):
            rows = torch.randn(batch, 6), torch.randn(batch, 4)
            torch.testing.assert_close(compiled(*rows), fusion(*rows))


@HALVES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_multiplies_in_half_and_shifts_in_float32(
    backend: Any, dtype: torch.dtype, compiled: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    fusion = ShiftingFusion(12, 8, threshold=10.0, backend=backend)
    module: Any = fusion
    if compiled:
        module = torch.compile(fusion, backend="aot_eager", fullgraph=True)
    anchor, nonverbal = torch.randn(5, 12), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=dtype):
        shifted = module(anchor, nonverbal)
    assert shifted.dtype is torch.float32
    wide = fusion(anchor, nonverbal)
    error = (shifted - wide).abs().max().item()
    assert 0 < error <= 8 * tolerances.UNIT[dtype] * wide.abs().max().item()
    shifted.sum().backward()
    assert fusion.gate.weight.grad is not None
    assert fusion.gate.weight.grad.dtype is torch.float32


def test_backward_inside_autocast_keeps_its_precision(backend: Any) -> None:
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        fusion = ShiftingFusion(12, 8, backend=backend)
        shifted = fusion(torch.randn(5, 12), torch.randn(5, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            shifted.square().sum().backward()
        gradients.append([parameter.grad for parameter in fusion.parameters()])
    for plain, autocast in zip(*gradients, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_second_derivative_is_that_of_the_definition(backend: Any, rate: float) -> None:
    tensors = tensors_of(5, 6)
    leaves = [tensor for tensor in tensors if tensor is not None]
    options = options_of(threshold=1.0, rate=rate)
    torch.manual_seed(2)
    fused = operator.gate_and_shift(*tensors, **options, backend=backend)
    plain = _eager(*leaves, **options)
    if rate:
        plain = plain * 2 * (fused != 0)
    seconds = []
    for output in (fused, plain):
        gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in gradients)
        seconds.append((*gradients, *torch.autograd.grad(norm, leaves)))
    for ours, theirs in zip(*seconds, strict=True):
        size = theirs.abs().max().clamp_min(1.0)
        assert ((ours - theirs).abs() <= 1e-4 * size).all()


def test_second_derivative_reaches_through_the_products() -> None:
    seconds = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        fusion = ShiftingFusion(5, 3, backend=backend).double()  # type: ignore[arg-type]
        anchor, nonverbal = (torch.randn(4, n).double().requires_grad_() for n in (5, 3))
        leaves = [anchor, nonverbal, *fusion.parameters()]
        gradients = torch.autograd.grad(
            fusion(anchor, nonverbal).square().sum(), leaves, create_graph=True
        )
        norm = sum(gradient.square().sum() for gradient in gradients)
        seconds.append(torch.autograd.grad(norm, leaves))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def _mapped(fusion: ShiftingFusion, anchor: Tensor, nonverbal: Tensor) -> Tensor:
    mapped: Tensor = torch.vmap(fusion)(anchor, nonverbal)
    return mapped


def _jacobian(fusion: ShiftingFusion, anchor: Tensor, nonverbal: Tensor) -> Tensor:
    jacobian: Tensor = torch.func.jacrev(fusion)(anchor, nonverbal)
    return jacobian


def _tangent(fusion: ShiftingFusion, anchor: Tensor, nonverbal: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(anchor, torch.ones_like(anchor))
        return forward_ad.unpack_dual(fusion(dual, nonverbal)).tangent


def _tangent_of_weight(fusion: ShiftingFusion, anchor: Tensor, nonverbal: Tensor) -> Tensor:
    with forward_ad.dual_level():
        weight = fusion.value.weight.detach()
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        output = torch.func.functional_call(fusion, {"value.weight": dual}, (anchor, nonverbal))
        return forward_ad.unpack_dual(output).tangent


TRANSFORMS = pytest.mark.parametrize(
    "transform", [_mapped, _jacobian, _tangent, _tangent_of_weight]
)


@TRANSFORMS
# PyTorch's own, where a function has no forward-mode formula:
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_fall_back_or_are_refused(
    backend: Any, transform: Callable[..., Tensor]
) -> None:
    anchor, nonverbal = torch.randn(4, 6), torch.randn(4, 3)
    results = []
    for name in ("auto", "reference"):
        torch.manual_seed(0)
        results.append(transform(ShiftingFusion(6, 3, backend=name), anchor, nonverbal))  # type: ignore[arg-type]
    assert torch.equal(*results)
    with pytest.raises(BackendError, match=r"torch\.func|forward-mode"):
        transform(ShiftingFusion(6, 3, backend=backend), anchor, nonverbal)


def test_tensor_subclass_falls_back_or_is_refused(backend: Any) -> None:
    class Tagged(Tensor):
        pass

    anchor, nonverbal = torch.randn(4, 6).as_subclass(Tagged), torch.randn(4, 3)
    assert _dispatch.choose("gate_and_shift", "auto", (anchor,)).backend == "reference"
    with pytest.raises(BackendError, match="it takes plain tensors, got Tagged"):
        ShiftingFusion(6, 3, backend=backend)(anchor, nonverbal)


def test_traced_and_exported_heads_need_only_pytorch(backend: Any) -> None:
    head, features = _head("auto").eval(), tuple(_features(3))
    exported = torch.export.export(head, features)
    assert "telme_kd" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*features), head(*features))
    named = _head(backend).eval()
    with pytest.raises(BackendError, match="no part of a traced or exported program"):
        torch.export.export(named, features, strict=False)


def test_without_gradients_nothing_is_kept(backend: Any) -> None:
    tensors = tensors_of()
    passes = operator._passes(backend)
    options = {**options_of(), "dtype": torch.float32}
    with torch.no_grad():
        _, saved = passes.forward(*tensors, None, **options, needs_grad=False)
        output = operator.gate_and_shift(*tensors, **options_of(), backend=backend)
    assert saved == []
    assert not output.requires_grad


def test_training_follows_the_reference() -> None:
    """Two hundred steps of a head: the losses agree to 1e-5 throughout."""
    histories = []
    for backend in ("cpu", "reference"):
        head = _head(backend, dropout=0.0)
        features = _features(32)
        labels = torch.randint(3, (32,), generator=torch.manual_seed(6))
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.5)
        losses = []
        for _ in range(200):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(head(*features), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert histories[1][-1] < 0.5 * histories[1][0]
    torch.testing.assert_close(*histories, rtol=1e-5, atol=0.0)
