"""The generated corpora: laid out as published, decodable, reproducible, and never overwritten."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

from examples.erc.dialogue import Corpus
from examples.erc.errors import InputError
from examples.synthetic.manifest import NAME
from examples.synthetic.script import Size

SIZE = Size(train=8, dev=4, test=4)
CORPORA = ("meld", "iemocap")


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def writer(corpus: str) -> ModuleType:
    return import_module(f"examples.synthetic.{corpus}")


@pytest.fixture(scope="module")
def root(writer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = writer.write(tmp_path_factory.mktemp("corpus"), seed=3, size=SIZE)
    return path


@pytest.fixture(scope="module")
def read(corpus: str, root: Path) -> Corpus:
    found: Corpus = import_module(f"examples.{corpus}.corpus").read(root)
    return found


def digests(root: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((root / NAME).read_text(encoding="utf-8"))["files"]
    return files


def test_the_reader_of_the_real_corpus_reads_it(read: Corpus) -> None:
    assert {split: len(read.utterances(split)) for split in read.splits} == {
        "train": 8,
        "dev": 4,
        "test": 4,
    }
    utterances = [row for split in read.splits for row in read.utterances(split)]
    assert len({row.identity for row in utterances}) == 16
    assert len({row.label for row in utterances}) > 2
    assert all(row.audio and row.visual for row in utterances)


def test_every_dialogue_has_at_most_the_speakers_of_its_corpus(corpus: str, read: Corpus) -> None:
    most = {"meld": 4, "iemocap": 2}[corpus]
    assert 2 <= read.speakers <= most


def test_every_clip_has_sound_and_a_moving_picture(corpus: str, read: Corpus) -> None:
    rate, channels = {"meld": (48000, 2), "iemocap": (16000, 1)}[corpus]
    for row in read.utterances("test"):
        assert row.audio is not None
        assert row.visual is not None
        with av.open(row.audio.path) as media:
            stream = media.streams.audio[0]
            assert (stream.rate, stream.channels) == (rate, channels)
            sound = np.concatenate([f.to_ndarray().ravel() for f in media.decode(stream)])
        assert 0.5 < sound.size / channels / rate < 3
        assert np.abs(sound.astype(float)).max() > 0
        with av.open(row.visual.path) as media:
            pictures = [f.to_ndarray(format="rgb24") for f in media.decode(video=0)]
        assert len(pictures) >= 8
        assert any((picture != pictures[0]).any() for picture in pictures)


def test_windows_of_iemocap_lie_in_the_film_of_their_dialogue(corpus: str, read: Corpus) -> None:
    if corpus != "iemocap":
        pytest.skip("MELD has a film for each utterance")
    for dialogue in read.splits["train"]:
        films = {row.visual.path for row in dialogue.utterances if row.visual}
        assert len(films) == 1
        with av.open(films.pop()) as media:
            assert media.duration is not None
            duration = media.duration / av.time_base
        for row in dialogue.utterances:
            assert row.visual is not None
            assert row.visual.start is not None
            assert row.visual.end is not None
            assert 0 <= row.visual.start < row.visual.end <= duration + 0.1


def test_words_do_not_tell_every_emotion(writer: ModuleType, tmp_path: Path, corpus: str) -> None:
    found = import_module(f"examples.{corpus}.corpus").read(
        writer.write(tmp_path, seed=0, size=Size(train=40, dev=4, test=4))
    )
    labels: dict[str, set[int]] = {}
    for row in found.utterances("train"):
        labels.setdefault(row.text, set()).add(row.label)
    assert any(len(said_in) > 1 for said_in in labels.values())


def test_the_seed_decides_everything(writer: ModuleType, root: Path, tmp_path: Path) -> None:
    again = writer.write(tmp_path / "again", seed=3, size=SIZE)
    other = writer.write(tmp_path / "other", seed=4, size=SIZE)
    assert digests(again) == digests(root)
    assert digests(other) != digests(root)


def test_a_finished_corpus_is_left_alone(writer: ModuleType, root: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert writer.write(root.parent, seed=3, size=SIZE) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_an_interrupted_corpus_is_continued_to_the_same_end(
    corpus: str,
    writer: ModuleType,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = {"meld": "_write_clip", "iemocap": "_write_dialogue"}[corpus]
    write_media, calls = getattr(writer, name), []

    def interrupt(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_media(*arguments)

    monkeypatch.setattr(writer, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path, seed=3, size=SIZE)
    monkeypatch.undo()
    assert digests(writer.write(tmp_path, seed=3, size=SIZE)) == digests(root)


def test_a_damaged_file_is_made_again(writer: ModuleType, tmp_path: Path) -> None:
    root = writer.write(tmp_path, seed=3, size=SIZE)
    expected = digests(root)
    damaged = root / next(name for name in expected if not name.endswith(".csv"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert digests(writer.write(tmp_path, seed=3, size=SIZE)) == expected
    assert damaged.stat().st_size > 7


def test_another_corpus_in_the_folder_is_refused(writer: ModuleType, root: Path) -> None:
    with pytest.raises(InputError, match=r"expected the synthetic corpus with .*seed 5.*seed 3"):
        writer.write(root.parent, seed=5, size=SIZE)


def test_other_files_in_the_folder_are_refused(
    writer: ModuleType, root: Path, tmp_path: Path
) -> None:
    real = tmp_path / root.name
    real.mkdir()
    (real / "train_sent_emo.csv").write_text("real annotations")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        writer.write(tmp_path, seed=3, size=SIZE)
    assert (real / "train_sent_emo.csv").read_text() == "real annotations"


@pytest.mark.parametrize("size", [{"train": 0}, {"dev": -1}])
def test_sizes_below_one_are_refused(size: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        Size(**size)
