import csv
from pathlib import Path

import av
import numpy as np
import pytest

from examples.synthetic import meld
from examples.synthetic.script import Size


def table(root: Path, split: str) -> list[dict[str, str]]:
    with (root / f"{split}_sent_emo.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def seconds(timestamp: str) -> float:
    hours, minutes, rest = timestamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))


def test_layout_is_that_of_the_published_corpus(meld_root: Path, size: Size) -> None:
    assert meld_root.name == "MELD.Raw"
    for split, folder in meld.CLIPS.items():
        rows = table(meld_root, split)
        assert tuple(rows[0]) == meld.COLUMNS
        assert [row["Sr No."] for row in rows] == [
            str(number) for number in range(1, getattr(size, split) + 1)
        ]
        assert {f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4" for row in rows} == {
            path.name for path in (meld_root / folder).iterdir()
        }


def test_apostrophes_are_written_as_in_the_published_tables(meld_root: Path) -> None:
    texts = [row["Utterance"] for row in table(meld_root, "train")]
    assert any("\u0092" in text for text in texts)
    assert not any("'" in text for text in texts)


def test_clip_lasts_as_long_as_the_table_says(meld_root: Path) -> None:
    for row in table(meld_root, "dev"):
        duration = seconds(row["EndTime"]) - seconds(row["StartTime"])
        name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
        with av.open(str(meld_root / meld.CLIPS["dev"] / name)) as clip:
            samples = sum(frame.samples for frame in clip.decode(audio=0))
        assert samples / 48000 == pytest.approx(duration, abs=0.05)


def test_microphones_hear_one_voice_at_different_loudness() -> None:
    voice = np.random.default_rng(0).standard_normal(1000)
    left, right = meld._stereo(voice, np.random.default_rng(1))
    assert np.corrcoef(left, right)[0, 1] > 0.999
    assert np.std(left + right) == pytest.approx(1.6 * np.std(voice), rel=0.01)
