"""What the recipe ``recommended`` rests on: dev scores, one number changed at a time.

The whole method (the teacher, students taught both ways, everything at hand fused by shifting) is
trained on extracted features with the released numbers, and with each of some changes. Only the
dev split is scored; the labels of test are not looked at. A value is recommended if it gains more
than three standard errors of the difference, seed by seed: of several, the first that is within one
standard error of the best. All that are taken have to hold up together, in the row ``recommended``.

Run ``python -m benchmarks.bench_recommended_recipe meld FOLDER`` and the same for ``iemocap``; each
writes ``benchmarks/results/<version>/recommended_recipe--<corpus>.json`` after every row, and goes
on from there when it is run again. ``FOLDER`` is as for ``--features``.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import telme_kd
from benchmarks import machine
from benchmarks.results import RESULTS
from examples.erc import artifacts
from examples.erc.features import FeatureSource
from examples.erc.pipeline import Story
from examples.erc.recipe import Recipe
from examples.erc.systems import EVERYTHING, TEACHER, System
from examples.erc.training import Hardware

ERRORS = 3
"""By how many standard errors a value has to gain: seeds are few, and values are many."""

Row = dict[str, Any]
Change = Callable[[Recipe], Recipe]


def fusion(**numbers: float) -> Change:
    """Change numbers of the fusion."""
    return lambda recipe: replace(recipe, fusion=replace(recipe.fusion, **numbers))


def student(**numbers: float) -> Change:
    """Change numbers of the students."""
    return lambda recipe: replace(recipe, student=replace(recipe.student, **numbers))


def classification(**numbers: float) -> Change:
    """Change the cross-entropy of every stage."""
    return lambda recipe: replace(recipe, classification=replace(recipe.classification, **numbers))


CHANGES: dict[str, Change] = {
    "released": lambda recipe: recipe,
    **{
        f"threshold {value}": fusion(threshold=value)
        for value in (0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
    },
    **{f"class balance {value}": classification(class_balance=value) for value in (0.5, 1.0)},
    "focal gamma 1.0": classification(focal_gamma=1.0),
    **{f"temperature {value}": student(temperature=value) for value in (1.0, 2.0, 4.0)},
    **{f"response weight {value}": student(response_weight=value) for value in (0.1, 1.0)},
    **{f"feature weight {value}": student(feature_weight=value) for value in (0.3, 3.0)},
    "feature temperature 0.3": student(feature_temperature=0.3),
}


def settled(recipe: Recipe, source: FeatureSource) -> Recipe:
    """The recipe with the optimisations of the light encoders."""
    return replace(
        recipe,
        **{
            phase: replace(getattr(recipe, phase), optimisation=source.optimisation(phase))
            for phase in ("teacher", "student", "fusion")
        },
    )


def dev_scores(source: FeatureSource, recipe: Recipe, seeds: range, folder: Path) -> list[float]:
    """Weighted F1 on dev of the whole method, one for each seed."""
    students = [System((modality,), EVERYTHING) for modality in source.modalities[1:]]
    method = System(source.modalities, EVERYTHING, "shifting")
    scores = []
    for seed in seeds:
        story = Story(source, recipe, seed, folder / f"seed-{seed}", Hardware("cpu"))
        *_, last = [story.tell(system) for system in (TEACHER, *students, method)]
        scores.append(max(epoch["dev_weighted_f1"] for epoch in last.record["history"]))
    return scores


def row(name: str, scores: list[float], released: list[float]) -> Row:
    """A result, and by how much it is better than the released numbers, seed by seed."""
    gains = [score - other for score, other in zip(scores, released, strict=True)]
    return {
        "change": name,
        "dev_weighted_f1": scores,
        "mean": mean(scores),
        "gain": mean(gains),
        "standard_error": stdev(gains) / sqrt(len(gains)),
    }


def mark_taken(rows: list[Row]) -> None:
    """Mark, of the values of each number, the one that is recommended, if any is."""
    groups: dict[str, list[Row]] = {}
    for found in rows:
        found["taken"] = found["change"] == "recommended"
        groups.setdefault(found["change"].rpartition(" ")[0], []).append(found)
    for number, group in groups.items():
        best = max(group, key=lambda found: float(found["gain"]))
        least = best["gain"] - best["standard_error"]
        good = (
            found
            for found in group
            if found["gain"] >= least and found["gain"] > ERRORS * found["standard_error"]
        )
        if number and (first := next(good, None)):
            first["taken"] = True


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=("meld", "iemocap"))
    parser.add_argument("features", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="of the stages (default: under runs/)")
    options = parser.parse_args()
    seeds = range(options.seeds)
    torch.set_num_threads(1)
    source = FeatureSource(options.features, options.corpus)
    recipes = import_module(f"examples.{options.corpus}.recipes").RECIPES
    path = RESULTS / f"recommended_recipe--{options.corpus}.json"
    folder = options.folder or Path("runs") / f"recommended-{options.corpus}"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    document: Row = {
        "command": f"python -m benchmarks.bench_recommended_recipe {options.corpus} FOLDER"
        + (f" --seeds {options.seeds}" if options.seeds != parser.get_default("seeds") else ""),
        "device": "cpu",
        "corpus": options.corpus,
        "seeds": options.seeds,
        "versions": {"telme_kd": telme_kd.__version__, **machine.versions("cpu")},
        "rows": earlier["rows"] if earlier.get("seeds") == options.seeds else [],
    }
    changes = {**CHANGES, "recommended": lambda recipe: recipes["recommended"]}
    recipe_of = {
        name: settled(replace(change(recipes["released"]), name=""), source)
        for name, change in changes.items()
    }
    with artifacts.exclusive(folder):
        for name, recipe in recipe_of.items():
            done = {found["change"]: found["dev_weighted_f1"] for found in document["rows"]}
            twins = [done[other] for other in done if recipe_of[other] == recipe]
            if name in done or (twins and name != "recommended"):
                continue
            scores = twins[0] if twins else dev_scores(source, recipe, seeds, folder)
            released = document["rows"][0]["dev_weighted_f1"] if document["rows"] else scores
            document["rows"].append(row(name, scores, released))
            document["rows"].sort(key=lambda found: [*changes].index(found["change"]))
            mark_taken(document["rows"])
            text = json.dumps(document, indent=2) + "\n"
            artifacts.replace(path, lambda partial, text=text: partial.write_text(text))
            print(document["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
