from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from examples.erc.audio import (
    SAMPLE_RATE,
    AudioEncoder,
    WaveformCollator,
    decode_waveform,
    quantise,
)
from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError
from examples.erc.pretrained import Pretrained

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


@pytest.fixture(scope="module")
def encoder(tiny_encoders: dict[str, str]) -> Pretrained:
    return Pretrained(tiny_encoders["audio"])


@pytest.fixture(scope="module")
def collator(encoder: Pretrained) -> WaveformCollator:
    return WaveformCollator(encoder)


def make_samples(count: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(quantise(random.uniform(-0.3, 0.5, count).astype(np.float32)))


def test_a_batch_is_normalised_and_padded_on_the_right(collator: WaveformCollator) -> None:
    batch = collator.collate([make_samples(2000), make_samples(5000), None])

    values, mask = batch["input_values"], batch["attention_mask"]
    assert values.shape == mask.shape == (3, 5000)
    assert values.dtype == torch.float32
    assert mask.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == [2000, 5000, 400]
    assert batch["present"].tolist() == [True, True, False]
    for row, length in ((0, 2000), (1, 5000)):
        assert values[row, :length].mean().item() == pytest.approx(0, abs=1e-5)
        assert values[row, :length].std().item() == pytest.approx(1, abs=1e-3)
    assert values[0, 2000:].eq(0).all()
    assert values[2].eq(0).all()


@pytest.mark.parametrize("lengths", [[1], [399, 1], [400], [0]])
def test_clips_too_short_for_a_frame_still_train(
    encoder: Pretrained, collator: WaveformCollator, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    model = AudioEncoder(encoder, num_classes=6, feature_size=8).train()

    batch = collator.collate([make_samples(length) if length else None for length in lengths])
    features, logits = model(**batch)

    assert features.isfinite().all()
    assert logits.shape == (len(lengths), 6)


@pytest.fixture
def model(encoder: Pretrained) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(encoder, num_classes=6, feature_size=8).eval()


def test_the_feature_is_the_mean_over_real_frames(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    batch = collator.collate([make_samples(4000), make_samples(16_000)])

    features, logits = model(**batch)

    hidden = model.body(
        batch["input_values"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    # 400 samples make the first frame, and each 320 one more.
    torch.testing.assert_close(features[0], hidden[0, : 1 + (4000 - 400) // 320].mean(dim=0))
    torch.testing.assert_close(features[1], hidden[1].mean(dim=0))
    assert logits.shape == (2, 6)


def test_neighbours_do_not_change_a_feature(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    short, long = make_samples(16_000), make_samples(48_000, seed=1)

    alone = model(**collator.collate([short])).features[0]
    beside = model(**collator.collate([short, long])).features[0]

    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


def test_an_absent_voice_has_a_zero_feature(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    features, logits = model(**collator.collate([None, make_samples(4000)]))

    assert features[0].eq(0).all()
    assert features[1].ne(0).all()
    assert torch.equal(logits[0], model.head.classifier.bias)


def test_every_parameter_gets_a_gradient(model: AudioEncoder, collator: WaveformCollator) -> None:
    torch.manual_seed(0)
    model.train()

    model(**collator.collate([make_samples(32_000)])).logits.square().sum().backward()

    without = [name for name, weights in model.named_parameters() if weights.grad is None]
    assert without == []


def test_an_encoder_of_another_kind_is_refused(tiny_encoders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"expected .*AutoFeatureExtractor|expected a speech"):
        WaveformCollator(Pretrained(tiny_encoders["text"]))


def test_an_encoder_for_another_sample_rate_is_refused(
    tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoConfig, Wav2Vec2FeatureExtractor

    AutoConfig.from_pretrained(tiny_encoders["audio"]).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)

    with pytest.raises(InputError, match=r"at 16000 Hz, got .* at 8000 Hz"):
        WaveformCollator(Pretrained(str(tmp_path)))
