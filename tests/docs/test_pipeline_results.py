"""The pipelines' pace on the performance page: defeats stand out, and not all is asked for."""

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


def stage(name: str, anew: float, kept: float, required: float | None) -> dict[str, Any]:
    return {
        "stage": name,
        "steps": 50,
        "epochs": 8,
        "anew_seconds": anew,
        "kept_seconds": kept,
        "fill_seconds": 3.0,
        "anew_over_kept": anew / kept,
        "with_filling": 8 * anew / (3 + 8 * kept),
        "required": required,
    }


DOCUMENT = {
    "command": "python -m benchmarks.bench_clips",
    "machine": {"name": "Abacus", "processes": 2},
    "versions": {"av": "1"},
    "utterances": {"train": 400},
    "rows": {
        "preparation": {
            "turns": 512,
            "films": 8,
            "film": [720, 480],
            "seconds_of_film": 288.0,
            "pass_milliseconds_per_turn": 30.0,
            "scan_milliseconds_per_turn": 600.0,
            "look_milliseconds_per_turn": 45.0,
            "scan_over_pass": 20.0,
            "look_over_pass": 1.5,
            "required": 10.0,
        },
        "stages": {
            "640 x 360": [
                stage("teacher", 2.0, 1.0, None),
                stage("student, audio", 1.5, 1.0, 2.0),
                stage("fusion", 8.0, 0.125, 50.0),
            ]
        },
    },
}


def flat(text: str) -> str:
    return " ".join(text.split())


def test_ways_to_the_pictures_stand_beside_one_pass(pages: ModuleType) -> None:
    text = flat(pages.preparation(DOCUMENT))
    assert "Pictures of 512 turns in 8 films of 288 s, 720 × 480" in text
    assert "* - one pass for each film - 30 - - -" in text
    assert "* - each turn from its last key frame - 45 - 1.5× - -" in text
    assert "* - each turn from the film's beginning - 600 - 20× - ≥ 10× - met" in text
    assert "on an Abacus; 2 processes decode (av 1)" in text


def test_stages_are_shown_with_and_without_filling(pages: ModuleType) -> None:
    text = flat(pages.stages(DOCUMENT))
    assert "400 utterances of the synthetic MELD, pictures of 640 × 360" in text
    assert "* - teacher, 8 epochs - 40 - 20 - 2× - - - 3 - 1.45×" in text
    assert "* - student, audio, 8 epochs - 30 - 20 - 1.5× - ≥ 2× - **missed** - 3" in text
    assert "* - fusion, 8 epochs - 160 - 2.5 - 64× - ≥ 50× - met - 3 - 16×" in text
