"""What Triton modules share: choosing a plan by timing."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from telme_kd.kernels.triton import launch

MILLISECONDS = {"default": 3.0, "slow": 5.0, "fast": 1.0}
PLANS = list(MILLISECONDS)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_chosen", {})


def test_rules_choose_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch, "TUNING", False)
    assert launch.fastest(PLANS, "kind", launched.append) == "default"
    assert launched == []


def test_tuning_takes_the_fastest_and_times_each_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def milliseconds(run: object) -> float:
        assert callable(run)
        run()
        return MILLISECONDS[launched[-1]]

    monkeypatch.setattr(launch, "TUNING", True)
    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    for _ in range(3):
        assert launch.fastest(PLANS, "kind", launched.append) == "fast"
    assert launched == PLANS
    assert launch.fastest(PLANS[:2], "another kind", launched.append) == "default"
    assert launch.fastest(PLANS[1:2], "a third", launched.append) == "slow"
    assert launched == PLANS + PLANS[:2]


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch, "TUNING", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch.fastest(PLANS, "kind", launched.append) == "default"
    assert launched == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.fastest(PLANS, "kind", launched.append)
    assert launched == PLANS


def test_the_interpreter_has_no_preference() -> None:
    assert launch.INTERPRETED
    assert launch._milliseconds(lambda: None) == 0.0
