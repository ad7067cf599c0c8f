"""How pictures are decoded turn by turn: the film is opened anew for every turn.

It stands apart from its benchmark because the processes that decode import it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from examples.erc import pictures
from examples.erc.dialogue import Clip
from examples.erc.media import Decoded, Media, window

_LONGEST = 1.0  # seconds that a picture is shown


def scan(clips: Sequence[Clip], *, count: int, max_seconds: float) -> Iterator[Decoded]:
    """Decode the pictures of each clip from the beginning of its film."""
    for position, clip in enumerate(clips):
        start, stop = window(clip, max_seconds)
        with Media(clip.path) as media:
            shown = []
            for picture in media.pictures(media.video):
                if picture.time is not None and picture.time >= stop:
                    break
                if picture.time is not None and picture.time > start - _LONGEST:
                    shown.append(picture)
            times = [start + (part + 0.5) * (stop - start) / count for part in range(count)]
            chosen = [
                max((one for one in shown if (one.time or 0) <= at), key=lambda one: one.time or 0)
                for at in times
            ]
            values = np.stack([one.to_ndarray(format="rgb24") for one in chosen])
        yield position, values, 0


def look(clips: Sequence[Clip], *, count: int, max_seconds: float) -> Iterator[Decoded]:
    """Decode the pictures of each clip from the last key frame before it."""
    for position, clip in enumerate(clips):
        ((_, values, damaged),) = pictures.decode([clip], count=count, max_seconds=max_seconds)
        yield position, values, damaged
