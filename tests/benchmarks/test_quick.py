"""Every script runs, on the CPU and with few small cases."""

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import (
    bench_batch_similarity,
    bench_dist,
    bench_distributed,
    bench_fusion,
    bench_linear_dist,
    command,
    results,
)

SCRIPTS = [bench_dist, bench_batch_similarity, bench_fusion, bench_linear_dist]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.BENCHMARK.operator)
def test_a_quick_run_measures_every_backend_of_the_cpu(script: ModuleType, tmp_path: Path) -> None:
    command.main([script.BENCHMARK], ["--quick", "--device", "cpu", "--output", str(tmp_path)])
    document = results.read(tmp_path / f"{script.BENCHMARK.operator}--cpu.json")
    assert document["rows"]
    for row in document["rows"]:
        for provider in ("reference", "cpu"):
            assert "seconds" in row["providers"][provider], row["providers"][provider]


def test_every_operator_with_results_has_a_script() -> None:
    assert [script.BENCHMARK.operator for script in SCRIPTS] == list(results.OPERATORS)


def test_a_quick_run_measures_losses_over_a_group(tmp_path: Path) -> None:
    path = bench_distributed.main(["--quick", "--output", str(tmp_path)])
    rows = results.read(path)["rows"]
    assert {(row["loss"], row["world"], row["provider"]) for row in rows} == {
        (loss, world, provider)
        for loss in ("dist", "batch_similarity")
        for world in (1, 2)
        for provider in ("shared", "gathered", "part")
    }
    for row in rows:
        assert row["seconds"]["p50"] > 0
        talks = row["provider"] == "gathered" or (row["provider"] == "shared" and row["world"] > 1)
        assert bool(row["collectives"]) is talks
