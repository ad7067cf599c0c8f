"""The page of the memory: what its tables and its sentence say follows from the rows."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_extensions"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module("committed_results")


def row(memory_size: int, dev: float, test: float, *, distilled: bool = True) -> dict[str, Any]:
    """A gain on dev and on test, each with an interval of half a point."""
    scores = {
        split: {"mean": 0.4 + gain, "gain": gain, "interval": 0.005}
        for split, gain in (("dev", dev), ("test", test))
    }
    settings = {"modality": "audio", "batch_size": 4, "distilled": distilled}
    return {**settings, "memory_size": memory_size, "seeds": 10, **scores}


def documents(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    rates = [
        {"modality": "audio", "batch_size": 4, "dev": {"0.1": 0.4, "0.2": 0.3}},
        {"modality": "visual", "batch_size": 4, "dev": {"0.1": 0.25, "0.2": 0.25}},
        {"modality": "visual", "batch_size": 64, "dev": {"0.1": 0.3, "0.2": 0.35}},
    ]
    shared = {"device": "cpu", "confidence": 0.95, "versions": {"torch": "2"}, "rows": [*rows]}
    shared |= {"seeds": 12, "rates": rates, "commonest": 0.25}
    return [{**shared, "corpus": corpus, "command": corpus} for corpus in ("meld", "iemocap")]


def test_gains_whose_interval_leaves_out_zero_are_bold_and_counted(pages: ModuleType) -> None:
    found = documents(
        row(0, 0.0, 0.0), row(16, 0.0061, 0.004), row(64, -0.01, -0.0049),
        row(0, -0.02, -0.03, distilled=False),
    )  # fmt: skip
    text = pages.relation_memory(found)
    assert text.count("     - **+0.61 ± 0.50**") == 2
    assert text.count("     - +0.40 ± 0.50") == 2
    assert text.count("     - **−1.00 ± 0.50**") == 2
    assert "     - −0.49 ± 0.50" in text
    assert "Of 8 gains, the interval of 2 lies above 0 and that of 2 below" in text
    assert "some 0.4 in all" in text  # labels alone are no memory
    assert "from **−1.00 ± 0.50** to **+0.61 ± 0.50** points." in text
    assert "Half of the intervals are wider than ±0.50" in text
    assert "MELD: weighted F1 in percent, means over 10 of 12 seeds" in text
    assert text.count("labels alone") == 2
    assert "The visual students of MELD are left out: in batches of 4 they scored 25.00" in text


def test_a_corpus_that_is_not_measured_is_said_to_be_none(pages: ModuleType) -> None:
    whole, begun = documents(row(0, 0.0, 0.0), row(16, 0.006, 0.004))
    begun["rows"] = [{**each, "seeds": 1} for each in begun["rows"]]
    text = pages.relation_memory([whole, begun])
    assert "IEMOCAP is not measured in this version; ``iemocap`` does it." in text
    assert "Of 2 gains" in text
    assert "IEMOCAP: weighted" not in text
    assert pages.relation_memory_picture([whole, begun], "light")


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (0.006, "A memory helps."),
        (0.004, "A memory makes no difference that can be told from chance."),
        (-0.006, "A memory harms."),
    ],
)
def test_the_verdict_is_that_of_the_intervals(pages: ModuleType, gain: float, verdict: str) -> None:
    text = pages.relation_memory(documents(row(0, 0.0, 0.0), row(16, gain, 0.0)))
    assert f"**{verdict}**" in text


def test_the_picture_is_the_same_whenever_it_is_drawn(pages: ModuleType) -> None:
    found = documents(row(0, 0.0, 0.0), row(16, 0.0061, 0.004))
    drawn = [pages.relation_memory_picture(found, "light") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != pages.relation_memory_picture(found, "dark")
