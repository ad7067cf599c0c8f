import numpy as np
import pytest

from examples.synthetic.acting import Delivery
from examples.synthetic.script import EMOTIONS
from examples.synthetic.voice import PROSODIES, Prosody, Recording, Samples, Timbre, speak

TIMBRE = Timbre(pitch=150.0, tract=1.0, breath=0.0, pace=1.0)


def record(
    emotion: str, seed: int = 0, intensity: float = 1.0, sample_rate: int = 16000
) -> Recording:
    delivery = Delivery(emotion, intensity)
    return speak(TIMBRE, delivery, 1.2, sample_rate, 12.5, np.random.default_rng(seed))


def spectrum(samples: Samples, sample_rate: int) -> tuple[Samples, Samples]:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return np.fft.rfftfreq(len(samples), 1 / sample_rate), power / power.sum()


def power_above(hertz: float, emotion: str) -> float:
    """Share of the power above a frequency, averaged over some recordings."""
    shares = []
    for seed in range(5):
        frequency, power = spectrum(record(emotion, seed).samples, 16000)
        shares.append(power[frequency > hertz].sum())
    return float(np.mean(shares))


def pitch(samples: Samples, sample_rate: int = 16000) -> float:
    """Frequency of the strongest periodicity between 80 and 500 Hz."""
    power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
    correlation = np.fft.irfft(power)
    shortest, longest = sample_rate // 500, sample_rate // 80
    return sample_rate / (shortest + int(np.argmax(correlation[shortest:longest])))


def test_every_emotion_has_a_prosody() -> None:
    assert set(PROSODIES) == set(EMOTIONS)


@pytest.mark.parametrize("sample_rate", [16000, 48000])
@pytest.mark.parametrize("emotion", EMOTIONS)
def test_recording_has_its_length_and_stays_within_full_scale(
    emotion: str, sample_rate: int
) -> None:
    recording = record(emotion, sample_rate=sample_rate)
    assert recording.samples.shape == (round(1.2 * sample_rate),)
    assert 0.3 < np.abs(recording.samples).max() < 1.0
    assert recording.loudness.shape == (15,)
    assert recording.loudness.min() >= 0.0
    assert recording.loudness.max() <= 1.0


def test_same_generator_gives_the_same_recording() -> None:
    assert np.array_equal(record("joy").samples, record("joy").samples)
    assert not np.array_equal(record("joy").samples, record("joy", seed=1).samples)


def test_anger_is_brighter_than_neutral_speech() -> None:
    assert power_above(1000, "anger") > 5 * power_above(1000, "neutral")


@pytest.mark.parametrize("emotion", ["fear", "sadness"])
def test_breath_is_heard_above_the_voice(emotion: str) -> None:
    assert power_above(5000, emotion) > 3 * power_above(5000, "neutral")


def test_surprise_rises_and_neutral_speech_does_not() -> None:
    def rise(emotion: str) -> float:
        samples = record(emotion).samples
        return pitch(samples[-6000:]) / pitch(samples[:6000])

    assert rise("surprise") > 1.3
    assert rise("neutral") < 1.1


def test_pitch_follows_the_speaker() -> None:
    low, high = (
        speak(
            Timbre(hertz, 1.0, 0.0, 1.0), Delivery("neutral", 1.0), 1.0, 16000, 12.5,
            np.random.default_rng(0),
        ).samples
        for hertz in (110.0, 220.0)
    )  # fmt: skip
    assert pitch(high) == pytest.approx(2 * pitch(low), rel=0.05)


def test_high_sample_rate_has_sound_that_a_low_one_would_alias() -> None:
    frequency, power = spectrum(record("fear", sample_rate=48000).samples, 48000)
    assert power[frequency > 8000].sum() > 0.02


def test_intensity_zero_is_neutral() -> None:
    assert np.array_equal(record("anger", intensity=0.0).samples, record("neutral").samples)
    assert PROSODIES["anger"].softened(0.0) == Prosody()
