from pathlib import Path

import pytest
from click.testing import CliRunner

from examples.synthetic.__main__ import command

TINY = ["--train", "2", "--dev", "1", "--test", "1"]


@pytest.mark.parametrize(
    ("corpus", "root", "table"),
    [
        ("meld", "MELD.Raw", "train_sent_emo.csv"),
        ("iemocap", "IEMOCAP_full_release", "IEMOCAP_train.csv"),
    ],
)
def test_command_writes_the_corpus_and_says_where(
    corpus: str, root: str, table: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, [corpus, str(tmp_path), *TINY])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / root)
    assert len((tmp_path / root / table).read_text(encoding="utf-8").splitlines()) == 3


def test_command_refuses_a_foreign_folder_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "MELD.Raw").mkdir()
    (tmp_path / "MELD.Raw/notes.txt").write_text("mine")
    result = CliRunner().invoke(command, ["meld", str(tmp_path), *TINY])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--train", "--dev", "--test"])
def test_command_refuses_an_empty_split(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["meld", str(tmp_path), option, "0"])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
