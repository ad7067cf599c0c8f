from pathlib import Path

import pytest

from benchmarks import compare, results
from benchmarks.results import Document


def document(
    reference: float, ours: float, case: str = "4x7 float32", device: str = "cpu"
) -> Document:
    seconds = {
        name: {"seconds": {"wall": {"full": {"p50": value}}}}
        for name, value in (("reference", reference), ("cpu", ours))
    }
    providers = {**seconds, "triton": {"reason": "none"}}
    rows = [{"case": case, "threads": 1, "providers": providers}]
    return {"operator": "dist", "device": device, "rows": rows}


def write(folder: Path, **documents: Document) -> list[str]:
    paths = []
    for name, content in documents.items():
        paths.append(str(folder / f"{name}.json"))
        results.write(folder / f"{name}.json", content)
    return paths


def test_a_slower_machine_cancels_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, before=document(1.0, 0.5), after=document(3.0, 1.5))
    assert compare.main(paths) == 0
    assert capsys.readouterr().out == "0 of 1 slower by more than 1.1x\n"


def test_a_slower_cell_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write(tmp_path, before=document(1.0, 0.5), after=document(1.0, 0.6))
    assert compare.main(paths) == 1
    assert "1.20x  4x7 float32, 1 threads, cpu, wall clock, full" in capsys.readouterr().out
    assert compare.main([*paths, "--threshold", "1.25"]) == 0


def test_cells_of_one_side_are_left_out() -> None:
    before, after = document(1.0, 0.5), document(1.0, 5.0, case="64x7 float32")
    assert list(compare.changes(before, after)) == []


def test_results_of_two_devices_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write(tmp_path, before=document(1.0, 1.0), after=document(1.0, 1.0, device="b200"))
    with pytest.raises(SystemExit):
        compare.main(paths)
    assert "dist on b200" in capsys.readouterr().err
