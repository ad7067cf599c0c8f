from pathlib import Path
from typing import Any

import torch

from examples.erc import processes
from tests.helpers.processes import crew


def talk(rank: int, folder: Path) -> dict[str, Any]:
    made: list[str] = []

    def make() -> bool:
        made.append("made")
        found = (folder / "file").exists()
        (folder / "file").write_text("")
        return found

    return {
        "count": processes.count(),
        "index": processes.index(),
        "first": processes.first(),
        "told": processes.tell(f"from {rank}"),
        "gathered": processes.gather([rank, f"and {rank}"]),
        "added": processes.add(torch.tensor([1.0, float(rank)])).tolist(),
        "found": processes.in_turn(make),
        "made": made,
    }


def test_two_processes_agree(tmp_path: Path) -> None:
    with crew(2, tmp_path) as both_processes:
        first, second = both_processes(talk, tmp_path)
    assert (first["count"], first["index"], first["first"]) == (2, 0, True)
    assert (second["count"], second["index"], second["first"]) == (2, 1, False)
    assert (first["found"], second["found"]) == (False, True)
    for both in (first, second):
        assert both["told"] == "from 0"
        assert both["gathered"] == [0, "and 0", 1, "and 1"]
        assert both["added"] == [2.0, 1.0]
        assert both["made"] == ["made"]


def test_a_process_alone_talks_to_itself(tmp_path: Path) -> None:
    alone = talk(0, tmp_path)
    assert (alone["count"], alone["index"], alone["first"]) == (1, 0, True)
    assert alone["told"] == "from 0"
    assert alone["gathered"] == [0, "and 0"]
    assert alone["added"] == [1.0, 0.0]
    processes.wait()
    processes.leave()
