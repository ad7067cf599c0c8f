"""Small media files of known content, and tiny encoders of the real classes."""

import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

Colour = tuple[int, int, int]

WIDTH, HEIGHT = 64, 48
WORDS = "Now feels what is it hello there Kathy I know you are here to stay a"


@pytest.fixture(scope="session")
def write_wav() -> Callable[..., Path]:
    def write(path: Path, samples: NDArray[np.floating], rate: int = 16_000) -> Path:
        """Write 16-bit samples in [-1, 1]: [n], or [channels, n]."""
        channels = np.atleast_2d(samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(channels))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.round(channels.T * 32767).astype("<i2").tobytes())
        return path

    return write


@pytest.fixture(scope="session")
def write_film() -> Callable[..., Path]:
    def write(
        path: Path,
        colours: Sequence[Colour | Sequence[Colour]],
        *,
        codec: str = "libx264",
        key_every: int = 250,
        b_frames: int = 2,
        sound: NDArray[np.floating] | None = None,
        sound_rate: int = 48_000,
    ) -> Path:
        """Write a picture of each colour or of several side by side, 25 a second.

        The sound is ``[channels, n]``, at 48 kHz.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            options = (
                {"sc_threshold": "0"} if codec == "libx264" else {"sc_threshold": "1000000000"}
            )
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.codec_context.gop_size = key_every
            stream.codec_context.max_b_frames = b_frames
            stream.codec_context.bit_rate = 2_000_000
            if sound is not None:
                layout = "mono" if len(sound) == 1 else "stereo"
                voice = container.add_stream("aac", rate=sound_rate, layout=layout)
                voice.codec_context.bit_rate = 192_000
            for colour in colours:
                parts = np.atleast_2d(np.asarray(colour, np.uint8))
                line = parts.repeat(WIDTH // len(parts), axis=0)
                picture = np.ascontiguousarray(np.broadcast_to(line, (HEIGHT, WIDTH, 3)))
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if sound is not None:
                samples = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(sound, np.float32), format="fltp", layout=layout
                )
                samples.sample_rate = sound_rate
                samples.pts, samples.time_base = 0, Fraction(1, sound_rate)
                container.mux(voice.encode(samples))
                container.mux(voice.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny encoders with random weights: text 16 wide, audio and visual 8 wide."""
    from tokenizers import ByteLevelBPETokenizer
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

    root = tmp_path_factory.mktemp("encoders")
    folders = {modality: root / modality for modality in ("text", "audio", "visual")}
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        [f" {word}" for word in WORDS.split()] * 3,
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    learner.save_model(str(root))
    merges = [
        tuple(line.split()) for line in (root / "merges.txt").read_text("utf-8").splitlines()[1:]
    ]
    tokenizer = RobertaTokenizer(vocab=learner.get_vocab(), merges=merges, model_max_length=64)
    tokenizer.save_pretrained(folders["text"])
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    RobertaModel(
        RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=66, **small
        )
    ).save_pretrained(folders["text"])
    Data2VecAudioModel(
        Data2VecAudioConfig(
            hidden_size=8,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=3,
            num_conv_pos_embedding_groups=2,
            **small,
        )
    ).save_pretrained(folders["audio"])
    Wav2Vec2FeatureExtractor().save_pretrained(folders["audio"])
    TimesformerModel(
        TimesformerConfig(image_size=32, patch_size=16, num_frames=4, hidden_size=8, **small)
    ).save_pretrained(folders["visual"])
    VideoMAEImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.45, 0.4, 0.35],
        image_std=[0.225, 0.2, 0.25],
    ).save_pretrained(folders["visual"])
    return {modality: str(folder) for modality, folder in folders.items()}


def mean_colour(picture: Image.Image) -> Colour:
    red, green, blue = np.asarray(picture).reshape(-1, 3).mean(axis=0).round().astype(int)
    return int(red), int(green), int(blue)
