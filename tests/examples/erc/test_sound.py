from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.erc.dialogue import Clip
from examples.erc.media import ClipError
from examples.erc.sound import SAMPLE_RATE, decode, decode_waveform, quantise

Waveform = NDArray[np.floating]


def tone(frequency: float, seconds: float, rate: int, loudness: float = 0.5) -> Waveform:
    return loudness * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def measure_frequency(waveform: Waveform) -> float:
    """The strongest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(waveform))


def measure_loudness(waveform: Waveform) -> float:
    """The root mean square of the middle, away from the edges of resampling."""
    quarter = len(waveform) // 4
    return float(np.sqrt(np.mean(waveform[quarter:-quarter] ** 2)))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_loudness_and_length(
    tmp_path: Path, write_wav: Callable[..., Path], rate: int
) -> None:
    path = write_wav(tmp_path / "tone.wav", tone(440, 1, rate), rate)

    waveform, damaged = decode_waveform(Clip(path), 30)

    assert waveform.dtype == np.float32
    assert abs(len(waveform) - SAMPLE_RATE) <= 1
    assert measure_frequency(waveform) == pytest.approx(440, abs=2)
    assert measure_loudness(waveform) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
    assert damaged == 0


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_stereo_is_the_mean_of_its_channels(
    tmp_path: Path, write_wav: Callable[..., Path], rate: int
) -> None:
    left = tone(440, 1, rate)
    both = write_wav(tmp_path / "both.wav", np.stack([left, left]), rate)
    one = write_wav(tmp_path / "one.wav", np.stack([left, 0 * left]), rate)

    loud, _ = decode_waveform(Clip(both), 30)
    soft, _ = decode_waveform(Clip(one), 30)

    assert measure_loudness(loud) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
    assert measure_loudness(soft) == pytest.approx(0.25 / np.sqrt(2), rel=0.01)


def test_many_channels_are_mixed(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    silence = np.zeros(SAMPLE_RATE)
    centre = tone(440, 1, SAMPLE_RATE)
    channels = np.stack([silence, silence, centre, silence, silence, silence])

    waveform, _ = decode_waveform(Clip(write_wav(tmp_path / "film.wav", channels)), 30)

    assert measure_frequency(waveform) == pytest.approx(440, abs=2)


def test_the_sound_of_a_film_is_decoded(tmp_path: Path, write_film: Callable[..., Path]) -> None:
    sound = np.stack([tone(300, 1, 48_000), tone(300, 1, 48_000)])
    path = write_film(tmp_path / "film.mp4", [(0, 0, 0)] * 25, sound=sound)

    waveform, _ = decode_waveform(Clip(path), 30)

    assert measure_frequency(waveform) == pytest.approx(300, abs=2)
    assert measure_loudness(waveform) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


@pytest.mark.parametrize("suffix", ["wav", "mp4", "mkv"])
def test_a_window_starts_and_ends_on_time(
    tmp_path: Path,
    write_wav: Callable[..., Path],
    write_film: Callable[..., Path],
    suffix: str,
) -> None:
    # A new pitch every half second.
    pitches = [300, 500, 700, 900, 1100, 1300]
    sound = np.concatenate([tone(pitch, 0.5, 48_000) for pitch in pitches])
    if suffix == "wav":
        path = write_wav(tmp_path / "steps.wav", sound, 48_000)
    else:
        path = write_film(tmp_path / f"steps.{suffix}", [(0, 0, 0)] * 75, sound=sound[None])

    waveform, _ = decode_waveform(Clip(path, 1.5, 2.5), 30)

    first, second = np.split(waveform, 2)
    assert len(waveform) == SAMPLE_RATE
    assert measure_frequency(first[100:-100]) == pytest.approx(900, abs=5)
    assert measure_frequency(second[100:-100]) == pytest.approx(1100, abs=5)


def test_a_window_is_the_same_part_of_the_whole(
    tmp_path: Path, write_film: Callable[..., Path]
) -> None:
    times = np.arange(3 * 48_000) / 48_000
    sound = 0.5 * np.sin(2 * np.pi * (200 + 150 * times) * times)
    path = write_film(tmp_path / "siren.mp4", [(0, 0, 0)] * 75, sound=sound[None])

    whole, _ = decode_waveform(Clip(path), 30)
    part, _ = decode_waveform(Clip(path, 1.5, 2.5), 30)

    assert np.corrcoef(whole[24_000:40_000], part)[0, 1] > 0.99
    assert np.corrcoef(whole[24_004:40_004], part)[0, 1] < 0.8


def test_a_long_clip_keeps_its_first_part(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tmp_path / "long.wav", np.linspace(0, 1, 3 * SAMPLE_RATE))

    waveform, _ = decode_waveform(Clip(path), 2)
    part, _ = decode_waveform(Clip(path, 0.5, 3.0), 2)

    assert len(waveform) == len(part) == 2 * SAMPLE_RATE
    assert waveform[-1] == pytest.approx(2 / 3, abs=1e-3)
    assert part[0] == pytest.approx(1 / 6, abs=1e-3)


def test_a_window_beyond_the_end_is_cut(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tmp_path / "short.wav", tone(440, 1, SAMPLE_RATE))

    waveform, _ = decode_waveform(Clip(path, 0.75, 9.0), 30)

    assert len(waveform) == SAMPLE_RATE // 4


def test_a_window_without_sound_is_broken(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tmp_path / "short.wav", tone(440, 1, SAMPLE_RATE))

    with pytest.raises(ClipError, match="no sound in the window"):
        decode_waveform(Clip(path, 5.0, 6.0), 30)


def test_a_file_without_sound_is_broken(tmp_path: Path, write_film: Callable[..., Path]) -> None:
    path = write_film(tmp_path / "silent.mp4", [(0, 0, 0)] * 5)

    with pytest.raises(ClipError, match="no audio stream"):
        decode_waveform(Clip(path), 30)


@pytest.mark.parametrize("content", [b"", b"no film at all" * 99])
def test_a_file_that_is_no_clip_is_broken(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dia125_utt3.mp4"
    path.write_bytes(content)

    with pytest.raises(ClipError, match=r"\w"):
        decode_waveform(Clip(path), 30)


def test_a_file_that_is_not_there_is_broken(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="No such file"):
        decode_waveform(Clip(tmp_path / "gone.wav"), 30)


def test_a_playlist_is_not_followed(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    write_wav(tmp_path / "secret.wav", tone(440, 1, SAMPLE_RATE))
    path = tmp_path / "dia0_utt0.mp4"
    path.write_text("ffconcat version 1.0\nfile secret.wav\n")

    with pytest.raises(ClipError, match=r"\w"):
        decode_waveform(Clip(path), 30)


def test_quantise_rounds_to_sixteen_bits() -> None:
    samples = np.array([-1.0, 0.0, 0.5, 1.0], np.float32)

    assert quantise(samples).tolist() == [-32767, 0, 16384, 32767]


def test_a_clip_without_sound_does_not_cost_the_others_of_its_file(
    tmp_path: Path, write_wav: Callable[..., Path]
) -> None:
    path = write_wav(tmp_path / "tone.wav", tone(440, 1, SAMPLE_RATE))
    clips = [Clip(path, 0.25, 0.5), Clip(path, 5.0, 6.0), Clip(path)]

    first, second, third = decode(clips, max_seconds=30)

    waveform, _ = decode_waveform(clips[0], 30)
    np.testing.assert_array_equal(first[1], quantise(waveform))
    assert isinstance(second[1], ClipError)
    assert len(third[1]) == SAMPLE_RATE  # type: ignore[arg-type]


def test_a_file_that_lies_about_its_times_is_cut_all_the_same(
    tmp_path: Path, write_wav: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    path = write_wav(tmp_path / "long.wav", tone(440, 20, SAMPLE_RATE))
    frames = []

    class Frame:
        """A frame that says that it is the first, whichever it is."""

        def __init__(self, frame: av.AudioFrame) -> None:
            self._frame = frame
            self.time = 0.0
            frames.append(frame)

        def __getattr__(self, name: str) -> object:
            return getattr(self._frame, name)

    from examples.erc import sound

    original = sound.Media.sound
    monkeypatch.setattr(
        sound.Media, "sound", lambda self, stream: map(Frame, original(self, stream))
    )
    monkeypatch.setattr(sound, "_resample", lambda frames: np.zeros(len(frames), np.float32))
    decode_waveform(Clip(path), 2)

    kept = sum(frame.samples for frame in frames)
    assert 2 * SAMPLE_RATE < kept < 4 * SAMPLE_RATE
