"""What every test shares: Triton's interpreter, one thread, Hypothesis profiles, fresh warnings."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run without a GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

from telme_kd import _checks
from tests.helpers import interpreter, processes
from tests.helpers.call_stack import with_room

interpreter.patch_the_language_once()
torch.set_num_threads(1)  # sums in one order on every machine, and no fight over cores

_SLOW_DATA = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("ci", max_examples=1_000, deadline=None, derandomize=True)
settings.register_profile(
    "nightly", max_examples=20_000, deadline=None, suppress_health_check=_SLOW_DATA
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default")
)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Call a test as pytest does, with room on the stack."""
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    with_room(partial(pyfuncitem.obj, **arguments))
    return True


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which one-time warnings were given, so that no test depends on those before it."""
    monkeypatch.setattr(_checks, "_warned", set())


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Crew]:
    """Four processes that form a group; started once, where a test wants them."""
    with processes.crew(4, Path(tmp_path_factory.mktemp("group"))) as running:
        yield running
