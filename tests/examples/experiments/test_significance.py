from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score

from examples.experiments import significance
from examples.experiments.significance import compare, holm, paired_t

CLASSES = 3

Case = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def draw(seed: int, *, utterances: int, dialogues: int, seeds: int, better: float = 0.4) -> Case:
    """Answers of two systems, of which the first is right more often; labels; dialogues."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, CLASSES, utterances)
    shape = (seeds, utterances)

    def answers(right: float) -> NDArray[np.int64]:
        guesses = generator.integers(0, CLASSES, shape)
        return np.where(generator.random(shape) < right, truth, guesses)

    places = np.sort(generator.permutation(np.arange(utterances) % dialogues))
    return answers(0.2 + better), answers(0.2), truth, 7 * places + 2


def weighted_f1(truth: NDArray[np.int64], answers: NDArray[np.int64]) -> float:
    return float(
        np.mean(
            [
                f1_score(truth, once, labels=range(CLASSES), average="weighted", zero_division=0)
                for once in answers
            ]
        )
    )


def by_scipy(case: Case) -> float:
    """SciPy exchanges the names of the systems, dialogue by dialogue, in every possible way."""
    left, right, truth, dialogues = case
    names = np.unique(dialogues)

    def gap(first: NDArray[np.float64], _: NDArray[np.float64]) -> float:
        swapped = np.isin(dialogues, names[first == 1])
        ours, theirs = np.where(swapped, right, left), np.where(swapped, left, right)
        return weighted_f1(truth, ours) - weighted_f1(truth, theirs)

    served = np.zeros(len(names)), np.ones(len(names))
    found = stats.permutation_test(
        served, gap, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    return float(found.pvalue)


@pytest.mark.parametrize("seed", range(4))
def test_exchanging_dialogues_is_scipys_test_of_paired_samples(seed: int) -> None:
    case = draw(seed, utterances=30, dialogues=6, seeds=2)
    assert compare(*case, CLASSES).dialogues == pytest.approx(by_scipy(case), rel=1e-12)


def test_drawn_exchanges_come_close_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(5, utterances=60, dialogues=12, seeds=2, better=0.12)
    exact = compare(*case, CLASSES).dialogues
    monkeypatch.setattr(significance, "DRAWS", 2_000)  # fewer than 2 ** 12
    drawn = compare(*case, CLASSES).dialogues
    assert 0.01 < exact < 0.5
    # Four standard errors of a share of 2,000 draws.
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 2_000) + 1 / 2_000)
    assert compare(*case, CLASSES).dialogues == drawn


def test_what_is_seen_counts_as_one_of_the_draws() -> None:
    case = draw(0, utterances=400, dialogues=40, seeds=2, better=0.8)
    assert compare(*case, CLASSES).dialogues == 1 / (significance.DRAWS + 1)


def test_seeds_are_tested_as_scipy_does() -> None:
    left, right, truth, dialogues = draw(1, utterances=50, dialogues=5, seeds=4)
    scores = [[weighted_f1(truth, once[None]) for once in answers] for answers in (left, right)]
    expected = stats.ttest_rel(*scores).pvalue
    assert compare(left, right, truth, dialogues, CLASSES).seeds == pytest.approx(expected)


def test_the_larger_probability_counts() -> None:
    found = compare(*draw(2, utterances=40, dialogues=4, seeds=3), CLASSES)
    assert found.seeds is not None
    assert found.seeds < found.dialogues == found.probability
    assert significance.Significance(0.3, 0.1).probability == 0.3


def test_one_seed_says_nothing_about_seeds() -> None:
    found = compare(*draw(2, utterances=40, dialogues=4, seeds=1), CLASSES)
    assert found.seeds is None
    assert found.probability == found.dialogues


def test_a_system_does_not_differ_from_itself() -> None:
    left, _, truth, dialogues = draw(3, utterances=40, dialogues=4, seeds=2)
    found = compare(left, left, truth, dialogues, CLASSES)
    assert (found.seeds, found.dialogues) == (1.0, 1.0)


def test_either_system_may_come_first_and_dialogues_may_have_any_numbers() -> None:
    left, right, truth, dialogues = draw(4, utterances=40, dialogues=5, seeds=3)
    found = compare(left, right, truth, dialogues, CLASSES)
    other = compare(right, left, truth, 1000 - dialogues, CLASSES)
    assert other.dialogues == pytest.approx(found.dialogues, rel=1e-12)
    assert other.seeds == pytest.approx(found.seeds, rel=1e-12)


def test_under_the_null_hypothesis_small_probabilities_are_rare() -> None:
    """Of 200 pairs of equally good systems about a twentieth is below a twentieth."""
    found = [
        compare(*draw(seed, utterances=40, dialogues=8, seeds=2, better=0.0), CLASSES).dialogues
        for seed in range(200)
    ]
    # A binomial count of 200 at 0.05 exceeds 23 once in ten thousand.
    assert sum(value <= 0.05 for value in found) <= 23


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([0.0, 0.0, 0.0], 1.0), ([0.1, 0.1], 0.0), ([1e-16, -1e-16], 1.0)],
)
def test_differences_without_spread_are_certain(differences: list[float], expected: float) -> None:
    assert paired_t(np.array(differences)) == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_holm_closes_bonferroni(probabilities: list[float]) -> None:
    """A hypothesis falls if Bonferroni rejects every intersection that it is part of."""
    every = range(len(probabilities))
    sets = [set(s) for size in every for s in combinations(every, size + 1)]
    expected = [
        max(
            min(1.0, len(family) * min(probabilities[i] for i in family))
            for family in sets
            if index in family
        )
        for index in every
    ]
    assert holm(probabilities) == pytest.approx(expected)


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []
