"""The story of TelME: a teacher, its students, their fusion, and what each is worth.

A text teacher learns to recognise emotions. Audio and visual students learn the same, and besides
what the teacher makes of the same utterances. Then all encoders are frozen, and a fusion head
learns to let the students shift the teacher's feature. Everything is selected on dev; the test
split is scored once, at the end.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from torch import Generator, Tensor, nn

import telme_kd
from examples.erc import artifacts, encoding, processes
from examples.erc import finished as finished_run
from examples.erc.artifacts import CHECKPOINTS, Artifact, Outputs
from examples.erc.checkpoint import Checkpoints
from examples.erc.errors import InputError
from examples.erc.fusion import ConcatenationHead, FrozenFeatures, ShiftingHead
from examples.erc.metrics import class_scores, scores
from examples.erc.objectives import Classification, Distillation
from examples.erc.recipe import Optimisation, Recipe, StudentRecipe
from examples.erc.source import JSON, SPLITS, Dataset, Source
from examples.erc.systems import System, plan
from examples.erc.training import (
    SMALLEST_BATCH,
    Hardware,
    Objective,
    Trained,
    check_parts,
    draw_batches,
    evaluate,
    train,
)

RESULTS = "results.json"


def run(
    source: Source,
    recipe: Recipe,
    seeds: Sequence[int],
    folder: Path,
    hardware: Hardware,
    command: str,
    checkpoint_every: int | None = None,
) -> dict[str, JSON]:
    """Train every system from every seed, and score them.

    What is finished is kept in the folder, one folder for each stage, and so is the state of a
    stage that is not; a run that was interrupted goes on where it stopped. Of several processes
    the first writes; the others have to see the same folder.

    Args:
        source: The corpus.
        recipe: The numbers, each optimisation as it is to be used.
        seeds: One or more, different.
        folder: Of the run; made if absent. It receives ``results.json``.
        hardware: What everything runs on.
        command: What the user typed, for the report.
        checkpoint_every: Optimiser steps between two checkpoints of a stage, >= 1; ``None``: one
            after each epoch.

    Returns:
        The results; see :func:`examples.erc.results.read`.

    Raises:
        InputError: The corpus is too small, or the folder is in use.
        TrainingError: A loss is no longer finite.
        OSError: A file cannot be written; what was written before is kept.
        KeyboardInterrupt: After the step at hand, whose state is kept.
    """
    check_size(source, recipe, hardware)
    systems = plan(source.modalities)
    finished: dict[int, dict[System, Artifact]] = {}
    with artifacts.exclusive(folder) if processes.first() else nullcontext():
        count = len(source.targets("train"))
        processes.in_turn(lambda: source.prepare(folder))
        check_size(source, recipe, hardware, skipped=count - len(source.targets("train")))
        if processes.first():
            encoding.keep(source, folder, command)
        for seed in seeds:
            story = Story(source, recipe, seed, folder / f"seed-{seed}", hardware, checkpoint_every)
            finished[seed] = {system: story.tell(system) for system in systems}
        results = {**circumstances(source, recipe, command), **score(source, finished)}
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        if processes.first():
            finished_run.keep(source, finished, folder)
            artifacts.replace(
                folder / RESULTS, lambda path: path.write_text(text, encoding="utf-8")
            )
        processes.wait()
    return results


class Story:
    """The stages of one seed, each told once, after those that it builds on.

    Args:
        source: The corpus, prepared.
        recipe: The numbers, each optimisation as it is to be used.
        seed: Of every stage.
        folder: Of this seed.
        hardware: What everything runs on.
        checkpoint_every: See :func:`run`.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        seed: int,
        folder: Path,
        hardware: Hardware,
        checkpoint_every: int | None = None,
    ) -> None:
        self._source = source
        self._recipe = recipe
        self._seed = seed
        self._folder = folder
        self._hardware = hardware
        self._checkpoint_every = checkpoint_every
        self._device = hardware.accelerator().device
        self._finished: dict[System, Artifact] = {}
        self._lengths = {
            split: list(Counter(line.dialogue for line in source.lines(split)).values())
            for split in SPLITS
        }

    def tell(self, system: System) -> Artifact:
        """Train a system and what it needs, or take them from their folders."""
        if system not in self._finished:
            for needed in system.needs():
                self.tell(needed)
            stage = {"teacher": self._teach, "student": self._distil, "fusion": self._fuse}
            self._finished[system] = stage[system.group](system)
        return self._finished[system]

    def _teach(self, system: System) -> Artifact:
        """The teacher learns from the labels alone."""
        recipe = self._recipe.teacher
        (modality,) = system.modalities
        source = self._seen_by(system)
        return self._obtain(
            system,
            {"recipe": asdict(recipe)},
            recipe.optimisation,
            build=lambda: source.encoder(modality),
            datasets=lambda: _encoder_inputs(source, modality),
            objective=self._classification,
        )

    def _distil(self, system: System) -> Artifact:
        """A student learns from the labels, and from what the frozen teacher said of each row."""
        recipe = _as_taught(self._recipe.student, system.distillation)
        teacher = self._finished[system.teacher]
        (modality,) = system.modalities
        settings: dict[str, JSON] = {"recipe": asdict(recipe), "telme_kd": telme_kd.__version__}
        if system.distillation != "none":
            settings["teacher"] = teacher.identity
        return self._obtain(
            system,
            settings,
            recipe.optimisation,
            build=lambda: self._source.encoder(modality),
            datasets=lambda: _encoder_inputs(self._source, modality),
            objective=lambda: self._distillation(recipe, teacher),
        )

    def _fuse(self, system: System) -> Artifact:
        """A head learns to fuse the features of the frozen encoders."""
        recipe = self._recipe.fusion
        parts = {part.modalities[0]: self._finished[part] for part in system.parts()}
        head = ShiftingHead if system.fusion == "shifting" else ConcatenationHead
        settings: dict[str, JSON] = {
            "recipe": asdict(recipe),
            "telme_kd": telme_kd.__version__,
            "encoders": {modality: part.identity for modality, part in parts.items()},
        }

        def features(split: str) -> dict[str, Tensor]:
            return {modality: part.outputs(split)["features"] for modality, part in parts.items()}

        def build() -> nn.Module:
            widths = {modality: values.shape[1] for modality, values in features("dev").items()}
            return head(widths, len(self._source.labels), recipe)

        return self._obtain(
            system,
            settings,
            recipe.optimisation,
            build=build,
            datasets=lambda: {split: FrozenFeatures(features(split)) for split in SPLITS},
            objective=self._classification,
        )

    def _classification(self) -> Classification:
        return Classification(
            self._source.targets("train").to(self._device),
            len(self._source.labels),
            self._recipe.classification,
            processes.count(),
        )

    def _distillation(self, recipe: StudentRecipe, teacher: Artifact) -> Distillation:
        known = {name: said.to(self._device) for name, said in teacher.outputs("train").items()}
        return Distillation(
            self._classification(),
            recipe,
            known["logits"],
            known["features"],
            everywhere=processes.count() > 1,
        )

    def _seen_by(self, system: System) -> Source:
        return self._source if system.prompt else self._source.without_prompt()

    def _obtain(
        self,
        system: System,
        settings: Mapping[str, JSON],
        optimisation: Optimisation,
        *,
        build: Callable[[], nn.Module],
        datasets: Callable[[], Mapping[str, Dataset]],
        objective: Callable[[], Objective],
    ) -> Artifact:
        """Take a stage from its folder, or do what it lacks; only then is its input made."""
        common: dict[str, JSON] = {
            "system": system.describe(),
            "source": self._seen_by(system).describe(system.modalities),
            "seed": self._seed,
            "mixed_precision": self._hardware.mixed_precision,
            "parts": self._hardware.parts,
            "classification": asdict(self._recipe.classification),
        }
        folder, title = self._folder / system.key.replace("/", "-"), self._title(system)

        def learn(fingerprint: str) -> Trained:
            return train(
                build,
                objective(),
                datasets(),
                self._source.targets("dev"),
                optimisation,
                seed=self._seed,
                hardware=self._hardware,
                title=title,
                checkpoints=Checkpoints(
                    folder / CHECKPOINTS, fingerprint, self._checkpoint_every, title
                ),
                lengths=self._lengths,
            )

        def say(weights: Mapping[str, Tensor]) -> Outputs:
            return evaluate(
                build, weights, datasets(), optimisation.batch_size, self._hardware, self._lengths
            )

        return artifacts.obtain(folder, title, {**common, **settings}, learn, say)

    def _title(self, system: System) -> str:
        return f"{self._source.title}, seed {self._seed}, {system.key}"


def _as_taught(recipe: StudentRecipe, distillation: str | None) -> StudentRecipe:
    """A weight of zero switches a term of the loss off."""
    if distillation == "none":
        return replace(recipe, response_weight=0.0, feature_weight=0.0)
    if distillation == "response":
        return replace(recipe, feature_weight=0.0)
    if distillation == "feature":
        return replace(recipe, response_weight=0.0)
    return recipe


def _encoder_inputs(source: Source, modality: str) -> dict[str, Dataset]:
    return {split: source.dataset(modality, split) for split in SPLITS}


def check_size(source: Source, recipe: Recipe, hardware: Hardware, skipped: int = 0) -> None:
    """Refuse a training split that is too small, of which so many rows were skipped.

    Raises:
        InputError: So it is.
    """
    count = len(source.targets("train"))
    left = f" after {skipped} with bad clips were skipped" if skipped else ""
    if count < SMALLEST_BATCH:
        remedy = "; mask bad clips instead, or mend them" if skipped else ""
        raise InputError(
            f"{source.title}: expected at least {SMALLEST_BATCH} utterances in train, got {count}"
            f"{left}; distillation compares the utterances of a batch with each other{remedy}"
        )
    for stage in (recipe.teacher, recipe.student, recipe.fusion):
        batches = draw_batches(count, stage.optimisation.batch_size, Generator())
        check_parts(batches, hardware.parts, source.title + left)


def score(source: Source, finished: Mapping[int, Mapping[System, Artifact]]) -> dict[str, JSON]:
    """Score every system: the end of the story.

    Args:
        source: The corpus, prepared.
        finished: For each seed the same systems.

    Returns:
        ``seeds``, ``systems`` and ``seconds``, as the results have them.
    """
    systems = next(iter(finished.values()))
    return {
        "seeds": list(finished),
        "systems": [
            {
                **system.describe(),
                "runs": [_score(source, seed, stages[system]) for seed, stages in finished.items()],
            }
            for system in systems
        ],
        "seconds": sum(
            artifact.record["seconds"]
            for stages in finished.values()
            for artifact in stages.values()
        ),
    }


def _score(source: Source, seed: int, artifact: Artifact) -> dict[str, JSON]:
    """One run of one system: the only place that looks at the labels of test."""
    dev, test = (artifact.outputs(split)["logits"] for split in ("dev", "test"))
    return {
        "seed": seed,
        "dev": scores(source.targets("dev"), dev),
        "test": {
            **scores(source.targets("test"), test),
            **class_scores(source.targets("test"), test),
        },
        **artifact.record,
    }


def circumstances(source: Source, recipe: Recipe, command: str) -> dict[str, JSON]:
    """What the scores are of."""
    packages = ("torch", "accelerate", "transformers", "scikit-learn", "numpy")
    return {
        "corpus": source.name,
        "title": source.title,
        "source": source.description,
        "recipe": recipe.name,
        "command": command,
        "labels": list(source.labels),
        "counts": {split: len(source.targets(split)) for split in SPLITS},
        "versions": {
            "telme_kd": telme_kd.__version__,
            **{package: version(package) for package in packages},
            "python": platform.python_version(),
        },
    }
