import pytest

from examples.erc.systems import TEACHER, System
from examples.experiments.catalogue import EXPERIMENTS, Experiment

EVERY = [("text", "audio", "visual"), ("text", "audio"), ("text", "visual")]


@pytest.mark.parametrize("modalities", EVERY)
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=list(EXPERIMENTS))
def test_tables_hold_together(experiment: Experiment, modalities: tuple[str, ...]) -> None:
    for table in experiment.plan(modalities):
        keys = [line.system.key for line in table.lines]
        assert len(set(keys)) == len(keys)
        assert len({line.words for line in table.lines}) == len(keys)
        for line in table.lines:
            assert len(line.words) == len(table.heads)
            assert line.baseline != line.system
            assert {*line.system.modalities} <= {*modalities}
            # A baseline is shown where it is compared with.
            assert line.baseline is None or line.baseline.key in keys


def test_keys_and_titles_of_all_systems_differ() -> None:
    for modalities in EVERY:
        systems = {s for e in EXPERIMENTS.values() for s in e.systems(modalities)}
        assert len({system.key for system in systems}) == len(systems)
        assert len({system.title for system in systems}) == len(systems)
        assert all(needed in systems for system in systems for needed in system.needs())


def test_tables_have_keys_of_their_own() -> None:
    keys = [table.key for e in EXPERIMENTS.values() for table in e.plan(EVERY[0])]
    assert len(set(keys)) == len(keys) == 8


def test_every_modality_is_a_teacher() -> None:
    fusions, students = EXPERIMENTS["teacher"].plan(EVERY[0])
    led = [line.system for line in fusions.lines if line.system.fusion]
    assert [system.modalities[0] for system in led] == ["text", "audio", "visual"]
    assert [system.parts()[0].group for system in led] == ["teacher"] * 3
    assert {system.taught_by for system in led[1].parts()} == {"audio"}
    pairs = {(line.system.modalities[0], line.system.taught_by) for line in students.lines}
    assert {(a, b) for a in EVERY[0] for b in EVERY[0] if a != b} <= pairs


def test_the_ablation_takes_one_means_at_a_time_away() -> None:
    (table,) = EXPERIMENTS["ablation"].plan(EVERY[0])
    found = {(line.system.fusion, line.system.distillation) for line in table.lines}
    taught = ("none", "response", "feature", "response+feature")
    assert found == {(how, what) for how in ("concatenation", "shifting") for what in taught}
    assert {line.baseline for line in table.lines[1:]} == {table.lines[0].system}


def test_the_prompt_is_the_only_thing_left_out() -> None:
    (table,) = EXPERIMENTS["prompt"].plan(("text",))
    assert [line.system for line in table.lines] == [System(("text",), prompt=False), TEACHER]
