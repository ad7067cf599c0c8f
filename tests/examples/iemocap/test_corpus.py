import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.iemocap.corpus import LABELS, SPLITS, find_side, read

HEADER = (
    "Utterance", "Speaker", "Dialogue_ID", "Start_Time", "End_Time", "Wav_Path", "Video_Path",
    "Emotion",
)  # fmt: skip

SHARED_DATA = Path(
    os.environ.get("TELME_KD_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")
)


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def row(
    identity: str = "Ses01F_impro01_F000",
    *,
    dialogue: str = "",
    start: object = 1.5,
    end: object = 3.0,
    emotion: str = "neu",
) -> list[object]:
    dialogue = dialogue or identity.rpartition("_")[0]
    return ["Hi.", identity, dialogue, start, end, "/etc/passwd", "../../x.avi", emotion]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A corpus of one utterance a split, without media."""
    for session, split in enumerate(SPLITS, start=1):
        identity = f"Ses{session:02}F_impro01_F000"
        write_table(tmp_path / f"IEMOCAP_{split}.csv", [row(identity)])
    return tmp_path


def test_a_dialogue_has_two_people_whoever_wears_the_markers(root: Path) -> None:
    names = ["M000", "F000", "M001", "F001"]
    table = [
        row(f"Ses01F_script01_1b_{name}", start=number, end=number + 2)
        for number, name in enumerate(names)
    ]
    write_table(root / "IEMOCAP_train.csv", table)

    corpus = read(root)

    assert [utterance.speaker for utterance in corpus.utterances("train")] == [0, 1, 0, 1]
    assert corpus.speakers == 2
    assert corpus.labels == LABELS == tuple(sorted(LABELS))


def test_utterances_come_in_the_order_in_which_they_begin(root: Path) -> None:
    table = [
        row("Ses01F_impro01_M000", start=20.0, end=21.0),
        row("Ses01F_impro01_F000", start=3.0, end=9.0),
        row("Ses01F_impro01_F001", start=20.0, end=22.0),
    ]
    write_table(root / "IEMOCAP_train.csv", table)

    (dialogue,) = read(root).splits["train"]

    assert [utterance.identity[-4:] for utterance in dialogue.utterances] == [
        "F000",
        "M000",
        "F001",
    ]
    assert [utterance.speaker for utterance in dialogue.utterances] == [0, 1, 0]


@pytest.mark.parametrize(
    ("identity", "side"),
    [
        ("Ses01F_impro01_F000", "left"),
        ("Ses01F_impro01_M000", "right"),
        ("Ses05M_script03_2_M001", "left"),
        ("Ses05M_script03_2_F001", "right"),
        ("Ses01F_script01_1b_MXX0", "right"),
    ],
)
def test_who_wears_the_markers_is_seen_on_the_left(identity: str, side: str) -> None:
    assert find_side(identity) == side


@pytest.mark.parametrize("spelling", ["DivX", "Divx"])
def test_media_are_found_by_the_ids(root: Path, spelling: str) -> None:
    identity = "Ses05M_script03_2_F001"
    write_table(root / "IEMOCAP_test.csv", [row(identity, start=13.13, end=15.52)])
    wav = root / f"Session5/sentences/wav/Ses05M_script03_2/{identity}.wav"
    avi = root / f"Session5/dialog/avi/{spelling}/Ses05M_script03_2.avi"
    for path in (wav, avi):
        path.parent.mkdir(parents=True)
        path.touch()

    (utterance,) = read(root).utterances("test")

    assert utterance.audio == Clip(wav.resolve())
    assert utterance.visual == Clip(avi.resolve(), 13.13, 15.52, "right")


def test_media_that_are_not_there_are_none(root: Path) -> None:
    (utterance,) = read(root).utterances("dev")

    assert (utterance.audio, utterance.visual) == (None, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row()], r"line 3, column 'Speaker': .*not in IEMOCAP_train\.csv, line 2 already"),
        ([row(emotion="xxx")], r"line 2, column 'Emotion': expected one of ang, exc, .*got 'xxx'"),
        (
            [row("../../etc/passwd", dialogue="../../etc")],
            r"line 2, column 'Speaker': expected an utterance id",
        ),
        ([row("Ses01F_../x_F000")], r"line 2, column 'Speaker': expected an utterance id"),
        (
            [row(dialogue="Ses01F_impro02")],
            r"line 2, column 'Dialogue_ID': expected Ses01F_impro01",
        ),
        ([row(start=3.0, end=3.0)], r"line 2, column 'End_Time': .*after the start, 3\.0 s, got"),
        ([row(start="nan")], r"line 2, column 'Start_Time': expected a finite number"),
        ([row(end="1e999")], r"line 2, column 'End_Time': expected a finite number"),
    ],
)
def test_a_fault_names_file_line_and_column(
    root: Path, rows: list[list[object]], message: str
) -> None:
    write_table(root / "IEMOCAP_train.csv", rows)

    with pytest.raises(InputError, match=rf"IEMOCAP_train\.csv, {message}"):
        read(root)


def test_an_utterance_in_two_splits_is_refused(root: Path) -> None:
    write_table(root / "IEMOCAP_test.csv", [row("Ses02F_impro01_F000")])

    with pytest.raises(InputError, match=r"IEMOCAP_test\.csv, line 2, .*IEMOCAP_dev\.csv, line 2"):
        read(root)


def test_media_that_lead_out_of_the_corpus_are_refused(root: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (root / "Session1").symlink_to(outside)

    with pytest.raises(InputError, match=r"Session1.*: expected a file under"):
        read(root)


@pytest.mark.skipif(
    not (SHARED_DATA / "iemocap_csv").is_dir(), reason=f"no iemocap_csv in {SHARED_DATA.name}"
)
def test_the_released_tables_have_the_published_counts() -> None:
    corpus = read(SHARED_DATA / "iemocap_csv")

    sizes = {
        split: (len(dialogues), len(corpus.utterances(split)))
        for split, dialogues in corpus.splits.items()
    }
    counts = Counter(LABELS[utterance.label] for utterance in corpus.utterances("test"))
    assert sizes == {"train": (108, 5163), "dev": (12, 647), "test": (31, 1623)}
    assert [counts[label] for label in LABELS] == [170, 299, 381, 144, 384, 245]
    assert all(
        len({utterance.speaker for utterance in dialogue.utterances}) == 2
        for dialogues in corpus.splits.values()
        for dialogue in dialogues
    )
