import numpy as np
import numpy.typing as npt
import pytest

from examples.synthetic.acting import Delivery
from examples.synthetic.face import EXPRESSIONS, HEIGHT, WIDTH, Expression, Looks, film
from examples.synthetic.script import EMOTIONS

Frames = npt.NDArray[np.uint8]


def shoot(emotion: str, intensity: float = 1.0, person: int = 0, loud: float = 0.0) -> Frames:
    looks = Looks.draw(np.random.default_rng(person))
    room, random = np.random.default_rng(1), np.random.default_rng(2)
    delivery = Delivery(emotion, intensity)
    return np.stack(list(film(looks, delivery, np.full(4, loud), room, random)))


def difference(one: Frames, other: Frames) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def test_film_has_one_rgb_frame_for_each_loudness() -> None:
    frames = shoot("joy")
    assert frames.shape == (4, HEIGHT, WIDTH, 3)
    assert frames.dtype == np.uint8


def test_every_emotion_has_an_expression() -> None:
    assert set(EXPRESSIONS) == set(EMOTIONS)


def test_same_generators_give_the_same_film() -> None:
    assert np.array_equal(shoot("fear"), shoot("fear"))


@pytest.mark.parametrize("emotion", sorted(set(EMOTIONS) - {"neutral"}))
def test_expression_shows_and_fades_with_intensity(emotion: str) -> None:
    neutral = shoot("neutral")
    assert np.array_equal(shoot(emotion, 0.0), neutral)
    assert difference(shoot(emotion), neutral) > difference(shoot(emotion, 0.4), neutral) > 0.5


def test_people_differ() -> None:
    assert difference(shoot("neutral", person=0), shoot("neutral", person=1)) > 5


def test_loud_voice_opens_the_mouth() -> None:
    def mouth(loud: float) -> Frames:
        frames = shoot("neutral", loud=loud)
        return frames[:, HEIGHT // 2 : 3 * HEIGHT // 4, WIDTH // 2 - 10 : WIDTH // 2 + 10]

    assert difference(mouth(1.0), mouth(0.0)) > 2
    assert mouth(1.0).min() < mouth(0.0).min()


def test_faces_blush_with_anger_and_pale_with_fear() -> None:
    def redness(frames: Frames) -> float:
        middle = frames[:, HEIGHT // 3 : HEIGHT // 2, WIDTH // 2 - 20 : WIDTH // 2 + 20]
        red, _, blue = middle.reshape(-1, 3).mean(axis=0)
        return float(red - blue)

    assert redness(shoot("anger")) > redness(shoot("neutral")) > redness(shoot("fear"))


def test_softening_interpolates_towards_rest() -> None:
    half = EXPRESSIONS["sadness"].softened(0.5)
    assert half.mouth_curve == pytest.approx(0.5 * EXPRESSIONS["sadness"].mouth_curve)
    assert half.bounce == pytest.approx(Expression().bounce)
    assert EXPRESSIONS["sadness"].softened(0.0) == Expression()
