import csv
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.erc.corpus_check import Finding
from examples.iemocap.check import EXPECTED, EXPECTED_OF_RELEASE, check
from examples.iemocap.corpus import read
from examples.iemocap.release import DEV, split_of
from examples.synthetic import iemocap as synthetic
from examples.synthetic.script import Size

SHARED_DATA = Path(
    os.environ.get("TELME_KD_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")
)
NEEDS_TABLES = pytest.mark.skipif(
    not (SHARED_DATA / "iemocap_csv").is_dir(), reason=f"no iemocap_csv in {SHARED_DATA.name}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic corpus, to be read only."""
    return synthetic.write(tmp_path_factory.mktemp("made"), size=Size(7, 3, 3))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "IEMOCAP_full_release"))


def remove_tables(root: Path) -> None:
    for table in root.glob("*.csv"):
        table.unlink()


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def rows(root: Path, split: str) -> Iterator[dict[str, str]]:
    with (root / f"IEMOCAP_{split}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def found(root: Path, *kinds: str) -> list[Finding]:
    return [finding for finding in check(root).findings if finding.kind in kinds]


def test_a_synthetic_corpus_is_usable(made: Path) -> None:
    examination = check(made)
    assert (examination.status, examination.not_checked) == (0, [])
    assert examination.layout == "tables and texts of the release"
    assert {finding.kind for finding in examination.findings} == {"speaker-column"}
    assert examination.clips["recordings"] == {"train": 7, "dev": 3, "test": 3}
    assert all(examination.clips["films"].values())


def test_a_synthetic_corpus_is_the_same_without_its_tables(root: Path) -> None:
    by_tables = read(root)
    remove_tables(root)
    by_texts = read(root)
    assert by_texts.labels == by_tables.labels
    for split in by_tables.splits:
        rows = {row.identity: row for row in by_texts.utterances(split)}
        assert rows == {row.identity: row for row in by_tables.utterances(split)}
    examination = check(root)
    assert (examination.status, examination.findings) == (0, [])
    assert examination.layout == "texts of the release"


def test_tables_that_contradict_the_release_are_told(root: Path) -> None:
    first, second = list(rows(root, "train"))[:2]
    table = root / "IEMOCAP_train.csv"
    replace(table, first["Utterance"], "Something else.")
    replace(table, f"{second['Start_Time']},", "0.001,")
    told = {finding.subject: finding.detail for finding in found(root, "disagreement")}
    assert list(told) == [first["Speaker"], second["Speaker"]]
    assert told[first["Speaker"]].startswith("line 2: 'Something else.', in the release ")
    assert told[second["Speaker"]].startswith("line 3: 0.0010 to ")
    assert check(root).status == 1


def test_labels_that_differ_are_known_where_the_release_has_none(root: Path) -> None:
    (row,) = list(rows(root, "dev"))[:1]
    (path,) = root.glob(f"*/dialog/EmoEvaluation/{row['Dialogue_ID']}.txt")
    (root / "synthetic.json").unlink()
    replace(root / "IEMOCAP_dev.csv", f",{row['Emotion']}\n", ",hap\n")
    for label, known in (("xxx", True), ("oth", False)):
        text = path.read_text(encoding="utf-8")
        head, separator, tail = text.partition(f"{row['Speaker']}\t")
        path.write_text(head + separator + label + tail[3:], encoding="utf-8")
        (finding,) = found(root, "disagreement")
        assert finding.detail == f"line 2: hap, in the release {label}"
        assert finding.is_known is known
        assert [each.subject for each in found(root, "left-out")] == [row["Speaker"]]


def test_damaged_and_missing_media_are_told(root: Path) -> None:
    turns = [row["Speaker"] for row in rows(root, "train")]
    recordings = {path.stem: path for path in root.glob("Session*/sentences/wav/*/*.wav")}
    gone, short, junk = turns[:3]
    recordings[gone].unlink()
    recordings[short].write_bytes(recordings[short].read_bytes()[:9000])
    recordings[junk].write_bytes(b"no sound")
    (recordings[gone].parent / f"{gone[:-3]}999.wav").write_bytes(b"")
    films = sorted(root.glob("Session[1-4]/dialog/avi/DivX/*.avi"))
    films[0].unlink()
    films[1].write_bytes(films[1].read_bytes()[:20000])
    kinds = ("missing", "mis-cut", "broken", "truncated", "extra")
    told = {(finding.kind, finding.subject): finding for finding in found(root, *kinds)}
    assert told["missing", gone].file == f"{recordings[gone].relative_to(root)}"
    assert told["mis-cut", short].detail.startswith("0.280 s, annotated with ")
    assert told["broken", junk].detail == "Invalid data found when processing input"
    assert told["missing", films[0].stem].detail == "no film"
    assert ("truncated", films[1].stem) in told
    assert "its last turn ends after" in told["mis-cut", films[1].stem].detail
    assert (told["extra", None].file or "").endswith("999.wav")
    assert len(told) == 7
    assert check(root).status == 1


def test_media_that_a_split_lacks_altogether_are_an_error(root: Path) -> None:
    shutil.rmtree(root / "Session5/sentences")
    shutil.rmtree(root / "Session5/dialog/avi")
    assert [(finding.split, finding.detail) for finding in found(root, "no-clips")] == [
        ("test", "no recording"),
        ("test", "no film"),
    ]


def test_texts_that_cannot_be_read_are_not_needed_beside_tables(root: Path) -> None:
    (path,) = root.glob("Session5/dialog/transcriptions/*.txt")
    path.unlink()
    examination = check(root)
    assert examination.status == 0
    (line,) = examination.not_checked
    assert line.startswith("whether the tables agree with the release: ")
    assert path.name in line


def test_words_in_a_wrong_encoding_are_told(root: Path) -> None:
    remove_tables(root)
    path = next(root.glob("Session5/dialog/transcriptions/*.txt"))
    path.write_bytes(path.read_bytes().replace(b"]: ", b"]: \x92", 1))
    (finding,) = check(root).findings
    assert (finding.kind, finding.detail) == ("encoding", "Utterance: U+FFFD")


def test_dialogues_out_of_order_are_told(root: Path) -> None:
    lines = (root / "IEMOCAP_test.csv").read_text(encoding="utf-8").splitlines()
    table = "\n".join([lines[0], *reversed(lines[1:])])
    (root / "IEMOCAP_test.csv").write_text(table, encoding="utf-8")
    (finding,) = found(root, "unsorted")
    assert (finding.subject, finding.is_known) == (next(rows(root, "test"))["Dialogue_ID"], True)


def test_the_release_has_53_happy_turns_less_than_the_tables() -> None:
    assert sum(expected.utterances or 0 for expected in EXPECTED.values()) == 7433
    test = EXPECTED_OF_RELEASE["test"]
    assert test.utterances == sum(number or 0 for number in test.classes.values()) == 1622
    # The labels of the release: 1103, 1041, 1849, 595, 1708 and 1084, as often counted.
    totals = {
        label: sum(expected.classes[label] or 0 for expected in EXPECTED.values())
        for label in test.classes
    }
    assert totals == {
        "ang": 1103, "exc": 1041, "fru": 1849, "hap": 595 + 53, "neu": 1708, "sad": 1084,
    }  # fmt: skip


@NEEDS_TABLES
def test_the_released_tables_have_the_known_findings_and_no_other() -> None:
    examination = check(SHARED_DATA / "iemocap_csv")
    assert examination.status == 0
    assert all(finding.is_known for finding in examination.findings)
    counts = Counter((finding.kind, finding.split) for finding in examination.findings)
    assert counts == {
        ("unsorted", "train"): 46,
        ("unsorted", "dev"): 5,
        ("unsorted", "test"): 6,
        ("speaker-column", "train"): 1,
        ("speaker-column", "dev"): 1,
        ("speaker-column", "test"): 1,
        ("too-long", "test"): 2,
    }
    beyond = [
        finding.detail.split()[2]
        for finding in examination.findings
        if finding.kind == "speaker-column"
    ]
    assert beyond == ["4192", "539", "1344"]
    assert len(examination.not_checked) == 3


@NEEDS_TABLES
def test_the_rule_of_the_splits_is_that_of_the_tables() -> None:
    corpus = read(SHARED_DATA / "iemocap_csv")
    for split, dialogues in corpus.splits.items():
        assert {split_of(dialogue.identity) for dialogue in dialogues} == {split}
    assert {dialogue.identity for dialogue in corpus.splits["dev"]} == set(DEV)
