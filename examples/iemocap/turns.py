"""A turn of IEMOCAP, whichever files it is read from."""

import re
from dataclasses import dataclass
from pathlib import Path

LABELS = ("ang", "exc", "fru", "hap", "neu", "sad")
"""The emotions, in the order of every result."""

SPLITS = ("train", "dev", "test")

# The letter in the dialogue's part is the actor with the markers; the last one is who speaks.
IDENTITY = re.compile(
    r"(?P<dialogue>Ses(?P<session>\d\d)[FM]_\w{1,40})_(?P<person>[FM])\d{1,9}", re.ASCII
)
"""The identity of an utterance, such as ``Ses01F_impro01_M000``."""


@dataclass(frozen=True)
class Turn:
    """What one person says at a time.

    Attributes:
        identity: Its name, in the form of :data:`IDENTITY`.
        text: The words, not empty.
        start: When it begins in the dialogue, in seconds, >= 0.
        end: When it ends, in seconds, > start.
        label: The emotion: one of :data:`LABELS`, or another where the turn is not used.
        path: The file that says so.
        line: The line there, from 1.
    """

    identity: str
    text: str
    start: float
    end: float
    label: str
    path: Path
    line: int

    @property
    def dialogue(self) -> str:
        """The name of its dialogue."""
        return self._part("dialogue")

    @property
    def session(self) -> int:
        """The number of its session."""
        return int(self._part("session"))

    @property
    def person(self) -> str:
        """Who speaks: F or M."""
        return self._part("person")

    @property
    def recording(self) -> str:
        """The place of its recording in the release."""
        folder = f"Session{self.session}/sentences/wav/{self.dialogue}"
        return f"{folder}/{self.identity}.wav"

    def _part(self, name: str) -> str:
        parts = IDENTITY.fullmatch(self.identity)
        assert parts is not None
        return parts[name]
