"""A stage that trains in a tenth of a second, with everything that a real one has to restore."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.erc import artifacts
from examples.erc.artifacts import CHECKPOINTS, Artifact, Outputs, exclusive, obtain
from examples.erc.checkpoint import Checkpoints
from examples.erc.objectives import Classification
from examples.erc.recipe import ClassificationRecipe, Optimisation
from examples.erc.training import Hardware, Objective, Trained, train
from tests.helpers.deaths import Deadline

OPTIMISATION = Optimisation(
    learning_rate=0.05,
    epochs=3,
    batch_size=8,
    warmup=0.25,
    weight_decay=0.01,
    max_gradient_norm=1.0,
    patience=None,
)
STEPS = 9
"""Optimiser steps of the whole stage: three in each of three epochs."""


class Logits(NamedTuple):
    logits: Tensor


class Points:
    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"points": self.points[rows]}


class Noisy(nn.Module):
    """Draws from every generator that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, points: Tensor) -> Logits:
        if self.training:
            points = points * (1 + 0.1 * np.random.randn() + 0.1 * random.gauss(0, 1))
        return Logits(self.layer(self.dropout(points)))


def points() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        split: torch.randn(count, 2, generator=generator)
        for split, count in (("train", 25), ("dev", 30), ("test", 20))
    }


def labels(values: Tensor) -> Tensor:
    return (values[:, 0] + 0.3 * values[:, 1] > 0).long()


def fit(
    checkpoints: Checkpoints | None = None,
    *,
    optimisation: Optimisation = OPTIMISATION,
    hardware: Hardware | None = None,
    objective: Objective | None = None,
    build: Any = Noisy,
) -> Trained:
    data = points()
    truth = labels(data["train"])
    return train(
        build,
        objective or Classification(truth, 2, ClassificationRecipe()),
        {split: Points(values) for split, values in data.items()},
        labels(data["dev"]),
        optimisation,
        seed=5,
        hardware=hardware or Hardware("cpu"),
        title="small",
        checkpoints=checkpoints,
    )


def obtain_stage(folder: Path, every: int | None = 1) -> Artifact:
    return obtain(
        folder / "stage",
        "small",
        {"steps": STEPS},
        lambda fingerprint: fit(
            Checkpoints(folder / "stage" / CHECKPOINTS, fingerprint, every, "small")
        ),
        never,
    )


def never(weights: object) -> Outputs:
    raise AssertionError("outputs were lost")


def work(folder: Path, moment: int | None = None) -> None:
    """Obtain the stage, dying at a moment; note the digest of each checkpoint once it is saved."""
    torch.set_num_threads(1)
    deadline = Deadline(moment)
    save = Checkpoints.save

    def save_and_note(self: Checkpoints, step: int, epochs: int, state: Any) -> None:
        save(self, step, epochs, state)
        name = f"step-{step:09d}-{epochs:05d}"
        (folder / name).write_text(digest(folder / "stage" / CHECKPOINTS / f"{name}.json"))

    Checkpoints.save = save_and_note  # type: ignore[method-assign]
    written = artifacts.save_file

    def half_then_whole(tensors: dict[str, Tensor], path: Path) -> None:
        written(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        deadline.tick()
        path.write_bytes(whole)

    artifacts.save_file = half_then_whole
    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        deadline.watch(os, name)
    with exclusive(folder):
        obtain_stage(folder)
    (folder / "moments").write_text(str(deadline.count))


def digest(path: Path) -> str:
    """Of everything in a checkpoint but how long it took."""
    record = json.loads(path.read_text())
    del record["state"]["seconds"], record["seal"]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def outcome(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of the finished stage, and its record but for how long it took."""
    stage = folder / "stage"
    record = json.loads((stage / artifacts.STAGE).read_text())["record"]
    del record["seconds"]
    return {path.name: path.read_bytes() for path in stage.glob("*.safetensors")}, record
