"""Two experiments on a small folder of features, in a process that may be told when to die."""

import os
from dataclasses import replace
from pathlib import Path

from examples.erc.features import FeatureSource
from examples.erc.recipe import FusionRecipe, Optimisation, Recipe, StudentRecipe, TeacherRecipe
from examples.erc.training import Hardware
from examples.experiments.catalogue import EXPERIMENTS
from examples.experiments.running import run
from tests.helpers.deaths import Deadline

OPTIMISATION = Optimisation(
    learning_rate=3e-3,
    epochs=1,
    batch_size=8,
    warmup=0.1,
    weight_decay=0.01,
    max_gradient_norm=1.0,
    patience=None,
)
BRIEF = Recipe(
    name="brief",
    teacher=TeacherRecipe(OPTIMISATION),
    student=StudentRecipe(OPTIMISATION, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    fusion=FusionRecipe(replace(OPTIMISATION, batch_size=16), 0.1, 3, 0.2, "modalities"),
)
NAMES = ("comparison", "students")


def live(folder: Path, features: Path, last: int | None = None) -> None:
    """Run both on text and audio, up to the moment (before or after a file is flushed) given."""
    Deadline(last).watch(os, "fsync")
    source = FeatureSource(features, "meld", ("text", "audio"))
    experiments = [EXPERIMENTS[name] for name in NAMES]
    run(source, BRIEF, experiments, (0,), folder, Hardware("cpu"), "a test", name=NAMES[0])
