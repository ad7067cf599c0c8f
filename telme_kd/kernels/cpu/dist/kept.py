"""Plans that outlive a call: a small operator takes as long as making a buffer or a view of one."""

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch

KEPT_LOGITS = 2**18
"""Of the plans kept for the next call, about 80 bytes a logit."""

LEAST_LOGITS = 2**12
"""A kept plan counts as so many at least."""


class Plan(Protocol):
    """Buffers and constants for one shape, dtype and set of options."""

    size: int
    """In logits."""


PlanT = TypeVar("PlanT", bound=Plan)

_plans: dict[Hashable, Plan] = {}


def take(key: Hashable, make: Callable[[], PlanT]) -> PlanT:
    """Return the plan kept under a key, or make it; until :func:`keep`, no other thread gets it."""
    plan = _plans.pop(key, None)
    if plan is None:
        with torch.inference_mode(False), torch.no_grad():
            plan = make()
        _make_room(max(plan.size, LEAST_LOGITS))
    return plan  # type: ignore[return-value]  # a key is used with one kind of plan


def keep(key: Hashable, plan: Plan) -> None:
    """Keep a plan for the next call."""
    _plans[key] = plan


def _make_room(size: int) -> None:
    """Forget the plans not used for longest until another has room beside the rest."""
    for key, plan in reversed(_plans.copy().items()):
        size += max(plan.size, LEAST_LOGITS)
        if size > KEPT_LOGITS:
            _plans.pop(key, None)


def sizes() -> list[int]:
    """Return how many logits each kept plan counts as."""
    return [max(plan.size, LEAST_LOGITS) for plan in _plans.values()]


def forget() -> None:
    """Give back the memory of all plans that are not in use."""
    _plans.clear()
