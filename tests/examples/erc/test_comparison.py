import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.erc.comparison import (
    Difference,
    Probability,
    Spread,
    Table,
    ablation,
    combinations,
    confusion,
    difference,
    every_run,
    every_system,
    headline,
    legend,
    parts,
    per_class,
    spread,
    students,
    tables,
    weighted_f1,
    words,
)
from examples.erc.results import Results, read

FABRICATED = Path(__file__).with_name("results.json").read_text(encoding="utf-8")
METHOD = "text+audio+visual/shifting/response+feature"


@pytest.fixture
def document() -> Any:
    return json.loads(FABRICATED)


@pytest.fixture
def results(document: Any) -> Results:
    return read(document)


def without(document: Any, modality: str) -> Results:
    document["systems"] = [s for s in document["systems"] if modality not in s["modalities"]]
    return read(document)


def cell(table: Table, system: str, column: str) -> Any:
    (row,) = (row for row in table.rows if row.system == system)
    return row.cells[[column.key for column in table.columns].index(column)]


def test_a_spread_is_mean_and_sample_standard_deviation(results: Results) -> None:
    found = spread(results.systems[0].runs, weighted_f1)

    assert found.mean == pytest.approx(0.61)
    assert found.deviation == pytest.approx(0.02 / math.sqrt(2))
    assert found.count == 2


def test_one_run_has_no_spread(results: Results) -> None:
    assert spread(results.systems[0].runs[:1], weighted_f1) == Spread(0.60, None, 1)


def test_differences_are_paired_by_seed_whatever_the_order(document: Any) -> None:
    document["systems"][0]["runs"].reverse()
    results = read(document)

    gap = difference(results.method, results.teacher) if results.method else None

    assert gap is not None
    assert gap.mean == pytest.approx(0.025)
    assert gap.deviation == pytest.approx(0.01 / math.sqrt(2))
    assert gap.count == 2


def test_only_seeds_that_both_have_are_paired(document: Any) -> None:
    del document["systems"][0]["runs"][0]
    results = read(document)

    gap = difference(results.method, results.teacher) if results.method else None

    assert gap == Difference(pytest.approx(0.02), None, 1)


def test_without_a_shared_seed_there_is_no_difference(document: Any) -> None:
    del document["systems"][0]["runs"][0]
    del document["systems"][8]["runs"][1]
    results = read(document)

    assert results.method is not None
    assert difference(results.method, results.teacher) is None


def test_a_system_does_not_differ_from_itself_or_from_nothing(results: Results) -> None:
    system = results.systems[0]

    assert difference(system, system) is None
    assert difference(system, None) is None


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (Difference(0.02, 0.01, 5), "beyond the spread"),
        (Difference(-0.02, 0.01, 5), "beyond the spread"),
        (Difference(0.01, 0.01, 5), "beyond the spread"),
        (Difference(-0.009, 0.01, 5), "within the spread"),
        (Difference(0.0, 0.0, 5), "within the spread"),
        (Difference(0.5, None, 1), "one seed"),
    ],
)
def test_a_difference_smaller_than_its_deviation_is_within_the_spread(
    gap: Difference, verdict: str
) -> None:
    assert gap.verdict == verdict


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Spread(0.61234, 0.0456, 3), "61.23 ± 4.56"),
        (Spread(0.61234, None, 1), "61.23"),
        (Difference(0.0123, 0.01, 3), "+1.23 ± 1.00"),
        (Difference(-0.0123, None, 1), "−1.23"),
        (None, "–"),
        (7, "7"),
        (12.34, "12.3"),
        ("Text", "Text"),
    ],
)
def test_cells_are_written_in_percent(value: Any, written: str) -> None:
    assert words(value) == written


def test_the_decimals_can_be_chosen() -> None:
    assert parts(Spread(0.61234, 0.0456, 3), 1) == ("61.2", "± 4.6")


def test_confusions_are_summed_over_seeds(results: Results) -> None:
    assert confusion(results.systems[0]) == [[9, 1, 0], [2, 4, 0], [1, 1, 2]]


def test_the_headline_ends_with_the_method(results: Results) -> None:
    table = headline(results)

    assert [row.system for row in table.rows] == [
        "text",
        "audio/response+feature",
        "visual/response+feature",
        "text+audio+visual/concatenation/none",
        "text+audio+visual/concatenation/response+feature",
        METHOD,
    ]
    assert cell(table, METHOD, "weighted_f1").mean == pytest.approx(0.635)
    assert cell(table, METHOD, "macro_f1").mean == pytest.approx(0.515)
    assert cell(table, METHOD, "accuracy").mean == pytest.approx(0.645)
    assert cell(table, METHOD, "against_teacher").mean == pytest.approx(0.025)
    assert cell(table, METHOD, "against_concatenation").mean == pytest.approx(-0.005)
    assert cell(table, "text", "against_teacher") is None


def test_the_ablation_crosses_fusion_and_distillation(results: Results) -> None:
    table = ablation(results)

    assert [row.cells[:2] for row in table.rows] == [
        ("Concatenation", "None"),
        ("Concatenation", "Response + feature"),
        ("Shifting", "None"),
        ("Shifting", "Response + feature"),
    ]
    assert "text + audio + visual" in table.note
    undistilled = cell(table, "text+audio+visual/shifting/none", "against_concatenation")
    assert undistilled.mean == pytest.approx(0.005)


def test_the_combinations_follow_the_paper(results: Results) -> None:
    assert [row.cells[:2] for row in combinations(results).rows] == [
        ("Audio", "None"),
        ("Visual", "None"),
        ("Text", "None"),
        ("Text + audio", "Shifting"),
        ("Text + audio + visual (all)", "Concatenation"),
        ("Text + audio + visual (all)", "Shifting"),
    ]


def test_without_visual_its_rows_are_simply_absent(document: Any) -> None:
    results = without(document, "visual")

    assert [row.cells[0] for row in combinations(results).rows] == [
        "Audio",
        "Text",
        "Text + audio (all)",
    ]
    assert [row.cells[0] for row in students(results).rows] == ["Audio", "Audio"]
    assert [row.system for row in ablation(results).rows] == [
        "text+audio/shifting/response+feature"
    ]


def test_students_stand_against_themselves_without_distillation(results: Results) -> None:
    table = students(results)

    gap = cell(table, "audio/response+feature", "against_none")
    assert gap.mean == pytest.approx(0.035)
    assert gap.deviation == pytest.approx(0.03 / math.sqrt(2))
    assert cell(table, "audio/none", "against_none") is None
    assert cell(table, "visual/response+feature", "against_none").verdict == "within the spread"


def test_classes_come_with_their_support_and_both_means(results: Results) -> None:
    table = per_class(results)

    assert [column.title for column in table.columns] == [
        "System",
        "neutral (5)",
        "joy (3)",
        "fear (2)",
        "Weighted F1",
        "Macro F1",
    ]
    assert len(table.rows) == len(results.systems)
    assert cell(table, "text", "f1/neutral").mean == pytest.approx(0.71)
    assert cell(table, "audio/none", "f1/fear") == Spread(0.0, 0.0, 2)


def test_all_systems_show_the_dev_score_too(results: Results) -> None:
    table = every_system(results)

    assert len(table.rows) == len(results.systems)
    assert cell(table, "text", "dev_weighted_f1").mean == pytest.approx(0.625)


def test_every_run_has_a_row(results: Results) -> None:
    table = every_run(results)

    assert len(table.rows) == 20
    assert table.rows[1].cells == (
        "Text teacher",
        5,
        Spread(0.62, None, 1),
        Spread(0.63, None, 1),
        2,
        3,
        5.0,
    )


def test_the_highest_mean_of_a_column_is_the_best(results: Results) -> None:
    table = headline(results)
    score = [column.key for column in table.columns].index("weighted_f1")
    count = [column.key for column in table.columns].index("count")

    best = [row.system for row in table.rows if table.best(row, score)]

    assert best == ["text+audio+visual/concatenation/response+feature"]
    assert not any(table.best(row, count) for row in table.rows)


def test_a_row_of_its_own_is_not_called_the_best(document: Any) -> None:
    del document["systems"][1:]
    table = headline(read(document))

    assert not any(table.best(table.rows[0], index) for index in range(len(table.columns)))


def test_columns_of_nothing_and_tables_of_nothing_are_left_out(document: Any) -> None:
    del document["systems"][1:]
    results = read(document)

    assert [table.key for table in tables(results)] == [
        "headline",
        "combinations",
        "per_class",
        "systems",
        "runs",
    ]
    assert [column.key for column in headline(results).columns] == [
        "system",
        "count",
        "weighted_f1",
        "macro_f1",
        "accuracy",
    ]


def test_the_legend_of_one_seed_does_not_speak_of_spreads(document: Any) -> None:
    several = legend(read(document))
    document["seeds"] = [3]
    for system in document["systems"]:
        del system["runs"][1]
    single = legend(read(document))

    assert "±" in several
    assert "no test of significance" in several
    assert "±" not in single
    assert "may well be chance" in single


@pytest.mark.parametrize(
    ("value", "written"), [(0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (1.0, "1.000")]
)
def test_probabilities_have_three_decimals(value: float, written: str) -> None:
    assert words(Probability(value)) == written
