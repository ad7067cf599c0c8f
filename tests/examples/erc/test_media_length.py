from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from examples.erc.media import ClipError
from examples.erc.media_length import measure

Write = Callable[..., Path]

BOTH = ("audio", "visual")
COLOURS = [(200, 30, 40), (10, 120, 90)] * 25


@pytest.fixture
def film(write_film: Write, tmp_path: Path) -> Path:
    """Two seconds of pictures, and as much sound."""
    return write_film(tmp_path / "film.mp4", COLOURS, sound=np.zeros((2, 96_000)))


def shorten(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def put_index_first(path: Path) -> Path:
    """The same film as it is made for the web: with the index before the data."""
    quick = path.with_name("quick.mp4")
    with (
        av.open(str(path)) as source,
        av.open(str(quick), "w", options={"movflags": "faststart"}) as target,
    ):
        streams = [target.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return quick


def test_length_is_that_of_the_longest_stream(write_film: Write, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4", COLOURS, sound=np.zeros((2, 144_000)))
    assert measure(film, BOTH).seconds == pytest.approx(3, abs=0.05)
    assert measure(film, BOTH).reached == pytest.approx(3, abs=0.05)
    assert measure(film, ("visual",)).seconds == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(("name", "codec"), [("film.avi", "mpeg4"), ("film.mkv", "libx264")])
def test_other_containers(write_film: Write, tmp_path: Path, name: str, codec: str) -> None:
    film = write_film(tmp_path / name, COLOURS, codec=codec)
    assert measure(film, ("visual",)) == pytest.approx((2, 2), abs=0.1)


def test_a_recording(write_wav: Write, tmp_path: Path) -> None:
    wav = write_wav(tmp_path / "voice.wav", np.zeros(20_000))
    assert measure(wav, ("audio",)) == (1.25, 1.25)
    # There is no more to tell the whole from than the annotation.
    assert measure(shorten(wav, 0.5), ("audio",)).seconds == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_film_that_ends_too_early_reaches_less(film: Path, share: float) -> None:
    length = measure(shorten(put_index_first(film), share), BOTH)
    assert length.seconds == pytest.approx(2, abs=0.05)
    assert 0 <= length.reached < 1.9


def test_a_shortened_avi_reaches_less(write_film: Write, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.avi", COLOURS * 10, codec="mpeg4", key_every=5)
    length = measure(shorten(film, 0.5), ("visual",))
    assert length.seconds == pytest.approx(20, abs=0.05)
    assert 1 < length.reached < 15


@pytest.mark.parametrize("share", [0.9, 0.1, 0.0])
def test_a_file_without_its_index_cannot_be_opened(film: Path, share: float) -> None:
    with pytest.raises(ClipError):
        measure(shorten(film, share), BOTH)


def test_a_missing_stream_is_named(write_film: Write, write_wav: Write, tmp_path: Path) -> None:
    silent = write_film(tmp_path / "silent.mp4", COLOURS)
    with pytest.raises(ClipError, match="no audio stream"):
        measure(silent, BOTH)
    with pytest.raises(ClipError, match="no video stream"):
        measure(write_wav(tmp_path / "voice.wav", np.zeros(100)), BOTH)


def test_a_playlist_is_not_followed(film: Path, tmp_path: Path) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ClipError):
        measure(playlist, BOTH)
