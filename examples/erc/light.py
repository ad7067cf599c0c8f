"""Light encoders of extracted features, which train in seconds on a processor."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, EncoderOutput, Phase

WIDTH = 144
"""Of every encoder's feature: batch similarity compares features of one width."""

CONTEXT = 10
"""How many utterances before the target the text encoder looks back, within the dialogue."""

HEADS = 4
"""Of the text encoder's attention."""

TEXT_DROPOUT = 0.5
STUDENT_DROPOUT = 0.1

SETTINGS: dict[str, JSON] = {
    "width": WIDTH,
    "context": CONTEXT,
    "heads": HEADS,
    "text_dropout": TEXT_DROPOUT,
    "student_dropout": STUDENT_DROPOUT,
}
"""What the encoders are made of, for the fingerprints."""

_STAGE = Optimisation(
    learning_rate=1e-3,
    epochs=10,
    batch_size=64,
    warmup=0.1,
    weight_decay=0.01,
    max_gradient_norm=1.0,
    patience=4,
)

# Chosen by the dev splits of MELD and IEMOCAP, test left alone.
OPTIMISATION: dict[Phase, Optimisation] = {
    "teacher": _STAGE,
    "student": replace(_STAGE, learning_rate=2e-3, epochs=12, batch_size=128),
    "fusion": replace(_STAGE, epochs=6, batch_size=128),
}


class FeatureRows:
    """Feature vectors; a batch has ``values``, float32, ``[B, width]``."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._values)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        return {"values": self._values[rows]}


class DialogueRows:
    """Utterances, each behind those before it in its dialogue and never with one after it.

    A batch has ``values`` (float32, ``[B, CONTEXT + 1, width]``, the target last), ``same_speaker``
    (int64, ``[B, CONTEXT + 1]``: 1 where the target's speaker speaks) and ``present`` (bool, of the
    same shape: false before the dialogue began).

    Args:
        values: The utterances of all splits, ``[N, width]``.
        speakers: Their speakers, int64, ``[N]``.
        windows: For each row of the split which utterances it sees, -1 for none:
            ``[n, CONTEXT + 1]``.
    """

    def __init__(self, values: Tensor, speakers: Tensor, windows: Tensor) -> None:
        self._values = values
        self._present = windows >= 0
        self._windows = windows.clamp(min=0)
        spoken = speakers[self._windows]
        self._same = (spoken == spoken[:, -1:]).long() * self._present

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._windows)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        return {
            "values": self._values[self._windows[rows]],
            "same_speaker": self._same[rows],
            "present": self._present[rows],
        }


class DialogueEncoder(nn.Module):
    """An utterance in its dialogue so far: the target attends to what was said before it.

    Each utterance carries how far back it is and whether the target's speaker says it.

    Args:
        width: Of the sentence embedding.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(TEXT_DROPOUT)
        )
        self.place = nn.Parameter(torch.randn(CONTEXT + 1, WIDTH) * 0.02)
        self.speaker = nn.Parameter(torch.randn(2, WIDTH) * 0.02)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=TEXT_DROPOUT, batch_first=True)
        self.dropout = nn.Dropout(TEXT_DROPOUT)
        self.mixture = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.LayerNorm(WIDTH))
        self.classifier = nn.Linear(WIDTH, num_classes)

    def forward(self, values: Tensor, same_speaker: Tensor, present: Tensor) -> EncoderOutput:
        """Encode a batch; see :class:`DialogueRows`."""
        said = self.embedding(values)
        placed = said + self.place + self.speaker[same_speaker]
        heard, _ = self.attention(
            placed[:, -1:], placed, placed, key_padding_mask=~present, need_weights=False
        )
        features = self.mixture(torch.cat([said[:, -1], self.dropout(heard[:, 0])], dim=1))
        return EncoderOutput(features, self.classifier(self.dropout(features)))


class FeatureEncoder(nn.Module):
    """One utterance's feature vector through two layers.

    Args:
        width: Of the vector.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, WIDTH),
            nn.ReLU(),
            nn.Dropout(STUDENT_DROPOUT),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.LayerNorm(WIDTH),
        )
        self.dropout = nn.Dropout(STUDENT_DROPOUT)
        self.classifier = nn.Linear(WIDTH, num_classes)

    def forward(self, values: Tensor) -> EncoderOutput:
        """Encode a batch; see :class:`FeatureRows`."""
        features = self.layers(values)
        return EncoderOutput(features, self.classifier(self.dropout(features)))


def context_windows(start: Tensor) -> Tensor:
    """List for each row which rows it sees: those of its dialogue up to itself, the last few.

    Args:
        start: The first row of each row's dialogue, int64, ``[N]``.

    Returns:
        int64, ``[N, CONTEXT + 1]``, oldest first and the row itself last; -1 before the dialogue.
    """
    windows = torch.arange(len(start))[:, None] + torch.arange(-CONTEXT, 1)
    return windows.masked_fill(windows < start[:, None], -1)
