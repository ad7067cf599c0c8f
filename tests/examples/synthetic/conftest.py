"""Tiny corpora, written once."""

from pathlib import Path

import pytest

from examples.synthetic import iemocap, meld
from examples.synthetic.script import Size

SIZE = Size(train=9, dev=3, test=3)


@pytest.fixture(scope="session")
def size() -> Size:
    """The size of the tiny corpora; their seed is 0."""
    return SIZE


@pytest.fixture(scope="session")
def meld_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MELD, to be read only."""
    return meld.write(tmp_path_factory.mktemp("meld"), size=SIZE)


@pytest.fixture(scope="session")
def iemocap_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny IEMOCAP, to be read only."""
    return iemocap.write(tmp_path_factory.mktemp("iemocap"), size=SIZE)
