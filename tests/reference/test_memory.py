"""The oracle of losses with a memory: SciPy's relations, and what is expected of a gradient."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from telme_kd.reference import batch_similarity, dist, memory
from tests.helpers import truth

ITEMS, REMEMBERED, WIDTH = 3, 5, 4
OPTIONS = {"temperature": 2.0, "inter_weight": 0.5, "intra_weight": 3.0}


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(
        2, count, WIDTH, dtype=torch.float64, generator=torch.manual_seed(seed)
    )
    return student, teacher


def test_dist_has_the_rows_of_the_batch_and_the_columns_of_both() -> None:
    now, before = rows(ITEMS, 0), rows(REMEMBERED, 1)
    loss = memory.dist_loss_with_memory(*now, *before, eps=None, **OPTIONS)
    both = [torch.cat(sides).numpy() for sides in zip(before, now, strict=True)]
    own = [side.numpy() for side in now]
    expected = truth.exact_dist(*own, **(OPTIONS | {"intra_weight": 0.0}))
    expected += truth.exact_dist(*both, **(OPTIONS | {"inter_weight": 0.0}))
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_batch_similarity_has_the_rows_and_columns_of_both() -> None:
    now, before = rows(ITEMS, 0), rows(REMEMBERED, 1)
    loss = memory.batch_similarity_loss_with_memory(*now, *before, temperature=0.3)
    both = [torch.cat(sides).numpy() for sides in zip(before, now, strict=True)]
    assert loss.item() == pytest.approx(truth.batch_similarity(*both, temperature=0.3), rel=1e-12)


def intra(student: Tensor, teacher: Tensor, *before: Tensor) -> Tensor:
    options = {"temperature": 2.0, "inter_weight": 0.0, "intra_weight": 1.0}
    if before:
        return memory.dist_loss_with_memory(student, teacher, *before, eps=None, **options)
    return dist.dist_loss(student, teacher, mask=None, eps=None, **options)


def similarity(student: Tensor, teacher: Tensor, *before: Tensor) -> Tensor:
    if before:
        return memory.batch_similarity_loss_with_memory(student, teacher, *before, temperature=0.3)
    return batch_similarity.batch_similarity_loss(student, teacher, temperature=0.3, mask=None)


@pytest.mark.parametrize("loss", [intra, similarity])
def test_the_mean_gradient_of_all_batches_is_that_of_all_items(
    loss: Callable[..., Tensor],
) -> None:
    """Of N items every B are the batch once, the others remembered: no step is too short."""
    student, teacher = rows(ITEMS + REMEMBERED, 2)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(loss(student, teacher), student)
    gradients = []
    for chosen in combinations(range(len(student)), ITEMS):
        others = [item for item in range(len(student)) if item not in chosen]
        now, before = [*chosen], others
        value = loss(student[now], teacher[now], student[before], teacher[before])
        gradients.append(torch.autograd.grad(value, student)[0])
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected, rtol=1e-12, atol=1e-15)


def test_the_last_rows_stay_in_order() -> None:
    held = torch.zeros(0, 2)
    for start in (0, 3, 6):
        held = memory.remembered(held, torch.arange(start, start + 3.0)[:, None].repeat(1, 2), 5)
    assert held[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert memory.remembered(held, torch.ones(9, 2), 5).tolist() == [[1, 1]] * 5
