"""Scores of predictions, by scikit-learn; a class without any prediction scores 0."""

from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from examples.erc.source import JSON


def weighted_f1(truth: Tensor, logits: Tensor) -> float:
    """The F1 of every class, averaged with the class sizes as weights: what models are selected by.

    Args:
        truth: Labels, int64, ``[N]``.
        logits: ``[N, C]``; the largest is the prediction.

    Returns:
        A fraction in [0, 1].
    """
    return _f1(truth, logits, "weighted")


def scores(truth: Tensor, logits: Tensor) -> dict[str, JSON]:
    """Summarise predictions in three fractions; the macro F1 counts every one of the C classes.

    Args:
        truth: Labels, int64, ``[N]``.
        logits: ``[N, C]``; the largest is the prediction.

    Returns:
        ``weighted_f1``, ``macro_f1`` and ``accuracy``, each in [0, 1].
    """
    return {
        "weighted_f1": weighted_f1(truth, logits),
        "macro_f1": _f1(truth, logits, "macro"),
        "accuracy": float(accuracy_score(truth.numpy(), logits.argmax(dim=1).numpy())),
    }


def class_scores(truth: Tensor, logits: Tensor) -> dict[str, JSON]:
    """Tell the classes apart.

    Args:
        truth: Labels, int64, ``[N]``.
        logits: ``[N, C]``; the largest is the prediction.

    Returns:
        ``per_class_f1``, C fractions, and ``confusion``, ``[C][C]`` counts; a row is a true class.
    """
    predicted = logits.argmax(dim=1).numpy()
    classes = range(logits.shape[1])
    per_class = f1_score(truth.numpy(), predicted, labels=classes, average=None, zero_division=0)
    return {
        "per_class_f1": per_class.tolist(),
        "confusion": confusion_matrix(truth.numpy(), predicted, labels=classes).tolist(),
    }


def _f1(truth: Tensor, logits: Tensor, average: str) -> float:
    return float(
        f1_score(
            truth.numpy(),
            logits.argmax(dim=1).numpy(),
            labels=range(logits.shape[1]),
            average=average,
            zero_division=0,
        )
    )
