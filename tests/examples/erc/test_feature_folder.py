import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.erc import feature_folder
from examples.erc.errors import InputError
from examples.erc.feature_folder import read

Arrays = dict[str, Any]
Meta = dict[str, Any]
Change = Callable[[Arrays, Meta], object]
Write = Callable[..., Path]


def put(key: str, value: Any) -> Change:
    return lambda arrays, meta: arrays.__setitem__(key, value)


def set_row(key: str, row: Any, value: Any) -> Change:
    return lambda arrays, meta: arrays[key].__setitem__(row, value)


def drop(key: str) -> Change:
    return lambda arrays, meta: arrays.pop(key)


def cut(key: str) -> Change:
    return lambda arrays, meta: arrays.__setitem__(key, arrays[key][:-1])


def put_meta(key: str, value: Any) -> Change:
    return lambda arrays, meta: meta.__setitem__(key, value)


def put_dialogue(index: int, key: str, value: Any) -> Change:
    return lambda arrays, meta: meta["dialogues"][index].__setitem__(key, value)


FAULTS: dict[str, tuple[Change, str]] = {
    "no label": (drop("label"), "expected the arrays label, split, .* none called label; add it"),
    "no speaker": (drop("speaker"), "none called speaker"),
    "no dialogue": (drop("dialogue"), "none called dialogue"),
    "no rows": (put("label", np.zeros(0, np.int8)), "expected a label for each utterance"),
    "short split": (cut("split"), r"split: expected the shape \(80,\), .* got \(79,\)"),
    "short text": (cut("text_sentence"), r"text_sentence: expected the shape \(80, width\)"),
    "flat audio": (put("audio_loudness", np.zeros(80)), r"audio_loudness: .* got \(80,\)"),
    "deep audio": (put("audio_frames", np.zeros((80, 3, 2))), r"got \(80, 3, 2\)"),
    "no width": (put("audio_none", np.zeros((80, 0))), r"got \(80, 0\)"),
    "short mask": (put("audio_mask", np.ones(79, np.uint8)), r"audio_mask: .* got \(79,\)"),
    "words": (put("text_words", np.array([["hi"]] * 80)), "expected numbers, got the dtype <U2"),
    "float label": (put("label", np.zeros(80)), "label: expected whole numbers, .* float64"),
    "nan": (set_row("audio_pitch", (3, 1), np.nan), "audio_pitch: .* in row 3; mend it"),
    "infinity": (set_row("text_sentence", (9, 0), np.inf), "text_sentence: .* in row 9"),
    "too large": (put("visual_big", np.full((80, 1), 1e300)), "visual_big: .* in row 0"),
    "label too large": (
        set_row("label", 4, 3), r"label: expected 0 to 2 \(the labels .*, got 3 in row 4"
    ),
    "negative label": (set_row("label", 5, -1), "got -1 in row 5"),
    "unknown split": (set_row("split", 0, 3), "split: expected 0 to 2 .* got 3 in row 0"),
    "split dialogue": (set_row("split", 3, 1), "one split for all rows of a dialogue.* row 3"),
    "scattered dialogue": (
        set_row("dialogue", 2, 4), r"rows of each dialogue together, .* \(0 in row 2\), got 4"
    ),
    "unknown speaker": (set_row("speaker", 7, 2), "into the 2 speakers .* got 2 in row 7"),
    "no dev": (
        lambda arrays, meta: arrays["split"].__setitem__(arrays["split"] == 1, 0),
        r"got none of dev \(1\); models are selected on dev",
    ),
    "other corpus": (put_meta("dataset", "IEMOCAP"), 'expected the dataset meld, got "IEMOCAP"'),
    "no corpus": (put_meta("dataset", None), "expected the dataset meld, got null"),
    "one label": (put_meta("labels", ["glad"]), 'two or more different names .* got \\["glad"\\]'),
    "same labels": (put_meta("labels", ["a", "a", "b"]), "two or more different names"),
    "numbered labels": (put_meta("labels", [0, 1, 2]), "two or more different names"),
    "no dialogues": (put_meta("dialogues", []), r"expected a list of dialogues, got \[\]"),
    "odd dialogue": (put_dialogue(1, "length", "1"), "start and length, whole numbers.* number 1"),
    "no speakers": (put_dialogue(6, "speakers", None), "speakers, a list.* number 6"),
    "gap": (put_dialogue(2, "start", 9), "follow each other and cover the 80 rows"),
    "too few rows": (put_dialogue(9, "length", 9), "follow each other and cover the 80 rows"),
    "empty dialogue": (put_dialogue(1, "length", 0), "follow each other and cover the 80 rows"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_read_refuses_faults(write_features: Write, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        read(write_features(change), "meld")


def test_read_refuses_missing_files(write_features: Write, tmp_path: Path) -> None:
    folder = write_features()
    (folder / "features.npz").unlink()
    with pytest.raises(InputError, match=r"features\.npz: .*No such file.*; hand over a folder"):
        read(folder, "meld")
    with pytest.raises(InputError, match=r"meta\.json: .*No such file"):
        read(tmp_path / "nowhere", "meld")


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK\x03\x04 half an archive", pickle.dumps([1])]
)
def test_read_refuses_what_is_no_archive(write_features: Write, content: bytes) -> None:
    folder = write_features()
    (folder / "features.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"expected an npz file of plain arrays.*numpy\.savez"):
        read(folder, "meld")


def test_read_refuses_a_lone_array(write_features: Write) -> None:
    folder = write_features()
    with (folder / "features.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="expected an npz file of plain arrays"):
        read(folder, "meld")


def test_read_refuses_pickled_objects(write_features: Write) -> None:
    folder = write_features(put("text_words", np.array([{"a": 1}] * 80, dtype=object)))
    with pytest.raises(InputError, match="expected an npz file of plain arrays"):
        read(folder, "meld")


def test_read_refuses_an_array_that_claims_more_than_there_is(write_features: Write) -> None:
    folder = write_features()
    header = (
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 44},), }}".ljust(117) + "\n"
    )
    claim = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(folder / "features.npz", "w") as archive:
        archive.writestr("label.npy", claim + bytes(100))
    with pytest.raises(InputError, match="expected an npz file of plain arrays"):
        read(folder, "meld")


def test_read_refuses_a_bomb(write_features: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_features()
    monkeypatch.setattr(feature_folder, "_MOST_BYTES", 1 << 20)
    with zipfile.ZipFile(folder / "features.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("unused.npy", bytes(1 << 21))
    with pytest.raises(InputError, match=r"it holds more than 1048576 bytes"):
        read(folder, "meld")


def test_read_refuses_a_damaged_archive(write_features: Write) -> None:
    folder = write_features()
    data = bytearray((folder / "features.npz").read_bytes())
    data[data.index(b"text_sentence.npy") + 400] ^= 1
    (folder / "features.npz").write_bytes(data)
    with pytest.raises(InputError, match="expected an npz file of plain arrays"):
        read(folder, "meld")


@pytest.mark.parametrize("text", ["", "{", '{"dataset": "MELD"', "\ufeff{}"])
def test_read_refuses_bad_json(write_features: Write, text: str) -> None:
    folder = write_features()
    (folder / "meta.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"meta\.json: expected JSON"):
        read(folder, "meld")


def test_read_refuses_another_kind_of_json(write_features: Write) -> None:
    folder = write_features()
    (folder / "meta.json").write_text(json.dumps([1, 2]), encoding="utf-8")
    with pytest.raises(InputError, match=r"meta\.json: expected an object, got a list"):
        read(folder, "meld")


def test_read_finds_splits_and_modalities(write_features: Write) -> None:
    found = read(write_features(put("unknown", np.array(["kept out"]))), "Meld")
    assert (found.dataset, found.labels) == ("MELD", ("glad", "sad", "calm"))
    assert {split: len(rows) for split, rows in found.rows.items()} == {
        "train": 40,
        "dev": 19,
        "test": 21,
    }
    names = {m: [array.name for array in arrays] for m, arrays in found.modalities.items()}
    assert names == {
        "text": ["text_sentence"],
        "audio": ["audio_pitch", "audio_voice"],
        "visual": ["visual_face"],
    }
    assert found.start[[0, 6, 7, 8, 79]].tolist() == [0, 0, 7, 8, 70]


def test_read_allows_anything_where_a_mask_is_zero(write_features: Write) -> None:
    def spoil(arrays: Arrays, meta: Meta) -> None:
        arrays["audio_voice"][5] = np.nan
        arrays["audio_pitch"][6] = np.inf
        arrays["audio_mask"] = np.ones(80, np.uint8)
        arrays["audio_mask"][5] = 0
        arrays["audio_pitch_mask"] = np.ones(80, bool)
        arrays["audio_pitch_mask"][6] = False

    pitch, voice = read(write_features(spoil), "meld").modalities["audio"]
    assert np.flatnonzero(~voice.there).tolist() == [5]
    assert np.flatnonzero(~pitch.there).tolist() == [5, 6]


def test_digest_tells_other_content(write_features: Write) -> None:
    first = read(write_features(), "meld").sha256
    again = read(write_features(), "meld").sha256
    other = read(write_features(set_row("audio_voice", 0, 0.0)), "meld").sha256
    assert first["meta.json"] == again["meta.json"] == other["meta.json"]
    assert first["features.npz"] != other["features.npz"]


def test_lines_tell_who_says_what(write_features: Write) -> None:
    def name(arrays: Arrays, meta: Meta) -> None:
        arrays["speaker"][:2] = [1, 0]
        meta["dialogues"][0]["utterances"] = [f"u{row}" for row in range(7)]
        meta["dialogues"][0]["texts"] = [f"word {row}" for row in range(7)]

    lines = read(write_features(name), "meld").lines
    assert len(lines) == 80
    assert lines[0] == ("d0", "u0", "Bo", "word 0")
    assert lines[1] == ("d0", "u1", "Ada", "word 1")
    assert lines[7][:2] == ("d1", "0")
    assert lines[7].text is None


@pytest.mark.parametrize(
    "change",
    [
        put_dialogue(1, "id", "d0"),
        put_dialogue(1, "id", 5),
        lambda arrays, meta: meta["dialogues"][0].pop("id"),
    ],
)
def test_dialogues_without_names_that_tell_apart_are_numbered(
    write_features: Write, change: Change
) -> None:
    lines = read(write_features(change), "meld").lines
    assert list(dict.fromkeys(line.dialogue for line in lines)) == [str(n) for n in range(10)]


@pytest.mark.parametrize("value", [["a"] * 6, ["a"] * 7, [1] * 7, "abcdefg"])
def test_utterances_without_names_that_tell_apart_are_numbered(
    write_features: Write, value: Any
) -> None:
    lines = read(write_features(put_dialogue(0, "utterances", value)), "meld").lines
    assert [line.utterance for line in lines[:7]] == [str(number) for number in range(7)]


def test_labels_and_splits_need_not_be_there(write_features: Write) -> None:
    def strip(arrays: Arrays, meta: Meta) -> None:
        del arrays["label"], arrays["split"], meta["labels"]

    whole = read(write_features(), "meld")
    found = read(write_features(strip), "meld", labelled=False)
    assert (found.labels, found.label.size, found.rows) == ((), 0, {})
    assert found.lines == whole.lines
    assert (found.start == whole.start).all()
    assert [*found.modalities] == [*whole.modalities]


@pytest.mark.parametrize(
    "name",
    ["no speaker", "no dialogue", "short text", "nan", "short mask", "words"],
)
def test_other_faults_are_found_without_labels(write_features: Write, name: str) -> None:
    change, message = FAULTS[name]
    with pytest.raises(InputError, match=message):
        read(write_features(change), "meld", labelled=False)
