"""Does a memory of earlier items help students whose batches are small?

Audio and visual students learn from a text teacher on extracted features, with both distillations,
in batches of 4, where the released code trains, and of 64; with memories of several sizes, without
one, and, for comparison, from the labels alone. Whatever else could matter is the same, initial
weights and the order of the items included, so that scores are compared seed by seed.

Nothing is chosen by these scores but each student's best epoch, by dev. The learning rate of a
batch size is the best on dev of three, without a memory and from a seed that is not compared; a
kind of student that at none of them does better than to say the commonest label is left out.
Epochs are few where steps are many: some 2,500 steps with batches of 4 and 950 with 64 in both
corpora, each a whole schedule of warm-up and decay.

Run ``python -m benchmarks.bench_relation_memory meld FOLDER`` and the same for ``iemocap``; each
writes ``benchmarks/results/<version>/relation_memory--<corpus>.json`` after every student, and goes
on from there when it is run again. ``FOLDER`` is as for ``--features``.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student_t
from tqdm import tqdm

from benchmarks import machine, results
from examples.erc import artifacts
from examples.erc.features import FeatureSource
from examples.erc.metrics import weighted_f1
from examples.erc.objectives import Classification, Distillation
from examples.erc.pipeline import Story
from examples.erc.recipe import Recipe
from examples.erc.source import SPLITS
from examples.erc.systems import TEACHER
from examples.erc.training import Hardware, Objective, train

SEEDS = 10
CONFIDENCE = 0.95
SEED_OF_RATES = 100
RATES = (3e-4, 1e-3, 3e-3)
BATCH_SIZES = (4, 64)
MEMORY_SIZES = (0, 16, 64, 256)
EPOCHS = {"meld": {4: 1, 64: 6}, "iemocap": {4: 2, 64: 12}}

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One kind of student: what it sees, its batches, and what they are related to."""

    modality: str
    batch_size: int
    distilled: bool = True
    memory_size: int = 0


def settings(modalities: Sequence[str]) -> Iterator[Setting]:
    """Every kind; before those with a memory comes what they are compared with."""
    for modality in modalities:
        for batch_size in BATCH_SIZES:
            for memory_size in MEMORY_SIZES:
                yield Setting(modality, batch_size, memory_size=memory_size)
            yield Setting(modality, batch_size, distilled=False)


class Classroom:
    """A teacher of one seed, and students of the same.

    Args:
        source: The corpus.
        recipe: The numbers of the distillation.
        seed: Of everything.
        folder: Where the teacher is kept.
    """

    def __init__(self, source: FeatureSource, recipe: Recipe, seed: int, folder: Path) -> None:
        self._source = source
        self._recipe = recipe
        self._seed = seed
        story = Story(source, recipe, seed, folder / f"seed-{seed}", Hardware("cpu"))
        said = story.tell(TEACHER).outputs("train")
        self._said = said["logits"], said["features"]

    def scores(self, setting: Setting, learning_rate: float) -> dict[str, float]:
        """Weighted F1 of a student on dev, and of its best epoch there on test."""
        source, usual = self._source, self._recipe.student.optimisation
        classification = Classification(
            source.targets("train"), len(source.labels), self._recipe.classification
        )
        student = replace(self._recipe.student, memory_size=setting.memory_size)
        objective: Objective = classification
        if setting.distilled:
            objective = Distillation(classification, student, *self._said)
        trained = train(
            lambda: source.encoder(setting.modality),
            objective,
            {split: source.dataset(setting.modality, split) for split in SPLITS},
            source.targets("dev"),
            replace(
                usual,
                batch_size=setting.batch_size,
                learning_rate=learning_rate,
                epochs=EPOCHS[source.name][setting.batch_size],
                patience=None,
            ),
            seed=self._seed,
            hardware=Hardware("cpu"),
            title=f"{source.title}, seed {self._seed}, {setting.modality}",
        )
        return {
            split: weighted_f1(source.targets(split), trained.outputs[split]["logits"])
            for split in ("dev", "test")
        }


def document(corpus: str, modalities: Sequence[str]) -> Row:
    """A result file without results: the rates to choose from, and no rows yet."""
    return {
        "command": f"python -m benchmarks.bench_relation_memory {corpus} FOLDER",
        "device": "cpu",
        "corpus": corpus,
        "seeds": SEEDS,
        "confidence": CONFIDENCE,
        "epochs": {str(size): count for size, count in EPOCHS[corpus].items()},
        "versions": machine.versions("cpu"),
        "rates": [
            {"modality": modality, "batch_size": batch_size, "dev": {}}
            for modality in modalities
            for batch_size in BATCH_SIZES
        ],
        "commonest": None,
        "rows": [],
    }


def choose_rates(
    found: Row, classroom: Callable[[int], Classroom], save: Callable[[], None]
) -> None:
    """Score the learning rates that are not scored yet."""
    for row in found["rates"]:
        for rate in RATES:
            if str(rate) not in row["dev"]:
                plain = Setting(row["modality"], row["batch_size"])
                row["dev"][str(rate)] = classroom(SEED_OF_RATES).scores(plain, rate)["dev"]
                save()


def best(found: Row, modality: str, batch_size: int) -> tuple[float, float]:
    """The best learning rate of a modality and batch size, and its score on dev."""
    (scored,) = (
        row["dev"]
        for row in found["rates"]
        if (row["modality"], row["batch_size"]) == (modality, batch_size)
    )
    rate = max(scored, key=lambda rate: float(scored[rate]))
    return float(rate), float(scored[rate])


def admit(found: Row, commonest: float) -> None:
    """Make rows for those who learn something, which is to score more than the commonest label."""
    found["commonest"] = commonest
    learning = [
        modality
        for modality in dict.fromkeys(row["modality"] for row in found["rates"])
        if all(best(found, modality, size)[1] > commonest for size in BATCH_SIZES)
    ]
    found["rows"] = [{**asdict(setting), "runs": []} for setting in settings(learning)]


def fill(found: Row, classroom: Callable[[int], Classroom], save: Callable[[], None]) -> None:
    """Do the runs that are not there yet: modality after modality, seed after seed."""
    for modality in dict.fromkeys(row["modality"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["modality"] == modality]
        for seed in range(SEEDS):
            for row in tqdm(rows, desc=f"{modality}, seed {seed}", disable=None):
                if seed in [run["seed"] for run in row["runs"]]:
                    continue
                setting = Setting(**{name: row[name] for name in Setting.__dataclass_fields__})
                rate, _ = best(found, setting.modality, setting.batch_size)
                scores = classroom(seed).scores(setting, rate)
                row["runs"].append({"seed": seed, **scores})
                save()


def summarise(found: Row) -> None:
    """Note each row's means and, seed by seed, what it gains on distillation without a memory.

    Of a modality only those seeds count that all its rows have.
    """
    for row in found["rows"]:
        peers = [other for other in found["rows"] if other["modality"] == row["modality"]]
        seeds = set.intersection(*({run["seed"] for run in peer["runs"]} for peer in peers))
        (plain,) = (
            other
            for other in found["rows"]
            if other["distilled"]
            and not other["memory_size"]
            and (other["modality"], other["batch_size"]) == (row["modality"], row["batch_size"])
        )
        pairs = [
            (run, other)
            for run, other in product(row["runs"], plain["runs"])
            if run["seed"] == other["seed"] and run["seed"] in seeds
        ]
        row["seeds"] = len(pairs)
        for split in ("dev", "test") if len(pairs) > 1 else ():
            gains = [run[split] - other[split] for run, other in pairs]
            error = stdev(gains) / sqrt(len(gains))
            row[split] = {
                "mean": mean(run[split] for run, _ in pairs),
                "gain": mean(gains),
                "interval": error * float(student_t.ppf(0.5 + CONFIDENCE / 2, len(gains) - 1)),
            }


def commonest_label(source: FeatureSource) -> float:
    """Weighted F1 on dev of saying the commonest label of train, whatever comes."""
    counts = torch.bincount(source.targets("train"), minlength=len(source.labels))
    logits = torch.zeros(len(source.targets("dev")), len(source.labels))
    logits[:, counts.argmax()] = 1.0
    return weighted_f1(source.targets("dev"), logits)


def light(recipe: Recipe, source: FeatureSource) -> Recipe:
    """The recipe with the optimisations of the light encoders."""
    return replace(
        recipe,
        **{
            phase: replace(getattr(recipe, phase), optimisation=source.optimisation(phase))
            for phase in ("teacher", "student")
        },
    )


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=sorted(EPOCHS))
    parser.add_argument("features", type=Path)
    parser.add_argument("--folder", type=Path, help="of the teachers (default: under runs/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = FeatureSource(options.features, options.corpus)
    recipe = import_module(f"examples.{options.corpus}.recipes").RECIPES["released"]
    path = results.RESULTS / f"relation_memory--{options.corpus}.json"
    fresh = document(options.corpus, source.modalities[1:])
    found = results.read(path) if path.is_file() else fresh
    head = fresh.keys() - {"rates", "commonest", "rows"}
    if any(found[name] != fresh[name] for name in head):
        parser.error(f"{path} was measured with something else; remove it to measure anew")
    folder = options.folder or Path("runs") / f"relation-memory-{options.corpus}"
    classroom = cache(lambda seed: Classroom(source, light(recipe, source), seed, folder))

    def save() -> None:
        summarise(found)
        results.write(path, found)

    with artifacts.exclusive(folder):
        choose_rates(found, classroom, save)
        if not found["rows"]:
            admit(found, commonest_label(source))
        fill(found, classroom, save)
        save()


if __name__ == "__main__":
    main()
