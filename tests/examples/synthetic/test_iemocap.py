import csv
import shutil
import wave
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from examples.synthetic import iemocap
from examples.synthetic.face import FRAME_RATE
from examples.synthetic.person import Person
from examples.synthetic.script import Size


def table(root: Path, split: str) -> list[dict[str, str]]:
    with (root / f"IEMOCAP_{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def place(root: Path, path: str) -> Path:
    return root / path.removeprefix("./dataset/IEMOCAP_full_release/")


def frames(path: Path) -> npt.NDArray[np.float64]:
    with av.open(str(path)) as container:
        return np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        ).astype(np.float64)


def test_layout_is_that_of_the_released_corpus(iemocap_root: Path, size: Size) -> None:
    assert iemocap_root.name == "IEMOCAP_full_release"
    for split in ("train", "dev", "test"):
        rows = table(iemocap_root, split)
        assert tuple(rows[0]) == iemocap.COLUMNS
        assert len(rows) == getattr(size, split)
        for row in rows:
            assert place(iemocap_root, row["Wav_Path"]).is_file()
            assert place(iemocap_root, row["Video_Path"]).is_file()
            assert row["Speaker"].startswith(row["Dialogue_ID"] + "_")


def test_people_of_the_test_split_occur_nowhere_else() -> None:
    dialogues = iemocap._dialogues(0, Size(60, 20, 20))
    assert {dialogue.session for dialogue in dialogues["test"]} == {5}
    rest = {dialogue.session for split in ("train", "dev") for dialogue in dialogues[split]}
    assert rest == {1, 2, 3, 4}


def test_dialogue_names_are_unique_over_the_splits() -> None:
    dialogues = iemocap._dialogues(0, Size(240, 60, 80))
    names = [dialogue.identity for split in dialogues.values() for dialogue in split]
    assert len(set(names)) == len(names)


def test_recording_is_as_long_as_its_window_and_windows_do_not_overlap(
    iemocap_root: Path,
) -> None:
    end = {"": 0.0}
    for row in table(iemocap_root, "train"):
        start, stop = float(row["Start_Time"]), float(row["End_Time"])
        assert start > end.get(row["Dialogue_ID"], 0.0)
        end[row["Dialogue_ID"]] = stop
        with wave.open(str(place(iemocap_root, row["Wav_Path"]))) as file:
            assert file.getframerate() == 16000
            assert file.getnframes() == round(16000 * (stop - start))


def test_film_shows_every_utterance_in_its_window(iemocap_root: Path, size: Size) -> None:
    dialogue = iemocap._dialogues(0, size)["train"][0]
    film = frames(iemocap_root / dialogue.film)
    for row in dialogue.utterances:
        person = Person.named(f"Ses{dialogue.session:02}{row.line.speaker}", 0)
        _, shot = person.perform(
            row.line.emotion,
            row.duration,
            iemocap.SAMPLE_RATE,
            np.random.default_rng(dialogue.key),
            np.random.default_rng(row.key),
        )
        drawn = np.stack(list(shot)).astype(np.float64)
        start = round(row.start * FRAME_RATE)
        window = film[start : start + len(drawn)]
        assert len(window) == len(drawn)
        apart = np.abs(window - drawn).mean(axis=(1, 2, 3))
        assert apart.max() < 6


def test_film_lasts_until_after_the_last_utterance(iemocap_root: Path) -> None:
    last = {row["Video_Path"]: float(row["End_Time"]) for row in table(iemocap_root, "dev")}
    for path, end in last.items():
        assert len(frames(place(iemocap_root, path))) / FRAME_RATE > end


def test_only_the_dialogue_without_its_film_is_made_again(
    iemocap_root: Path, size: Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(iemocap_root, tmp_path / "IEMOCAP_full_release"))
    film = next(root.rglob("Ses05*.avi"))
    film.unlink()
    made: list[str] = []
    write = iemocap._write_dialogue

    def note(root: Path, dialogue: iemocap._Dialogue, seed: int) -> None:
        made.append(dialogue.identity)
        write(root, dialogue, seed)

    monkeypatch.setattr(iemocap, "_write_dialogue", note)
    assert iemocap.write(tmp_path, size=size) == root
    assert made == [film.stem]
    assert film.read_bytes() == (iemocap_root / film.relative_to(root)).read_bytes()
