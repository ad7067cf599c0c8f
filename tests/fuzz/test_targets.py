"""Damaged files for every parser, a few hundred at a time.

``HYPOTHESIS_PROFILE=nightly`` tries 20,000 each; ``python -m tests.fuzz`` follows the branches of
the code, for as long as it may.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Room, Target, fabricated, whole_manifest
from tests.helpers import deaths
from tests.helpers.damage import Change, Mutation, all_changes, change, changes, mutate, mutations
from tests.helpers.mutations import spoil

HERE = [name for name in TARGETS if name != "film"]
"""What can be read in this process; a film might take it along."""

FILMS = 150

DRAWN = settings().max_examples
DAMAGED = DRAWN if DRAWN >= 20_000 else min(DRAWN, 200)
"""Files for each parser; half as many of noise, which few get into."""

damages = st.lists(st.one_of(mutations(), changes), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def room(request: pytest.FixtureRequest) -> Iterator[Room]:
    found = Room(TARGETS[request.param])
    yield found
    found.close()


def damage(target: Target, seed: bytes, wanted: list[Mutation | Change]) -> bytes:
    """Damage a file; what makes other JSON comes first."""
    if target.json:
        document: Any = json.loads(seed)
        for one in wanted:
            if isinstance(one, Change) and isinstance(document, dict | list):
                seed = change(document, one)
                document = json.loads(seed)
    for one in wanted:
        if isinstance(one, Mutation):
            seed = mutate(seed, one)
    return seed


@pytest.mark.parametrize("room", HERE, indirect=True)
def test_whole_files_are_read(room: Room) -> None:
    """Or what follows would only show that nothing is."""
    assert room.attempt(room.seeds[0]) is None


@pytest.mark.parametrize("room", [n for n in HERE if TARGETS[n].json], indirect=True)
def test_any_value_in_any_place_is_read_or_refused(room: Room) -> None:
    for seed in room.seeds:
        for data in all_changes(json.loads(seed)):
            room.attempt(data)


@pytest.mark.parametrize("room", HERE, indirect=True)
@settings(max_examples=DAMAGED)
@given(which=st.integers(0, 1), wanted=damages)
def test_anything_is_read_or_refused(
    room: Room, which: int, wanted: list[Mutation | Change]
) -> None:
    seed = room.seeds[which % len(room.seeds)]
    room.attempt(damage(room.target, seed, wanted))


@pytest.mark.parametrize("room", HERE, indirect=True)
@settings(max_examples=DAMAGED // 2)
@given(data=st.binary(max_size=200))
def test_noise_is_read_or_refused(room: Room, data: bytes) -> None:
    room.attempt(data)


HEADER = b'{"damaged":0,"dtype":"<i2","shape":[1]}'

FOUND = [
    ("decoder-messages", len(HEADER).to_bytes(4, "little") + HEADER + bytes(2)),
    ("decoder-messages", b'\x0d\0\0\0{"done":true}'),
    ("record", b"[" * 100_000),
    ("sources", b'{"a":[1e999,0,0,""]}'),
    ("synthetic-manifest", whole_manifest()[0].replace(b'"a/b.csv"', b'"../outside/secret.mp4"')),
    ("synthetic-manifest", whole_manifest()[0].replace(b'"a/b.csv"', b'""')),
    ("shard", b"no shard"),
    ("results", fabricated()[0].replace(b'"labels"', b'"la\xe2\x80\xa8bels"')),
]
"""Files that broke a promise once."""


@pytest.mark.parametrize(("name", "data"), FOUND, ids=[name for name, _ in FOUND])
def test_what_was_found_once_stays_mended(name: str, data: bytes) -> None:
    found = Room(TARGETS[name])
    found.attempt(data)
    found.close()


def read_films() -> None:
    room = Room(TARGETS["film"])
    random = np.random.default_rng(0)
    for seed in room.seeds:
        assert room.attempt(seed) is None
    refused = 0
    for number in range(FILMS):
        refused += room.attempt(spoil(room.seeds[number % len(room.seeds)], random)) is not None
    room.close()
    assert 0 < refused < FILMS


def test_films_are_measured_or_refused() -> None:
    assert deaths.run(read_films) == 0
