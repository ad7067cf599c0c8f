"""Float32 at least, and autocast left alone."""

import pytest
import torch

from telme_kd._precision import accumulation_dtype, outside_autocast


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.float64, torch.float16), torch.float64),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_accumulation_is_the_widest_given_and_float32_at_least(
    dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    assert accumulation_dtype(*(torch.empty(1, dtype=dtype) for dtype in dtypes)) is expected


def test_autocast_is_left_and_resumed() -> None:
    device = torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with outside_autocast(device):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    with outside_autocast(device):
        assert not torch.is_autocast_enabled("cpu")
    with outside_autocast(torch.device("meta")):  # a device without autocast
        pass
