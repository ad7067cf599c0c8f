from dataclasses import replace

from examples.iemocap.recipes import PAPER, RECIPES, RELEASED
from examples.meld import recipes as meld


def test_recipes_differ_where_the_readme_says() -> None:
    other = replace(RELEASED.fusion, threshold=0.01, dropout=0.1)
    assert replace(RELEASED, name="paper", fusion=other) == PAPER


def test_released_has_the_numbers_of_the_released_code() -> None:
    student, fusion = RELEASED.student, RELEASED.fusion
    assert (student.temperature, student.feature_temperature) == (2.0, 1.0)
    assert (student.response_weight, student.feature_weight) == (0.1, 1.0)
    assert (fusion.threshold, fusion.num_heads, fusion.dropout) == (0.2, 4, 0.2)
    assert (fusion.optimisation.epochs, fusion.optimisation.warmup) == (8, 1 / 8)


def test_temperatures_are_the_code_s_and_not_the_swapped_ones_of_table_9() -> None:
    assert (meld.PAPER.student.temperature, PAPER.student.temperature) == (4.0, 2.0)


def test_recipes_are_found_by_name() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {
        "paper": "paper",
        "released": "released",
        "recommended": "recommended",
    }
