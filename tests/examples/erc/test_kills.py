"""SIGKILL at every call that writes, and at random: what is there is whole, and is gone on with.

For whole stages of training see ``test_resume.py``.
"""

import random
import signal
from pathlib import Path

import pytest

from tests.helpers import deaths
from tests.helpers.small_stores import STORES, work

KILLS = 20


@pytest.mark.parametrize("store", STORES)
def test_a_kill_at_any_call_leaves_what_is_whole(store: str, tmp_path: Path) -> None:
    check = STORES[store][1]
    (tmp_path / "whole").mkdir()
    assert deaths.run(work, store, tmp_path / "whole") == 0
    check(tmp_path / "whole", done=True)
    moments = int((tmp_path / f"{store}.moments").read_text())
    assert moments >= 8
    for moment in range(1, moments + 1):
        folder = tmp_path / str(moment)
        folder.mkdir()
        assert deaths.run(work, store, folder, moment) == -signal.SIGKILL
        check(folder, done=False)
        assert deaths.run(work, store, folder) == 0
        check(folder, done=True)


@pytest.mark.parametrize("store", STORES)
def test_a_kill_at_random_leaves_what_is_whole(store: str, tmp_path: Path) -> None:
    draw = random.Random(store)
    check = STORES[store][1]
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        deaths.run(work, store, folder, kill_after=draw.uniform(0, 0.04))
        check(folder, done=False)
    assert deaths.run(work, store, folder) == 0
    check(folder, done=True)
