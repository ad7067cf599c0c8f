import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.erc.clips import MANIFEST, ClipStore, decode_clips
from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError

Rows = list[tuple[str, Clip | None]]


class Decoder:
    """Gives each clip as many numbers as its file has bytes, all the first byte's; keeps count."""

    def __init__(self) -> None:
        self.decoded: list[str] = []
        self.fail_at: str | None = None

    def __call__(self, clip: Clip) -> tuple[np.ndarray[Any, Any], int]:
        if clip.path.name == self.fail_at:
            raise KeyboardInterrupt
        self.decoded.append(clip.path.name)
        data = clip.path.read_bytes()
        if data == b"broken":
            raise ClipError("Invalid data found when processing input")
        return np.full(len(data), data[0], np.int16), int(data[0] == 7)


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Ten clips; clip n has n + 1 bytes of value n."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows: Rows = []
    for number in range(10):
        path = folder / f"clip{number}"
        path.write_bytes(bytes([number]) * (number + 1))
        rows.append((f"utterance{number}", Clip(path)))
    return rows


@pytest.fixture
def decode(tmp_path: Path, rows: Rows, decoder: Decoder) -> Callable[..., ClipStore]:
    def run(rows: Rows = rows, settings: dict[str, Any] | None = None) -> ClipStore:
        decoder.decoded.clear()
        return decode_clips(
            rows,
            decoder,
            tmp_path / "run" / "audio" / "train",
            title="MELD audio, train",
            settings=settings or {"sample_rate": 16_000},
            shard_rows=3,
            workers=1,
        )

    return run


def read_manifest(tmp_path: Path) -> dict[str, Any]:
    text = (tmp_path / "run" / "audio" / "train" / MANIFEST).read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def test_rows_come_back_as_they_were_decoded(decode: Callable[..., ClipStore]) -> None:
    store = decode()

    assert len(store) == 10
    for number in (9, 0, 4):
        values = store[number]
        assert values is not None
        assert values.dtype == torch.int16
        assert values.tolist() == [number] * (number + 1)
    with pytest.raises(IndexError):
        store[10]


def test_several_threads_keep_the_order(tmp_path: Path, rows: Rows, decoder: Decoder) -> None:
    store = decode_clips(
        rows * 20, decoder, tmp_path / "many", title="t", settings={}, shard_rows=64, workers=4
    )

    firsts = [values[0].item() for row in range(200) if (values := store[row]) is not None]
    assert firsts == list(range(10)) * 20


def test_pictures_keep_their_shape(tmp_path: Path, rows: Rows) -> None:
    def decode(clip: Clip) -> tuple[np.ndarray[Any, Any], int]:
        return np.full((4, 3, 2, 2), int(clip.path.name[-1]), np.uint8), 0

    store = decode_clips(rows, decode, tmp_path / "p", title="t", settings={}, shard_rows=3)

    values = store[7]
    assert values is not None
    assert values.shape == (4, 3, 2, 2)
    assert values.dtype == torch.uint8
    assert values.eq(7).all()


def test_a_missing_or_broken_clip_costs_its_own_row_alone(
    tmp_path: Path,
    rows: Rows,
    decode: Callable[..., ClipStore],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows[2] = ("utterance2", None)
    (tmp_path / "corpus" / "clip4").write_bytes(b"broken")

    store = decode()

    assert [row for row in range(10) if store[row] is None] == [2, 4]
    assert [(fault.utterance, fault.kind) for fault in store.faults] == [
        ("utterance2", "missing"),
        ("utterance4", "broken"),
        ("utterance7", "damaged"),
    ]
    assert store.faults[1].reason == "Invalid data found when processing input"
    line = capsys.readouterr().err
    assert "MELD audio, train: 8 of 10 clips, 1 broken, 1 damaged, 1 missing; see " in line


def test_the_manifest_says_what_was_decoded_and_how(
    tmp_path: Path, decode: Callable[..., ClipStore]
) -> None:
    decode()

    manifest = read_manifest(tmp_path)
    assert manifest["title"] == "MELD audio, train"
    assert manifest["settings"] == {"sample_rate": 16_000}
    assert manifest["rows"] == 10
    assert [shard["file"] for shard in manifest["shards"]] == [
        f"{number:05}.safetensors" for number in range(4)
    ]


def test_nothing_is_decoded_twice(decode: Callable[..., ClipStore], decoder: Decoder) -> None:
    first = decode()
    again = decode()

    assert decoder.decoded == []
    assert first.digest == again.digest


@pytest.mark.parametrize("stop", [0, 4, 9])
def test_an_interruption_keeps_the_finished_shards(
    tmp_path: Path, decode: Callable[..., ClipStore], decoder: Decoder, stop: int
) -> None:
    decoder.fail_at = f"clip{stop}"
    with pytest.raises(KeyboardInterrupt):
        decode()
    decoder.fail_at = None

    store = decode()

    assert decoder.decoded == [f"clip{number}" for number in range(stop // 3 * 3, 10)]
    assert [None if (values := store[row]) is None else len(values) for row in range(10)] == list(
        range(1, 11)
    )
    names = {path.name for path in (tmp_path / "run" / "audio" / "train").iterdir()}
    assert names == {MANIFEST, *(f"{number:05}.safetensors" for number in range(4))}


def test_a_changed_clip_costs_its_shard_alone(
    tmp_path: Path, decode: Callable[..., ClipStore], decoder: Decoder
) -> None:
    before = decode()
    (tmp_path / "corpus" / "clip4").write_bytes(b"\x09" * 50)

    store = decode()

    assert decoder.decoded == ["clip3", "clip4", "clip5"]
    values = store[4]
    assert values is not None
    assert values.tolist() == [9] * 50
    assert store.digest != before.digest


def test_a_changed_window_or_setting_is_decoded_again(
    rows: Rows, decode: Callable[..., ClipStore], decoder: Decoder
) -> None:
    decode()
    name, clip = rows[0]
    assert clip is not None
    decode([(name, Clip(clip.path, 0.0, 1.0)), *rows[1:]])
    assert decoder.decoded == ["clip0", "clip1", "clip2"]

    decode(settings={"sample_rate": 8_000})
    assert len(decoder.decoded) == 10


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_decoded_again(
    tmp_path: Path, decode: Callable[..., ClipStore], decoder: Decoder, damage: str
) -> None:
    before = decode()
    path = tmp_path / "run" / "audio" / "train" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])

    store = decode()

    assert decoder.decoded == ["clip3", "clip4", "clip5"]
    assert store.digest == before.digest


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": [{}]}', '{"shards": 3}'])
def test_a_damaged_manifest_is_made_again(
    tmp_path: Path, decode: Callable[..., ClipStore], decoder: Decoder, text: str
) -> None:
    before = decode()
    (tmp_path / "run" / "audio" / "train" / MANIFEST).write_text(text)

    store = decode()

    assert len(decoder.decoded) == 10
    assert store.digest == before.digest


def test_shards_of_a_larger_corpus_are_removed(
    tmp_path: Path, rows: Rows, decode: Callable[..., ClipStore]
) -> None:
    decode()

    store = decode(rows[:4])

    assert len(store) == 4
    assert len(list((tmp_path / "run" / "audio" / "train").glob("*.safetensors"))) == 2


def test_a_split_of_faults_alone_is_refused(rows: Rows, decode: Callable[..., ClipStore]) -> None:
    with pytest.raises(InputError, match=r"MELD audio, train: .* none in 10 \(utterance0: no file"):
        decode([(name, None) for name, _ in rows])


def test_a_full_disk_is_an_input_error_and_leaves_nothing_half_written(
    tmp_path: Path, decode: Callable[..., ClipStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)

    with pytest.raises(InputError, match=r"00000\.safetensors: .*No space left on device"):
        decode()
    assert list((tmp_path / "run" / "audio" / "train").iterdir()) == []
