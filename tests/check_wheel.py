"""Check an installed wheel: run by ``make wheel``, with torch and einops beside it, nothing else.

It is a script, not a test: its interpreter has no pytest.
"""

import importlib.metadata
import statistics
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

UNNEEDED = ("numpy", "scipy", "triton", "transformers", "sklearn", "matplotlib")
FRESH_PROCESSES = 5


def main() -> None:
    """Run every check; the first that fails raises."""
    _check_what_importing_loads()
    _check_what_is_installed()
    _check_losses()
    _check_fusion()
    _show_import_time()
    print("the wheel works")


def _check_what_importing_loads() -> None:
    import torch  # noqa: F401 - what it loads itself is its own affair

    before = set(sys.modules)
    import telme_kd  # noqa: F401

    loaded = {name.split(".")[0] for name in set(sys.modules) - before}
    unneeded = loaded & set(UNNEEDED)
    assert not unneeded, f"importing telme_kd loads {sorted(unneeded)}"
    third_party = loaded - set(sys.stdlib_module_names) - {"telme_kd", "torch", "einops"}
    assert not third_party, f"importing telme_kd loads {sorted(third_party)}"


def _check_what_is_installed() -> None:
    import telme_kd

    home = Path(telme_kd.__file__).resolve()
    assert "site-packages" in home.parts, f"telme_kd comes from {home}, not from the wheel"
    assert Path(sys.prefix).resolve() in home.parents, f"telme_kd comes from {home}"
    installed = importlib.metadata.version("telme-kd")
    assert telme_kd.__version__ == installed, (telme_kd.__version__, installed)
    assert resources.files(telme_kd).joinpath("py.typed").is_file(), "py.typed is not shipped"
    requirements = importlib.metadata.requires("telme-kd") or []
    required = sorted(line for line in requirements if "extra ==" not in line)
    names = [line.split(">")[0].split(";")[0].strip() for line in required]
    assert names == ["einops", "torch"], required
    files = importlib.metadata.files("telme-kd") or []
    roots = {file.parts[0] for file in files if ".dist-info" not in file.parts[0]}
    assert roots == {"telme_kd"}, f"the wheel also installs {sorted(roots - {'telme_kd'})}"
    assert any(file.name == "LICENSE" for file in files), "the licence is not shipped"


def _check_losses() -> None:
    import torch

    from telme_kd import BatchSimilarityLoss, DISTLoss, StudentLoss

    torch.manual_seed(0)
    logits, features = torch.randn(2, 8, 7), torch.randn(2, 8, 32)
    student = logits[0].clone().requires_grad_()
    criterion = StudentLoss(
        response=DISTLoss(temperature=4.0), feature=BatchSimilarityLoss(temperature=0.5)
    )
    terms = criterion(
        student,
        logits[1],
        torch.arange(8) % 7,
        student_features=features[0],
        teacher_features=features[1],
    )
    terms.total.backward()
    assert bool(terms.total.isfinite()), terms
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert bool(student.grad.any())
    assert abs(DISTLoss()(logits[1], logits[1]).item()) < 1e-6


def _check_fusion() -> None:
    import torch

    from telme_kd import AttentionShiftingFusion

    fusion = AttentionShiftingFusion(16, (8, 4), num_heads=2, num_classes=7)
    logits = fusion(torch.randn(4, 16), torch.randn(4, 8), torch.randn(4, 4))
    logits.square().sum().backward()
    assert logits.shape == (4, 7)
    assert all(parameter.grad is not None for parameter in fusion.parameters())


def _show_import_time() -> None:
    """Print how long importing takes after torch: information, never a verdict."""
    code = (
        "import time, torch; start = time.perf_counter(); import telme_kd; "
        "print(time.perf_counter() - start)"
    )
    added, whole = [], []
    for _ in range(FRESH_PROCESSES):
        start = time.perf_counter()
        completed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        whole.append(time.perf_counter() - start)
        added.append(float(completed.stdout))
    print(
        f"import telme_kd adds {1e3 * statistics.median(added):.0f} ms to import torch "
        f"({1e3 * min(added):.0f} to {1e3 * max(added):.0f} over {FRESH_PROCESSES} processes; "
        f"a whole process takes {statistics.median(whole):.1f} s)"
    )


if __name__ == "__main__":
    main()
