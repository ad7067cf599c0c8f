"""The Triton kernels' own ways: blocks, programs, sums in registers and in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from telme_kd import ShiftingFusion
from telme_kd.errors import BackendError
from telme_kd.kernels import fusion as operator
from tests.helpers.synchronisation import NoValueIsRead

triton = pytest.importorskip("triton")
from telme_kd.kernels.triton import fusion as kernels  # noqa: E402

NAMES = ("anchor", "gate", "value", "gate_bias", "value_bias", "norm_weight", "norm_bias")


def outcome(backend: str, batch: int, width: int, **changed: Any) -> dict[str, Tensor]:
    generator = torch.manual_seed(0)
    rows = [torch.randn(batch, width, generator=generator) for _ in range(3)]
    parameters = [torch.randn(width, generator=generator) for _ in range(4)]
    tensors = [tensor.requires_grad_() for tensor in rows + parameters]
    options: dict[str, Any] = {
        "threshold": 0.1,
        "eps": None,
        "norm_eps": 1e-5,
        "rate": 0.0,
        "output_dtype": torch.float32,
        **changed,
    }
    output = operator.gate_and_shift(*tensors, **options, backend=backend)
    upstream = torch.randn(batch, width, generator=generator)
    gradients = torch.autograd.grad(output, tensors, upstream, allow_unused=True)
    found = zip(NAMES, gradients, strict=True)
    return {"output": output.detach(), **{name: x for name, x in found if x is not None}}


@pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
@pytest.mark.parametrize("width", [1024, 1025, 2048, 2064, 4096])
def test_every_block_computes_what_the_cpu_does(width: int, eps: float | None) -> None:
    ours, cpu = (outcome(backend, 3, width, eps=eps) for backend in ("triton", "cpu"))
    for name in ours:
        torch.testing.assert_close(ours[name], cpu[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("width", [24, 2064], ids=["sums in registers", "sums in memory"])
def test_number_of_programs_changes_no_row_and_sums_only_by_rounding(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    apiece = outcome("triton", 5, width)
    for programs in (1, 2, 3):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        shared = outcome("triton", 5, width)
        for name in apiece:
            if shared[name].ndim == 2:
                assert torch.equal(shared[name], apiece[name])
            else:
                torch.testing.assert_close(shared[name], apiece[name], rtol=1e-5, atol=1e-5)


def test_dropout_of_an_element_depends_on_its_place_alone() -> None:
    seed = torch.tensor([7])
    kept = kernels.kept(seed, (6, 40), 0.5, torch.float32)
    assert torch.equal(kernels.kept(seed, (3, 40), 0.5, torch.float32), kept[:3])
    assert not torch.equal(kernels.kept(seed + 1, (6, 40), 0.5, torch.float32), kept)
    assert not torch.equal(kept[0], kept[1])


def test_seed_is_a_tensor_on_the_device_of_the_rows() -> None:
    seed = kernels.draw(torch.empty(3, 4))
    assert seed.shape == (1,)
    assert seed.dtype is torch.int64


def test_no_pass_makes_a_gpu_wait() -> None:
    with NoValueIsRead():
        for changed in ({}, {"eps": 1e-6}, {"rate": 0.5}, {"norm_eps": None, "rate": 0.5}):
            outcome("triton", 3, 24, **changed)
        with pytest.raises(AssertionError, match="would make a GPU wait"):
            bool(torch.ones(1) > 0)  # the mode does see what it is to see


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        (4097, "it holds rows of up to 4096 features, got 4097"),
        (2049, "beyond 2048 features it takes multiples of 16, got 2049"),
    ],
)
def test_wider_rows_fall_back_or_are_refused(width: int, reason: str) -> None:
    assert kernels.reasons_against(width) == [reason]
    anchor, nonverbal = torch.randn(1, width), torch.randn(1, 2)
    assert ShiftingFusion(width, 2)(anchor, nonverbal).shape == (1, width)
    with pytest.raises(BackendError, match=reason):
        ShiftingFusion(width, 2, backend="triton")(anchor, nonverbal)


def test_float64_is_refused() -> None:
    fusion = ShiftingFusion(6, 2, backend="triton").double()
    with pytest.raises(BackendError, match="float64"):
        fusion(torch.randn(3, 6).double(), torch.randn(3, 2).double())


def test_shipped_configurations_are_those_of_the_heuristics() -> None:
    shipped = kernels.shipped()
    blocks = {
        entry.constants["BLOCK"]: entry.num_warps for entry in shipped if "BLOCK" in entry.constants
    }
    assert blocks == dict(kernels._BLOCKS)
    for entry in shipped:
        names = set(entry.signature) | set(entry.constants)
        assert names == set(entry.kernel.arg_names)
