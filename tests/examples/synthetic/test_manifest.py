import json
import random
from contextlib import suppress
from pathlib import Path

import pytest

from examples.erc.errors import InputError
from examples.synthetic.manifest import NAME, VERSION, Manifest
from examples.synthetic.script import Size


def finished(root: Path) -> Path:
    manifest = Manifest(root, "MELD", 0, Size())
    manifest.begin()
    path = root / "clips/one.mp4"
    path.parent.mkdir()
    path.write_bytes(b"one")
    manifest.finish([path])
    return path


def test_corpus_is_finished_only_once_it_is_said_to_be(tmp_path: Path) -> None:
    assert not Manifest(tmp_path, "MELD", 0, Size()).is_finished()
    Manifest(tmp_path, "MELD", 0, Size()).begin()
    assert not Manifest(tmp_path, "MELD", 0, Size()).is_finished()
    finished(tmp_path / "other")
    assert Manifest(tmp_path / "other", "MELD", 0, Size()).is_finished()


def test_marker_says_what_the_corpus_is(tmp_path: Path) -> None:
    finished(tmp_path)
    marker = json.loads((tmp_path / NAME).read_text())
    assert marker["corpus"] == "MELD"
    assert marker["seed"] == 0
    assert marker["size"] == {"train": 240, "dev": 60, "test": 80}
    assert marker["version"] == VERSION
    assert list(marker["files"]) == ["clips/one.mp4"]


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_damaged_file_is_noticed_and_removed(damage: str, tmp_path: Path) -> None:
    path = finished(tmp_path)
    if damage == "changed":
        path.write_bytes(b"two")
    else:
        path.unlink()
    manifest = Manifest(tmp_path, "MELD", 0, Size())
    assert not manifest.is_finished()
    manifest.begin()
    assert not path.exists()


@pytest.mark.parametrize(
    ("corpus", "seed", "size", "named"),
    [
        ("IEMOCAP", 0, Size(), "corpus IEMOCAP"),
        ("MELD", 1, Size(), "seed 1"),
        ("MELD", 0, Size(dev=61), "'dev': 61"),
    ],
)
def test_other_synthetic_corpus_is_refused(
    corpus: str, seed: int, size: Size, named: str, tmp_path: Path
) -> None:
    finished(tmp_path)
    with pytest.raises(InputError, match=rf"expected .*{named}.*, got corpus MELD.* remove this"):
        Manifest(tmp_path, corpus, seed, size)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": null'])
def test_damaged_marker_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InputError, match="got a damaged file; remove the folder"):
        Manifest(tmp_path, "MELD", 0, Size())


def test_every_flipped_bit_and_cut_of_the_marker_is_found(tmp_path: Path) -> None:
    finished(tmp_path)
    path = tmp_path / NAME
    data = path.read_bytes()
    draw = random.Random(0)
    spoiled = [data[:kept] for kept in draw.choices(range(len(data) - 1), k=1000)]
    for place in draw.choices(range(8 * len(data)), k=1000):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        spoiled.append(bytes(flipped))
    for damaged in spoiled:
        path.write_bytes(damaged)
        with suppress(InputError):
            assert not Manifest(tmp_path, "MELD", 0, Size()).is_finished()


@pytest.mark.parametrize("name", ["../outside", "/outside", "clips/../../outside", "a\0b"])
def test_marker_that_names_a_file_outside_is_refused_and_removes_nothing(
    name: str, tmp_path: Path
) -> None:
    outside, root = tmp_path / "outside", tmp_path / "corpus"
    outside.write_text("kept")
    finished(root)
    name = str(outside) if name == "/outside" else name
    marker = json.loads((root / NAME).read_text())
    (root / NAME).write_text(json.dumps({**marker, "files": {name: "0" * 64}}))
    with pytest.raises(InputError, match="got a damaged file; remove the folder"):
        Manifest(root, "MELD", 0, Size()).begin()
    assert outside.read_text() == "kept"


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "MELD.Raw"
    path.write_text("a file")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        Manifest(path, "MELD", 0, Size())


def test_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed: expected at least 0, got -1"):
        Manifest(tmp_path, "MELD", -1, Size())
