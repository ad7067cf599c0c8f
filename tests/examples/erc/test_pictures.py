from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from examples.erc import pictures as module
from examples.erc.dialogue import Clip
from examples.erc.media import ClipError, Media
from examples.erc.pictures import Picture, decode, decode_frames

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


def recognise(pictures: Iterable[Picture], count: int) -> list[int]:
    """The numbers of pictures made by `shade`."""
    known = np.array([shade(number) for number in range(count)])
    means = [picture.reshape(-1, 3).mean(axis=0) for picture in pictures]
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

    means = [picture.reshape(-1, 3).mean(axis=0) for picture in pictures]
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

    means = [picture.reshape(-1, 3).mean(axis=0) for picture in pictures]
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


WINDOWS = [(2.0, 4.0), (0.0, 0.5), (7.0, 8.0), (3.5, 4.6), (1.001, 1.01), (4.5, 9.0), (2.5, 3.0)]


def test_a_film_is_opened_once_for_all_of_its_clips(
    film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Counted(Media):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    clips = [Clip(film, start, end) for start, end in WINDOWS]
    alone = {}
    for position, clip in enumerate(clips):
        if position != 2:
            alone[position], _ = decode_frames(clip, 8, 30)
    monkeypatch.setattr(module, "Media", Counted)

    together = {position: values for position, values, _ in decode(clips, count=8, max_seconds=30)}

    assert opened == [film]
    assert isinstance(together.pop(2), ClipError)
    assert together.keys() == alone.keys()
    for position, pictures in alone.items():
        np.testing.assert_array_equal(pictures, together[position])


def test_one_pass_decodes_no_picture_twice(
    tmp_path: Path, write_film: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / "film.mp4", [shade(number) for number in range(125)])
    decoded = 0
    original = Media.pictures

    def count(self: Media, stream: object) -> Iterable[object]:
        nonlocal decoded
        for picture in original(self, stream):  # type: ignore[arg-type]
            decoded += 1
            yield picture

    monkeypatch.setattr(Media, "pictures", count)
    clips = [Clip(path, number / 2, number / 2 + 1) for number in range(8)]

    assert len(list(decode(clips, count=8, max_seconds=30))) == 8

    assert decoded <= 125


@pytest.mark.parametrize(
    ("name", "options"), [("film.mp4", {}), ("film.avi", {"codec": "mpeg4", "b_frames": 0})]
)
def test_what_lies_between_is_not_decoded(
    name: str,
    options: dict[str, object],
    tmp_path: Path,
    write_film: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_film(
        tmp_path / name, [shade(number) for number in range(125)], key_every=5, **options
    )
    decoded = 0
    original = Media.pictures

    def count(self: Media, stream: object) -> Iterable[object]:
        nonlocal decoded
        for picture in original(self, stream):  # type: ignore[arg-type]
            decoded += 1
            yield picture

    monkeypatch.setattr(Media, "pictures", count)
    pictures, _ = decode_frames(Clip(path), 4, 30)

    assert recognise(pictures, 125) == [15, 46, 78, 109]
    assert decoded <= 4 * 5


@pytest.mark.parametrize(("side", "colour"), [("left", RED), ("right", BLUE)])
def test_a_film_of_two_can_be_cropped_to_the_speaker(
    tmp_path: Path, write_film: Callable[..., Path], side: str, colour: tuple[int, int, int]
) -> None:
    path = write_film(tmp_path / "film.avi", [(RED, BLUE)] * 10, codec="mpeg4", b_frames=0)
    clip = replace(Clip(path), side=side)

    ((_, half, _),) = decode([clip], count=2, max_seconds=30, crop=True)
    ((_, whole, _),) = decode([clip], count=2, max_seconds=30)

    assert isinstance(half, np.ndarray)
    assert isinstance(whole, np.ndarray)
    assert half.shape == (2, 48, 32, 3)
    assert whole.shape == (2, 48, 64, 3)
    np.testing.assert_allclose(half[:, :, 4:-4].reshape(-1, 3).mean(axis=0), colour, atol=25)


def test_pictures_that_are_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 16, "yuv420p"
        picture = np.zeros((16, 640, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))

    with pytest.raises(ClipError, match="pictures of 640 x 16"):
        decode_frames(Clip(path), 8, 30)


def test_a_side_is_kept_whole_unless_asked(tmp_path: Path, write_film: Callable[..., Path]) -> None:
    path = write_film(tmp_path / "film.mp4", [RED] * 10)

    ((_, pictures, _),) = decode([Clip(path)], count=2, max_seconds=30, crop=True)

    assert isinstance(pictures, np.ndarray)
    assert pictures.shape == (2, 48, 64, 3)
