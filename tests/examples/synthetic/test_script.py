from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from examples.synthetic import iemocap, meld
from examples.synthetic.script import (
    AMBIGUOUS,
    EMOTIONS,
    FEELINGS,
    LENGTHS,
    REVEALED,
    REVEALING,
    Line,
    write_dialogues,
)

CAST = ("Ada", "Bo", "Cy")


def write(count: int, seed: int = 0, shares: dict[str, float] = meld.SHARES) -> list[Line]:
    dialogues = write_dialogues(count, shares, lambda _: CAST, np.random.default_rng(seed))
    return [line for dialogue in dialogues for line in dialogue]


@pytest.mark.parametrize("shares", [meld.SHARES, iemocap.SHARES], ids=["meld", "iemocap"])
def test_shares_sum_to_one_and_are_known_emotions(shares: dict[str, float]) -> None:
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) <= set(EMOTIONS)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 240])
def test_split_has_as_many_utterances_as_asked(count: int) -> None:
    assert len(write(count)) == count


def test_emotions_have_their_shares() -> None:
    counts = Counter(line.emotion for line in write(2000))
    for emotion, share in meld.SHARES.items():
        assert counts[emotion] == pytest.approx(2000 * share, abs=8)


def test_every_emotion_occurs_where_there_is_room() -> None:
    assert {line.emotion for line in write(7)} == set(meld.SHARES)


def test_same_share_of_every_emotion_reveals_itself() -> None:
    lines = write(700)
    for emotion in meld.SHARES:
        reveals = [line.reveals for line in lines if line.emotion == emotion]
        assert abs(sum(reveals) - REVEALING * len(reveals)) <= 0.5


def test_moods_last_longer_than_by_chance() -> None:
    lines = write(2000)
    same = np.mean([a.emotion == b.emotion for a, b in pairwise(lines)])
    assert same > 2 * sum(share**2 for share in meld.SHARES.values())


def test_one_seed_gives_one_script_and_another_another() -> None:
    assert write(60, seed=3) == write(60, seed=3)
    assert write(60, seed=3) != write(60, seed=4)


def test_dialogues_have_the_stated_lengths_and_cast() -> None:
    dialogues = write_dialogues(301, meld.SHARES, lambda _: CAST, np.random.default_rng(0))
    assert {len(dialogue) for dialogue in dialogues[:-1]} == set(range(LENGTHS[0], LENGTHS[1] + 1))
    assert {line.speaker for dialogue in dialogues for line in dialogue} == set(CAST)


def test_ambiguous_words_occur_with_every_emotion() -> None:
    lines = write(2000)
    plain = [text for text in AMBIGUOUS if "{" not in text]
    for text in plain:
        assert {line.emotion for line in lines if line.text == text} == set(meld.SHARES)


def test_revealing_words_occur_with_one_emotion_only() -> None:
    lines = write(3000) + write(3000, shares=iemocap.SHARES)
    for text in {line.text for line in lines if line.reveals}:
        assert len({line.emotion for line in lines if line.text == text}) == 1


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_words_of_an_emotion_are_its_own(emotion: str) -> None:
    others = [other for other in EMOTIONS if other != emotion]
    assert set(FEELINGS[emotion]).isdisjoint(word for other in others for word in FEELINGS[other])
    assert set(REVEALED[emotion]).isdisjoint(AMBIGUOUS)


def test_no_gap_stays_open() -> None:
    assert not [line.text for line in write(2000) if "{" in line.text or not line.text[0].isupper()]
