import json
from pathlib import Path

import pytest

from benchmarks import results
from tests.benchmarks import toy


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "toy--cpu.json"
    results.write(path, {"rows": [1]})
    with pytest.raises(TypeError):
        results.write(path, {"rows": [object()]})
    assert results.read(path) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_partial_results_are_no_results(tmp_path: Path) -> None:
    for name in ("dist--cpu.json", "dist--cpu.partial.json", "dist--a.json", "other--cpu.json"):
        (tmp_path / name).write_text(json.dumps({"name": name}), encoding="utf-8")
    found = [document["name"] for document in results.documents(tmp_path)]
    assert found == ["dist--cpu.json", "dist--a.json"]


def test_a_run_goes_on_only_with_what_was_measured_alike(tmp_path: Path) -> None:
    path = tmp_path / "toy--cpu.json"
    fresh = results.new_document("toy", toy.CPU, quick=False)
    assert results.continued(path, fresh) is fresh

    partial = {**fresh, "rows": [{"case": "a", "threads": 1}]}
    results.write(results.partial_path(path), partial)
    assert results.continued(path, fresh)["rows"] == partial["rows"]

    results.write(results.partial_path(path), {**partial, "sources": "others"})
    with pytest.raises(SystemExit, match="other sources"):
        results.continued(path, fresh)


def test_a_complete_file_of_other_sources_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "toy--cpu.json"
    fresh = results.new_document("toy", toy.CPU, quick=False)
    results.write(path, {**fresh, "rows": [1], "sources": "others"})
    assert results.continued(path, fresh) is fresh
    results.write(path, {**fresh, "rows": [1]})
    assert results.continued(path, fresh)["rows"] == [1]
