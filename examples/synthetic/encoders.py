"""Tiny encoders of the real classes, with random weights, that load without a network.

They take the place of the pretrained encoders: transformers' ``from_pretrained`` loads models,
tokenizer and processors from these folders just as it loads published ones.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    TimesformerConfig,
    TimesformerModel,
    VideoMAEImageProcessorPil,
    Wav2Vec2FeatureExtractor,
)

from examples.erc import processes
from examples.erc.errors import InputError

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""RoBERTa's special tokens, in the order of their ids."""

VOCABULARY = 1200
"""Enough tokens for every word of the corpus to be one."""

POSITIONS = 514
"""RoBERTa's: 512 tokens, the first of which stands at position 2."""

SAMPLE_RATE = 16000

FRAMES, PIXELS, PATCH = 8, 48, 16
"""Input of the visual encoder: so few patches are quick, and they suffice for a face."""

MEAN, DEVIATION = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
"""The colour normalisation of the published TimeSformer."""


class _Savable(Protocol):
    def save_pretrained(self, save_directory: Path) -> object: ...


def write(folder: Path, corpus_texts: Iterable[str], *, seed: int = 0) -> dict[str, Path]:
    """Write the three encoders; what is there already is replaced.

    Args:
        folder: Where the folders ``text``, ``audio`` and ``visual`` go.
        corpus_texts: The utterances that the tokenizer learns its words from, at least one.
        seed: Seed of the weights.

    Returns:
        The folder of every modality.

    Raises:
        InputError: There is no text.
    """
    texts = list(corpus_texts)
    if not texts:
        raise InputError("corpus_texts: expected at least one utterance, got none")
    paths = {modality: folder / modality for modality in ("text", "audio", "visual")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer(texts)
        _publish((tokenizer, _text_model(len(tokenizer))), paths["text"])
        _publish((_feature_extractor(), _audio_model()), paths["audio"])
        _publish((_image_processor(), _visual_model()), paths["visual"])
    return paths


def _publish(parts: Iterable[_Savable], folder: Path) -> None:
    """Save all parts beside their place, then put them there in one step.

    Of several processes the first does, as transformers saves nothing in the others.
    """
    if not processes.first():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part in parts:
        part.save_pretrained(partial)
    if folder.exists():
        rmtree(folder)
    partial.replace(folder)


def _tokenizer(texts: Iterable[str]) -> RobertaTokenizer:
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    # In a prompt, even the first word of an utterance stands after a space.
    learner.train_from_iterator((text for known in texts for text in (known, " " + known)), trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=POSITIONS - 2)


def _text_model(vocabulary: int) -> RobertaModel:
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
    )
    return RobertaModel(config, add_pooling_layer=False)


def _feature_extractor() -> _Savable:
    untyped: Any = Wav2Vec2FeatureExtractor
    extractor: _Savable = untyped(
        sampling_rate=SAMPLE_RATE, do_normalize=True, return_attention_mask=True
    )
    return extractor


def _audio_model() -> Data2VecAudioModel:
    # The published model reaches its stride of 320 samples in seven steps. Three are quicker, and
    # a first kernel of 4 ms tells pitches apart without having been trained on hours of speech.
    config = Data2VecAudioConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32, 64),
        conv_kernel=(64, 10, 8),
        conv_stride=(16, 5, 4),
        num_conv_pos_embeddings=1,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    return Data2VecAudioModel(config)


def _image_processor() -> VideoMAEImageProcessorPil:
    return VideoMAEImageProcessorPil(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=MEAN,
        image_std=DEVIATION,
    )


def _visual_model() -> TimesformerModel:
    # The usual range of 0.02 suits a width of 768; at 64, signals would all but vanish.
    config = TimesformerConfig(
        image_size=PIXELS,
        patch_size=PATCH,
        num_frames=FRAMES,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    return TimesformerModel(config)
