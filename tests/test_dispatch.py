"""Which backend computes: ``"auto"`` may fall back, a named one never does."""

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from telme_kd import _dispatch, available_backends
from telme_kd._dispatch import Implementation, choose, decided
from telme_kd._typing import Backend
from telme_kd.errors import BackendError, DTypeError, RangeError
from telme_kd.functional import batch_similarity_loss, dist_loss

OPERATORS = ("dist_loss", "batch_similarity_loss")
PAIR = torch.randn(2, 4, 7, generator=torch.manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests change what decisions depend on."""
    monkeypatch.setattr(_dispatch, "_decisions", {})


def _answer(*_tensors: Tensor, **_options: Any) -> Tensor:
    return torch.tensor(42.0)


def _on_cuda_in_float32(tensors: Sequence[Tensor]) -> list[str]:
    reasons = []
    if any(tensor.device.type != "cuda" for tensor in tensors):
        reasons.append("it needs a CUDA device, got cpu")
    if any(tensor.dtype is not torch.float32 for tensor in tensors):
        reasons.append("it needs float32, got float64")
    return reasons


def _up_to_8_classes(tensors: Sequence[Tensor]) -> list[str]:
    return [] if tensors[0].shape[-1] <= 8 else ["it takes at most 8 classes"]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends: one that serves nothing here, one that serves small inputs, the oracle."""
    rows = (
        Implementation("triton", _answer, _on_cuda_in_float32),
        Implementation("cpu", _answer, _up_to_8_classes),
        Implementation("reference", _answer, lambda tensors: []),
    )
    monkeypatch.setattr(
        _dispatch, "_IMPLEMENTATIONS", {"dist_loss": rows, "batch_similarity_loss": rows[2:]}
    )


def test_reference_is_always_there() -> None:
    names = available_backends()
    assert "reference" in names
    assert len(set(names)) == len(names)
    assert set(names) <= set(get_args(Backend)) - {"auto"}
    for operator in OPERATORS:
        assert choose(operator, "reference", tuple(PAIR)).backend == "reference"


@pytest.mark.usefixtures("table")
def test_available_backends_lists_each_name_once_in_order_of_preference() -> None:
    assert available_backends() == ("triton", "cpu", "reference")


@pytest.mark.usefixtures("table")
def test_auto_takes_the_first_that_serves() -> None:
    assert choose("dist_loss", "auto", (torch.ones(2, 8),)).backend == "cpu"
    assert choose("dist_loss", "auto", (torch.ones(2, 9),)).backend == "reference"
    assert choose("batch_similarity_loss", "auto", (torch.ones(2, 8),)).backend == "reference"


@pytest.mark.usefixtures("table")
def test_named_backend_is_the_one_that_computes() -> None:
    for name in ("cpu", "reference"):
        assert choose("dist_loss", name, tuple(PAIR)).backend == name
        assert dist_loss(*PAIR, backend=name).item() == 42.0


@pytest.mark.usefixtures("table")
def test_named_backend_never_falls_back_and_lists_every_reason() -> None:
    pattern = (
        r"^backend: expected .*'triton'|^backend: 'triton' cannot compute dist_loss: "
        r"it needs a CUDA device, got cpu; it needs float32, got float64; "
    )
    with pytest.raises(BackendError, match=pattern) as caught:
        dist_loss(*PAIR.double(), backend="triton")
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    assert "it needs a CUDA device, got cpu; it needs float32, got float64" in message
    assert "use backend='auto' or one of ('triton', 'cpu', 'reference')" in message
    with pytest.raises(BackendError, match="it takes at most 8 classes"):
        dist_loss(*torch.ones(2, 4, 9), backend="cpu")


@pytest.mark.usefixtures("table")
def test_backend_without_the_operator_is_refused_by_name() -> None:
    with pytest.raises(
        BackendError, match=r"this version has no 'cpu' implementation of batch_similarity_loss"
    ):
        batch_similarity_loss(*PAIR, backend="cpu")


@pytest.mark.parametrize("loss", [dist_loss, batch_similarity_loss])
def test_triton_is_refused_on_the_cpu(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETED", False)
    reason = "'triton' cannot compute .*: it computes on CUDA devices, got tensors on cpu; use"
    with pytest.raises(BackendError, match=reason):
        loss(*PAIR, backend="triton")


def test_triton_is_listed_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETED", False)
    assert ("triton" in available_backends()) is torch.cuda.is_available()
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    assert "triton" not in available_backends()
    with pytest.raises(BackendError, match=r"Triton is not installed; pip install 'telme-kd\[tri"):
        dist_loss(*PAIR, backend="triton")


def test_named_backend_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETED", False)
    with pytest.raises(BackendError) as raised:
        dist_loss(*PAIR.double(), backend="triton")
    assert "on CUDA devices" in str(raised.value)
    assert "float64" in str(raised.value)


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_backend_is_a_range_error(operator: Any) -> None:
    with pytest.raises(RangeError, match=r"^backend: expected one of 'auto', .* got 'cuda'; "):
        choose(operator, "cuda", tuple(PAIR))  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_serves_every_dtype_and_shape_without_looking_at_values(
    operator: Any, dtype: torch.dtype
) -> None:
    for shape in ((1, 1), (4, 7), (128, 50_000)):
        for needs_gradient in (False, True):
            pair = [
                torch.empty(shape, dtype=dtype, device="meta", requires_grad=needs_gradient)
                for _ in range(2)
            ]
            chosen = choose(operator, "auto", pair)
            assert chosen.backend in available_backends()
            assert not chosen.reasons_against(pair)


@pytest.mark.parametrize("backend", available_backends())
def test_every_backend_computes_the_reference_definition(backend: Backend) -> None:
    for loss in (dist_loss, batch_similarity_loss):
        try:
            value = loss(*PAIR, backend=backend)
        except BackendError as error:
            pytest.skip(f"{backend} does not serve the CPU here: {error}")
        torch.testing.assert_close(value, loss(*PAIR, backend="reference"), rtol=1e-5, atol=1e-6)


# --- decisions that are kept ----------------------------------------------------------------------


class Decider:
    """Decides anew each time, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None, *_: object) -> object:
        self.times += 1
        return object()

    def asked(self, student: Tensor, teacher: Tensor, mask: Tensor | None, *options: Any) -> object:
        return decided(self, student, teacher, mask, options)


@pytest.fixture
def decider() -> Decider:
    return Decider()


def test_a_decision_is_made_once_for_shapes_dtypes_and_options(decider: Decider) -> None:
    first = decider.asked(*PAIR, None, 1.0)
    assert decider.asked(*PAIR.clone(), None, 1.0) is first
    others = [
        (*PAIR.double(), None, 1.0),
        (PAIR[0], PAIR[1].half(), None, 1.0),
        (*PAIR[:, :3], None, 1.0),
        (*PAIR.to("meta"), None, 1.0),
        (*PAIR, torch.ones(4, dtype=torch.bool), 1.0),
        (*PAIR, torch.ones(4), 1.0),
        (*PAIR, None, 2.0),
        (*PAIR, None, True),
        (*PAIR, None, 1),
    ]
    assert len({first, *(decider.asked(*arguments) for arguments in others)}) == 1 + len(others)
    assert decider.times == 1 + len(others)


def test_few_decisions_are_kept(decider: Decider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_MOST_DECISIONS", 2)
    for batch in range(1, 5):
        decider.asked(*PAIR[:, :batch], None)
        assert 0 < len(_dispatch._decisions) <= 2


def test_what_is_not_plain_or_not_called_eagerly_is_decided_anew(decider: Decider) -> None:
    class Special(Tensor):
        pass

    def in_vmap(row: Tensor) -> Tensor:
        decider.asked(row, row, None)
        return row

    for _ in range(2):
        decider.asked(PAIR[0].as_subclass(Special), PAIR[1], None)
        decider.asked(*PAIR, None, [])  # which cannot be hashed
        torch.func.vmap(in_vmap)(PAIR[0])
        with forward_ad.dual_level():
            decider.asked(*PAIR, None)
    assert decider.times == 8


def test_a_mistake_is_found_after_the_same_shapes_were_right() -> None:
    dist_loss(*PAIR, temperature=1.0)
    with pytest.raises(DTypeError, match="temperature: expected a finite number > 0, got a bool"):
        dist_loss(*PAIR, temperature=True)
    with pytest.raises(DTypeError, match="temperature: expected a finite number > 0, got a list"):
        dist_loss(*PAIR, temperature=[1.0])  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="temperature"):
        dist_loss(*PAIR, temperature=-1.0)
