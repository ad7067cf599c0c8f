"""The words: the prompt over the dialogue so far, and the encoder that reads it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.erc.dialogue import Dialogue
from examples.erc.errors import InputError
from examples.erc.pretrained import Head, Pretrained, load_body
from examples.erc.source import EncoderOutput

DEFAULT_ENCODER = "roberta-large"
"""The encoder of the paper."""

_POSITIONS_AFTER_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"}
)
"""The kinds of encoder that count positions from the id of the padding token on."""

_LEFT_PADDING_TOLERANCE = 1e-3
"""How far padding may move a hidden state, as a share of its norm: rounding in float32."""


def speaker_token(speaker: int) -> str:
    """The special token of a speaker: ``<s1>`` for speaker 0.

    Args:
        speaker: The number within the dialogue, >= 0.
    """
    return f"<s{speaker + 1}>"


class Prompter:
    """Turns the dialogue so far into the prompt of the text teacher.

    The prompt is ``<s_i> t_1 <s_j> t_2 ... <s_i> t_k </s> Now <s_i> feels <mask>``, after the
    token with which the encoder's sequences begin (which the released code leaves out). Without
    the question it is ``<s_i> t_1 <s_j> t_2 ... <s_i> t_k </s>``. Text that reads like a special
    token stays text.

    Args:
        encoder: The encoder that the prompts are for.
        speakers: The largest number of speakers in a dialogue, >= 1; each is a token of its own.
        max_tokens: The length of the longest prompt.
        ask: Whether the prompt ends in the question.

    Attributes:
        tokenizer: The encoder's tokenizer, with the speakers' tokens added.
        asks: Whether the prompt ends in the question, and so in the mask.

    Raises:
        InputError: The encoder is not of this kind, or has no room for so many tokens.
    """

    def __init__(
        self, encoder: Pretrained, speakers: int, max_tokens: int, *, ask: bool = True
    ) -> None:
        self.asks = ask
        self.tokenizer: Any = encoder.load("AutoTokenizer")
        begin = _first(self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        separator = _first(self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)
        mask, padding = self.tokenizer.mask_token_id, self.tokenizer.pad_token_id
        if begin is None or separator is None or mask is None or padding is None:
            raise InputError(
                f"{encoder.name}: expected a tokenizer with tokens for begin, separator, mask and "
                "padding, got one without; choose a masked language model such as roberta-large"
            )
        self.tokenizer.add_tokens(
            [speaker_token(speaker) for speaker in range(speakers)], special_tokens=True
        )
        self._begin, self._separator, self._mask, self._padding = begin, separator, mask, padding
        self._speakers = self.tokenizer.convert_tokens_to_ids(
            [speaker_token(speaker) for speaker in range(speakers)]
        )
        self._now, self._feels = self.tokenize(["Now", "feels"])
        self._max_tokens = max_tokens
        self._check_room(encoder)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts as they stand inside a prompt: after a blank, without special tokens."""
        ids: list[list[int]] = self.tokenizer(
            [" " + text for text in texts], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        return ids

    def encode(self, turns: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Build the prompt for the last of some turns.

        A prompt that would be too long loses its oldest words, never its end.

        Args:
            turns: For each utterance of the dialogue so far its speaker and its token ids.

        Returns:
            At most ``max_tokens`` ids; the last one is the mask, or the separator.
        """
        words = [token for speaker, ids in turns for token in (self._speakers[speaker], *ids)]
        end = self._end(turns[-1][0])
        return [self._begin, *words[-(self._max_tokens - len(end) - 1) :], *end]

    def collate(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Pad prompts on the left, so that they end together: in the mask, if there is one.

        Args:
            prompts: B lists of ids, the longest of length T.

        Returns:
            ``input_ids`` and ``attention_mask``, both int64, ``[B, T]``.
        """
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        return {
            "input_ids": torch.tensor(
                [
                    [self._padding] * gap + list(prompt)
                    for gap, prompt in zip(gaps, prompts, strict=True)
                ]
            ),
            "attention_mask": torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps]),
        }

    def _end(self, speaker: int) -> list[int]:
        if not self.asks:
            return [self._separator]
        return [
            self._separator, *self._now, self._speakers[speaker], *self._feels, self._mask
        ]  # fmt: skip

    def _check_room(self, encoder: Pretrained) -> None:
        least = len(self._end(0)) + 2
        most = self.tokenizer.model_max_length
        if (positions := getattr(encoder.config, "max_position_embeddings", None)) is not None:
            after_padding = encoder.config.model_type in _POSITIONS_AFTER_PADDING
            most = min(most, positions - (self._padding + 1 if after_padding else 0))
        if not least <= self._max_tokens <= most:
            raise InputError(
                f"max_text_tokens: expected between {least} (one word and the end) and "
                f"{most} (the positions of {encoder.name}), got {self._max_tokens}; "
                "choose a length in between"
            )


class TextDataset:
    """The prompts of a split.

    A batch has ``input_ids`` and ``attention_mask``; see :meth:`Prompter.collate`.

    Args:
        dialogues: The split.
        prompter: What makes the prompts.
    """

    def __init__(self, dialogues: Sequence[Dialogue], prompter: Prompter) -> None:
        self._prompter = prompter
        utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
        tokens = prompter.tokenize([utterance.text for utterance in utterances])
        self._turns = {
            utterance.identity: (utterance.speaker, ids)
            for utterance, ids in zip(utterances, tokens, strict=True)
        }
        self._rows = [
            (dialogue, position)
            for dialogue in dialogues
            for position in range(len(dialogue.utterances))
        ]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        places = [self._rows[row] for row in rows]
        return self._prompter.collate(
            [
                self._prompter.encode(
                    [self._turns[turn.identity] for turn in dialogue.context(position)]
                )
                for dialogue, position in places
            ]
        )


class TextEncoder(nn.Module):
    """A masked language model with a linear classifier over the state of one token.

    It is that of the mask, or without a question that of the token with which a sequence begins.

    Args:
        encoder: A masked language model such as RoBERTa, with its weights. It must be one whose
            positions do not move when a row is padded on the left.
        prompter: What makes its prompts; the encoder gets embeddings for the tokens it added.
        num_classes: C.
        feature_size: d, the width of the feature; the hidden size is projected if it differs.

    Raises:
        InputError: The encoder cannot be loaded, or padding on the left changes what it says.
    """

    def __init__(
        self, encoder: Pretrained, prompter: Prompter, num_classes: int, feature_size: int
    ) -> None:
        super().__init__()
        self.body = load_body(encoder)
        self.body.resize_token_embeddings(len(prompter.tokenizer), mean_resizing=False)
        self.head = Head(encoder.hidden_size, feature_size, num_classes)
        self._last = prompter.asks
        self._check_left_padding(encoder, prompter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        """Encode a batch.

        Args:
            input_ids: ``[B, T]``, padded on the left.
            attention_mask: ``[B, T]``, 1 for tokens, 0 for padding.

        Returns:
            Features ``[B, d]`` and logits ``[B, C]``, both float32.
        """
        output: EncoderOutput = self.head(self._read_state(input_ids, attention_mask))
        return output

    def _read_state(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        if self._last:
            return hidden[:, -1]
        first = attention_mask.argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]

    def _check_left_padding(self, encoder: Pretrained, prompter: Prompter) -> None:
        prompt = prompter.encode([(0, prompter.tokenize(["a"])[0])])
        self.body.eval()
        with torch.no_grad():
            alone = self._read_state(**prompter.collate([prompt]))[0]
            padded = self._read_state(**prompter.collate([prompt, prompt * 2]))[0]
        if (alone - padded).norm() > _LEFT_PADDING_TOLERANCE * alone.norm():
            raise InputError(
                f"{encoder.name}: expected an encoder that reads a text alike with padding on its "
                "left, got one that does not; choose one such as roberta-large"
            )


def _first(*tokens: int | None) -> int | None:
    return next((token for token in tokens if token is not None), None)
