"""The results of experiments, read strictly: nothing is reported that does not hold together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from examples.erc.results import Results, System, Value, read_plain
from examples.erc.results import read as read_systems
from examples.erc.source import MODALITIES, SPLITS
from examples.experiments.catalogue import EXPERIMENTS, Experiment
from examples.experiments.significance import Significance


@dataclass(frozen=True)
class Outcome:
    """Everything that experiments have to say.

    Attributes:
        results: The systems and their circumstances.
        name: What was asked for: an experiment or ``"all"``.
        modalities: Those at hand.
        experiments: Those that were run, in the order of the paper.
        left_out: Those that were not, each with the reason.
        classes: For each split how many utterances each label has.
        significance: By the keys of a system and its baseline.
    """

    results: Results
    name: str
    modalities: tuple[str, ...]
    experiments: tuple[Experiment, ...]
    left_out: Mapping[str, str]
    classes: Mapping[str, Mapping[str, int]]
    significance: Mapping[tuple[str, str], Significance]

    def system(self, key: str) -> System:
        """The system of this key, which was run."""
        return next(system for system in self.results.systems if system.key == key)


def read(results: Mapping[str, Any]) -> Outcome:
    """Check a results dict from end to end.

    Args:
        results: As :func:`examples.experiments.running.run` returns it.

    Returns:
        The same, typed.

    Raises:
        InputError: Something is missing, out of range or contradicts something else; the message
            names the key, what was expected, what was received and the remedy.
    """
    root = Value(read_plain(results, "results"), "results")
    modalities = tuple(value.choice(MODALITIES) for value in root["modalities"].entries())
    names = [value.choice(tuple(EXPERIMENTS)) for value in root["experiments"].entries()]
    experiments = tuple(experiment for name, experiment in EXPERIMENTS.items() if name in names)
    known = read_systems(results, trained=any(e.systems(modalities) for e in experiments))
    outcome = Outcome(
        results=known,
        name=root["name"].text(),
        modalities=modalities,
        experiments=experiments,
        left_out={name: root["left_out"][name].text() for name in root["left_out"].mapping()},
        classes=_classes(root["classes"], known),
        significance=_significance(root["significance"]),
    )
    _check_complete(outcome, root)
    return outcome


def _classes(value: Value, results: Results) -> dict[str, dict[str, int]]:
    found = {
        split: {label: value[split][label].integer() for label in results.labels}
        for split in SPLITS
    }
    for split, counts in found.items():
        value[split].require(
            sum(counts.values()) == results.counts[split],
            f"counts that add up to results['counts'][{split!r}] = {results.counts[split]}",
        )
    return found


def _significance(value: Value) -> dict[tuple[str, str], Significance]:
    found = {}
    for entry in value.entries() if value.value else ():
        over_seeds = entry["seeds"]
        found[entry["system"].text(), entry["baseline"].text()] = Significance(
            seeds=None if over_seeds.value is None else over_seeds.fraction(),
            dialogues=entry["dialogues"].fraction(),
        )
    return found


def _check_complete(outcome: Outcome, root: Value) -> None:
    """Every line of every table has to have its system, and every baseline its test."""
    keys = {system.key for system in outcome.results.systems}
    for experiment in outcome.experiments:
        for table in experiment.plan(outcome.modalities):
            for line in table.lines:
                root["systems"].require(
                    line.system.key in keys, f"the system {line.system.key} of {table.key} too"
                )
                if line.baseline is not None:
                    root["significance"].require(
                        (line.system.key, line.baseline.key) in outcome.significance,
                        f"a test of {line.system.key} against {line.baseline.key} too",
                    )
