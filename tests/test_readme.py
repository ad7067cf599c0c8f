"""What README.rst says: its code runs, and its figures are those of the committed results."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import telme_kd

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / telme_kd.__version__


def faults() -> dict[str, dict[str, float]]:
    path = RESULTS / "released_faults--cpu.json"
    rows: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def table_row(beginning: str) -> list[str]:
    """The cells of the row of a list-table whose first cell begins with these words."""
    rows = re.findall(r"^   \* - (.*?)(?=^   \* - |^\S)", README, flags=re.MULTILINE | re.DOTALL)
    (row,) = [row for row in rows if row.startswith(beginning)]
    return [" ".join(cell.split()) for cell in re.split(r"\n     - ", row)]


def test_code_runs() -> None:
    (code,) = re.findall(r"^\.\. code-block:: python\n\n(.*?)(?=^\S)", README, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(code), "README.rst", "exec"), names)
    assert names["logits"].shape == (8, 7)
    assert names["student_logits"].grad is not None


def share(row: dict[str, float]) -> str:
    return f"{row['released']:,} of {row['of']:,}"


@pytest.mark.parametrize(
    ("beginning", "name", "formats"),
    [
        ("A student that equals", "equal_logits_50000", ("{:.2f}", "{:.0e}")),
        ("A zero-initialised head", "zero_head_gradient", ("{:,.0f}", "{:.1f}")),
        ("float16 with one row", "half_precision_nan", ("{:.0f}", "{:.0f}")),
        ("Batch similarity of features", "features_at_1e20", ("{:.0f}", "{:.4f}")),
        ("Shift of anchors", "shift_at_1e18", ("{:.0%}", "{:.0%}")),
        ("Largest change of an utterance", "company", ("{:.3f}", "{:.0e}")),
    ],
)
def test_faults_are_the_measured_ones(beginning: str, name: str, formats: tuple[str, str]) -> None:
    row = faults()[name]
    released, ours = row["released"], row["telme_kd"]
    if name == "zero_head_gradient":
        released = round(released, -4)
    expected = [formats[0].format(released), formats[1].format(ours)]
    assert [cell.replace(" %", "%") for cell in table_row(beginning)[1:]] == expected


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        ("MELD train dialogues", "meld_train_dialogues_whose_first_speaker_is_not_the_first"),
        ("IEMOCAP train utterances", "iemocap_train_utterances_beyond_nine_speaker_tokens"),
    ],
)
def test_faults_in_annotations_are_the_measured_ones(beginning: str, name: str) -> None:
    assert table_row(beginning)[1:] == [share(faults()[name]), "0"]


def test_shards_are_the_measured_ones() -> None:
    row = faults()["shards"]
    assert f"is {row['whole']:.3f} as a whole and {row['shards']:.3f} as the mean" in README


@pytest.mark.parametrize(
    ("beginning", "operator", "case"),
    [
        ("DIST, 4 ×", "dist", "4x7 float32"),
        ("DIST, 64 ×", "dist", "64x7 float32"),
        ("DIST, 256 × 7", "dist", "256x7 float32"),
        ("DIST, 256 × 1000", "dist", "256x1000 float32"),
        ("DIST, 2048 ×", "dist", "2048x1000 float32"),
        ("Batch similarity, 64 ×", "batch_similarity", "64x768 float32"),
        ("Batch similarity, 4096 ×", "batch_similarity", "4096x768 float32"),
        ("Gate-and-shift tail", "fusion", "tail 64x768 float32"),
    ],
)
def test_speeds_are_the_measured_ones(beginning: str, operator: str, case: str) -> None:
    results = json.loads((RESULTS / f"{operator}--cpu.json").read_text(encoding="utf-8"))
    (row,) = [row for row in results["rows"] if row["case"] == case and row["threads"] == 2]
    assert results["machine"]["name"] in README
    providers = row["providers"]
    ours, eager, compiled = (
        providers[name]["seconds"]["wall"]["full"]["p50"]
        for name in ("cpu", "reference", "reference compiled")
    )
    assert table_row(beginning)[1:] == [f"{eager / ours:.1f}×", f"{compiled / ours:.1f}×"]
    if "tenth of the memory" in table_row(beginning)[0]:
        share = providers["cpu"]["peak_bytes"] / providers["reference"]["peak_bytes"]
        assert round(share, 1) == 0.1


@pytest.mark.parametrize("corpus", ["meld", "iemocap"])
def test_real_results_are_the_committed_ones(corpus: str) -> None:
    report = pytest.importorskip("examples.erc.report")
    path = RESULTS / f"pipeline--{corpus}--features.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    (headline,) = re.findall(
        r"^\.\. list-table:: \w+: Headline.*?(?=\n\n\S)", report.rst_tables(results), re.M | re.S
    )
    assert headline in README
    assert results["command"] in README
