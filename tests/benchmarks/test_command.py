from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, command, results
from benchmarks.results import Document
from benchmarks.workload import Benchmark, Case
from tests.benchmarks import toy


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "machines", lambda: [toy.CPU])
    monkeypatch.setattr(
        command,
        "ceilings",
        lambda machine, quick: {"copy_bytes_per_second": 1e9, "matmul_flop_per_second": {}},
    )


def test_a_run_leaves_one_complete_file(tmp_path: Path) -> None:
    command.main([toy.BENCHMARK], ["--quick", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    document = results.read(path)
    assert path.name == "toy--cpu.json"
    assert [row["case"] for row in document["rows"]] == [case.name for case in toy.CASES]
    assert document["command"] == "python -m benchmarks.bench_toy --quick"


def test_a_quick_run_stays_away_from_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "QUICK_FOLDER", command.QUICK_FOLDER.parent / "quick-test")
    written = []
    monkeypatch.setattr(results, "write", lambda path, document: written.append(path.parent))
    command.main([toy.BENCHMARK], ["--quick"])
    assert set(written) == {command.QUICK_FOLDER}
    assert results.RESULTS not in written


def test_an_interrupted_run_keeps_its_cells_and_the_old_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.path_of(tmp_path, "toy", "cpu")
    results.write(path, {"rows": "as they were"})
    measure = cells.measure
    measured = []

    def interrupted(benchmark: Benchmark, case: Case, *rest: Any) -> Document:
        if case is toy.CASES[1]:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(benchmark, case, *rest)

    monkeypatch.setattr(cells, "measure", interrupted)
    arguments = ["--quick", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        command.main([toy.BENCHMARK], arguments)
    assert stopped.value.code == 130
    assert results.read(path) == {"rows": "as they were"}
    assert len(results.read(results.partial_path(path))["rows"]) == 1

    monkeypatch.setattr(cells, "measure", measure)
    command.main([toy.BENCHMARK], [*arguments, "--resume"])
    assert measured == [toy.CASES[0]]
    assert len(results.read(path)["rows"]) == 2
    assert not results.partial_path(path).exists()


def test_threads_are_as_before_when_it_is_done(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    command.main([toy.BENCHMARK], ["--quick", "--output", str(tmp_path)])
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([toy.BENCHMARK], ["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err
