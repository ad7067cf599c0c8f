import os
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.erc import artifacts
from examples.erc.cache import SOURCES, Cache
from examples.erc.errors import InputError

ARRAYS = {"values": np.arange(1000, dtype=np.int16)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that was written long ago."""
    path = tmp_path / "clip"
    path.write_bytes(b"content")
    return path


def test_a_shard_is_found_again_with_its_notes(cache: Cache) -> None:
    put = cache.put("audio-1", ARRAYS, {"rows": 3, "faults": [[0, "broken", "ü"]]})

    found = Cache(cache.folder).find("audio-1")

    assert found == put
    assert found is not None
    assert found.notes == {"rows": 3, "faults": [[0, "broken", "ü"]]}
    np.testing.assert_array_equal(load_file(found.path)["values"], ARRAYS["values"])
    assert artifacts.file_sha256(found.path) == found.sha256
    assert cache.find("audio-2") is None


def test_every_flipped_bit_is_found(cache: Cache) -> None:
    put = cache.put("audio-1", ARRAYS, {"rows": 3})
    data = put.path.read_bytes()

    for place in np.random.default_rng(0).permutation(8 * len(data))[:1000]:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        put.path.write_bytes(flipped)
        assert cache.find("audio-1") is None
        assert not put.path.exists()


def test_every_cut_is_found(cache: Cache) -> None:
    put = cache.put("audio-1", ARRAYS, {})
    data = put.path.read_bytes()

    for kept in np.random.default_rng(1).permutation(len(data))[:1000]:
        put.path.write_bytes(data[:kept])
        assert cache.find("audio-1") is None
        assert not put.path.exists()


def test_every_flipped_bit_and_cut_of_the_digests_is_found(
    cache: Cache, source: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1 << 62)
    expected = cache.digest(source)
    cache.keep_digests()
    path = cache.folder / SOURCES
    data = path.read_bytes()
    draw = np.random.default_rng(0)
    spoiled = [data[:kept] for kept in draw.integers(0, len(data) - 1, 1000)]
    for place in draw.integers(0, 8 * len(data), 1000):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        spoiled.append(bytes(flipped))

    for damaged in spoiled:
        path.write_bytes(damaged)
        reads.clear()
        assert Cache(cache.folder).digest(source) == expected
        assert reads == [source]


def test_a_claim_is_had_by_one_alone(cache: Cache) -> None:
    other = Cache(cache.folder)
    claim = cache.claim("audio-1", wait=False)
    assert claim is not None

    assert other.claim("audio-1", wait=False) is None
    second = other.claim("audio-2", wait=False)
    assert second is not None
    second.release()
    claim.release()
    claim.release()

    again = other.claim("audio-1", wait=False)
    assert again is not None
    again.release()
    assert list(cache.folder.iterdir()) == []


def test_one_after_the_other_gets_a_claim_that_all_wait_for(cache: Cache) -> None:
    inside, most, turns = 0, 0, []

    def work(number: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            claim = Cache(cache.folder).claim("audio-1", wait=True)
            assert claim is not None
            with claim:
                inside += 1
                most = max(most, inside)
                turns.append(number)
                time.sleep(0.001)
                inside -= 1

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (most, len(turns)) == (1, 80)
    assert list(cache.folder.iterdir()) == []


def test_the_digest_is_that_of_the_content(cache: Cache, source: Path) -> None:
    assert cache.digest(source) == artifacts.sha256(b"content")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to the end."""
    seen: list[Path] = []
    original = artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: seen.append(path) or original(path))
    return seen


def test_a_file_that_looks_the_same_is_not_read_again(
    cache: Cache, source: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: source.stat().st_ctime_ns + 3_000_000_000)
    first = cache.digest(source)
    cache.keep_digests()

    assert Cache(cache.folder).digest(source) == first
    assert reads == [source]


def test_a_file_that_has_just_been_written_is_read_again(
    cache: Cache, source: Path, reads: list[Path]
) -> None:
    cache.digest(source)
    cache.keep_digests()

    Cache(cache.folder).digest(source)
    assert reads == [source] * 2


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(
    cache: Cache, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: source.stat().st_ctime_ns + 3_000_000_000)
    before = source.stat()
    first = cache.digest(source)
    cache.keep_digests()
    time.sleep(0.02)
    source.write_bytes(b"CONTENT")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert Cache(cache.folder).digest(source) == artifacts.sha256(b"CONTENT") != first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": [1]}', '{"a": 3}', '{"a": [1, 2, "x", 4]}'])
def test_damaged_digests_are_made_again(cache: Cache, source: Path, text: str) -> None:
    (cache.folder / SOURCES).write_text(text)

    again = Cache(cache.folder)

    assert again.digest(source) == artifacts.sha256(b"content")


def test_two_runs_keep_each_others_digests(
    cache: Cache, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1 << 62)
    other = Cache(cache.folder)
    paths = [tmp_path / name for name in ("one", "two")]
    for run, path in zip((cache, other), paths, strict=True):
        path.write_text(path.name)
        run.digest(path)
    cache.keep_digests()
    other.keep_digests()

    third = Cache(cache.folder)
    for path in paths:
        third.digest(path)
    assert reads == paths


def test_a_file_that_changes_while_it_is_read_is_refused(cache: Cache, source: Path) -> None:
    cache.digest(source)
    cache.check_unchanged([source])
    source.write_bytes(b"other content")

    with pytest.raises(InputError, match=r"clip: .* changed while it was read; run"):
        cache.check_unchanged([source])
    source.unlink()
    with pytest.raises(InputError, match="changed while it was read"):
        cache.check_unchanged([source])


def test_other_shards_and_what_killed_runs_left_are_removed(cache: Cache) -> None:
    kept = cache.put("audio-1", ARRAYS, {})
    cache.put("audio-2", ARRAYS, {})
    (cache.folder / ".audio-3.safetensors.partial").touch()
    (cache.folder / "audio-4.lock").touch()
    (cache.folder / "notes.txt").touch()

    cache.keep_only([kept])

    assert {path.name for path in cache.folder.iterdir()} == {kept.path.name, "notes.txt"}


def test_a_full_disk_is_an_input_error_and_leaves_nothing_half_written(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)

    with pytest.raises(InputError, match=r"audio-1\..*No space left on device"):
        cache.put("audio-1", ARRAYS, {})
    assert list(cache.folder.iterdir()) == []


def test_a_place_that_is_no_folder_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="choose another folder"):
        Cache(source)
