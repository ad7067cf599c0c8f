import wave
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from examples.synthetic.face import FRAME_RATE, HEIGHT, WIDTH, Frame
from examples.synthetic.media import write_avi, write_mp4, write_table, write_wav


def ramp(count: int) -> Iterator[Frame]:
    """Frames that become brighter, so that their order shows."""
    for index in range(count):
        yield np.full((HEIGHT, WIDTH, 3), 20 + 10 * index, dtype=np.uint8)


def tone(sample_rate: int, seconds: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * sample_rate)) / sample_rate)


def brightness(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [
            float(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)
        ]


def test_mp4_has_the_frames_and_the_sound_in_the_published_formats(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    left = tone(48000, 1.2)
    write_mp4(path, ramp(15), np.stack([left, 0.5 * left]), 48000)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.width, video.height) == ("h264", WIDTH, HEIGHT)
        assert video.average_rate == FRAME_RATE
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == (
            "aac", 48000, "stereo",
        )  # fmt: skip
        decoded = np.concatenate([f.to_ndarray() for f in container.decode(audio)], axis=1)
    assert decoded.shape[1] == pytest.approx(1.2 * 48000, abs=2048)
    middle = decoded[:, 10000:40000]
    assert np.std(middle[0]) == pytest.approx(2 * np.std(middle[1]), rel=0.1)
    assert brightness(path) == pytest.approx([20 + 10 * index for index in range(15)], abs=3)


def test_avi_is_silent_mpeg4(tmp_path: Path) -> None:
    path = tmp_path / "film.avi"
    write_avi(path, ramp(10))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        assert not container.streams.audio
    assert brightness(path) == pytest.approx([20 + 10 * index for index in range(10)], abs=3)


def test_wav_holds_the_samples_as_16_bit_mono(tmp_path: Path) -> None:
    path = tmp_path / "voice.wav"
    samples = tone(16000, 0.1)
    write_wav(path, samples, 16000)
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, 2, 16000, 1600)
        read = np.frombuffer(file.readframes(1600), "<i2") / 32767
    assert np.abs(read - samples).max() < 1 / 32767


def test_table_quotes_what_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_table(path, ("text", "id"), [("Oh, no.", 1), ("It\u0092s.", 2)])
    assert path.read_bytes() == 'text,id\n"Oh, no.",1\nIt\u0092s.,2\n'.encode()


@pytest.mark.parametrize("name", ["clip.mp4", "film.avi"])
def test_interrupted_film_leaves_nothing(name: str, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Frame]:
        yield from ramp(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if name.endswith("mp4"):
            write_mp4(tmp_path / name, interrupted(), np.zeros((2, 4800)), 48000)
        else:
            write_avi(tmp_path / name, interrupted())
    assert not list(tmp_path.iterdir())
