"""How clearly an utterance's emotion shows in one channel, voice or face.

People do not always show what they feel. A delivery therefore has an intensity, and now and then
the channel shows an emotion that is easily taken for the right one, as in real recordings. Voice
and face are drawn independently of each other, so that one can make up for the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MISLEADING = 0.22
"""Share of the utterances in which a channel shows a similar emotion instead of the right one."""

LEAST_INTENSITY = 0.3


@dataclass(frozen=True)
class Delivery:
    """What one channel shows.

    Attributes:
        emotion: The emotion shown, a name of :data:`examples.synthetic.script.EMOTIONS`.
        intensity: How strongly, in [0, 1]; at 0 every emotion looks and sounds neutral.
    """

    emotion: str
    intensity: float


def deliver(
    emotion: str, similar: Mapping[str, tuple[str, ...]], random: np.random.Generator
) -> Delivery:
    """Draw how one channel shows an emotion.

    Args:
        emotion: The emotion felt.
        similar: For every emotion, those that the channel may show in its place.
        random: Source of the draw.

    Returns:
        The emotion shown and its intensity.
    """
    intensity = random.uniform(LEAST_INTENSITY, 1.0)
    misleads = random.uniform() < MISLEADING
    shown = similar[emotion][random.integers(len(similar[emotion]))] if misleads else emotion
    return Delivery(shown, float(intensity))
