"""What the story asks of its input, whether raw clips or extracted features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from examples.erc.recipe import Optimisation

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""Anything that ``json.dumps`` takes."""

Phase: TypeAlias = Literal["teacher", "student", "fusion"]
"""The three kinds of stage that bring an optimisation of their own."""

MODALITIES = ("text", "audio", "visual")
"""The modalities in order, the teacher's first."""

SPLITS = ("train", "dev", "test")
"""The splits in order."""


class EncoderOutput(NamedTuple):
    """What every encoder returns for a batch of B utterances.

    Attributes:
        features: ``[B, d]``, floating; the input of the feature distillation and of the fusion.
        logits: ``[B, C]``, floating, unnormalised.
    """

    features: Tensor
    logits: Tensor


class Dataset(Protocol):
    """One modality of one split, read a whole batch at a time."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate the encoder's keyword arguments for these rows, in this order."""
        ...


class Line(NamedTuple):
    """An utterance as people know it.

    Attributes:
        dialogue: The name of its dialogue, unique in the corpus.
        utterance: Its own name, unique in the dialogue.
        speaker: Who says it.
        text: The words; ``None`` where the source has none.
    """

    dialogue: str
    utterance: str
    speaker: str
    text: str | None


class Source(Protocol):
    """A corpus, seen as encoder inputs and labels.

    Row i of every modality, of the lines and of the targets of a split is the same utterance.

    Attributes:
        name: The corpus in lower case, as in the name of the run folder.
        title: The corpus as people write it.
        labels: The C class names, in index order.
        modalities: Those present, in the order of ``MODALITIES``; text is always the first.
        description: What the input is (kind, content digest, encoder names), for the report.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    modalities: tuple[str, ...]
    description: dict[str, JSON]

    def describe(self, modalities: Sequence[str]) -> Mapping[str, JSON]:
        """All that the input of a stage that sees these modalities depends on; after `prepare`.

        It is part of the fingerprint of the stage: it changes when that input does, and as far as
        possible only then.
        """
        ...

    def targets(self, split: str) -> Tensor:
        """The labels of a split: int64, ``[N]``."""
        ...

    def without_prompt(self) -> "Source":
        """The same corpus with texts that do not end in the question for the emotion.

        It is prepared if this one is.

        Raises:
            InputError: There is no question to leave out.
        """
        ...

    def lines(self, split: str) -> list[Line]:
        """Who says what in a split; the utterances of a dialogue follow each other."""
        ...

    def keep_encoding(self, folder: Path) -> dict[str, JSON]:
        """Keep what it takes to encode other dialogues alike, but for the weights.

        Args:
            folder: Empty; it receives the files.

        Returns:
            Its ``kind`` and its other settings; see :func:`examples.erc.encoding.load`.
        """
        ...

    def prepare(self, folder: Path) -> None:
        """Do once what every stage needs, such as decoding clips into the run folder; resumable."""
        ...

    def dataset(self, modality: str, split: str) -> Dataset:
        """The encoder inputs of one modality in one split."""
        ...

    def encoder(self, modality: str) -> nn.Module:
        """A fresh encoder; what it initialises at random follows torch's global seed.

        It is called as ``encoder(**batch)`` and returns an :class:`EncoderOutput`.
        """
        ...

    def optimisation(self, phase: Phase) -> Optimisation | None:
        """The optimisation that suits this source's encoders; ``None``: the recipe's own."""
        ...
