"""Killed at any moment, a stage goes on to the very same end."""

import json
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from examples.erc.artifacts import CHECKPOINTS, exclusive
from examples.erc.errors import InputError
from tests.helpers import deaths, small_stage

KILLS = 20

Outcome = tuple[dict[str, bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert deaths.run(small_stage.work, folder) == 0
    return folder


def steps(folder: Path) -> dict[str, str]:
    """What was noted at each step; a note that a kill left empty is none."""
    notes = {path.name: path.read_text() for path in folder.glob("step-*")}
    return {name: note for name, note in notes.items() if note}


def test_every_step_is_saved_and_the_checkpoints_go_when_the_stage_is_there(whole: Path) -> None:
    # Three steps in each of three epochs, and the last epoch once more when it is evaluated.
    saved = [(step, (step - 1) // 3) for step in range(1, small_stage.STEPS + 1)]
    expected = {f"step-{step:09d}-{epochs:05d}" for step, epochs in [*saved, (9, 3)]}
    assert steps(whole).keys() == expected
    assert not (whole / "stage" / CHECKPOINTS).exists()
    assert int((whole / "moments").read_text()) > 10 * small_stage.STEPS


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_end(whole: Path, tmp_path: Path, kill: int) -> None:
    draw = random.Random(kill)
    moments = int((whole / "moments").read_text())
    # Once at a save, once wherever it is.
    first = deaths.run(small_stage.work, tmp_path, draw.randint(1, moments))
    assert first == -signal.SIGKILL
    deaths.run(small_stage.work, tmp_path, kill_after=draw.uniform(0, 0.1))
    assert deaths.run(small_stage.work, tmp_path) == 0
    assert small_stage.outcome(tmp_path) == small_stage.outcome(whole)
    # Weights, optimiser, schedule, generators, order and losses, at every step that was saved.
    noted = steps(tmp_path)
    assert noted
    assert noted.items() <= steps(whole).items()
    left = {path.name for path in (tmp_path / "stage").iterdir()}
    assert left == {"model.safetensors", "outputs.safetensors", "stage.json"}


def limited(folder: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"File too large"):
        small_stage.obtain_stage(folder)


@pytest.mark.parametrize("size", [100, 1000, 6000])
def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(
    whole: Path, tmp_path: Path, size: int
) -> None:
    """As a full disk does: nothing half-written stays, and there is something to go on from."""
    halfway = int((whole / "moments").read_text()) // 2
    assert deaths.run(small_stage.work, tmp_path, halfway) == -signal.SIGKILL
    before = steps(tmp_path)
    assert deaths.run(limited, tmp_path, size) == 0
    assert not list((tmp_path / "stage").rglob("*.partial"))
    assert deaths.run(small_stage.work, tmp_path) == 0
    assert before.items() <= steps(tmp_path).items()
    assert small_stage.outcome(tmp_path) == small_stage.outcome(whole)


def intrude(folder: Path) -> None:
    with pytest.raises(InputError, match="no other run in this folder"):
        small_stage.work(folder)


def test_two_writers_are_refused_and_a_killed_one_is_no_writer(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        assert deaths.run(intrude, tmp_path) == 0
    assert not (tmp_path / "stage").exists()
    assert deaths.run(small_stage.work, tmp_path, 30) == -signal.SIGKILL
    assert deaths.run(small_stage.work, tmp_path) == 0


def test_a_stage_that_is_killed_twice_at_the_same_place_still_ends(
    whole: Path, tmp_path: Path
) -> None:
    """Each life gets a little further."""
    lives = 0
    while deaths.run(small_stage.work, tmp_path, 60) != 0:
        lives += 1
        assert lives < 30
    assert lives > 1
    assert small_stage.outcome(tmp_path) == small_stage.outcome(whole)
    assert json.loads((tmp_path / "stage" / "stage.json").read_text())["record"]["seconds"] > 0
