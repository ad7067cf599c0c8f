"""Everything that the pipelines write, small, for processes that are killed while they write it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from examples.erc import artifacts, ledger
from examples.erc.artifacts import Artifact, obtain
from examples.erc.cache import SOURCES, Cache
from examples.erc.checkpoint import Checkpoints
from examples.erc.clips import ClipStore
from examples.erc.source import JSON
from examples.erc.training import Epoch, Trained
from tests.helpers.deaths import Deadline

VALUES = np.arange(500, dtype=np.int16)


def write_shard(folder: Path) -> None:
    cache = Cache(folder)
    claim = cache.claim("audio-1", wait=True)
    assert claim is not None
    with claim:
        if cache.find("audio-1") is None:
            cache.put("audio-1", {"values": VALUES}, {"rows": 3})


def check_shard(folder: Path, *, done: bool) -> None:
    shard = Cache(folder).find("audio-1")
    assert shard is not None or not done
    if shard is not None:
        assert (load_file(shard.path)["values"] == VALUES).all()
        assert shard.notes == {"rows": 3}
    if done:
        assert not list(folder.glob("*.lock"))


def write_sources(folder: Path) -> None:
    cache = Cache(folder)
    for number in range(20):
        source = folder / f"{number}.clip"
        if not source.exists():
            source.write_bytes(bytes([number]))
        cache.digest(source)
    cache.keep_digests()


def check_sources(folder: Path, *, done: bool) -> None:
    if (folder / SOURCES).exists():
        assert len(artifacts.read_record(folder / SOURCES)) == 20
    assert (folder / SOURCES).exists() or not done


def trained(fingerprint: str = "") -> Trained:
    return Trained(
        weights={"layer.weight": torch.arange(200.0)},
        outputs={split: {"logits": torch.arange(12.0)} for split in ("train", "dev", "test")},
        history=(Epoch(1, 2.0, 0.25),),
        selected_epoch=1,
        seconds=1.5,
    )


def obtain_stage(
    folder: Path, settings: Mapping[str, JSON], compute: Callable[[str], Trained]
) -> Artifact:
    return obtain(folder, "a stage", settings, compute, lambda weights: compute("").outputs)


def write_stage(folder: Path) -> None:
    obtain_stage(folder / "stage", {"rate": 0.1}, trained)


def check_stage(folder: Path, *, done: bool) -> None:
    computed = []

    def compute(fingerprint: str) -> Trained:
        computed.append(fingerprint)
        return trained()

    valid = (folder / "stage" / artifacts.STAGE).exists()
    stage = obtain_stage(folder / "stage", {"rate": 0.1}, compute)
    assert bool(computed) != valid
    assert valid or not done
    assert stage.outputs("test")["logits"].tolist() == list(range(12))


def write_checkpoints(folder: Path) -> None:
    store = Checkpoints(folder / "checkpoints", "settings", 1, "a stage")
    newest = store.newest()
    for step in range(0 if newest is None else store.load(newest)["step"] + 1, 2):
        store.save(step, 0, {"step": step, "weights": torch.full((50,), step)})
        (folder / "saved").write_text(str(step))


def check_checkpoints(folder: Path, *, done: bool) -> None:
    store = Checkpoints(folder / "checkpoints", "settings", 1, "a stage")
    newest = store.newest()
    text = (folder / "saved").read_text() if (folder / "saved").exists() else ""
    if newest is not None:
        state = store.load(newest)
        assert state["weights"].unique().tolist() == [state["step"]]
        assert state["step"] >= int(text or 0)
        assert state["step"] == 1 or not done
    else:
        assert not text
        assert not done


def write_ledger(folder: Path) -> None:
    cache = Cache(folder)
    rows = {"rows": 2, "faults": [[1, "broken", "no film"]]}
    shard = cache.find("audio-1")
    if shard is None:
        shard = cache.put("audio-1", {"values": VALUES[:3], "offsets": np.array([0, 3, 3])}, rows)
    place = ("audio", "train")
    store = ClipStore([shard], ["one", "two"])
    ledger.write(
        folder / "ledger.json", "mask", {place: store}, {place: [("one", None), ("two", None)]}
    )


def check_ledger(folder: Path, *, done: bool) -> None:
    path = folder / "ledger.json"
    assert path.exists() or not done
    if path.exists():
        (clips,) = json.loads(path.read_text("utf-8"))["clips"]
        assert (clips["used"], clips["quarantined"]) == (1, 1)


STORES: dict[str, tuple[Callable[[Path], None], Callable[..., None]]] = {
    "shard": (write_shard, check_shard),
    "sources": (write_sources, check_sources),
    "stage": (write_stage, check_stage),
    "checkpoints": (write_checkpoints, check_checkpoints),
    "ledger": (write_ledger, check_ledger),
}


def work(store: str, folder: Path, moment: int | None = None) -> None:
    """Write a store, dying at a moment; note how many there were."""
    torch.set_num_threads(1)
    time.time_ns = lambda: 1 << 62  # in this process all files are old, and worth a note
    deadline = Deadline(moment)
    for name in ("fsync", "replace", "unlink", "mkdir", "open"):
        deadline.watch(os, name)
    write = Path.write_bytes
    save = artifacts.save_file

    def half_then_whole(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        deadline.tick()
        return write(path, data)

    def save_half_then_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors, path)
        half_then_whole(path, path.read_bytes())

    Path.write_bytes = half_then_whole  # type: ignore[method-assign, assignment]
    artifacts.save_file = save_half_then_whole
    STORES[store][0](folder)
    (folder.parent / f"{store}.moments").write_text(str(deadline.count))
