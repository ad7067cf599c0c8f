"""People of the synthetic corpora: a face and a voice that stay the same throughout."""

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from examples.synthetic import face, voice
from examples.synthetic.acting import deliver
from examples.synthetic.script import Line

LEAST_SECONDS, MOST_SECONDS = 0.8, 1.6
"""Duration of an utterance."""


@dataclass(frozen=True)
class Person:
    """Somebody who can be filmed and recorded.

    Attributes:
        looks: What they look like.
        timbre: What they sound like.
    """

    looks: face.Looks
    timbre: voice.Timbre

    @classmethod
    def named(cls, name: str, seed: int) -> "Person":
        """Cast the person of a name; one name and seed always give one person."""
        random = np.random.default_rng([seed, crc32(name.encode())])
        return cls(face.Looks.draw(random), voice.Timbre.draw(random))

    def perform(
        self,
        emotion: str,
        duration: float,
        sample_rate: int,
        room: np.random.Generator,
        random: np.random.Generator,
    ) -> tuple[voice.Recording, Iterator[face.Frame]]:
        """Say one utterance in front of a camera.

        Args:
            emotion: The emotion felt; voice and face each show it in their own way.
            duration: Length in seconds.
            sample_rate: Samples a second of the recording.
            room: Draws the room.
            random: Draws everything else.

        Returns:
            The recording, and the frames, which are drawn as they are asked for.
        """
        in_voice = deliver(emotion, voice.SIMILAR, random)
        in_face = deliver(emotion, face.SIMILAR, random)
        for_voice, for_face = random.spawn(2)
        recording = voice.speak(
            self.timbre, in_voice, duration, sample_rate, face.FRAME_RATE, for_voice
        )
        return recording, face.film(self.looks, in_face, recording.loudness, room, for_face)


def draw_duration(line: Line, random: np.random.Generator) -> float:
    """Draw the length of an utterance in seconds, a whole number of milliseconds."""
    seconds = 0.65 + 0.09 * len(line.text.split()) + random.uniform(-0.1, 0.25)
    return round(float(np.clip(seconds, LEAST_SECONDS, MOST_SECONDS)), 3)
