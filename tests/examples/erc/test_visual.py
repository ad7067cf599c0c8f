from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained
from examples.erc.visual import FrameFitter, VisualEncoder

RED = (220, 30, 30)


@pytest.fixture(scope="module")
def encoder(tiny_encoders: dict[str, str]) -> Pretrained:
    return Pretrained(tiny_encoders["visual"])


@pytest.fixture(scope="module")
def fitter(encoder: Pretrained) -> FrameFitter:
    return FrameFitter(encoder)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (3, 40), (40, 3), (1, 9)])
def test_pictures_become_what_the_image_processor_makes_of_them(
    encoder: Pretrained, fitter: FrameFitter, shape: tuple[int, int]
) -> None:
    from transformers import VideoMAEImageProcessorPil

    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (4, *shape, 3), dtype=np.uint8)
    processor = VideoMAEImageProcessorPil.from_pretrained(encoder.name)

    fitted = fitter.fit(pictures)
    values = fitter.normalise(torch.from_numpy(fitted))

    assert fitted.shape == (4, 3, 32, 32)
    assert fitted.dtype == np.uint8
    images = [Image.fromarray(picture) for picture in pictures]
    expected = processor([images], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, expected)


def test_fitting_keeps_the_order_of_the_colours(fitter: FrameFitter) -> None:
    fitted = fitter.fit(np.full((4, 48, 64, 3), RED, np.uint8))

    assert fitted.reshape(4, 3, -1).mean(axis=2).tolist() == [list(RED)] * 4


def test_the_encoder_says_how_many_pictures_of_which_size(fitter: FrameFitter) -> None:
    assert fitter.count == 4
    assert fitter.size == (32, 32)
    assert fitter.settings["frames"] == 4


def test_the_feature_is_the_class_token(encoder: Pretrained) -> None:
    torch.manual_seed(0)
    model = VisualEncoder(encoder, num_classes=7, feature_size=8).eval()
    pixels = torch.randn(2, 4, 3, 32, 32)

    features, logits = model(pixels, torch.tensor([True, True]))

    assert torch.equal(features, model.body(pixels).last_hidden_state[:, 0])
    torch.testing.assert_close(logits, model.head.classifier(features))


def test_an_absent_picture_has_a_zero_feature(encoder: Pretrained) -> None:
    torch.manual_seed(0)
    model = VisualEncoder(encoder, num_classes=7, feature_size=8).eval()

    features, _ = model(torch.zeros(2, 4, 3, 32, 32), torch.tensor([True, False]))

    assert features[0].ne(0).any()
    assert features[1].eq(0).all()


def test_every_parameter_gets_a_gradient(encoder: Pretrained) -> None:
    torch.manual_seed(0)
    model = VisualEncoder(encoder, num_classes=7, feature_size=8)

    model(torch.randn(1, 4, 3, 32, 32), torch.tensor([True])).logits.square().sum().backward()

    without = [name for name, weights in model.named_parameters() if weights.grad is None]
    assert without == []


def test_an_encoder_of_another_kind_is_refused(tiny_encoders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"expected a video encoder .* got one of the kind 'rob"):
        FrameFitter(Pretrained(tiny_encoders["text"]))


def test_an_image_processor_of_another_size_is_refused(encoder: Pretrained, tmp_path: Path) -> None:
    from transformers import AutoConfig, VideoMAEImageProcessorPil

    AutoConfig.from_pretrained(encoder.name).save_pretrained(tmp_path)
    VideoMAEImageProcessorPil().save_pretrained(tmp_path)

    with pytest.raises(InputError, match=r"pictures of \(32, 32\), got \(224, 224\)"):
        FrameFitter(Pretrained(str(tmp_path)))
