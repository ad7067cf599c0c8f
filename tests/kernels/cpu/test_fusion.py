"""The CPU's own ways: blocks of rows, and sixteen bits for a decision of dropout."""

import pytest
import torch

from telme_kd.kernels.cpu import fusion as cpu

BIASES = pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])


@BIASES
@pytest.mark.parametrize("eps", [None, 1e-6], ids=["exact", "released"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["shift", "normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_change_no_bit_of_a_row(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    eps: float | None,
    norm_eps: float | None,
    biases: bool,
) -> None:
    generator = torch.manual_seed(0)
    rows = [torch.randn(11, 8, generator=generator).to(dtype) for _ in range(3)]
    parameters = [torch.randn(8, generator=generator).to(dtype) for _ in range(4)]
    tensors = [*rows, *(parameters[:2] if biases else (None, None)), *parameters[2:], None]
    upstream = torch.randn(11, 8, generator=generator).to(dtype)
    options = {"threshold": 0.5, "eps": eps, "norm_eps": norm_eps, "rate": 0.0}
    results = []
    for block in (1, 4 * 8, 10**9):  # a row at a time, three blocks of which one is short, one
        monkeypatch.setattr(cpu, "_BLOCK", block)
        output, saved = cpu.forward(
            *tensors, **options, dtype=torch.float32, output_dtype=dtype, needs_grad=True
        )
        gradients = cpu.backward(
            upstream,
            *tensors,
            saved,
            **options,
            dtype=torch.float32,
            needs_grad=[tensor is not None for tensor in tensors[:7]],
        )
        shapes = [(tensor.shape, tensor.dtype) for tensor in saved]
        expected = cpu.empty_saved(rows[0], torch.float32, eps=eps, norm_eps=norm_eps)
        assert shapes == [(tensor.shape, tensor.dtype) for tensor in expected]
        results.append([output, *gradients])
    for blocked in results[:2]:
        for ours, whole in zip(blocked, results[2], strict=True):
            assert (ours is None) is (whole is None)
            if ours is not None:
                assert torch.equal(ours, whole)


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 0.1, 0.3, 1 - 1e-9])
def test_what_is_kept_is_divided_by_the_share_that_is_kept(rate: float) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    kept = cpu.kept(every, (256, 256), rate, torch.float64)
    assert kept.mean().item() == pytest.approx(1.0, abs=1e-12)
    dropped = (kept == 0).double().mean().item()
    assert abs(dropped - rate) <= 2**-16
    assert dropped < 1.0


def test_decisions_of_neighbours_are_independent() -> None:
    rows = torch.empty(64, 1024)
    torch.manual_seed(0)
    gone = (cpu.kept(cpu.draw(rows), rows.shape, 0.5, torch.float32) == 0).double().flatten()
    centred = gone - gone.mean()
    for distance in (1, 2, 3, 4, 8, 1024):
        correlation = (centred[distance:] * centred[:-distance]).mean() / centred.square().mean()
        assert abs(correlation.item()) <= 4 / rows.numel() ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 2), (0, 4)])
def test_every_element_gets_a_decision(shape: tuple[int, int]) -> None:
    rows = torch.empty(shape)
    assert cpu.kept(cpu.draw(rows), shape, 0.5, torch.float32).shape == shape


def test_norms_beyond_float64s_squares_are_right() -> None:
    rows = torch.tensor([[3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[5e200], [5e-200], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(cpu._length_in_range(rows), expected, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_norm_of_what_is_not_finite_is_nan(dtype: torch.dtype, value: float) -> None:
    rows = torch.tensor([[1.0, value]], dtype=dtype)
    assert cpu._length_in_range(rows).isnan().all()
