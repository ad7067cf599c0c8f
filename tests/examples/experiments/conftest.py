"""All experiments, run once on a small folder of features."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from examples.erc import plots
from examples.experiments.command import command
from tests.examples.conftest import make_features, write_files


class Ran(NamedTuple):
    """A run: its folder, the words typed, and what came of it."""

    folder: Path
    words: list[str]
    result: Result


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """``all`` on three modalities, from two seeds, an epoch each."""
    root = tmp_path_factory.mktemp("experiments")
    write_files(root / "features", make_features())
    words = ["--corpus", "meld", "--features", str(root / "features"), "--device", "cpu"]
    words += ["--epochs", "1", "--seeds", "2", "--output", str(root / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DENSITY", 1)  # fewer pixels are faster
        return Ran(root / "run", words, call("all", *words))


@pytest.fixture(scope="session")
def read_once(ran: Ran) -> dict[str, Any]:
    assert ran.result.exit_code == 0, ran.result.stderr
    text = (ran.folder / "experiments" / "all" / "results.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@pytest.fixture
def document(read_once: dict[str, Any]) -> dict[str, Any]:
    """The results, to be spoilt."""
    return copy.deepcopy(read_once)
