import pytest
import torch

from benchmarks import machine


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("NVIDIA GB200", "nvidia-gb200"),
    ],
)
def test_a_slug_leaves_out_the_size_of_the_memory(name: str, slug: str) -> None:
    assert machine.slug(name) == slug


def test_the_cpu_comes_first_and_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (only,) = machine.machines()
    assert (only.kind, only.slug) == ("cpu", "cpu")
    assert only.threads[-1] == 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert [found.slug for found in machine.machines()] == ["cpu", "nvidia-h100"]
