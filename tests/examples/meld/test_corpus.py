import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.meld.corpus import FOLDERS, LABELS, read, repair

HEADER = ("Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID", "Video_Path")

SHARED_DATA = Path(
    os.environ.get("TELME_KD_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")
)


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def row(dialogue: int, utterance: int, *, text: str = "Hi.", speaker: str = "Joey") -> list[object]:
    return [1, text, speaker, "joy", dialogue, utterance, "../../../etc/passwd"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A corpus of one utterance a split, without clips."""
    for split in FOLDERS:
        write_table(tmp_path / f"{split}_sent_emo.csv", [row(0, 0)])
    return tmp_path


def test_labels_are_alphabetical() -> None:
    assert list(LABELS) == sorted(LABELS)
    assert len(LABELS) == 7


def test_reads_dialogues_speakers_and_labels(root: Path) -> None:
    table = [
        row(3, 1, speaker="Ross"),
        row(3, 0, speaker="Joey"),
        row(3, 4, speaker="Ross"),
        row(0, 0, speaker="Ross"),
    ]
    write_table(root / "train_sent_emo.csv", table)

    corpus = read(root)

    first, second = corpus.splits["train"]
    assert (corpus.name, corpus.labels) == ("meld", LABELS)
    assert [utterance.identity for utterance in first.utterances] == [
        f"train_dia3_utt{number}" for number in (0, 1, 4)
    ]
    assert [utterance.speaker for utterance in first.utterances] == [0, 1, 1]
    assert [utterance.speaker for utterance in second.utterances] == [0]
    assert corpus.labels[first.utterances[0].label] == "joy"
    assert set(corpus.splits) == {"train", "dev", "test"}


def test_the_place_of_a_clip_follows_from_its_ids(root: Path) -> None:
    write_table(root / "dev_sent_emo.csv", [row(2, 0), row(2, 7)])
    clip = root / "dev_splits_complete" / "dia2_utt7.mp4"
    clip.parent.mkdir()
    clip.touch()

    absent, present = read(root).utterances("dev")

    assert (absent.audio, absent.visual) == (None, None)
    assert present.audio == present.visual == Clip(clip.resolve())


def test_tables_and_clips_may_stand_in_a_folder_of_the_split(root: Path) -> None:
    (root / "train_sent_emo.csv").unlink()
    write_table(root / "train" / "train_sent_emo.csv", [row(5, 0)])
    clip = root / "train" / "train_splits" / "dia5_utt0.mp4"
    clip.parent.mkdir()
    clip.touch()

    assert read(root).utterances("train")[0].audio == Clip(clip.resolve())


def test_the_tables_of_telme_are_read_as_well(root: Path) -> None:
    (root / "test_sent_emo.csv").rename(root / "test_meld_emo.csv")

    assert len(read(root).utterances("test")) == 1


def test_control_characters_get_their_cp1252_meaning(root: Path) -> None:
    table = [
        row(0, 0, text="It\x92s\x85 \x93me\x94", speaker="O\x92"),
        row(0, 1, speaker="O\u2019"),
    ]
    write_table(root / "train_sent_emo.csv", table)

    first, second = read(root).utterances("train")

    assert first.text == "It\u2019s\u2026 \u201cme\u201d"
    assert first.speaker == second.speaker


def test_repair_leaves_undefined_and_other_characters_alone() -> None:
    text = "plain \u00a0 \u00e9 \u2019 \x81 \x9d"

    assert repair(text) == text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(0, 0), row(0, 0)],
            r"line 3, column 'Utterance_ID': .*not in line 2 already, got '0'",
        ),
        (
            [[1, "Hi", "Joey", "happy", 0, 0, ""]],
            r"line 2, column 'Emotion': expected one of anger",
        ),
        ([[1, "Hi", "Joey", "joy", "x", 0, ""]], r"line 2, column 'Dialogue_ID': .*got 'x'"),
        (
            [[1, "Hi", "Joey", "joy", 0, "../1", ""]],
            r"line 2, column 'Utterance_ID': .*got '\.\./1'",
        ),
        ([[1, " ", "Joey", "joy", 0, 0, ""]], r"line 2, column 'Utterance': expected some text"),
        ([], r"line 2: expected at least one utterance"),
    ],
)
def test_a_fault_names_file_line_and_column(
    root: Path, rows: list[list[object]], message: str
) -> None:
    write_table(root / "train_sent_emo.csv", rows)

    with pytest.raises(InputError, match=rf"train_sent_emo\.csv, {message}"):
        read(root)


def test_a_missing_table_is_named(root: Path) -> None:
    (root / "dev_sent_emo.csv").unlink()

    with pytest.raises(InputError, match=r"expected dev_sent_emo\.csv or dev_meld_emo\.csv, got"):
        read(root)


def test_clips_that_lead_out_of_the_corpus_are_refused(root: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (root / "train_splits").symlink_to(outside)

    with pytest.raises(InputError, match=r"train_splits: expected a file under"):
        read(root)


@pytest.mark.skipif(
    not (SHARED_DATA / "meld_csv").is_dir(), reason=f"no meld_csv in {SHARED_DATA.name}"
)
def test_the_published_tables_have_the_published_counts() -> None:
    corpus = read(SHARED_DATA / "meld_csv")

    sizes = {
        split: (len(dialogues), len(corpus.utterances(split)))
        for split, dialogues in corpus.splits.items()
    }
    counts = Counter(LABELS[utterance.label] for utterance in corpus.utterances("test"))
    assert sizes == {"train": (1038, 9989), "dev": (114, 1109), "test": (280, 2610)}
    assert [counts[label] for label in LABELS] == [345, 68, 50, 402, 1256, 208, 281]
    assert corpus.speakers == 9
    assert not any(
        "\x80" <= letter <= "\x9f"
        for split in corpus.splits
        for utterance in corpus.utterances(split)
        for letter in utterance.text
    )
