import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.erc import pipeline
from examples.erc.artifacts import exclusive
from examples.erc.features import FeatureSource
from examples.erc.systems import System
from examples.erc.training import Hardware, Trained, train
from examples.experiments.catalogue import EXPERIMENTS
from examples.experiments.command import ALL, NAMES
from examples.experiments.outcome import read
from examples.experiments.running import EVERYTHING, choose, run
from examples.experiments.significance import compare
from examples.experiments.tables import table
from examples.synthetic.script import Size
from examples.synthetic.source import SyntheticSource
from tests.examples.experiments.conftest import Ran, call
from tests.helpers import deaths, small_experiments
from tests.helpers.small_experiments import BRIEF

Write = Callable[..., Path]

CPU = Hardware("cpu")


def work(source: FeatureSource, folder: Path, *names: str, seeds: tuple[int, ...] = (0,)) -> Any:
    experiments = [EXPERIMENTS[name] for name in names]
    return dict(run(source, BRIEF, experiments, seeds, folder, CPU, "a test", name=names[0]))


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is trained."""
    titles: list[str] = []

    def watched(*arguments: Any, title: str, **options: Any) -> Trained:
        titles.append(title.split(", ", 1)[1])
        return train(*arguments, title=title, **options)

    monkeypatch.setattr(pipeline, "train", watched)
    return titles


def without_times(results: Any) -> Any:
    plain = json.loads(json.dumps(results))
    del plain["seconds"]
    for system in plain["systems"]:
        for once in system["runs"]:
            del once["seconds"]
    return plain


def test_a_system_is_trained_once_whoever_needs_it(
    write_features: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FeatureSource(write_features(), "meld", ("text", "audio"))
    trained = noted(monkeypatch)
    pipeline.run(source, BRIEF, (0,), tmp_path, CPU, "a test")
    assert len(trained) == 10
    work(source, tmp_path, "ablation", "modalities", seeds=(0, 1))
    # The pipeline has no student of features alone, nor the second seed.
    extra = ["audio/feature", "text+audio/concatenation/feature", "text+audio/shifting/feature"]
    assert [name for name in trained[10:] if name.startswith("seed 0, ")] == [
        f"seed 0, {name}" for name in extra
    ]
    assert len(set(trained)) == len(trained) == 10 + 3 + 13
    before = len(trained)
    work(source, tmp_path, "confusions", "comparison", seeds=(0, 1))
    assert len(trained) == before


def test_another_teacher_leads_and_is_learnt_from(write_features: Write, tmp_path: Path) -> None:
    source = FeatureSource(write_features(), "meld")
    work(source, tmp_path, "teacher")
    folder = tmp_path / "seed-0"
    key = "audio+text+visual-shifting-response+feature-by-audio"
    settings = {
        path.parent.name: json.loads(path.read_text())["settings"]
        for path in folder.glob("*/stage.json")
    }
    assert list(settings[key]["encoders"]) == ["audio", "text", "visual"]
    student = settings["text-response+feature-by-audio"]
    assert student["system"]["taught_by"] == "audio"
    assert student["teacher"] == settings[key]["encoders"]["audio"]
    assert student["teacher"] != settings["audio-response+feature"]["teacher"]


def test_features_alone_switch_the_responses_off(write_features: Write, tmp_path: Path) -> None:
    source = FeatureSource(write_features(), "meld", ("text", "audio"))
    work(source, tmp_path, "students")
    recipes = {
        taught: json.loads((tmp_path / f"seed-0/audio-{taught}/stage.json").read_text())[
            "settings"
        ]["recipe"]
        for taught in ("none", "response", "feature", "response+feature")
    }
    weights = {
        taught: (recipe["response_weight"], recipe["feature_weight"])
        for taught, recipe in recipes.items()
    }
    assert weights == {
        "none": (0.0, 0.0),
        "response": (1.0, 0.0),
        "feature": (0.0, 1.0),
        "response+feature": (1.0, 1.0),
    }


def test_significance_is_computed_from_the_stored_answers(
    write_features: Write, tmp_path: Path
) -> None:
    source = FeatureSource(write_features(), "meld", ("text", "audio"))
    results = work(source, tmp_path, "comparison", seeds=(0, 1))
    entry = results["significance"][-1]
    answers = []
    for key in (entry["system"], entry["baseline"]):
        stages = [tmp_path / f"seed-{seed}" / key.replace("/", "-") for seed in (0, 1)]
        outputs = [
            pipeline.artifacts.Artifact(stage, {}, "", {}).outputs("test") for stage in stages
        ]
        answers.append(torch.stack([fields["logits"].argmax(1) for fields in outputs]).numpy())
    dialogues = [0] * 8 + [1] * 3 + [2] * 10
    expected = compare(*answers, source.targets("test").numpy(), torch.tensor(dialogues).numpy(), 3)
    assert (entry["seeds"], entry["dialogues"]) == (expected.seeds, expected.dialogues)


def test_a_killed_run_goes_on_to_the_same_end(write_features: Write, tmp_path: Path) -> None:
    features = write_features()

    for last in (60, 80):
        assert (
            deaths.run(small_experiments.live, tmp_path / "killed", features, last)
            == -signal.SIGKILL
        )
        assert not (tmp_path / "killed" / "experiments").exists()
    kept = [path.parent for path in (tmp_path / "killed").glob("seed-0/*/stage.json")]
    times = {folder.name: (folder / "stage.json").stat().st_mtime_ns for folder in kept}
    assert len(times) > 2
    assert deaths.run(small_experiments.live, tmp_path / "killed", features) == 0
    for name, time in times.items():  # what was finished was left alone
        assert (tmp_path / "killed" / "seed-0" / name / "stage.json").stat().st_mtime_ns == time
    assert deaths.run(small_experiments.live, tmp_path / "whole", features) == 0
    found, expected = (
        json.loads((tmp_path / name / "experiments" / "comparison" / "results.json").read_text())
        for name in ("killed", "whole")
    )
    assert without_times(found) == without_times(expected)


def test_all_leaves_out_what_the_source_is_not_good_for(write_features: Write) -> None:
    whole = FeatureSource(write_features(), "meld")
    experiments, left_out = choose("all", whole)
    assert [e.name for e in experiments] == [name for name in EXPERIMENTS if name != "prompt"]
    assert list(left_out) == ["prompt"]
    text = FeatureSource(write_features(), "meld", ("text",))
    experiments, left_out = choose("all", text)
    assert [e.name for e in experiments] == ["classes"]
    assert "expected at least 2 modalities to compare, got text alone" in left_out["ablation"]


@pytest.mark.parametrize(("name", "title"), [("meld", "MELD"), ("iemocap", "IEMOCAP")])
def test_the_synthetic_corpus_gives_every_table(name: str, title: str, tmp_path: Path) -> None:
    modalities = ("text", "audio", "visual") if name == "meld" else ("text", "audio")
    source = SyntheticSource(
        name, title, tmp_path, modalities, seed=0, size=Size(train=9, dev=4, test=4)
    )
    recipe = import_module(f"examples.{name}.recipes").RELEASED
    for phase in ("teacher", "student", "fusion"):
        own = source.optimisation(phase)  # type: ignore[arg-type]
        assert own is not None
        stage = replace(getattr(recipe, phase), optimisation=replace(own, epochs=1))
        recipe = replace(recipe, **{phase: stage})
    experiments, left_out = choose("all", source)
    assert not left_out
    outcome = read(run(source, recipe, experiments, (0,), tmp_path, CPU, "a test"))
    made = [
        table(comparison, outcome)
        for experiment in outcome.experiments
        for comparison in experiment.plan(outcome.modalities)
    ]
    assert len(made) == 8
    assert all(row.cells for one in made for row in one.rows)
    silent, asking = (
        tmp_path / "seed-0" / key / "stage.json" for key in ("text-no-prompt", "text")
    )
    seen = [json.loads(path.read_text())["settings"]["source"] for path in (silent, asking)]
    assert seen[0] == {**seen[1], "prompt": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation", "--corpus", "meld"], "expected exactly one of --features, --raw and"),
        (["ablation", "--corpus", "meld", "--synthetic", "--crop"], "--crop: expected only with"),
        (
            ["ablation", "--corpus", "meld", "--features", "/nowhere"],
            "/nowhere/meta.json: expected a file that can be read",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], message: str) -> None:
    result = call(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["luck", "--corpus", "meld"],
        ["all"],
        ["all", "--corpus", "mosi"],
        ["all", "--corpus", "meld", "--seeds", "0"],
    ],
)
def test_mistyped_words_have_status_2(words: list[str]) -> None:
    assert call(*words).exit_code == 2


def test_an_experiment_that_cannot_be_is_refused_before_any_work(
    write_features: Write, tmp_path: Path
) -> None:
    words = ["--corpus", "meld", "--features", write_features(), "--output", tmp_path / "run"]
    result = call("prompt", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: prompt: features.npz: expected words")
    assert "use --raw or --synthetic" in result.stderr
    result = call("teacher", *words, "--modalities", "text")
    assert result.exit_code == 2
    assert "teacher: expected at least 2 modalities" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_is_kept_as_it_was_typed(ran: Ran, document: Any) -> None:
    pairs = dict(zip(ran.words[::2], ran.words[1::2], strict=True))
    declared = ("--corpus", "--features", "--seeds", "--epochs", "--output", "--device")
    words = [word for name in declared for word in (name, pairs[name])]
    assert document["command"] == shlex.join(
        ["python", "-m", "examples.experiments", "all", *words]
    )


def test_ctrl_c_says_how_to_go_on(
    write_features: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", stop)
    words = ["--corpus", "meld", "--features", write_features(), "--output", tmp_path]
    result = call("modalities", *words)
    assert result.exit_code == 130
    assert result.stderr.strip().endswith("the same command goes on from there")
    assert not (tmp_path / "experiments").exists()


def test_a_folder_at_work_is_refused(write_features: Write, tmp_path: Path) -> None:
    words = ["--corpus", "meld", "--features", write_features(), "--output", tmp_path]
    with exclusive(tmp_path):
        result = call("classes", *words)
    assert result.exit_code == 2
    assert "no other run in this folder" in result.stderr


def test_what_is_left_out_is_told_before_any_work(ran: Ran) -> None:
    (line,) = [line for line in ran.result.stderr.splitlines() if line.startswith("prompt")]
    assert line.startswith("prompt is left out: features.npz: expected words")


def test_the_class_distribution_trains_nothing(
    write_features: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = noted(monkeypatch)

    def prepare(self: FeatureSource, folder: Path) -> None:
        raise AssertionError("clips would be decoded")

    monkeypatch.setattr(FeatureSource, "prepare", prepare)
    words = ["--corpus", "meld", "--features", write_features(), "--output", tmp_path]
    result = call("classes", *words)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "experiments" / "classes" / "tables" / "classes.csv").exists()
    assert not trained


def test_names_agree_and_help_needs_no_torch() -> None:
    assert tuple(EXPERIMENTS) == NAMES
    assert ALL == EVERYTHING
    code = """
import sys
from click.testing import CliRunner
from examples.experiments.command import command
result = CliRunner().invoke(command, ["--help"])
print(result.output)
assert result.exit_code == 0
assert not {"torch", "transformers", "numpy"} & {*sys.modules}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("--corpus", "--features", "--recipe", "--checkpoint-every", "ablation", "all"):
        assert word in done.stdout


def test_systems_are_found_by_what_they_are() -> None:
    led = System(("audio", "text"), "response+feature", "shifting", "audio")
    assert led.key == "audio+text/shifting/response+feature/by-audio"
    assert led.title == "Audio + text by shifting, response + feature, taught by audio"
    assert [part.key for part in led.parts()] == ["audio", "text/response+feature/by-audio"]
    plain = replace(led, distillation="none")
    assert [part.key for part in plain.parts()] == ["audio", "text/none"]
    silent = System(("text",), prompt=False)
    assert (silent.key, silent.title) == ("text/no-prompt", "Text teacher, no prompt")
    assert silent.needs() == []
    assert led.describe()["taught_by"] == "audio"
    assert {"taught_by", "prompt"}.isdisjoint(System(("text",)).describe())
