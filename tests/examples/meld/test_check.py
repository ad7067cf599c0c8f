import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from examples.erc.corpus_check import Examination
from examples.erc.media_length import measure
from examples.meld.check import check
from examples.synthetic import meld as synthetic
from examples.synthetic.script import Size

SHARED_DATA = Path(
    os.environ.get("TELME_KD_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")
)
HEADER = "Sr No.,Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,StartTime,EndTime"
FOLDERS = ("train_splits", "dev_splits_complete", "output_repeated_splits_test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic corpus, to be read only."""
    return synthetic.write(tmp_path_factory.mktemp("made"), size=Size(4, 2, 3))


@pytest.fixture
def clip(made: Path) -> Path:
    """A whole clip of one second or so."""
    return next((made / "train_splits").glob("*.mp4"))


def write(root: Path, **tables: list[str]) -> Path:
    """Write a table for each split, with a line for each "dialogue_utterance start end"."""
    for split in ("train", "dev", "test"):
        rows = [HEADER]
        for line in tables.get(split, ["0_0 0:00:01,000 0:00:02,000"]):
            ids, start, end = line.split()
            dialogue, utterance = ids.split("_")
            rows.append(f'1,Hi.,Ada,joy,{dialogue},{utterance},"{start}","{end}"')
        (root / f"{split}_sent_emo.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def told(examination: Examination) -> dict[tuple[str, str | None], tuple[bool, str]]:
    """Everything but counts, by kind and subject or file: whether it is known, and the detail."""
    return {
        (finding.kind, finding.subject or finding.file): (finding.is_known, finding.detail)
        for finding in examination.findings
        if finding.kind != "count"
    }


def test_a_synthetic_corpus_is_usable(made: Path) -> None:
    examination = check(made)
    assert examination.status == 0
    assert {finding.kind for finding in examination.findings} == {"control-characters"}
    assert examination.clips == {"clips": {"train": 4, "dev": 2, "test": 3}}
    assert examination.not_checked == []
    assert [facts.utterances for facts in examination.facts.values()] == [4, 2, 3]


def test_a_synthetic_corpus_that_lacks_an_utterance_is_not(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "copy"))
    table = root / "test_sent_emo.csv"
    lines = table.read_text(encoding="utf-8").split("\n")
    table.write_text("\n".join(lines[:-2]), encoding="utf-8")
    (finding,) = check(root).news
    assert (finding.kind, finding.split) == ("count", "test")
    assert finding.detail == "expected 3 utterances, got 2"


def test_counts_are_those_of_the_published_corpus(tmp_path: Path) -> None:
    details = {finding.detail for finding in check(write(tmp_path)).findings}
    assert "expected 9989 utterances, got 1" in details
    assert "expected 280 dialogues, got 1" in details
    assert "expected 22 utterances of disgust, got 0" in details


def test_every_clip_that_is_known_to_be_wrong_is_found(clip: Path, tmp_path: Path) -> None:
    """The release in small, with each of its faults, and a fault that it does not have."""
    length = measure(clip, ("audio", "visual")).seconds
    fits = f"0:00:01,000 0:00:0{1 + length:.3f}".replace(".", ",")
    root = write(
        tmp_path,
        train=[f"125_3 {fits}", "309_0 0:00:01,000 0:00:42,040", f"7_0 {fits}", f"7_1 {fits}"],
        dev=[f"110_6 {fits}", f"110_7 {fits}"],
        test=[
            "38_4 0:00:01,000 0:05:05,940", "220_0 0:00:01,000 0:03:56,068", f"93_0 {fits}",
            "155_3 0:00:05,000 0:00:05,000", f"101_0 {fits}",
        ],
    )  # fmt: skip
    folders = [root / name for name in FOLDERS]
    for folder in folders:
        folder.mkdir()
    train, dev, test = folders
    (train / "dia125_utt3.mp4").write_bytes(clip.read_bytes()[:-500])
    for folder, names in (
        (train, ["dia7_utt0"]),
        (dev, ["dia110_utt6", "dia49_utt4", "dia66_utt10"]),
        (test, ["dia93_utt0", "dia93_utt6", "dia155_utt3", "dia101_utt0", "dia999_utt0",
                "final_videos_testdia101_utt0"]),
    ):  # fmt: skip
        for name in names:
            shutil.copy(clip, folder / f"{name}.mp4")
    for folder, name in ((train, "dia309_utt0"), (test, "dia38_utt4"), (test, "dia220_utt0")):
        shutil.copy(clip, folder / f"{name}.mp4")

    found = told(check(root))

    known = {subject for (kind, subject), (is_known, _) in found.items() if is_known}
    assert known >= {
        "train_dia125_utt3",
        "dev_dia110_utt7",
        "test_dia155_utt3",
        "dev_splits_complete/dia49_utt4.mp4",
        "dev_splits_complete/dia66_utt10.mp4",
        "output_repeated_splits_test/dia93_utt6.mp4",
        "output_repeated_splits_test/final_videos_testdia101_utt0.mp4",
    }
    assert found["broken", "train_dia125_utt3"][0]
    assert found["missing", "dev_dia110_utt7"] == (True, "no file")
    assert found["no-duration", "test_dia155_utt3"] == (True, "0.000 s from the start to the end")
    assert found["mis-cut", "test_dia155_utt3"][0]
    assert found["missing", "train_dia7_utt1"] == (False, "no file")
    assert not found["extra", "output_repeated_splits_test/dia999_utt0.mp4"][0]
    # These clips are not as long as the real ones: by their files they are cut short.
    assert found["mis-cut", "train_dia309_utt0"] == (
        False,
        f"{length:.3f} s, annotated with 41.040 s",
    )
    assert ("mis-cut", "train_dia7_utt0") not in found
    assert ("too-long", "test_dia38_utt4") not in found


def test_without_clips_lengths_are_those_of_the_table(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        train=["309_0 0:00:01,000 0:00:42,040", "338_3 00:15:53,994 00:15:54,000"],
        test=["38_4 0:00:01,000 0:05:05,940", "220_0 0:00:01,000 0:03:56,068",
              "0_0 0:00:01,000 0:00:32,000"],
    )  # fmt: skip
    examination = check(root)
    found = told(examination)
    assert found["too-long", "train_dia309_utt0"] == (True, "41.0 s by the annotation")
    assert found["too-long", "test_dia38_utt4"] == (True, "304.9 s by the annotation")
    assert found["too-long", "test_dia220_utt0"] == (True, "235.1 s by the annotation")
    assert found["too-long", "test_dia0_utt0"] == (False, "31.0 s by the annotation")
    assert found["too-short", "train_dia338_utt3"] == (True, "0.006 s by the annotation")
    (line,) = examination.not_checked
    assert line.startswith("clips: none in train_splits")


def test_a_split_without_clips_beside_others_is_an_error(clip: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test" / FOLDERS[2]).mkdir(parents=True)
    shutil.copy(clip, tmp_path / "test" / FOLDERS[2] / "dia0_utt0.mp4")
    examination = check(tmp_path)
    assert [finding.split for finding in examination.findings if finding.kind == "no-clips"] == [
        "train",
        "dev",
    ]
    assert examination.clips["clips"]["test"] == 1


def test_numbers_that_are_left_out_are_told_in_ranges(tmp_path: Path) -> None:
    time = "0:00:01,000 0:00:02,000"
    rows = [f"{ids} {time}" for ids in ("0_1", "2_0", "2_7", "999999999_999999999")]
    found = told(check(write(tmp_path, train=rows)))
    assert found["gap", "train_dia0"][1] == "no utterance 0"
    assert found["gap", "train_dia1"][1] == "no such dialogue"
    assert found["gap", "train_dia2"][1] == "no utterance 1 to 6"
    assert found["gap", "train_dia3 to 999999998"][1] == "no such dialogue"


def test_times_are_read_as_the_clips_were_cut_or_told(tmp_path: Path) -> None:
    rows = ["0_0 00:05:05,680 00:05:11,82", "0_1 0:00:xx 0:00:01,000", "0_2 0:05:00,0 0:05:02,5"]
    examination = check(write(tmp_path, dev=rows))
    assert told(examination)["time", "dev_dia0_utt1"] == (
        False,
        "line 3: '0:00:xx' to '0:00:01,000'",
    )
    assert examination.facts["dev"].seconds == pytest.approx(6.14 + 2.5)


def test_an_utterance_far_before_the_one_that_it_follows_is_told(tmp_path: Path) -> None:
    rows = [
        "4_0 0:10:00,000 0:10:02,000",
        "4_1 0:09:40,000 0:09:41,000",
        "4_2 0:09:00,000 0:09:01,0",
    ]
    found = told(check(write(tmp_path, train=rows)))
    assert found["jump", "train_dia4_utt2"][1] == "line 4: 40.0 s before train_dia4_utt1"
    assert ("jump", "train_dia4_utt1") not in found


def test_tables_without_times_are_said_to_be_so(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        table = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\nHi.,Ada,joy,0,0\n"
        (tmp_path / f"{split}_sent_emo.csv").write_text(table, encoding="utf-8")
    examination = check(tmp_path)
    assert any("no StartTime and EndTime" in line for line in examination.not_checked)
    assert examination.facts["train"].seconds is None


@pytest.mark.skipif(
    not (SHARED_DATA / "meld_csv").is_dir(), reason=f"no meld_csv in {SHARED_DATA.name}"
)
def test_the_published_tables_have_the_known_findings_and_no_other() -> None:
    examination = check(SHARED_DATA / "meld_csv")
    assert examination.status == 0
    assert all(finding.is_known for finding in examination.findings)
    assert [facts.repaired for facts in examination.facts.values()] == [2691, 308, 742]
    subjects = {
        kind: sorted(
            finding.subject or "" for finding in examination.findings if finding.kind == kind
        )
        for kind in ("too-long", "no-duration", "jump")
    }
    assert subjects == {
        "too-long": ["test_dia220_utt0", "test_dia38_utt4", "train_dia309_utt0"],
        "no-duration": ["test_dia155_utt3"],
        "jump": ["train_dia1029_utt9", "train_dia111_utt12", "train_dia446_utt19"],
    }
    counts = Counter(finding.kind for finding in examination.findings)
    # Dialogue 60, and 72, 2 and 2 dialogues that leave out utterances; three names of speakers.
    assert (counts["gap"], counts["control-characters"]) == (77, 2691 + 308 + 742 + 3)
    assert counts["too-short"] == 10
    assert set(counts) == {*subjects, "gap", "control-characters", "too-short"}
    assert "train_dia60" in {finding.subject for finding in examination.findings}
