import pytest

from examples.erc.results import FUSIONS, GROUPS
from examples.erc.systems import TAUGHT, TEACHER, System, plan

BOTH = "response+feature"


def test_plan_of_three_modalities_has_the_full_comparison() -> None:
    systems = plan(("text", "audio", "visual"))
    keys = {system.key for system in systems}
    assert len(keys) == len(systems) == 17
    assert {"text", "audio/none", "visual/response", f"audio/{BOTH}"} <= keys
    everything = {f"text+audio+visual/{how}/{taught}" for how in FUSIONS for taught in TAUGHT}
    pairs = {f"text+{student}/{how}/{BOTH}" for student in ("audio", "visual") for how in FUSIONS}
    assert everything | pairs == {system.key for system in systems if system.fusion}


def test_plan_of_two_modalities_fuses_them_in_every_way() -> None:
    keys = [system.key for system in plan(("text", "visual"))]
    assert keys == [
        "text",
        *(f"visual/{taught}" for taught in TAUGHT),
        *(f"text+visual/{how}/{taught}" for how in FUSIONS for taught in TAUGHT),
    ]


def test_plan_of_text_alone_is_the_teacher() -> None:
    assert plan(("text",)) == [TEACHER]


@pytest.mark.parametrize("modalities", [("text", "audio", "visual"), ("text", "audio"), ("text",)])
def test_plan_puts_every_system_after_its_parts(modalities: tuple[str, ...]) -> None:
    seen: set[System] = set()
    for system in plan(modalities):
        if system.fusion:
            assert set(system.parts()) <= seen
        assert system.distillation is None or TEACHER in seen
        seen.add(system)


def test_parts_take_the_students_as_they_were_taught() -> None:
    fusion = System(("text", "audio", "visual"), "response", "shifting")
    assert [part.key for part in fusion.parts()] == ["text", "audio/response", "visual/response"]


def test_titles_differ_and_groups_are_known() -> None:
    systems = plan(("text", "audio", "visual"))
    assert len({system.title for system in systems}) == len(systems)
    assert [system.group for system in (TEACHER, systems[1], systems[-1])] == list(GROUPS)
    assert systems[1].title == "Audio student, not distilled"
