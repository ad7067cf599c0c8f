"""Whether one system is better than another, by weighted F1 on test.

Two things are left to chance: the seeds, and the dialogues that happen to be in test. Each has a
paired test of its own, and the larger p-value counts: a difference is claimed if it would hold with
other seeds *and* with other dialogues (an intersection-union test, Berger, Technometrics 1982,
whose level is that of its parts). Utterances of a dialogue are not independent, as each is read
with what was said before it; so whole dialogues are exchanged, in all seeds at once.

Where several systems are compared with a baseline, some will differ by chance: p-values of a table
are adjusted by Holm's method (Scandinavian Journal of Statistics 1979).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

DRAWS = 9_999
"""Random exchanges, where there are more ways than that to exchange dialogues."""

_TOLERANCE = 1e-12
"""Of fractions: what differs by less is equal, but for rounding."""

_ROWS = 1_000
"""Exchanges computed at a time."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Significance:
    """What chance says to a difference.

    Attributes:
        seeds: The p-value over seeds, by a paired t-test; ``None`` with a single seed.
        dialogues: The p-value over dialogues, by exchanging them.
    """

    seeds: float | None
    dialogues: float

    @property
    def probability(self) -> float:
        """The one that counts: the larger."""
        return max(self.dialogues, self.seeds or 0.0)


def compare(
    left: Integers, right: Integers, truth: Integers, dialogues: Integers, classes: int
) -> Significance:
    """Test two systems against each other.

    Args:
        left: What a system predicts, by seed: ``[S, N]``, in [0, classes).
        right: The same of the other, with the same seeds in the same order.
        truth: The labels, ``[N]``.
        dialogues: The dialogue of each utterance, ``[N]``, numbered in any way.
        classes: C.

    Returns:
        The p-values of both tests; two-sided.
    """
    exchanges = _Exchanges(left, right, truth, dialogues, classes)
    scores = exchanges.scores(np.zeros((1, exchanges.count)))[0]
    return Significance(
        seeds=paired_t(scores[0] - scores[1]) if len(left) > 1 else None,
        dialogues=exchanges.probability(),
    )


def paired_t(differences: Floats) -> float:
    """The two-sided p-value of Student's t-test of paired differences.

    Args:
        differences: Two or more.

    Returns:
        In [0, 1]; differences that are all alike are certain to be zero, or not to be.
    """
    if np.ptp(differences) <= _TOLERANCE:
        return float(abs(differences.mean()) <= _TOLERANCE)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjust p-values for being several, by Holm's step-down method.

    Args:
        probabilities: Those of a family, in any order.

    Returns:
        The adjusted ones, in the same order, each at least as large.
    """
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(order) - rank) * probabilities[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


class _Exchanges:
    """Two systems, some of whose dialogues are exchanged.

    F1 needs of each system only how many utterances of each class it hits and says, and an exchange
    moves those of a dialogue from one to the other.
    """

    def __init__(
        self,
        left: Integers,
        right: Integers,
        truth: Integers,
        dialogues: Integers,
        classes: int,
    ) -> None:
        _, self._group = np.unique(dialogues, return_inverse=True)
        self.count = int(self._group.max()) + 1
        self._truth, self._classes = truth, classes
        self._support = np.bincount(truth, minlength=classes)
        mine, theirs = self._counts(left), self._counts(right)
        self._totals = mine.sum(axis=0), theirs.sum(axis=0)
        self._moved = (theirs - mine).reshape(self.count, -1)

    def _counts(self, predicted: Integers) -> Floats:
        """Hits and answers: ``[D, 2, S, C]``."""
        seeds = np.arange(len(predicted))[:, None]
        counts = np.zeros((self.count, 2, len(predicted), self._classes))
        np.add.at(counts[:, 0], (self._group, seeds, predicted), predicted == self._truth)
        np.add.at(counts[:, 1], (self._group, seeds, predicted), 1)
        return counts

    def scores(self, exchanged: Floats) -> Floats:
        """Weighted F1 of both: ``[R, 2, S]``, for R exchanges ``[R, D]`` of zeros and ones."""
        first, second = self._totals
        moved = (exchanged @ self._moved).reshape(-1, *first.shape)
        return np.stack(
            [self._weighted_f1(first + moved), self._weighted_f1(second - moved)], axis=1
        )

    def _weighted_f1(self, counts: Floats) -> Floats:
        hits, said = counts[:, 0], counts[:, 1]
        f1 = 2 * hits / np.maximum(said + self._support, 1)
        weighted: Floats = f1 @ self._support / self._support.sum()
        return weighted

    def probability(self) -> float:
        """How rarely a difference of the means over seeds is as large, if dialogues are exchanged.

        All ways to exchange them are gone through if they are few, else some are drawn, always the
        same; what is seen counts as one of them then.
        """
        few = 2**self.count <= DRAWS + 1
        observed = self._difference(np.zeros((1, self.count)))[0]
        as_large = total = 0
        for exchanged in self._every() if few else self._drawn():
            found = self._difference(exchanged)
            as_large += int((found >= observed - _TOLERANCE).sum())
            total += len(found)
        return as_large / total if few else (as_large + 1) / (total + 1)

    def _difference(self, exchanged: Floats) -> Floats:
        scores = self.scores(exchanged).mean(axis=2)
        gaps: Floats = np.abs(scores[:, 0] - scores[:, 1])
        return gaps

    def _every(self) -> Iterator[Floats]:
        numbers = np.arange(2**self.count)
        yield ((numbers[:, None] >> np.arange(self.count)) & 1).astype(np.float64)

    def _drawn(self) -> Iterator[Floats]:
        generator = np.random.default_rng(0)
        for start in range(0, DRAWS, _ROWS):
            rows = min(_ROWS, DRAWS - start)
            yield generator.integers(0, 2, (rows, self.count)).astype(np.float64)
