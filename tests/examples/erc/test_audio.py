from pathlib import Path

import numpy as np
import pytest
import torch

from examples.erc.audio import AudioEncoder, WaveformCollator
from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained
from examples.erc.sound import quantise


@pytest.fixture(scope="module")
def encoder(tiny_encoders: dict[str, str]) -> Pretrained:
    return Pretrained(tiny_encoders["audio"])


@pytest.fixture(scope="module")
def collator(encoder: Pretrained) -> WaveformCollator:
    return WaveformCollator(encoder)


def make_samples(count: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(quantise(random.uniform(-0.3, 0.5, count).astype(np.float32)))


def test_a_batch_is_normalised_and_padded_on_the_right(collator: WaveformCollator) -> None:
    batch = collator.collate([make_samples(2000), make_samples(5000), None])

    values, mask = batch["input_values"], batch["attention_mask"]
    assert values.shape == mask.shape == (3, 5000)
    assert values.dtype == torch.float32
    assert mask.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == [2000, 5000, 400]
    assert batch["present"].tolist() == [True, True, False]
    for row, length in ((0, 2000), (1, 5000)):
        assert values[row, :length].mean().item() == pytest.approx(0, abs=1e-5)
        assert values[row, :length].std().item() == pytest.approx(1, abs=1e-3)
    assert values[0, 2000:].eq(0).all()
    assert values[2].eq(0).all()


@pytest.mark.parametrize("lengths", [[1], [399, 1], [400], [0]])
def test_clips_too_short_for_a_frame_still_train(
    encoder: Pretrained, collator: WaveformCollator, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    model = AudioEncoder(encoder, num_classes=6, feature_size=8).train()

    batch = collator.collate([make_samples(length) if length else None for length in lengths])
    features, logits = model(**batch)

    assert features.isfinite().all()
    assert logits.shape == (len(lengths), 6)


@pytest.fixture
def model(encoder: Pretrained) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(encoder, num_classes=6, feature_size=8).eval()


def test_the_feature_is_the_mean_over_real_frames(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    batch = collator.collate([make_samples(4000), make_samples(16_000)])

    features, logits = model(**batch)

    hidden = model.body(
        batch["input_values"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    # 400 samples make the first frame, and each 320 one more.
    torch.testing.assert_close(features[0], hidden[0, : 1 + (4000 - 400) // 320].mean(dim=0))
    torch.testing.assert_close(features[1], hidden[1].mean(dim=0))
    assert logits.shape == (2, 6)


def test_neighbours_do_not_change_a_feature(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    short, long = make_samples(16_000), make_samples(48_000, seed=1)

    alone = model(**collator.collate([short])).features[0]
    beside = model(**collator.collate([short, long])).features[0]

    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


def test_an_absent_voice_has_a_zero_feature(
    model: AudioEncoder, collator: WaveformCollator
) -> None:
    features, logits = model(**collator.collate([None, make_samples(4000)]))

    assert features[0].eq(0).all()
    assert features[1].ne(0).all()
    assert torch.equal(logits[0], model.head.classifier.bias)


def test_every_parameter_gets_a_gradient(model: AudioEncoder, collator: WaveformCollator) -> None:
    torch.manual_seed(0)
    model.train()

    model(**collator.collate([make_samples(32_000)])).logits.square().sum().backward()

    without = [name for name, weights in model.named_parameters() if weights.grad is None]
    assert without == []


def test_an_encoder_of_another_kind_is_refused(tiny_encoders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"expected .*AutoFeatureExtractor|expected a speech"):
        WaveformCollator(Pretrained(tiny_encoders["text"]))


def test_an_encoder_for_another_sample_rate_is_refused(
    tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoConfig, Wav2Vec2FeatureExtractor

    AutoConfig.from_pretrained(tiny_encoders["audio"]).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)

    with pytest.raises(InputError, match=r"at 16000 Hz, got .* at 8000 Hz"):
        WaveformCollator(Pretrained(str(tmp_path)))
