"""Train what the experiments compare, each system once for a seed, and score it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.erc import artifacts, processes
from examples.erc.artifacts import Artifact
from examples.erc.errors import InputError
from examples.erc.pipeline import RESULTS, Story, check_size, circumstances, score
from examples.erc.recipe import Recipe
from examples.erc.results import as_text
from examples.erc.source import JSON, SPLITS, Source
from examples.erc.systems import System
from examples.erc.training import Hardware
from examples.experiments.catalogue import EXPERIMENTS, Experiment
from examples.experiments.significance import compare

EVERYTHING = "all"
"""The name of all experiments that a source is good for."""

FOLDER = "experiments"
"""In the run folder, with a folder of results for each name that was run."""


def choose(name: str, source: Source) -> tuple[list[Experiment], dict[str, str]]:
    """Choose the experiments of a name.

    Args:
        name: Of an experiment, or ``"all"``.
        source: What they are to be run on.

    Returns:
        The experiments, and for each that is left out of all, the reason.

    Raises:
        InputError: The one that was asked for, or every one, cannot be run on this source.
    """
    if name != EVERYTHING:
        if reason := _obstacle(EXPERIMENTS[name], source):
            raise InputError(f"{name}: {reason}")
        return [EXPERIMENTS[name]], {}
    obstacles = {
        experiment.name: _obstacle(experiment, source) for experiment in EXPERIMENTS.values()
    }
    left_out = {name: reason for name, reason in obstacles.items() if reason}
    return [EXPERIMENTS[name] for name in obstacles if name not in left_out], left_out


def run(
    source: Source,
    recipe: Recipe,
    experiments: Sequence[Experiment],
    seeds: Sequence[int],
    folder: Path,
    hardware: Hardware,
    command: str,
    *,
    name: str = EVERYTHING,
    left_out: Mapping[str, str] | None = None,
    checkpoint_every: int | None = None,
) -> dict[str, JSON]:
    """Train every system of some experiments from every seed, score and test them.

    Stages are kept in the folder as those of the pipeline are, so that experiments, names and the
    pipeline itself share them; what was interrupted goes on where it stopped.

    Args:
        source: The corpus.
        recipe: The numbers, each optimisation as it is to be used.
        experiments: As :func:`choose` gave them.
        seeds: One or more, different.
        folder: Of the run; made if absent. ``experiments/<name>/results.json`` is written there.
        hardware: What everything runs on.
        command: What the user typed, for the report.
        name: Of these experiments together.
        left_out: Those that are not run, each with the reason.
        checkpoint_every: See :func:`examples.erc.pipeline.run`.

    Returns:
        The results; see :func:`examples.experiments.outcome.read`.

    Raises:
        InputError: The corpus is too small, or the folder is in use.
        TrainingError: A loss is no longer finite.
        OSError: A file cannot be written; what was written before is kept.
        KeyboardInterrupt: After the step at hand, whose state is kept.
    """
    modalities = source.modalities
    systems = list(
        dict.fromkeys(
            system for experiment in experiments for system in experiment.systems(modalities)
        )
    )
    if systems:
        check_size(source, recipe, hardware)
    with artifacts.exclusive(folder) if processes.first() else nullcontext():
        if systems:
            count = len(source.targets("train"))
            processes.in_turn(lambda: source.prepare(folder))
            check_size(source, recipe, hardware, skipped=count - len(source.targets("train")))
        finished: dict[int, dict[System, Artifact]] = {}
        with tqdm(
            total=len(seeds) * len(systems),
            desc=f"{source.title}, {name}",
            unit="system",
            leave=False,
            disable=None if processes.first() else True,
        ) as progress:
            for seed in seeds:
                place = folder / f"seed-{seed}"
                story = Story(source, recipe, seed, place, hardware, checkpoint_every)
                finished[seed] = {}
                for system in systems:
                    finished[seed][system] = story.tell(system)
                    progress.update()
        results: dict[str, JSON] = {
            **circumstances(source, recipe, command),
            **score(source, finished),
            "name": name,
            "modalities": modalities,
            "experiments": [experiment.name for experiment in experiments],
            "left_out": dict(left_out or {}),
            "classes": _classes(source),
            "significance": _significance(source, experiments, finished),
        }
        text = as_text(results)
        if processes.first():
            place = folder / FOLDER / name
            place.mkdir(parents=True, exist_ok=True)
            artifacts.replace(place / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))
        processes.wait()
    return results


def _obstacle(experiment: Experiment, source: Source) -> str | None:
    """Why a source is not good enough for an experiment."""
    if len(source.modalities) < experiment.least:
        return (
            f"expected at least {experiment.least} modalities to compare, got "
            f"{', '.join(source.modalities)} alone; take a source that has more"
        )
    if experiment.prompt:
        try:
            source.without_prompt()
        except InputError as error:
            return str(error)
    return None


def _classes(source: Source) -> dict[str, JSON]:
    """How many utterances of each split have each label."""
    return {
        split: dict(
            zip(
                source.labels,
                source.targets(split).bincount(minlength=len(source.labels)).tolist(),
                strict=True,
            )
        )
        for split in SPLITS
    }


def _significance(
    source: Source,
    experiments: Sequence[Experiment],
    finished: Mapping[int, Mapping[System, Artifact]],
) -> list[JSON]:
    """Test every system against its baseline."""
    truth = source.targets("test").numpy()
    _, dialogues = np.unique([line.dialogue for line in source.lines("test")], return_inverse=True)
    pairs = dict.fromkeys(
        (line.system, line.baseline)
        for experiment in experiments
        for table in experiment.plan(source.modalities)
        for line in table.lines
        if line.baseline is not None
    )
    predictions = {
        system: np.stack(
            [
                stages[system].outputs("test")["logits"].argmax(dim=1).numpy()
                for stages in finished.values()
            ]
        )
        for system in dict.fromkeys(system for pair in pairs for system in pair if system)
    }
    tested: list[JSON] = []
    for system, baseline in pairs:
        assert baseline is not None
        found = compare(
            predictions[system], predictions[baseline], truth, dialogues, len(source.labels)
        )
        tested.append(
            {
                "system": system.key,
                "baseline": baseline.key,
                "seeds": found.seeds,
                "dialogues": found.dialogues,
            }
        )
    return tested
