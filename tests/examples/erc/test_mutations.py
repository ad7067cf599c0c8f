from pathlib import Path
from typing import Any

from tests.helpers.mutations import LARGEST, LONGEST, prepare


def test_spoiled_files_cost_themselves_alone(tmp_path: Path) -> None:
    outcome = prepare(tmp_path, 28)

    assert outcome.slowest < LONGEST
    assert 0 < outcome.largest < LARGEST
    places: Any = outcome.ledger["clips"]
    assert [place["modality"] for place in places] == ["audio", "visual"]
    for place in places:
        assert place["rows"] == 28
        assert place["used"] + place["quarantined"] == 28
        assert place["used"] > 0
        assert place["quarantined"] > 0
        assert len(place["faults"]) == place["quarantined"] + place["damaged"]
        for fault in place["faults"]:
            assert fault["reason"]
            assert "\n" not in fault["reason"]
