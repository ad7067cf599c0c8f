"""Does a memory of earlier items help students whose batches are small?

Audio and visual students learn from a text teacher on extracted features, with both distillations,
in batches of 4, where the released code trains, and of 64; with memories of several sizes, without
one, and, for comparison, from the labels alone. Whatever else could matter is the same, initial
weights and the order of the items included, so that scores are compared seed by seed.

Nothing is chosen by these scores, but each student's best epoch by dev. The learning rate of the
light encoders, which suits them in batches of 128, goes with the square root of the batch size.
Epochs are few where steps are many: some 2,500 steps with batches of 4 and 950 with 64, the same in
both corpora, each a whole schedule of warm-up and decay.

Run ``python -m benchmarks.bench_relation_memory meld FOLDER`` and the same for ``iemocap``; each
writes ``benchmarks/results/<version>/relation_memory--<corpus>.json`` after every student, and goes
on from there when it is run again. ``FOLDER`` is as for ``--features``.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine, results
from examples.erc.features import FeatureSource
from examples.erc.metrics import weighted_f1
from examples.erc.objectives import Classification, Distillation
from examples.erc.recipe import Optimisation, Recipe
from examples.erc.source import SPLITS
from examples.erc.training import Hardware, Objective, Trained, train

SEEDS = 10
BATCH_SIZES = (4, 64)
MEMORY_SIZES = (0, 16, 64, 256)
EPOCHS = {"meld": {4: 1, 64: 6}, "iemocap": {4: 2, 64: 12}}

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One kind of student: what it sees, its batches, and what they are related to."""

    modality: str
    batch_size: int
    distilled: bool
    memory_size: int


def settings(modalities: Sequence[str]) -> Iterator[Setting]:
    """Every kind; before those with a memory comes what they are compared with."""
    for modality in modalities:
        for batch_size in BATCH_SIZES:
            for memory_size in MEMORY_SIZES:
                yield Setting(modality, batch_size, True, memory_size)
            yield Setting(modality, batch_size, False, 0)


class Classroom:
    """A teacher of one seed, and students of the same.

    Args:
        source: The corpus.
        recipe: The numbers of the distillation.
        seed: Of everything.
    """

    def __init__(self, source: FeatureSource, recipe: Recipe, seed: int) -> None:
        self._source = source
        self._recipe = recipe
        self._seed = seed
        self._classification = Classification(
            source.targets("train"), len(source.labels), recipe.classification
        )
        optimisation = source.optimisation("teacher")
        assert optimisation is not None  # light encoders have their own
        taught = self._train("text", optimisation, self._classification)
        self._said = taught.outputs["train"]

    def scores(self, setting: Setting) -> dict[str, float]:
        """Weighted F1 of a student on dev, and of its best epoch there on test."""
        objective: Objective = self._classification
        if setting.distilled:
            student = replace(self._recipe.student, memory_size=setting.memory_size)
            said = self._said["logits"], self._said["features"]
            objective = Distillation(self._classification, student, *said)
        usual = self._source.optimisation("student")
        assert usual is not None
        optimisation = replace(
            usual,
            batch_size=setting.batch_size,
            learning_rate=usual.learning_rate * sqrt(setting.batch_size / usual.batch_size),
            epochs=EPOCHS[self._source.name][setting.batch_size],
            patience=None,
        )
        trained = self._train(setting.modality, optimisation, objective)
        return {
            split: weighted_f1(self._source.targets(split), trained.outputs[split]["logits"])
            for split in ("dev", "test")
        }

    def _train(self, modality: str, optimisation: Optimisation, objective: Objective) -> Trained:
        return train(
            lambda: self._source.encoder(modality),
            objective,
            {split: self._source.dataset(modality, split) for split in SPLITS},
            self._source.targets("dev"),
            optimisation,
            seed=self._seed,
            hardware=Hardware("cpu"),
            title=f"{self._source.title}, seed {self._seed}, {modality}",
        )


def document(corpus: str, modalities: Sequence[str]) -> Row:
    """A result file's head, and a row without runs for every setting."""
    return {
        "command": f"python -m benchmarks.bench_relation_memory {corpus} FOLDER",
        "device": "cpu",
        "corpus": corpus,
        "epochs": {str(size): count for size, count in EPOCHS[corpus].items()},
        "versions": machine.versions("cpu"),
        "rows": [{**asdict(setting), "runs": []} for setting in settings(modalities)],
    }


def fill(found: Row, classroom: Callable[[int], Classroom], save: Callable[[], None]) -> None:
    """Do the runs that are not there yet, seed after seed."""
    for seed in range(SEEDS):
        for row in tqdm(found["rows"], desc=f"seed {seed}", disable=None):
            if seed in [run["seed"] for run in row["runs"]]:
                continue
            setting = Setting(**{name: row[name] for name in Setting.__dataclass_fields__})
            row["runs"].append({"seed": seed, **classroom(seed).scores(setting)})
            save()


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=sorted(EPOCHS))
    parser.add_argument("features", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = FeatureSource(options.features, options.corpus)
    recipe = import_module(f"examples.{options.corpus}.recipes").RECIPES["released"]
    path = results.RESULTS / f"relation_memory--{options.corpus}.json"
    fresh = document(options.corpus, source.modalities[1:])
    found = results.read(path) if path.is_file() else fresh
    if {**found, "rows": []} != {**fresh, "rows": []}:
        parser.error(f"{path} was measured with something else; remove it to measure anew")
    classroom = cache(lambda seed: Classroom(source, recipe, seed))
    fill(found, classroom, lambda: results.write(path, found))


if __name__ == "__main__":
    main()
