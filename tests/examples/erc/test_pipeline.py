import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

import telme_kd
from examples.erc import pipeline
from examples.erc.errors import InputError
from examples.erc.features import FeatureSource
from examples.erc.metrics import scores
from examples.erc.pipeline import run
from examples.erc.recipe import (
    FusionRecipe,
    Optimisation,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
)
from examples.erc.results import read
from examples.erc.source import JSON
from examples.erc.training import Hardware, Trained, train

Write = Callable[..., Path]

SHORT = Optimisation(
    learning_rate=3e-3,
    epochs=2,
    batch_size=8,
    warmup=0.1,
    weight_decay=0.01,
    max_gradient_norm=1.0,
    patience=None,
)
RECIPE = Recipe(
    name="short",
    teacher=TeacherRecipe(SHORT),
    student=StudentRecipe(SHORT, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    fusion=FusionRecipe(SHORT, 0.1, 3, 0.2, "modalities"),
)
PAIR = ("text", "audio")
CPU = Hardware("cpu")


def tell(
    source: FeatureSource, folder: Path, recipe: Recipe = RECIPE, seeds: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    return dict(run(source, recipe, seeds, folder, CPU, "python -m examples.meld"))


@pytest.fixture
def source(write_features: Write) -> FeatureSource:
    return FeatureSource(write_features(), "meld", PAIR)


def count_training(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """Note what is trained; ``stop_at`` presses Ctrl-C in the middle of that stage."""
    titles: list[str] = []

    def noted(*arguments: Any, title: str, **options: Any) -> Trained:
        titles.append(title.rsplit(", ", 1)[1])
        if len(titles) == stop_at:
            raise KeyboardInterrupt
        return train(*arguments, title=title, **options)

    monkeypatch.setattr(pipeline, "train", noted)
    return titles


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(results))
    del plain["seconds"]
    for system in plain["systems"]:
        for once in system["runs"]:
            del once["seconds"]
    return dict(plain)


def test_run_trains_the_full_comparison(write_features: Write, tmp_path: Path) -> None:
    source = FeatureSource(write_features(), "meld")
    results = tell(source, tmp_path / "run", seeds=(0, 3))
    checked = read(results)
    assert len(checked.systems) == 17
    assert checked.method is not None
    assert checked.method.title == "Text + audio + visual by shifting, response + feature"
    assert [once.seed for once in checked.systems[4].runs] == [0, 3]
    assert checked.counts == {"train": 40, "dev": 19, "test": 21}
    assert checked.versions["telme_kd"] == telme_kd.__version__
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    stages = {path.parent.name for path in (tmp_path / "run" / "seed-3").glob("*/stage.json")}
    assert stages == {system.key.replace("/", "-") for system in checked.systems}


def test_scores_are_those_of_the_stored_outputs(source: FeatureSource, tmp_path: Path) -> None:
    results = tell(source, tmp_path)
    for system in results["systems"]:
        stored = load_file(
            tmp_path / "seed-0" / system["key"].replace("/", "-") / "outputs.safetensors"
        )
        (once,) = system["runs"]
        assert once["dev"] == scores(source.targets("dev"), stored["dev.logits"])
        expected = scores(source.targets("test"), stored["test.logits"])
        assert {name: once["test"][name] for name in expected} == expected
        selected = once["history"][once["selected_epoch"] - 1]
        assert selected["dev_weighted_f1"] == once["dev"]["weighted_f1"]


def test_a_finished_run_trains_nothing_again(
    source: FeatureSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tell(source, tmp_path)
    trained = count_training(monkeypatch)
    assert tell(source, tmp_path) == first
    assert trained == []


@pytest.mark.parametrize("stop_at", [1, 3, 8])
def test_an_interrupted_run_goes_on_to_the_same_end(
    source: FeatureSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole = tell(source, tmp_path / "whole")
    count_training(monkeypatch, stop_at)
    with pytest.raises(KeyboardInterrupt):
        tell(source, tmp_path / "broken")
    assert not (tmp_path / "broken" / "results.json").exists()
    rest = count_training(monkeypatch)
    again = tell(source, tmp_path / "broken")
    assert len(rest) == 10 - (stop_at - 1)
    assert without_times(again) == without_times(whole)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def test_a_damaged_teacher_is_trained_again_and_its_students_kept(
    source: FeatureSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tell(source, tmp_path)
    flip_a_bit(tmp_path / "seed-0" / "text" / "model.safetensors")
    trained = count_training(monkeypatch)
    assert without_times(tell(source, tmp_path)) == without_times(first)
    assert trained == ["text"]
    assert "model.safetensors is damaged" in capsys.readouterr().err


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let the test choose the precision, which otherwise stays as it was chosen first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_damaged_outputs_are_said_again_to_the_bit_and_nothing_is_trained(
    source: FeatureSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: Literal["no", "bf16"],
) -> None:
    hardware = Hardware("cpu", precision)
    first = run(source, RECIPE, (0,), tmp_path, hardware, "")
    damaged = [
        tmp_path / "seed-0" / stage / "outputs.safetensors"
        for stage in ("text", "audio-response+feature", "text+audio-shifting-response+feature")
    ]
    before = [path.read_bytes() for path in damaged]
    for path in damaged:
        flip_a_bit(path)
    trained = count_training(monkeypatch)

    assert run(source, RECIPE, (0,), tmp_path, hardware, "") == first

    assert trained == []
    assert [path.read_bytes() for path in damaged] == before
    assert capsys.readouterr().err.count("computing them again from its weights") == 3


def all_but(*unchanged: str) -> set[str]:
    keys = {"text", "audio/none", "audio/response", "audio/response+feature"}
    keys |= {
        f"text+audio/{how}/{taught}"
        for how in ("concatenation", "shifting")
        for taught in ("none", "response", "response+feature")
    }
    return keys - set(unchanged)


@pytest.mark.parametrize(
    ("changed", "retrained"),
    [
        (replace(RECIPE, teacher=TeacherRecipe(replace(SHORT, epochs=3))), all_but("audio/none")),
        (
            replace(RECIPE, student=replace(RECIPE.student, feature_weight=2.0)),
            {
                "audio/response+feature",
                "text+audio/concatenation/response+feature",
                "text+audio/shifting/response+feature",
            },
        ),
        (
            replace(RECIPE, fusion=replace(RECIPE.fusion, threshold=0.3)),
            {key for key in all_but() if key.startswith("text+")},
        ),
        (replace(RECIPE, name="renamed"), set()),
    ],
    ids=["teacher", "feature weight", "fusion", "name"],
)
def test_a_change_retrains_what_depends_on_it(
    source: FeatureSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Recipe,
    retrained: set[str],
) -> None:
    tell(source, tmp_path)
    trained = count_training(monkeypatch)
    tell(source, tmp_path, changed)
    assert set(trained) == retrained


def test_other_features_retrain_everything(
    source: FeatureSource, write_features: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(source, tmp_path / "run")

    def change(arrays: dict[str, Any], meta: Any) -> None:
        arrays["audio_voice"][0, 0] += 1.0

    other = FeatureSource(write_features(change), "meld", PAIR)
    trained = count_training(monkeypatch)
    tell(other, tmp_path / "run")
    assert set(trained) == all_but()


def test_test_labels_are_looked_at_last(
    source: FeatureSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    trained = count_training(monkeypatch)
    given = FeatureSource.targets

    def targets(self: FeatureSource, split: str) -> Tensor:
        asked.append(f"{split} after {len(trained)}")
        return given(self, split)

    monkeypatch.setattr(FeatureSource, "targets", targets)
    tell(source, tmp_path)
    assert {moment for moment in asked if moment.startswith("test")} == {"test after 10"}


def test_wrong_test_labels_change_no_model(
    source: FeatureSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tell(source, tmp_path / "one")
    given = FeatureSource.targets

    def wrong(self: FeatureSource, split: str) -> Tensor:
        return given(self, split) if split != "test" else (given(self, split) + 1) % 3

    monkeypatch.setattr(FeatureSource, "targets", wrong)
    second = tell(source, tmp_path / "two")
    for one, two in zip(first["systems"], second["systems"], strict=True):
        assert one["runs"][0]["history"] == two["runs"][0]["history"]
        assert one["runs"][0]["dev"] == two["runs"][0]["dev"]
        assert one["runs"][0]["test"] != two["runs"][0]["test"]


def test_each_distillation_teaches_something_else(source: FeatureSource, tmp_path: Path) -> None:
    tell(source, tmp_path)
    none, response, both = (
        load_file(tmp_path / "seed-0" / f"audio-{taught}" / "model.safetensors")["layers.0.weight"]
        for taught in ("none", "response", "response+feature")
    )
    assert not torch.equal(none, response)
    assert not torch.equal(response, both)


def test_weights_of_zero_switch_distillation_off(source: FeatureSource, tmp_path: Path) -> None:
    mute = replace(RECIPE.student, response_weight=0.0, feature_weight=0.0)
    results = tell(source, tmp_path, replace(RECIPE, student=mute))
    runs = {system["key"]: system["runs"][0] for system in results["systems"]}
    assert runs["audio/none"]["history"] == runs["audio/response"]["history"]
    assert runs["audio/none"]["history"] == runs["audio/response+feature"]["history"]


def test_text_alone_is_the_teacher(write_features: Write, tmp_path: Path) -> None:
    results = tell(FeatureSource(write_features(), "meld", ("text",)), tmp_path)
    assert [system["key"] for system in results["systems"]] == ["text"]


def test_run_refuses_a_train_split_of_two_rows(
    source: FeatureSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureSource, "targets", lambda self, split: torch.zeros(2).long())
    with pytest.raises(InputError, match="at least 3 utterances in train, got 2"):
        tell(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("left", "hardware", "message"),
    [
        (2, CPU, "at least 3 utterances in train, got 2 after 38 with bad clips were skipped; .*"
         "mask bad clips instead"),
        (3, Hardware("cpu", accumulation=4), "MELD after 37 with bad clips were skipped: expected "
         "at least 4 rows in every batch"),
    ],
)  # fmt: skip
def test_run_refuses_a_train_split_of_which_too_little_is_left(
    source: FeatureSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    hardware: Hardware,
    message: str,
) -> None:
    given, prepared = FeatureSource.targets, []

    def targets(self: FeatureSource, split: str) -> Tensor:
        return given(self, split)[: left if prepared else None]

    monkeypatch.setattr(FeatureSource, "targets", targets)
    monkeypatch.setattr(FeatureSource, "prepare", lambda self, folder: prepared.append(folder))
    trained = count_training(monkeypatch)
    with pytest.raises(InputError, match=message):
        run(source, RECIPE, (0,), tmp_path, hardware, "")
    assert prepared == [tmp_path]
    assert trained == []


def test_every_fingerprint_names_the_source(source: FeatureSource, tmp_path: Path) -> None:
    tell(source, tmp_path)
    stages: list[dict[str, JSON]] = [
        json.loads(path.read_text())["settings"] for path in tmp_path.glob("seed-0/*/stage.json")
    ]
    assert len(stages) == 10
    assert all(stage["source"] == source.description for stage in stages)
    assert {stage["seed"] for stage in stages} == {0}  # type: ignore[type-var]
