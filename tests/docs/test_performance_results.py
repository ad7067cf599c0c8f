"""The performance page, from nothing, from a CPU's results, and from a GPU's with gaps."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import targets
from benchmarks.providers import FUSED
from benchmarks.results import Document

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_extensions"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module("performance_results")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module("performance_pictures")


def document(kind: str, *, clocks: tuple[str, ...]) -> Document:
    fused = FUSED[kind]
    rows = []
    for batch in (4, 64, 256):
        providers: Document = {}
        for name, seconds in (("reference", 8e-4), ("reference compiled", 4e-4), (fused, 1e-4)):
            times = dict.fromkeys(("p20", "p50", "p80"), seconds)
            providers[name] = {
                "seconds": {clock: {"full": times} for clock in clocks},
                "peak_bytes": int(seconds * 1e8) * batch,
                "saved_bytes": 12,
                "launches": 7,
                "share_of_copy_rate": 0.5,
                "error": {
                    "draws": 200,
                    "output": {"max": 1e-7, "rms": 5e-8},
                    "gradient": {"max": 1e-6, "rms": 5e-7},
                },
            }
        rows.append(
            {
                "case": f"{batch}x7 float32",
                "shape": [batch, 7],
                "dtype": "float32",
                "variant": "",
                "threads": 2,
                "providers": providers,
            }
        )
    rows[0]["providers"]["reference"] = {"reason": "out of memory"}
    return {
        "operator": "dist",
        "command": "python -m benchmarks.bench_dist",
        "device": "cpu" if kind == "cpu" else "nvidia-h100",
        "machine": {"kind": kind, "name": "a device", "threads": [2]},
        "versions": {"torch": "2"},
        "ceilings": {
            "2": {"copy_bytes_per_second": 1e10, "matmul_flop_per_second": {"float32": 1e11}}
        },
        "rows": rows,
    }


def test_without_results_every_target_says_so(pages: ModuleType) -> None:
    shown = pages.target_tables(targets.evaluate([]), targets)
    assert "0 are met, 0 are missed" in shown
    assert "GPU: not measured" in shown
    assert "python -m benchmarks.bench_dist --device cuda" in pages.not_measured(
        "cuda", "python -m benchmarks.bench_dist"
    )


def test_a_missed_target_stands_out(pages: ModuleType) -> None:
    found = targets.evaluate([document("cuda", clocks=("wall", "cold", "graph"))])
    shown = pages.target_tables(found, targets)
    assert "**missed**" in shown
    assert "8× graph, 8× wall" in shown


def test_tables_have_a_line_for_every_case_and_dashes_for_gaps(pages: ModuleType) -> None:
    shown = pages.device_results(document("cpu", clocks=("wall",)), {})
    assert "* - 64\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}7\n" in shown
    assert "- 8×" in shown  # the fused backend over eager
    assert pages.NOTHING in shown
    assert f"- Eager ({pages.unbroken('4 × 7')}): ``out of memory``" in shown


@pytest.mark.parametrize(
    ("kind", "clocks"), [("cpu", ("wall",)), ("cuda", ("wall", "cold", "graph"))]
)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_are_drawn_alike_each_time(
    pictures: ModuleType, kind: str, clocks: tuple[str, ...], theme: str
) -> None:
    measured = document(kind, clocks=clocks)
    for draw in (pictures.ratios, pictures.memory):
        drawn = draw(measured, theme)
        assert drawn is not None
        assert drawn.startswith(b"<?xml")
        assert draw(measured, theme) == drawn


def test_nothing_is_drawn_where_nothing_was_measured(pictures: ModuleType) -> None:
    empty = {**document("cpu", clocks=("wall",)), "rows": []}
    assert pictures.ratios(empty, "light") is None
    assert pictures.memory(empty, "light") is None
