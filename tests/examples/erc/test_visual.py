from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError
from examples.erc.pretrained import Pretrained
from examples.erc.visual import FrameFitter, VisualEncoder, decode_frames

RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)

FILMS = {
    "one group of pictures": ("film.mp4", {"codec": "libx264", "key_every": 250}),
    "many groups of pictures": ("film.mp4", {"codec": "libx264", "key_every": 10}),
    "avi": ("film.avi", {"codec": "mpeg4", "key_every": 12, "b_frames": 0}),
    "matroska": ("film.mkv", {"codec": "libx264", "key_every": 25}),
}


def shade(number: int) -> tuple[int, int, int]:
    """A colour for each of 125 pictures, told apart after lossy coding."""
    return (20 + 50 * (number % 5), 20 + 50 * (number // 5 % 5), 20 + 50 * (number // 25))


def recognise(pictures: Sequence[Image.Image], count: int) -> list[int]:
    """The numbers of pictures made by `shade`."""
    known = np.array([shade(number) for number in range(count)])
    means = [np.asarray(picture).reshape(-1, 3).mean(axis=0) for picture in pictures]
    return [int(np.abs(known - mean).sum(axis=1).argmin()) for mean in means]


@pytest.fixture(scope="module", params=list(FILMS))
def film(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_film: Callable[..., Path],
) -> Path:
    """Five seconds at 25 pictures a second."""
    name, options = FILMS[request.param]
    folder = tmp_path_factory.mktemp("films")
    return write_film(folder / name, [shade(number) for number in range(125)], **options)


@pytest.mark.parametrize(
    ("start", "end", "numbers"),
    [
        (None, None, [7, 23, 39, 54, 70, 85, 101, 117]),
        (2.0, 4.0, [53, 59, 65, 71, 78, 84, 90, 96]),
        (0.0, 0.5, [0, 2, 3, 5, 7, 8, 10, 11]),
        (4.5, 9.0, [113, 114, 116, 117, 119, 121, 122, 124]),
        (1.001, 1.01, [25] * 8),
    ],
)
def test_pictures_are_those_shown_at_the_middles_of_equal_parts(
    film: Path, start: float | None, end: float | None, numbers: list[int]
) -> None:
    pictures, damaged = decode_frames(Clip(film, start, end), 8, 30)

    assert recognise(pictures, 125) == numbers
    assert damaged == 0


def test_only_the_first_part_of_a_long_clip_counts(film: Path) -> None:
    pictures, _ = decode_frames(Clip(film), 4, 2.0)
    part, _ = decode_frames(Clip(film, 1.0, 5.0), 4, 2.0)

    assert recognise(pictures, 125) == [6, 18, 31, 43]
    assert recognise(part, 125) == [31, 43, 56, 68]


def test_a_window_beyond_the_end_is_broken(film: Path) -> None:
    with pytest.raises(ClipError, match="no picture in the window"):
        decode_frames(Clip(film, 7.0, 8.0), 8, 30)


def test_colours_are_red_green_blue(tmp_path: Path, write_film: Callable[..., Path]) -> None:
    path = write_film(tmp_path / "film.mp4", [RED] * 10 + [GREEN] * 10 + [BLUE] * 10)

    pictures, _ = decode_frames(Clip(path), 3, 30)

    means = [np.asarray(picture).reshape(-1, 3).mean(axis=0) for picture in pictures]
    np.testing.assert_allclose(means, [RED, GREEN, BLUE], atol=25)


@pytest.mark.parametrize("count", [1, 3])
def test_a_clip_of_few_pictures_repeats_them(
    tmp_path: Path, write_film: Callable[..., Path], count: int
) -> None:
    path = write_film(tmp_path / "film.mp4", [shade(number) for number in range(count)])

    pictures, _ = decode_frames(Clip(path), 8, 30)

    numbers = recognise(pictures, count)
    assert len(numbers) == 8
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(count))


def test_damage_costs_the_damaged_pictures_alone(
    tmp_path: Path, write_film: Callable[..., Path]
) -> None:
    path = write_film(
        tmp_path / "film.avi", [RED] * 40 + [GREEN] * 40, codec="mpeg4", key_every=1, b_frames=0
    )
    data = bytearray(path.read_bytes())
    first = data.index(b"00dc", data.index(b"movi"))
    data[first + 8 : first + 40] = bytes(32)
    path.write_bytes(data)

    pictures, _ = decode_frames(Clip(path), 2, 30)

    means = [np.asarray(picture).reshape(-1, 3).mean(axis=0) for picture in pictures]
    np.testing.assert_allclose(means, [RED, GREEN], atol=25)


def test_a_truncated_film_is_broken_or_short_but_never_a_crash(
    tmp_path: Path, write_film: Callable[..., Path]
) -> None:
    whole = write_film(tmp_path / "film.avi", [RED] * 50, codec="mpeg4").read_bytes()
    path = tmp_path / "cut.avi"
    counts = []
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        try:
            counts.append(len(decode_frames(Clip(path), 8, 30)[0]))
        except ClipError:
            counts.append(0)

    assert set(counts) == {0, 8}


def test_a_file_without_pictures_is_broken(tmp_path: Path, write_wav: Callable[..., Path]) -> None:
    path = write_wav(tmp_path / "voice.wav", np.zeros(1600))

    with pytest.raises(ClipError, match="no video stream"):
        decode_frames(Clip(path), 8, 30)


@pytest.fixture(scope="module")
def encoder(tiny_encoders: dict[str, str]) -> Pretrained:
    return Pretrained(tiny_encoders["visual"])


@pytest.fixture(scope="module")
def fitter(encoder: Pretrained) -> FrameFitter:
    return FrameFitter(encoder)


def test_pictures_become_what_the_image_processor_makes_of_them(
    encoder: Pretrained, fitter: FrameFitter
) -> None:
    from transformers import VideoMAEImageProcessorPil

    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(4)
    ]
    processor = VideoMAEImageProcessorPil.from_pretrained(encoder.name)

    fitted = fitter.fit(pictures)
    values = fitter.normalise(torch.from_numpy(fitted))

    assert fitted.shape == (4, 3, 32, 32)
    assert fitted.dtype == np.uint8
    expected = processor([pictures], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, expected)


def test_fitting_keeps_the_order_of_the_colours(fitter: FrameFitter) -> None:
    fitted = fitter.fit([Image.new("RGB", (64, 48), RED)] * 4)

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
