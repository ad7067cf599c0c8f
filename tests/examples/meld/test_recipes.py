from dataclasses import replace

from examples.erc.recipe import TeacherRecipe
from examples.meld.recipes import PAPER, RECIPES, RELEASED


def test_recipes_differ_where_the_readme_says() -> None:
    faster = replace(RELEASED.teacher.optimisation, learning_rate=1e-5)
    assert replace(RELEASED, name="paper", teacher=TeacherRecipe(faster)) == PAPER
    assert RELEASED.teacher.optimisation.learning_rate == 1e-6


def test_released_has_the_numbers_of_the_released_code() -> None:
    student, fusion = RELEASED.student, RELEASED.fusion
    assert (student.temperature, student.feature_temperature) == (4.0, 1.0)
    assert (student.response_weight, student.feature_weight) == (1.0, 1.0)
    assert (fusion.threshold, fusion.num_heads, fusion.dropout) == (0.1, 3, 0.2)
    assert {stage.optimisation.epochs for stage in (RELEASED.teacher, student, fusion)} == {10}
    assert {stage.optimisation.batch_size for stage in (RELEASED.teacher, student, fusion)} == {4}


def test_recipes_are_found_by_name() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {
        "paper": "paper",
        "released": "released",
        "recommended": "recommended",
    }
