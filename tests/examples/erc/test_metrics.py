import pytest
import torch

from examples.erc.metrics import class_scores, scores, weighted_f1

# Class 0: precision 2/3, recall 2/2; class 1: 1/1, 1/2; class 2: 0/1, 0/1; class 3: absent.
TRUTH = torch.tensor([0, 0, 1, 1, 2])
LOGITS = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 3]), 4).float()
PER_CLASS = [0.8, 2 / 3, 0.0, 0.0]


def test_weighted_f1_weighs_by_true_counts() -> None:
    assert weighted_f1(TRUTH, LOGITS) == pytest.approx((2 * 0.8 + 2 * 2 / 3) / 5)


def test_scores_count_absent_classes_in_the_macro_f1() -> None:
    assert scores(TRUTH, LOGITS) == pytest.approx(
        {
            "weighted_f1": (2 * 0.8 + 2 * 2 / 3) / 5,
            "macro_f1": (0.8 + 2 / 3) / 4,
            "accuracy": 3 / 5,
        }
    )


def test_class_scores_have_true_classes_as_rows() -> None:
    found = class_scores(TRUTH, LOGITS)
    assert found["per_class_f1"] == pytest.approx(PER_CLASS)
    assert found["confusion"] == [[2, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
