import json
from pathlib import Path

import pytest

from examples.erc import corpus_check, raw
from examples.erc.corpus_check import (
    KINDS,
    Examination,
    Expected,
    Facts,
    Finding,
    Known,
    compare_counts,
    inspect_length,
    inspect_text,
    synthetic_counts,
)

SPLITS = ("train", "dev", "test")
FACTS = {split: Facts(3, 1, {"joy": 1, "fear": 2}, {2: 1}, 6.5, 0) for split in SPLITS}


def examination(*findings: Finding) -> Examination:
    return Examination("meld", "MELD", "tables", ("joy", "fear"), FACTS, {}, findings=[*findings])


def test_the_pipelines_use_as_much_of_a_clip_as_the_check_says() -> None:
    defaults = raw.RawSource.__init__.__kwdefaults__
    assert defaults["max_seconds"] == corpus_check.LONGEST


def test_status_is_that_of_new_findings_beyond_notes() -> None:
    known = Finding("missing", "dev", "a", None, "", source="somebody")
    note = Finding("extra", "dev", None, "b.mp4", "")
    new = Finding("missing", "dev", "c", None, "")
    assert examination().status == 0
    assert examination(known, note).status == 0
    assert examination(known, note, new).status == 1
    assert examination(known, note, new).news == [new]


def test_a_finding_is_known_by_kind_subject_and_detail() -> None:
    known = (Known("missing broken", "dev_.*", "one"), Known("extra", r".*/x\.mp4", "two", "no .*"))
    checked = examination()
    for finding in (
        Finding("broken", "dev", "dev_1", "dev/dev_1.mp4", ""),
        Finding("broken", "dev", "train_1", None, ""),
        Finding("mis-cut", "dev", "dev_1", None, ""),
        Finding("extra", "dev", None, "clips/x.mp4", "no line"),
        Finding("extra", "dev", None, "clips/x.mp4", "two lines"),
        Finding("extra", "dev", None, "clips/x.mp4.mp4", "no line"),
    ):
        checked.add([finding], known)
    assert [finding.source for finding in checked.findings] == [
        "one",
        None,
        None,
        "two",
        None,
        None,
    ]


def test_counts_that_are_not_known_are_not_compared() -> None:
    expected = {
        "train": Expected(3, 1, {"joy": 1, "fear": 2}),
        "dev": Expected(None, None, {"joy": None}),
        "test": Expected(4, 2, {"joy": None, "fear": 3}),
    }
    assert [(finding.split, finding.detail) for finding in compare_counts(FACTS, expected)] == [
        ("test", "expected 4 utterances, got 3"),
        ("test", "expected 2 dialogues, got 1"),
        ("test", "expected 3 utterances of fear, got 2"),
    ]


@pytest.mark.parametrize(
    ("text", "kind", "codes"),
    [
        ("It\x92s \x93fine\x94\x85", "control-characters", "U+0085, U+0092, U+0093, U+0094"),
        ("an \x81 that cp1252 lacks \x92", "encoding", "U+0081"),
        ("a bell \x07", "encoding", "U+0007"),
        ("lost \ufffd", "encoding", "U+FFFD"),
        ("It\u00e2\u20ac\u2122s", "encoding", "U+00E2, U+20AC"),
        ("It\u00e2\x80\x99s", "encoding", "U+00E2, U+0080"),
        ("caf\u00c3\u00a9", "encoding", "U+00C3, U+00A9"),
        ("\u00c2\u00a0", "encoding", "U+00C2, U+00A0"),
    ],
)
def test_text_that_suffered_is_told(text: str, kind: str, codes: str) -> None:
    cells = {"Utterance": text, "Speaker": "Ada"}
    (finding,) = inspect_text("dev", "a", "t.csv", cells, repaired=True)
    assert (finding.kind, finding.detail) == (kind, f"Utterance: {codes}")
    (finding,) = inspect_text("dev", "a", "t.csv", cells, repaired=False)
    assert (finding.kind, finding.detail) == ("encoding", f"Utterance: {codes}")


@pytest.mark.parametrize(
    "text", ["It\u2019s \u2026", "caf\u00e9", "\u00a0", "S\u00e3o", "\u00c2ge", "a\tb"]
)
def test_text_that_is_right_is_left_alone(text: str) -> None:
    assert list(inspect_text("dev", "a", "t.csv", {"Utterance": text}, repaired=True)) == []


@pytest.mark.parametrize(
    ("annotated", "measured", "kinds"),
    [
        (2.0, None, []),
        (None, 2.0, []),
        (None, None, []),
        (2.0, 2.2, []),
        (2.0, 2.3, ["mis-cut"]),
        (2.3, 2.0, ["mis-cut"]),
        (30.0, None, []),
        (30.1, None, ["too-long"]),
        (30.1, 30.1, ["too-long"]),
        (40.0, 2.0, ["mis-cut"]),
        (0.09, None, ["too-short"]),
        (0.006, 2.5, ["mis-cut"]),
        (0.0, None, ["no-duration"]),
        (-3.0, None, ["no-duration"]),
        (0.0, 1.6, ["no-duration", "mis-cut"]),
    ],
)
def test_lengths_are_those_of_the_clip_if_there_is_one(
    annotated: float | None, measured: float | None, kinds: list[str]
) -> None:
    found = inspect_length("dev", "a", "f", annotated=annotated, measured=measured)
    assert [finding.kind for finding in found] == kinds


def test_a_synthetic_corpus_says_how_large_it_is(tmp_path: Path) -> None:
    marker = tmp_path / "synthetic.json"
    assert synthetic_counts(tmp_path, "MELD") is None
    sizes = {"train": 5, "dev": 2, "test": 1}
    marker.write_text(json.dumps({"corpus": "MELD", "size": sizes}))
    assert synthetic_counts(tmp_path, "IEMOCAP") is None
    assert synthetic_counts(tmp_path, "MELD") == {
        split: Expected(size) for split, size in sizes.items()
    }


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"corpus": "MELD"}', '{"corpus": "MELD", "size": {"train": 1, "dev": 2}}',
     '{"corpus": "MELD", "size": {"train": 1, "dev": true, "test": "x"}}', "[" * 100_000],
)  # fmt: skip
def test_a_marker_that_is_none_makes_no_synthetic_corpus(tmp_path: Path, text: str) -> None:
    (tmp_path / "synthetic.json").write_text(text)
    assert synthetic_counts(tmp_path, "MELD") is None


def test_kinds_stand_in_order_of_their_severity() -> None:
    order = ["error", "warning", "note"]
    places = [order.index(kind.severity) for kind in KINDS.values()]
    assert places == sorted(places)
