"""Measure every operator on whatever the machine has, then print the targets."""

from benchmarks import bench_batch_similarity, bench_dist, bench_fusion, bench_linear_dist
from benchmarks.command import main
from benchmarks.results import documents
from benchmarks.targets import evaluate, report

_BENCHMARKS = [
    module.BENCHMARK
    for module in (bench_dist, bench_batch_similarity, bench_fusion, bench_linear_dist)
]

if __name__ == "__main__":
    print(report(evaluate(documents(main(_BENCHMARKS)))))
