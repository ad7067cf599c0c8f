import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from examples.erc import pipeline
from examples.erc.command import make_command
from examples.erc.ending import INTERRUPTED
from examples.erc.errors import TrainingError
from examples.erc.features import FeatureSource
from examples.erc.recipe import ClassificationRecipe, Recipe

Write = Callable[..., Path]


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(make_command("meld", "MELD"), [str(word) for word in words])


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Do not train; note what would have been."""
    calls: list[Any] = []

    def run(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", run)
    return calls


def test_help_needs_no_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from examples.meld.__main__ import command
result = CliRunner().invoke(command, ["--help"])
print(result.output)
assert result.exit_code == 0
assert not {"torch", "transformers", "numpy"} & {*sys.modules}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in ("--features", "--raw", "--synthetic", "--recipe", "--visual-encoder"):
        assert option in done.stdout


def test_the_names_of_modalities_agree() -> None:
    from examples.erc import source, training_options

    assert training_options.MODALITIES == source.MODALITIES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected exactly one of --features, --raw and --synthetic, got none of them"),
        (["--features", "a", "--synthetic"], "got --features and --synthetic"),
        (["--raw", "a", "--features", "b", "--synthetic"], "--features and --raw and --synthetic"),
        (["--synthetic", "--modalities", "text,smell"], "--modalities: expected some of text"),
        (["--features", "a", "--text-encoder", "b"], "--text-encoder: expected only with --raw"),
        (["--synthetic", "--visual-encoder", "b"], "got it with --synthetic"),
        (["--synthetic", "--bad-clips", "skip"], "--bad-clips: expected only with --raw, got it"),
        (["--features", "a", "--cache", "b"], "--cache: expected only with --raw"),
        (["--synthetic", "--crop"], "--crop: expected only with --raw"),
        (["--features", "/nowhere"], "/nowhere/meta.json: expected a file that can be read"),
        (["--raw", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], message: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "mine"],
        ["--seeds", "0"],
        ["--epochs", "0"],
        ["--batch-size", "2"],
        ["--device", "abacus"],
        ["--mixed-precision", "fp8"],
        ["--bad-clips", "hide"],
        ["--patience", "-1"],
        ["--class-balance", "1.5"],
        ["--focal", "-1"],
        ["--accumulate", "0"],
        ["--memory", "-1"],
        ["--checkpoint-every", "0"],
        ["elsewhere"],
    ],
)
def test_mistyped_options_have_status_2(words: list[str]) -> None:
    assert call("--synthetic", *words).exit_code == 2


def test_a_mistake_in_the_features_leaves_no_folder(write_features: Write, tmp_path: Path) -> None:
    folder = write_features(dataset="IEMOCAP")
    result = call("--features", folder, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "expected the dataset meld" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_whole_run_ends_with_a_table_and_a_report(write_features: Write, tmp_path: Path) -> None:
    words = ["--features", write_features(), "--output", tmp_path / "run", "--device", "cpu"]
    words += ["--epochs", "1", "--seeds", "2", "--modalities", "audio"]
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith(str(tmp_path / "run" / "report.html"))
    assert "Text + audio by shifting, response + feature" in result.stdout
    assert "mean ± sd over 2 seeds" in result.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["recipe"] == "released"
    assert results["command"] == shlex.join(
        ["python", "-m", "examples.meld", *sorted_as_declared(words)]
    )
    again = call(*words)
    assert again.exit_code == 0
    assert again.stdout.count(": kept, ") == 20


def sorted_as_declared(words: list[Any]) -> list[str]:
    pairs = dict(zip(words[::2], map(str, words[1::2]), strict=True))
    declared = ("--features", "--modalities", "--seeds", "--epochs", "--output", "--device")
    return [word for name in declared for word in (name, pairs[name])]


def test_options_reach_the_recipe(write_features: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    words = ["--features", write_features(), "--recipe", "paper"]
    assert call(*words, "--epochs", "5", "--batch-size", "7").exit_code == 130
    assert call(*words).exit_code == 130
    chosen: list[Recipe] = [arguments[1] for arguments in calls]
    for recipe in chosen:
        assert recipe.name == "paper"
        assert recipe.student.temperature == 4.0
    phases = [
        [recipe.teacher.optimisation, recipe.student.optimisation, recipe.fusion.optimisation]
        for recipe in chosen
    ]
    assert all((phase.epochs, phase.batch_size) == (5, 7) for phase in phases[0])
    source: FeatureSource = calls[1][0]
    own = [source.optimisation(phase) for phase in ("teacher", "student", "fusion")]
    assert phases[1] == own
    assert calls[1][3] == Path("runs/meld-features")


def test_options_about_clips_reach_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from examples.erc import raw
    from examples.meld import corpus

    made: list[dict[str, Any]] = []

    def make(*arguments: Any, **options: Any) -> None:
        made.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "read", lambda root: None)
    monkeypatch.setattr(raw, "RawSource", make)
    words = ["--raw", tmp_path, "--bad-clips", "fail", "--cache", tmp_path / "cache", "--crop"]
    assert call(*words).exit_code == 130
    assert call("--raw", tmp_path).exit_code == 130

    chosen = [{name: options[name] for name in ("bad_clips", "cache", "crop")} for options in made]
    assert chosen == [
        {"bad_clips": "fail", "cache": tmp_path / "cache", "crop": True},
        {"bad_clips": "mask", "cache": None, "crop": False},
    ]


def test_options_against_imbalance_and_for_the_loop_arrive(
    write_features: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    words = ["--features", write_features()]
    call(*words)
    call(*words, "--class-balance", "0.5", "--focal", "2", "--patience", "0")
    call(*words, "--patience", "3", "--accumulate", "2", "--checkpoint-every", "7", "--memory", "9")
    plain, balanced, patient = (arguments[1] for arguments in calls)
    assert (plain.student.memory_size, patient.student.memory_size) == (0, 9)
    assert plain.classification == ClassificationRecipe(0.0, 0.0)
    assert plain.teacher.optimisation.patience == 4
    assert balanced.classification == ClassificationRecipe(0.5, 2.0)
    assert balanced.fusion.optimisation.patience is None
    assert patient.student.optimisation.patience == 3
    assert [arguments[4].accumulation for arguments in calls] == [1, 1, 2]
    assert [arguments[6] for arguments in calls] == [None, None, 7]


@pytest.mark.parametrize("words", [("--focal", "inf"), ("--class-balance", "nan")])
def test_what_is_no_number_is_refused(write_features: Write, words: tuple[str, str]) -> None:
    result = call("--features", write_features(), *words)
    assert result.exit_code == 2
    assert f"got {words[1]}; 0.5 and 2 are usual ones" in result.stderr


def test_two_processes_give_what_one_gives_with_the_batch_in_two_parts(
    write_features: Write, tmp_path: Path
) -> None:
    """To a thousandth of all weights and of all outputs, after two epochs.

    Losses and gradients agree to rounding, but where a gradient is rounding alone AdamW turns it
    into whole steps: single weights may differ by several.
    """
    words = ["-m", "examples.meld", "--features", str(write_features()), "--device", "cpu"]
    words += ["--modalities", "audio", "--epochs", "2", "--batch-size", "9"]
    words += ["--class-balance", "0.5", "--memory", "20"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run(
        [sys.executable, *launcher, *words, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    one = call(*words[2:], "--accumulate", "2", "--output", tmp_path / "one")
    assert one.exit_code == 0, one.stderr
    stages = sorted((tmp_path / "one").glob("seed-0/*/stage.json"))
    assert len(stages) == 10
    for stage in stages:
        folders = [stage.parent, tmp_path / "two" / stage.parent.relative_to(tmp_path / "one")]
        records = [json.loads((folder / "stage.json").read_text()) for folder in folders]
        if stage.parent.name in ("text", "audio-none"):  # others name stages that differ in bits
            assert records[0]["fingerprint"] == records[1]["fingerprint"]
        for name in ("model", "outputs"):
            tensors = [load_file(folder / f"{name}.safetensors") for folder in folders]
            assert tensors[0].keys() == tensors[1].keys()
            ours, theirs = (torch.cat([x[key].flatten() for key in sorted(x)]) for x in tensors)
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), (stage, name)
    assert two.stdout.count("MELD, seed 0, ") == 10  # each line once
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["command"].startswith("torchrun --nproc_per_node 2 -m examples.meld --features")


def test_recipes_serve_a_source_without_an_optimisation(
    write_features: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    monkeypatch.setattr(FeatureSource, "optimisation", lambda self, phase: None)
    call("--features", write_features())
    assert calls[0][1].teacher.optimisation.learning_rate == 1e-6
    assert calls[0][1].fusion.optimisation.batch_size == 4


def test_a_loss_that_is_not_finite_ends_with_status_1(
    write_features: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any) -> None:
        raise TrainingError("text: the loss of epoch 1 is nan; lower the learning rate")

    monkeypatch.setattr(pipeline, "run", diverge)
    result = call("--features", write_features())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: text: the loss of epoch 1 is nan; lower the learning rate\n"


def test_a_full_disk_ends_with_status_1(
    write_features: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "stage.json")

    monkeypatch.setattr(pipeline, "run", fill)
    result = call("--features", write_features())
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr


def test_ctrl_c_says_how_to_go_on(write_features: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(monkeypatch)
    result = call("--features", write_features())
    assert result.exit_code == INTERRUPTED
    assert result.stderr.strip() == (
        "interrupted: what was saved is kept; the same command goes on from there"
    )


def test_a_signal_in_the_middle_of_training_loses_nothing(
    write_features: Write, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "examples.meld", "--features", str(write_features())]
    # So many seeds that it cannot have finished by the time that the signal arrives.
    words += ["--output", str(tmp_path / "run"), "--device", "cpu", "--seeds", "1000"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("MELD, seed 0, text: dev ")
    time.sleep(0.05)  # into the middle of some stage
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    assert err.strip().splitlines() == [
        "interrupted: what was saved is kept; the same command goes on from there"
    ]
    assert (tmp_path / "run" / "seed-0" / "text" / "stage.json").exists()
    assert not (tmp_path / "run" / "results.json").exists()


def test_check_prints_a_summary_and_leaves_a_manifest(tmp_path: Path) -> None:
    root = write_meld(tmp_path / "MELD.Raw")
    result = call("check", root, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout.startswith("MELD, from tables\n")
    assert result.stdout.rstrip().endswith(str(tmp_path / "out" / "check.html"))
    document = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))
    assert (document["status"], document["root"]) == (1, str(root))


def write_meld(root: Path) -> Path:
    root.mkdir()
    for split in ("train", "dev", "test"):
        table = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\nHi.,Ada,joy,0,0\n"
        (root / f"{split}_sent_emo.csv").write_text(table, encoding="utf-8")
    return root


def test_check_of_what_cannot_be_read_is_one_line_and_status_2(tmp_path: Path) -> None:
    root = write_meld(tmp_path / "MELD.Raw")
    (root / "dev_sent_emo.csv").write_bytes(b"\xff")
    result = call("check", root, "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {root / 'dev_sent_emo.csv'}, line 1, byte 1: expected UTF-8")
    assert not (tmp_path / "out").exists()


def test_check_that_cannot_write_has_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("check", write_meld(tmp_path / "MELD.Raw"), "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert str(tmp_path / "file") in result.stderr.splitlines()[-1]


def test_check_takes_no_options_of_a_training(tmp_path: Path) -> None:
    result = call("--synthetic", "check", tmp_path)
    assert result.exit_code == 2
    assert "--synthetic: expected nothing before check" in result.stderr


def test_an_interrupted_check_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.meld import check

    def interrupt(root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", interrupt)
    result = call("check", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == INTERRUPTED
    assert result.stderr.strip() == "interrupted: the same command starts afresh"
    assert not (tmp_path / "out").exists()
