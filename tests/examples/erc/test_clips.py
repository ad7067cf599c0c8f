import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.erc.cache import Cache, Shard
from examples.erc.clips import LOST, ClipStore, Row, decode_clips
from examples.erc.crew import Crew, Decoding, Limits
from examples.erc.dialogue import Clip
from examples.erc.errors import InputError

Rows = list[Row]
Decode = Callable[..., ClipStore]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(1, Limits(seconds=5, silence=4, memory=1 << 28)) as crew:
        yield crew


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
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decode(tmp_path: Path, folder: Path, rows: Rows, crew: Crew) -> Decode:
    def run(
        rows: Rows = rows,
        settings: dict[str, Any] | None = None,
        finish: Callable[[Any], Any] = np.asarray,
        crew: Crew = crew,
        **options: Any,
    ) -> ClipStore:
        (tmp_path / "log").unlink(missing_ok=True)
        return decode_clips(
            rows,
            Decoding(
                "tests.helpers.hostile:decode", {"log": str(tmp_path / "log")} | options, finish
            ),
            Cache(folder),
            crew,
            title="MELD audio, train",
            label="audio",
            settings=settings or {"sample_rate": 16_000},
            shard_rows=3,
        )

    return run


@pytest.fixture
def decoded(tmp_path: Path) -> Callable[[], list[str]]:
    """The files that were decoded in the last run, in order."""

    def read() -> list[str]:
        path = tmp_path / "log"
        return path.read_text().splitlines() if path.exists() else []

    return read


Decoded = Callable[[], list[str]]


def lengths(store: ClipStore) -> list[int | None]:
    return [None if (values := store[row]) is None else len(values) for row in range(len(store))]


def test_rows_come_back_as_they_were_decoded(decode: Decode) -> None:
    store = decode()

    assert len(store) == store.count() == 10
    for number in (9, 0, 4):
        values = store[number]
        assert values is not None
        assert values.dtype == torch.int16
        assert values.tolist() == [number] * (number + 1)
    with pytest.raises(IndexError):
        store[10]


def test_several_processes_keep_the_order(rows: Rows, folder: Path, tmp_path: Path) -> None:
    decoding = Decoding("tests.helpers.hostile:decode", {"log": str(tmp_path / "log")}, np.asarray)
    with Crew(4) as crew:
        store = decode_clips(
            [row for number in range(10) for row in rows[number:] + rows[:number]],
            decoding, Cache(folder), crew, title="t", label="l", settings={}, shard_rows=8,
        )  # fmt: skip

    firsts = [values[0].item() for row in range(100) if (values := store[row]) is not None]
    assert firsts == [(number + shift) % 10 for shift in range(10) for number in range(10)]


def test_pictures_keep_their_shape(decode: Decode) -> None:
    store = decode(finish=lambda values: np.full((4, 3, 2, 2), values[0], np.uint8))

    values = store[7]
    assert values is not None
    assert values.shape == (4, 3, 2, 2)
    assert values.dtype == torch.uint8
    assert values.eq(7).all()


def test_a_missing_or_broken_clip_costs_its_own_row_alone(
    tmp_path: Path, rows: Rows, decode: Decode, capsys: pytest.CaptureFixture[str]
) -> None:
    rows[2] = ("utterance2", None)
    (tmp_path / "corpus" / "clip4").write_bytes(b"no clip")
    (tmp_path / "corpus" / "clip5").write_bytes(b"crash")
    (tmp_path / "corpus" / "clip8").unlink()

    store = decode()

    assert [row for row in range(10) if store[row] is None] == [2, 4, 5, 8]
    assert store.count() == 6
    assert [(fault.row, fault.utterance, fault.kind, fault.reason) for fault in store.faults] == [
        (2, "utterance2", "missing", "no file"),
        (4, "utterance4", "broken", "Invalid data found when processing input"),
        (5, "utterance5", "broken", "the decoder crashed (SIGSEGV)"),
        (7, "utterance7", "damaged", "damaged packets left out: 1"),
        (8, "utterance8", "missing", "No such file or directory"),
    ]
    assert [fault.row for fault in store.lost] == [2, 4, 5, 8]
    line = capsys.readouterr().err
    assert "MELD audio, train: 6 of 10 clips, 2 broken, 1 damaged, 2 missing\n" in line


def test_a_split_of_faults_alone_is_a_store(rows: Rows, decode: Decode) -> None:
    store = decode([(name, None) for name, _ in rows])

    assert lengths(store) == [None] * 10
    assert store.count() == 0


def test_nothing_is_decoded_twice(decode: Decode, decoded: Decoded) -> None:
    first = decode()
    again = decode()

    assert decoded() == []
    assert first.digest == again.digest


def test_names_and_places_do_not_matter(
    tmp_path: Path, rows: Rows, decode: Decode, decoded: Decoded
) -> None:
    first = decode()
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    moved = [
        (f"other {name}", Clip(tmp_path / "elsewhere" / clip.path.name))
        for name, clip in rows
        if clip is not None
    ]

    store = decode(moved)

    assert decoded() == []
    assert store.digest == first.digest
    assert store.faults[0].utterance == "other utterance7"


@pytest.mark.parametrize("stop", [0, 4, 9])
def test_an_interruption_keeps_the_finished_shards(
    folder: Path, decode: Decode, decoded: Decoded, stop: int
) -> None:
    def finish(values: Any) -> Any:
        if values[0] == stop:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt), Crew(1) as crew:
        decode(finish=finish, crew=crew)

    store = decode()

    assert decoded() == [f"clip{number}" for number in range(stop // 3 * 3, 10)]
    assert lengths(store) == list(range(1, 11))
    assert len(list(folder.glob("*.safetensors"))) == len(list(folder.glob("*"))) == 4


def test_a_changed_clip_costs_its_shard_alone(
    tmp_path: Path, decode: Decode, decoded: Decoded
) -> None:
    before = decode()
    (tmp_path / "corpus" / "clip4").write_bytes(b"\x09" * 5)  # of the same size

    store = decode()

    assert decoded() == ["clip3", "clip4", "clip5"]
    values = store[4]
    assert values is not None
    assert values.tolist() == [9] * 5
    assert store.digest != before.digest


def test_a_changed_window_or_setting_is_decoded_again(
    rows: Rows, decode: Decode, decoded: Decoded
) -> None:
    decode()
    name, clip = rows[0]
    assert clip is not None
    decode([(name, Clip(clip.path, 0.0, 1.0)), *rows[1:]])
    assert decoded() == ["clip0", "clip1", "clip2"]

    decode(settings={"sample_rate": 8_000})
    assert len(decoded()) == 10
    decode(unused=1)
    assert len(decoded()) == 10

    decode()
    assert decoded() == []  # the others did not take its place


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_decoded_again(decode: Decode, decoded: Decoded, damage: str) -> None:
    before = decode()
    path = before.shards[1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])

    store = decode()

    assert decoded() == ["clip3", "clip4", "clip5"]
    assert store.digest == before.digest


def test_a_clip_that_was_late_is_tried_again(
    tmp_path: Path, rows: Rows, decode: Decode, decoded: Decoded
) -> None:
    path = tmp_path / "corpus" / "clip4"
    path.write_bytes(b"once asleep " + bytes(tmp_path / "flag"))
    store = decode()
    assert [(fault.row, fault.kind) for fault in store.lost] == [(4, "late")]

    store = decode()

    assert decoded() == ["clip3", "clip4", "clip5"]
    assert store.lost == []


def test_clips_of_a_film_are_decoded_together(
    tmp_path: Path, rows: Rows, decode: Decode, decoded: Decoded
) -> None:
    opened = []

    class Counted(Crew):
        def decode(self, clips: Any, decoding: Decoding) -> Any:
            opened.append([clip.start for clip in clips])
            return super().decode(clips, decoding)

    clip = rows[5][1]
    assert clip is not None
    film: Rows = [(f"turn{number}", Clip(clip.path, number, number + 2)) for number in range(5)]
    decoding = Decoding("tests.helpers.hostile:decode", {"log": str(tmp_path / "log")}, np.asarray)
    with Counted(1) as crew:
        store = decode_clips(
            [*rows[:2], *film, ("gone", None), *rows[2:4]],
            decoding, Cache(tmp_path / "films"), crew, title="t", label="l", settings={},
            shard_rows=3,
        )  # fmt: skip

    assert opened == [[None], [None], [0, 1, 2, 3, 4], [None], [None]]
    assert [shard.notes["rows"] for shard in store.shards] == [2, 5, 3]
    assert lengths(store) == [1, 2, 6, 6, 6, 6, 6, None, 3, 4]


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, folder: Path, decode: Decode
) -> None:
    def finish(values: Any) -> Any:
        (tmp_path / "corpus" / "clip1").write_bytes(b"another clip")
        return values

    with pytest.raises(InputError, match=r"clip1: .* changed while it was read"):
        decode(finish=finish)
    assert not list(folder.glob("*.safetensors"))


SHARING = """
import json, sys
from pathlib import Path
import numpy as np
from examples.erc.cache import Cache
from examples.erc.clips import decode_clips
from examples.erc.crew import Crew, Decoding
from examples.erc.dialogue import Clip
folder, corpus, log = sys.argv[1:]
rows = [(f"utterance{number}", Clip(Path(corpus) / f"clip{number}")) for number in range(10)]
decoding = Decoding("tests.helpers.hostile:decode", {"log": log}, np.asarray)
with Crew(1) as crew:
    store = decode_clips(
        rows, decoding, Cache(Path(folder)), crew, title="t", label="l", settings={}, shard_rows=1
    )
print(json.dumps([store.digest, [len(store[row]) for row in range(10)]]))
"""


def test_runs_that_share_a_cache_share_the_work(
    tmp_path: Path, folder: Path, rows: Rows, decoded: Decoded
) -> None:
    words = [sys.executable, "-c", SHARING, folder, tmp_path / "corpus", tmp_path / "log"]
    runs = [
        subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]

    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len({*said}) == 1
    assert json.loads(said[0])[1] == list(range(1, 11))
    assert sorted(decoded()) == [f"clip{number}" for number in range(10)]
    assert len(list(folder.glob("*.safetensors"))) == 10
    assert not list(folder.glob("*.lock"))


def test_a_run_that_is_killed_leaves_what_the_next_one_can_use(
    tmp_path: Path, folder: Path, rows: Rows
) -> None:
    words = [sys.executable, "-c", SHARING, folder, tmp_path / "corpus", tmp_path / "log"]
    run = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)
    while len(list(folder.glob("*.safetensors"))) < 4 and run.poll() is None:
        pass
    run.send_signal(signal.SIGKILL)
    run.communicate()

    again = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=True, timeout=120
    )

    assert json.loads(again.stdout)[1] == list(range(1, 11))


def test_every_kind_that_leaves_nothing_is_lost(folder: Path) -> None:
    faults = [[number, kind, "why"] for number, kind in enumerate((*LOST, "damaged"))]
    shard = Shard(folder, "", {"rows": 4, "faults": faults})

    store = ClipStore([shard], [f"utterance{number}" for number in range(4)])

    assert [fault.row for fault in store.lost] == [0, 1, 2]
