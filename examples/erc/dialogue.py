"""A corpus of dialogues as every reader hands it over."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Clip:
    """A piece of a media file.

    Attributes:
        path: The file.
        start: Where the piece starts, in seconds, >= 0; ``None``: at the start of the file.
        end: Where it ends, in seconds, > start; ``None``: at the end of the file.
        side: The half of its pictures in which the speaker is seen, if two people share them.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    side: Literal["left", "right"] | None = None


@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue.

    Attributes:
        identity: Its name, unique in the corpus.
        text: The words, not empty.
        speaker: Who says it: 0 for whoever speaks first in the dialogue, 1 for the next, ...
        label: Index into :attr:`Corpus.labels`.
        audio: The voice; ``None`` where the corpus has no such file.
        visual: The picture; ``None`` where the corpus has no such file.
        name: The speaker as people know them; empty where the corpus has no names.
    """

    identity: str
    text: str
    speaker: int
    label: int
    audio: Clip | None
    visual: Clip | None
    name: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Utterances in the order in which they were said.

    Attributes:
        identity: Its name, unique in the corpus.
        utterances: At least one.
    """

    identity: str
    utterances: tuple[Utterance, ...]

    def context(self, position: int) -> tuple[Utterance, ...]:
        """The dialogue so far: all that was said up to an utterance, itself included.

        Args:
            position: Of the utterance, in [0, number of utterances).

        Returns:
            ``position + 1`` utterances; never one from the future.
        """
        return self.utterances[: position + 1]


@dataclass(frozen=True)
class Corpus:
    """A corpus with its splits.

    Attributes:
        name: In lower case, as in the name of the run folder.
        labels: The C class names, in index order.
        splits: The dialogues of "train", "dev" and "test"; none is empty.
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, tuple[Dialogue, ...]]

    @property
    def speakers(self) -> int:
        """The largest number of speakers in one dialogue."""
        return 1 + max(
            utterance.speaker for split in self.splits for utterance in self.utterances(split)
        )

    def utterances(self, split: str) -> list[Utterance]:
        """The rows of a split: its utterances, dialogue after dialogue."""
        return [utterance for dialogue in self.splits[split] for utterance in dialogue.utterances]


def number_speakers(names: Iterable[str]) -> list[int]:
    """Number the speakers of one dialogue by first appearance.

    Args:
        names: Who says each utterance, in order.

    Returns:
        One number for each name, 0 for the first speaker.
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
