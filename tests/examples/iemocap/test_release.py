from pathlib import Path

import pytest

from examples.erc.errors import InputError
from examples.iemocap.corpus import LABELS, read
from examples.iemocap.release import DEV, is_release, read_release, split_of

DIALOGUES = (
    "Ses01F_impro01", "Ses01M_impro01", "Ses02M_impro03", "Ses03F_impro04", "Ses04M_script01_1",
    "Ses05F_impro01",
)  # fmt: skip


def write(root: Path, dialogue: str, words: str, evaluation: str) -> None:
    home = root / f"Session{int(dialogue[3:5])}" / "dialog"
    for folder, text in (("transcriptions", words), ("EmoEvaluation", evaluation)):
        path = home / folder / f"{dialogue}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A release with one turn in each of six dialogues."""
    for dialogue in DIALOGUES:
        write(
            tmp_path,
            dialogue,
            f"{dialogue}_F000 [006.2901-008.2357]: Well.\n",
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            f"[6.2901 - 8.2357]\t{dialogue}_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
            "C-E2:\tNeutral;\t()\nC-F1:\tNeutral;\t(curious)\nA-E3:\tval 3; act 2; dom  2;\t()\n",
        )
    return tmp_path


def test_splits_follow_from_the_names() -> None:
    assert [split_of(dialogue) for dialogue in DIALOGUES] == [
        "train", "dev", "train", "train", "train", "test",
    ]  # fmt: skip
    assert len(set(DEV)) == 12


def test_the_texts_of_the_release_are_a_corpus(root: Path) -> None:
    wav = root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    wav.parent.mkdir(parents=True)
    wav.touch()
    corpus = read(root)
    assert {split: len(held) for split, held in corpus.splits.items()} == {
        "train": 4, "dev": 1, "test": 1,
    }  # fmt: skip
    turn = corpus.utterances("train")[0]
    assert (turn.identity, turn.text, turn.speaker) == ("Ses01F_impro01_F000", "Well.", 0)
    assert LABELS[turn.label] == "neu"
    assert turn.audio is not None
    assert turn.audio.path == wav.resolve()


def test_tables_come_before_the_texts(root: Path) -> None:
    (root / "IEMOCAP_dev.csv").touch()
    with pytest.raises(InputError, match=r"IEMOCAP_train\.csv: expected a CSV table"):
        read(root)


def test_labels_beyond_the_six_and_lines_without_a_time_are_left_out(root: Path) -> None:
    write(
        root,
        "Ses02M_impro03",
        "Ses02M_impro03_M000 [000.1000-001.0000]:  [LAUGHTER] Oh: no [sic]. \n"
        "M: Yes.\nF : And.\n\n"
        "Ses02M_impro03_FXX0 [001.0000-002.0000]: I see.\n"
        "Ses02M_impro03_F000 [002.0000-003.0000]: Well.\r\n"
        "nothing of the kind\n",
        "[0.1000 - 1.0000]\tSes02M_impro03_M000\tfru\t[2.5000, 2.5000, 2.5000]\n"
        "[2.0000 - 3.0000]\tSes02M_impro03_F000\txxx\t[2.5000, 2.5000, 2.5000]\n"
        "[3.0000 - 4.0000]\tSes02M_impro03_F001\toth\t[2.5000, 2.5000, 2.5000]\n"
        "[4.0000 - ]\tSes02M_impro03_F002\tneu\t[2.5000, 2.5000, 2.5000]\n"
        "[4.0000 - 5.0000]\tSes02F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n",
    )
    release = read_release(root)
    (turn,) = [turn for turn in release.turns["train"] if turn.session == 2]
    assert (turn.text, turn.start, turn.end) == ("[LAUGHTER] Oh: no [sic].", 0.1, 1.0)
    assert [(turn.identity[-4:], turn.label) for turn in release.left_out] == [
        ("F000", "xxx"), ("F001", "oth"),
    ]  # fmt: skip
    assert [(oddity.kind, oddity.line) for oddity in release.oddities] == [
        ("untimed", 2), ("untimed", 3), ("untimed", 5), ("unread", 7), ("unread", 4), ("unread", 5),
    ]  # fmt: skip


def test_hidden_files_of_a_mac_are_not_dialogues(root: Path) -> None:
    folder = root / "Session3/dialog/EmoEvaluation"
    (folder / "._Ses03F_impro04.txt").write_bytes(b"\x00\x05\x16\x07")
    assert read_release(root).oddities == []


@pytest.mark.parametrize(
    ("words", "evaluation", "message"),
    [
        ("", "[1.0 - 2.0]\t{}_F000\tneu\t[2, 2, 2]", r"transcriptions.*words of {}_F000, got none"),
        (
            "{}_F000 [001.0-002.0]: Hi.",
            "[2.0 - 2.0]\t{}_F000\tneu\t[2, 2, 2]",
            r"EmoEvaluation.*line 1: expected {}_F000 to end after its start, 2\.0 s, got 2\.0 s",
        ),
        (
            "{}_F000 [001.0-002.0]: Hi.",
            "[1.0 - 2.0]\t{0}_F000\tneu\t[2, 2, 2]\n[1.0 - 2.0]\t{0}_F000\txxx\t[2, 2, 2]",
            r"line 2: expected an utterance that is not in {}\.txt, line 1 already",
        ),
    ],
)
def test_a_fault_of_a_turn_names_file_and_line(
    root: Path, words: str, evaluation: str, message: str
) -> None:
    name = "Ses04M_script01_1"
    write(root, name, words.format(name), evaluation.format(name))
    with pytest.raises(InputError, match=message.format(name)):
        read(root)


def test_a_missing_session_and_a_missing_transcription_are_named(root: Path) -> None:
    (root / "Session3/dialog/transcriptions/Ses03F_impro04.txt").unlink()
    with pytest.raises(InputError, match=r"Ses03F_impro04\.txt: expected a text of the release"):
        read(root)
    (root / "Session3/dialog/EmoEvaluation/Ses03F_impro04.txt").unlink()
    with pytest.raises(InputError, match=r"Session3/dialog/EmoEvaluation: expected evaluations"):
        read(root)


def test_a_release_without_a_split_is_refused(root: Path) -> None:
    (root / "Session1/dialog/EmoEvaluation/Ses01M_impro01.txt").unlink()
    with pytest.raises(InputError, match="expected dialogues of the dev split, got none"):
        read_release(root)


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    assert not is_release(tmp_path)
    with pytest.raises(InputError, match=r"expected Session1/dialog/EmoEvaluation.*got neither"):
        read(tmp_path)
