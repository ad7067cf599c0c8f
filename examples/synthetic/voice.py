"""Synthesised voices whose pitch, rhythm, brightness and breath carry an emotion.

A voice hums syllables: one period of a vowel is laid out as a table of harmonics, and the pitch
contour says how fast the table is read. No words can be heard in it. A voice works at any sample
rate and fills the band that the rate allows, so that a careless change of rate is audible.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from examples.synthetic.acting import Delivery

Samples = npt.NDArray[np.float64]

SIMILAR = {
    "neutral": ("sadness", "disgust"),
    "anger": ("joy", "frustration"),
    "disgust": ("sadness", "anger"),
    "fear": ("surprise", "sadness"),
    "joy": ("surprise", "excitement"),
    "sadness": ("neutral", "disgust"),
    "surprise": ("joy", "fear"),
    "excitement": ("joy", "anger"),
    "frustration": ("anger", "neutral"),
}
"""What a voice may be taken for."""

TABLE = 512
"""Samples of one period of a vowel."""

HARMONICS = 96

FORMANTS = ((720.0, 1240.0, 2500.0), (420.0, 2050.0, 2700.0), (480.0, 900.0, 2400.0))
"""Resonances of the vowels a, e and o in hertz."""


@dataclass(frozen=True)
class Prosody:
    """How an utterance is spoken.

    Attributes:
        pitch: Mean pitch relative to the speaker's own, in octaves.
        rise: Change of pitch from the first to the last moment, in octaves.
        lilt: Change of pitch within every syllable, in octaves; negative falls.
        vibrato: Depth of a fast vibrato (9 Hz), in octaves.
        rate: Syllables a second.
        legato: Share of its time that a syllable sounds, in (0, 1].
        attack: Where in a syllable the voice is loudest, 0 (at once) to 1 (at its end).
        tilt: Fall of the harmonics in decibels an octave; a small one is bright.
        breath: Loudness of the breath relative to the voice.
        creak: Depth of a rough 28 Hz modulation, 0 to 1.
        swell: Change of loudness from the first to the last moment, -1 to 1.
    """

    pitch: float = 0.0
    rise: float = -0.12
    lilt: float = -0.05
    vibrato: float = 0.0
    rate: float = 4.2
    legato: float = 0.75
    attack: float = 0.35
    tilt: float = 10.0
    breath: float = 0.05
    creak: float = 0.0
    swell: float = -0.2

    def softened(self, intensity: float) -> "Prosody":
        """Move towards neutral speech; intensity 1 changes nothing, 0 leaves none of it."""
        plain = Prosody()
        return Prosody(
            *(
                getattr(plain, field.name)
                + intensity * (getattr(self, field.name) - getattr(plain, field.name))
                for field in fields(self)
            )
        )


PROSODIES = {
    "neutral": Prosody(),
    "anger": Prosody(
        pitch=0.30, rise=-0.05, lilt=-0.45, rate=5.6, legato=0.55, attack=0.05, tilt=4.0,
        creak=0.55, swell=0.2,
    ),
    "disgust": Prosody(
        pitch=-0.35, rise=-0.35, lilt=-0.20, rate=2.8, legato=0.95, attack=0.5, tilt=8.0,
        creak=0.9, breath=0.08,
    ),
    "fear": Prosody(
        pitch=0.75, rise=0.15, vibrato=0.10, rate=6.4, legato=0.6, attack=0.2, tilt=11.0,
        breath=0.45,
    ),
    "joy": Prosody(
        pitch=0.50, rise=0.10, lilt=0.45, rate=4.8, legato=0.8, attack=0.5, tilt=6.5, swell=0.1,
    ),
    "sadness": Prosody(
        pitch=-0.25, rise=-0.30, lilt=-0.10, vibrato=0.02, rate=2.4, legato=1.0, attack=0.3,
        tilt=16.0, breath=0.25, swell=-0.8,
    ),
    "surprise": Prosody(
        pitch=0.45, rise=1.10, lilt=0.20, rate=2.6, legato=0.9, attack=0.8, tilt=8.0, breath=0.12,
        swell=0.9,
    ),
    "excitement": Prosody(
        pitch=0.70, rise=0.25, lilt=0.30, vibrato=0.02, rate=6.6, legato=0.7, attack=0.3, tilt=4.5,
        swell=0.5,
    ),
    "frustration": Prosody(
        pitch=0.02, rise=-0.50, lilt=-0.35, rate=3.4, legato=0.8, attack=0.1, tilt=6.5,
        breath=0.30, creak=0.35, swell=-0.6,
    ),
}  # fmt: skip
"""The prosody of every emotion at full intensity."""


@dataclass(frozen=True)
class Timbre:
    """What tells one voice from another, whatever the prosody.

    Attributes:
        pitch: Mean pitch in hertz.
        tract: Factor of the resonances; a short vocal tract is above 1.
        breath: Added to the breath.
        pace: Factor of the speed.
    """

    pitch: float
    tract: float
    breath: float
    pace: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> "Timbre":
        """Draw a voice."""
        height = random.uniform(0.0, 1.0)
        return cls(
            pitch=float(115.0 * 1.8**height),
            tract=float(0.95 + 0.2 * height),
            breath=float(random.uniform(0.0, 0.04)),
            pace=float(random.uniform(0.92, 1.08)),
        )


@dataclass(frozen=True)
class Recording:
    """A spoken utterance.

    Attributes:
        samples: (n,), within [-1, 1].
        loudness: (frames,), within [0, 1]: the loudness of the voice at the frames of a film.
    """

    samples: Samples
    loudness: Samples


def speak(
    timbre: Timbre,
    delivery: Delivery,
    duration: float,
    sample_rate: int,
    frame_rate: float,
    random: np.random.Generator,
) -> Recording:
    """Speak one utterance.

    Args:
        timbre: The speaker's voice.
        delivery: The emotion that the voice carries.
        duration: Length in seconds.
        sample_rate: Samples a second.
        frame_rate: Frames a second of the film to be made.
        random: Draws the vowels, the noise and small deviations from the prosody.

    Returns:
        The recording, ``round(duration * sample_rate)`` samples long.
    """
    prosody = PROSODIES[delivery.emotion].softened(delivery.intensity)
    time = np.arange(round(duration * sample_rate)) / sample_rate
    done = time / duration
    # A whole number of syllables keeps the last one from being cut off.
    syllables = max(round(prosody.rate * timbre.pace * duration * random.uniform(0.85, 1.15)), 1)
    place = done * syllables
    syllable = np.minimum(place.astype(int), syllables - 1)
    within = place - syllable

    octaves = (
        prosody.pitch
        + random.normal(0.0, 0.10)
        + prosody.rise * (done - 0.5)
        + prosody.lilt * (within - 0.5)
        + prosody.vibrato * np.sin(2 * np.pi * 9.0 * time)
        + random.normal(0.0, 0.03, size=syllables)[syllable]
    )
    pitch = timbre.pitch * 2.0**octaves
    phase = np.cumsum(pitch) / sample_rate
    vowels = random.integers(len(FORMANTS), size=syllables)
    tilt = prosody.tilt + random.normal(0.0, 1.2)
    mean_pitch = float(pitch.mean())
    tables = np.stack([_period(timbre, tilt, mean_pitch, sample_rate, f) for f in FORMANTS])
    hum = tables[vowels[syllable], (phase * TABLE).astype(int) % TABLE]

    envelope = _envelope(within / prosody.legato, prosody.attack)
    envelope *= 1.0 + prosody.swell * (done - 0.5)
    envelope *= random.uniform(0.8, 1.0, size=syllables)[syllable]
    creak = 1.0 - prosody.creak * (0.5 + 0.5 * np.sin(2 * np.pi * 28.0 * time))
    breath = (prosody.breath + timbre.breath) * random.standard_normal(len(time))
    room = 0.01 * random.standard_normal(len(time))
    samples = envelope * (creak * hum + breath) + room
    samples *= random.uniform(0.4, 0.7) / np.abs(samples).max()

    moments = (np.arange(round(duration * frame_rate)) + 0.5) / frame_rate
    loudness = np.interp(moments, time, envelope / envelope.max())
    return Recording(samples, loudness)


def _period(
    timbre: Timbre,
    tilt: float,
    pitch: float,
    sample_rate: int,
    formants: tuple[float, ...],
) -> Samples:
    """One period of a vowel, (TABLE,), with unit power and nothing above half the sample rate."""
    harmonic = np.arange(1, HARMONICS + 1)
    frequency = harmonic * pitch
    level = 10.0 ** (-tilt * np.log2(harmonic) / 20.0)
    resonance = np.zeros(HARMONICS)
    for formant in formants:
        width = 60.0 + 0.08 * formant
        resonance += 1.0 / (1.0 + ((frequency - timbre.tract * formant) / width) ** 2)
    level = level * (0.15 + resonance) * (1.6 * frequency < sample_rate / 2)
    spectrum = np.zeros(TABLE // 2 + 1, dtype=np.complex128)
    spectrum[harmonic] = -1j * level
    period: Samples = np.fft.irfft(spectrum, TABLE)
    period /= np.sqrt(np.mean(period**2))
    return period


def _envelope(within: Samples, attack: float) -> Samples:
    """Loudness over a syllable: up to its peak, down again, silent once it has passed."""
    peak = 0.06 + 0.88 * attack
    up = np.clip(within / peak, 0.0, 1.0)
    down = np.clip((1.0 - within) / (1.0 - peak), 0.0, 1.0)
    return np.sin(np.pi / 2 * np.minimum(up, down)) ** 0.8
