"""Stores under any sequence of use and abuse: what is read is what was written, or nothing.

``HYPOTHESIS_PROFILE=nightly`` runs each machine 500 times, 50 steps at a time.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors.numpy import load_file

from examples.erc import artifacts
from examples.erc.artifacts import Artifact, exclusive
from examples.erc.cache import Cache, Shard
from examples.erc.checkpoint import KEPT, Checkpoints
from examples.erc.errors import InputError
from examples.erc.training import Epoch, Trained
from tests.helpers import disk
from tests.helpers.small_stores import obtain_stage

LONG = settings().max_examples >= 20_000
RUNS, STEPS = (500, 50) if LONG else (40, 25)

numbers = st.integers(0, 99)
moments = st.integers(1, 40)
damages = st.sampled_from(["flip", "truncate", "append", "empty", "delete"])


def damage(path: Path, how: str, place: int) -> None:
    """Damage a file in a way that changes it."""
    data = bytearray(path.read_bytes())
    at = place * (len(data) - 1) // 99
    if how == "delete":
        path.unlink()
        return
    if how == "flip" and data:
        data[at] ^= 1 << place % 8
    elif how == "truncate":
        del data[at:]
    elif how == "append":
        data.append(place)
    else:
        data.clear()
    path.write_bytes(data)


class Store(RuleBasedStateMachine):
    """A folder, and what every machine does to one."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.folder = self.home / "store"
        self.folder.mkdir()

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    def files(self) -> list[Path]:
        """The files that may be damaged: all but locks, which are empty."""
        return sorted(
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.endswith(".lock")
        )

    def partials(self) -> set[Path]:
        """What was half-written; a run that is killed leaves it behind, one that fails does not."""
        return {*self.folder.glob("*.partial")}

    @precondition(lambda self: self.files())
    @rule(which=numbers, how=damages, place=numbers)
    def harm(self, which: int, how: str, place: int) -> None:
        files = self.files()
        damage(files[which % len(files)], how, place)

    @precondition(lambda self: self.files())
    @rule(which=numbers, other=numbers)
    def confuse(self, which: int, other: int) -> None:
        """Put one file in the place of another."""
        files = self.files()
        one, two = files[which % len(files)], files[other % len(files)]
        if one != two:
            shutil.copyfile(one, two)

    @rule()
    def two_writers(self) -> None:
        with (
            exclusive(self.home),
            pytest.raises(InputError, match="no other run"),
            exclusive(self.home),
        ):
            pass


class CheckpointMachine(Store):
    """Checkpoints: the newest that is whole is found, and is what was saved under its name."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, list[tuple[bytes, bytes, int]]] = {}
        self.reopen()

    @rule()
    def reopen(self) -> None:
        self.store = Checkpoints(self.folder, "settings", 1, "a stage")

    def write(self, store: Checkpoints, step: int, value: int) -> None:
        weights = torch.full((3,), value)
        store.save(step, step // 3, {"step": step, "value": value, "weights": weights})

    def remember(self, step: int, value: int) -> None:
        """Note what a checkpoint looks like, by saving it at another place."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(Checkpoints(Path(folder), "settings", 1, "a stage"), step, value)
            pair = self.pair(Path(folder) / self.name(step))
        assert pair is not None
        self.saved.setdefault(Path(self.name(step)).stem, []).append((*pair, value))

    @staticmethod
    def name(step: int) -> str:
        return f"step-{step:09d}-{step // 3:05d}.json"

    @staticmethod
    def pair(path: Path) -> tuple[bytes, bytes] | None:
        data = path.with_suffix(".safetensors")
        if not (path.is_file() and data.is_file()):
            return None
        return path.read_bytes(), data.read_bytes()

    @rule(step=numbers, value=numbers)
    def save(self, step: int, value: int) -> None:
        self.remember(step, value)
        self.write(self.store, step, value)
        assert len(list(self.folder.glob("step-*.json"))) <= KEPT
        assert not list(self.folder.glob(".*"))

    @rule(step=numbers, value=numbers, moment=moments)
    def save_and_be_killed(self, step: int, value: int, moment: int) -> None:
        self.remember(step, value)
        disk.killed(moment, self.folder, lambda: self.write(self.store, step, value))

    @rule(step=numbers, value=numbers, moment=moments)
    def save_on_a_full_disk(self, step: int, value: int, moment: int) -> None:
        self.remember(step, value)
        before, partials = self.expected(), self.partials()
        try:
            disk.full(moment, lambda: self.write(self.store, step, value))
        except OSError:
            assert self.partials() <= partials
            found = self.expected()
            assert found in (before, (Path(self.name(step)).stem, value)) or before is None

    @rule(step=numbers)
    def save_with_other_settings(self, step: int) -> None:
        Checkpoints(self.folder, "others", 1, "a stage").save(step, step // 3, {"step": -1})

    def expected(self) -> tuple[str, int] | None:
        """The newest whose two files are what was saved: its name and value."""
        for path in sorted(self.folder.glob("step-*.json"), reverse=True):
            pair = self.pair(path)
            for record, data, value in self.saved.get(path.stem, []):
                if pair == (record, data):
                    return path.stem, value
        return None

    @invariant()
    def the_newest_whole_one_is_found(self) -> None:
        newest = self.store.newest()
        if newest is None:
            assert self.expected() is None
            return
        state = self.store.load(newest)
        assert (newest.stem, state["value"]) == self.expected()
        assert state["step"] == int(newest.stem.split("-")[1])
        assert state["weights"].tolist() == [state["value"]] * 3


class CacheMachine(Store):
    """Shards that two runs share: each is one that was put, and is there if it is whole."""

    keys = st.sampled_from(["audio-1", "audio-2", "visual-1"])

    @initialize()
    def open_both(self) -> None:
        self.runs = [Cache(self.folder), Cache(self.folder)]
        self.put: dict[str, set[int]] = {}
        self.claims: dict[str, tuple[int, Any]] = {}
        self.source = self.home / "clip"
        self.source.write_bytes(b"0")

    @rule(run=st.integers(0, 1))
    def reopen(self, run: int) -> None:
        self.runs[run] = Cache(self.folder)

    def write(self, run: int, key: str, value: int) -> Shard:
        values = np.full(4, value, np.int16)
        return self.runs[run].put(key, {"values": values}, {"value": value, "key": key})

    @rule(run=st.integers(0, 1), key=keys)
    def claim(self, run: int, key: str) -> None:
        claim = self.runs[run].claim(key, wait=False)
        assert (claim is None) == (key in self.claims)
        if claim is not None:
            self.claims[key] = run, claim

    @precondition(lambda self: self.claims)
    @rule(which=numbers, value=numbers)
    def fill(self, which: int, value: int) -> None:
        """Put a shard whose claim is held, and give the claim back."""
        key = sorted(self.claims)[which % len(self.claims)]
        run, claim = self.claims.pop(key)
        with claim:
            shard = self.write(run, key, value)
        self.put.setdefault(key, set()).add(value)
        assert self.value(shard, key) == value

    @rule(run=st.integers(0, 1), key=keys, value=numbers, moment=moments)
    def be_killed(self, run: int, key: str, value: int, moment: int) -> None:
        if self.claims:  # the folder is put back, and with it the locks, which others hold
            return

        def work() -> None:
            claim = self.runs[run].claim(key, wait=False)
            assert claim is not None
            with claim:
                self.write(run, key, value)

        disk.killed(moment, self.folder, work)
        self.put.setdefault(key, set()).add(value)

    @rule(run=st.integers(0, 1), key=keys, value=numbers, moment=moments)
    def fill_a_full_disk(self, run: int, key: str, value: int, moment: int) -> None:
        partials = self.partials()
        try:
            disk.full(moment, lambda: self.write(run, key, value))
        except InputError:
            assert self.partials() <= partials
        self.put.setdefault(key, set()).add(value)

    @rule(key=keys)
    def rename(self, key: str) -> None:
        """Somebody gives a shard the name of another one's content."""
        for path in sorted(self.folder.glob(f"{key}.*.safetensors"))[:1]:
            path.rename(path.with_name(f"{key}.{'0' * 64}.safetensors"))

    @rule(run=st.integers(0, 1), content=numbers)
    def look_at_a_source(self, run: int, content: int) -> None:
        self.source.write_bytes(b"%d" % content)
        assert self.runs[run].digest(self.source) == artifacts.sha256(b"%d" % content)
        with pytest.MonkeyPatch.context() as patch:
            # The files of the machine are all young; here they are to count as old.
            patch.setattr("examples.erc.cache.time.time_ns", lambda: 1 << 62)
            self.runs[run].keep_digests()
        assert Cache(self.folder).digest(self.source) == artifacts.sha256(b"%d" % content)

    @rule(which=numbers)
    def clear_up(self, which: int) -> None:
        if self.claims:
            return
        kept = [shard for key in sorted(self.put) if (shard := self.runs[0].find(key))][:1]
        self.runs[0].keep_only(kept)
        left = {path.name for path in self.files()}
        assert left <= {*(shard.path.name for shard in kept), "sources.json"}
        assert {shard.path.name for shard in kept} <= left

    def value(self, shard: Shard, key: str) -> int:
        held: set[int] = set(load_file(shard.path)["values"].tolist())
        assert shard.notes == {"value": max(held), "key": key}
        (value,) = held
        return value

    @invariant()
    def what_is_found_was_put(self) -> None:
        for key, values in getattr(self, "put", {}).items():
            whole = [
                path
                for path in self.folder.glob(f"{key}.*.safetensors")
                if artifacts.file_sha256(path) == path.name.split(".")[1]
            ]
            shard = self.runs[0].find(key)
            assert (shard is None) == (not whole)
            if shard is not None:
                assert self.value(shard, key) in values

    def teardown(self) -> None:
        for _, claim in getattr(self, "claims", {}).values():
            claim.release()
        super().teardown()


class StageMachine(Store):
    """A finished stage: what is obtained is always what its settings compute."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: dict[int, tuple[bytes, ...]] = {}
        for value in range(3):
            self.obtain(value)
            self.whole[value] = self.read()
        shutil.rmtree(self.folder)

    def compute(self, value: int) -> Trained:
        self.computed = True
        return Trained(
            weights={"weight": torch.full((4,), value)},
            outputs={
                split: {"logits": torch.full((2, 3), value)} for split in ("train", "dev", "test")
            },
            history=(Epoch(1, float(value), 0.5),),
            selected_epoch=1,
            seconds=1.0,
        )

    def obtain(self, value: int) -> Artifact:
        self.computed = False
        return obtain_stage(self.folder, {"value": value}, lambda _: self.compute(value))

    def read(self) -> tuple[bytes, ...]:
        names = (artifacts.WEIGHTS, artifacts.OUTPUTS, artifacts.STAGE)
        paths = [self.folder / name for name in names]
        return tuple(path.read_bytes() if path.is_file() else b"" for path in paths)

    @rule(value=st.integers(0, 2))
    def get(self, value: int) -> None:
        kept = self.read() == self.whole[value]
        stage = self.obtain(value)
        assert self.computed != kept
        assert self.read() == self.whole[value]
        assert stage.outputs("dev")["logits"].unique().tolist() == [value]
        assert stage.record["history"][0]["loss"] == value

    @rule(value=st.integers(0, 2), moment=moments)
    def get_and_be_killed(self, value: int, moment: int) -> None:
        self.folder.mkdir(exist_ok=True)
        disk.killed(moment, self.folder, lambda: self.obtain(value))

    @rule(value=st.integers(0, 2), moment=moments)
    def get_on_a_full_disk(self, value: int, moment: int) -> None:
        partials = self.partials()
        try:
            disk.full(moment, lambda: self.obtain(value))
        except OSError:
            assert self.partials() <= partials


MACHINES = [CheckpointMachine, CacheMachine, StageMachine]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_what_is_read_is_what_was_written(
    machine: type[Store], capsys: pytest.CaptureFixture[str]
) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=RUNS, stateful_step_count=STEPS)
    )
    capsys.readouterr()  # thousands of warnings of damage
