import pytest

from benchmarks import bench_batch_similarity, bench_dist, bench_fusion, bench_linear_dist, targets
from benchmarks.results import Document
from benchmarks.targets import Outcome, evaluate, report, required, shown

BENCHMARKS = {
    module.BENCHMARK.operator: module.BENCHMARK
    for module in (bench_dist, bench_batch_similarity, bench_fusion, bench_linear_dist)
}


def provider(seconds: float, peak: float = 1000.0, clock: str = "wall") -> Document:
    return {"seconds": {clock: {"full": {"p50": seconds}}}, "peak_bytes": peak}


def document(operator: str, kind: str, *rows: Document) -> Document:
    machine = {"kind": kind, "name": "a device", "threads": [2, 1]}
    return {"operator": operator, "machine": machine, "rows": list(rows)}


def row(
    case: str,
    providers: Document,
    *,
    threads: int = 2,
    shape: tuple[int, ...] = (4, 7),
    dtype: str = "float32",
) -> Document:
    return {
        "case": case,
        "threads": threads,
        "shape": list(shape),
        "dtype": dtype,
        "providers": providers,
    }


def outcomes(found: Document, measure: str, against: str) -> list[Outcome]:
    return [
        outcome
        for outcome in evaluate([found])
        if outcome.device
        and (outcome.target.measure, outcome.target.against) == (measure, against)
        and (outcome.figure is not None or outcome.note.startswith("cpu: "))
    ]


def test_every_target_is_a_case_of_its_benchmark() -> None:
    for target in targets.targets():
        cases = BENCHMARKS[target.operator].cases(target.kind, False)
        assert target.case in [case.name for case in cases], target.what


def test_without_results_nothing_is_measured() -> None:
    found = evaluate([])
    assert {outcome.status for outcome in found} == {"not measured"}
    assert len(found) == len(list(targets.targets()))
    assert report(found).endswith(f"0 met, 0 missed, {len(found)} not measured")


@pytest.mark.parametrize(("ours", "status"), [(0.4, "met"), (0.5, "missed")])
def test_a_speed_up_is_the_baselines_time_over_ours(ours: float, status: str) -> None:
    cells = {"reference": provider(1.0), "cpu": provider(ours)}
    single = {"reference": provider(3.0), "cpu": provider(1.0)}
    (outcome,) = outcomes(
        document("dist", "cpu", row("4x7 float32", cells), row("4x7 float32", single, threads=1)),
        "speed-up",
        "reference",
    )
    assert (outcome.status, outcome.figure) == (status, 1.0 / ours)
    assert outcome.one_thread == 3.0


def test_the_fastest_mode_of_the_compiler_is_the_baseline() -> None:
    cells = {
        "reference compiled": provider(3.0),
        "reference compiled, CUDA graphs": provider(2.0),
        "triton": provider(1.0),
    }
    (outcome,) = outcomes(
        document("dist", "cuda", row("4x7 float32", cells)), "speed-up", "reference compiled"
    )
    assert (outcome.figure, outcome.status) == (2.0, "missed")
    assert outcome.note == "against reference compiled, CUDA graphs"


def test_a_provider_without_a_figure_leaves_the_target_unmeasured() -> None:
    cells = {"reference": provider(1.0), "cpu": {"reason": "BackendError: no"}}
    (outcome,) = outcomes(
        document("dist", "cpu", row("4x7 float32", cells)), "speed-up", "reference"
    )
    assert (outcome.status, outcome.note) == ("not measured", "cpu: BackendError: no")


def test_memory_is_not_to_exceed_its_share() -> None:
    cells = {"reference": provider(1.0, 1000.0), "cpu": provider(1.0, 250.0)}
    found = document("batch_similarity", "cpu", row("4096x768 float32", cells))
    (outcome,) = outcomes(found, "memory", "reference")
    assert (outcome.status, outcome.figure) == ("met", 0.25)
    assert required(outcome.target) == "≤ 25 %"


def test_extra_memory_counts_from_the_gradient_and_says_that_eager_runs_out() -> None:
    batch, width = 65536, 768
    cells = {
        "reference": {"reason": "out of memory"},
        "triton": provider(1.0, 2 * batch * width + 12.0 * batch),
    }
    case = "65536x768 bfloat16"
    found = document(
        "batch_similarity", "cuda", row(case, cells, shape=(batch, width), dtype="bfloat16")
    )
    (outcome,) = outcomes(found, "extra memory", "bytes per item, beyond the gradient")
    assert (outcome.status, outcome.figure) == ("met", 12.0)
    assert outcome.note == "where the reference runs out of memory"
    assert shown(outcome.target, 12.0) == "12 B"


def test_a_share_of_a_ceiling_is_of_what_the_plan_moves() -> None:
    fused = {**provider(1.0, clock="cold"), "plan_share_of_copy_rate": 0.71}
    found = document("dist", "cuda", row("4096x128256 bfloat16", {"triton": fused}))
    (outcome,) = outcomes(found, "share of copy rate", "7 N elements moved")
    assert (outcome.status, shown(outcome.target, outcome.figure)) == ("met", "71 %")
