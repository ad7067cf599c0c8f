"""The results of a run, read strictly: nothing is reported that does not hold together."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from examples.erc.errors import InputError
from examples.erc.source import MODALITIES

GROUPS = ("teacher", "student", "fusion")
"""The kinds of system, in the order of the story."""

DISTILLATIONS = ("none", "response", "feature", "response+feature")
"""What a student learns from the teacher, from nothing to everything."""

FUSIONS = ("concatenation", "shifting")
"""The fusion heads, the plain one first."""

_SHOWN = 200
"""How many characters of the keys that are there an error shows."""

Document = dict[str, Any]
"""A results dict as JSON has it."""


@dataclass(frozen=True)
class Scores:
    """The scores of one run on one split, as fractions in [0, 1]."""

    weighted_f1: float
    macro_f1: float
    accuracy: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training split: its mean loss, and weighted F1 on dev as a fraction."""

    number: int
    loss: float
    dev_weighted_f1: float


@dataclass(frozen=True)
class Run:
    """One system trained from one seed.

    Attributes:
        seed: The seed, >= 0.
        dev: The scores on dev at the selected epoch.
        test: The scores on test at the selected epoch.
        per_class_f1: F1 of each of the C classes on test, as fractions.
        confusion: ``[C][C]`` counts on test; a row is a true class, a column a predicted one.
        history: Every epoch trained, in order.
        selected_epoch: The number of the epoch whose weights were kept.
        seconds: What the training took.
    """

    seed: int
    dev: Scores
    test: Scores
    per_class_f1: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    history: tuple[Epoch, ...]
    selected_epoch: int
    seconds: float


@dataclass(frozen=True)
class System:
    """One row of the comparison: a teacher, a student or a fusion, with its runs.

    Attributes:
        key: Its name in files, such as ``"audio/none"``; unique.
        title: Its name for people.
        group: One of ``GROUPS``.
        modalities: What it sees; one for a teacher or student, two or more for a fusion.
        distillation: How the students it is or it fuses were taught, one of ``DISTILLATIONS``;
            ``None`` for a teacher.
        fusion: One of ``FUSIONS``; ``None`` unless the system is a fusion.
        runs: One per seed.
        taught_by: The modality of the teacher.
        prompt: Whether the text of the teacher ended in the question for the emotion.
    """

    key: str
    title: str
    group: str
    modalities: tuple[str, ...]
    distillation: str | None
    fusion: str | None
    runs: tuple[Run, ...]
    taught_by: str = MODALITIES[0]
    prompt: bool = True


@dataclass(frozen=True)
class Results:
    """Everything a run has to say.

    Attributes:
        corpus: The corpus in lower case.
        title: The corpus as people write it.
        source: What the input was, as JSON.
        recipe: The name of the recipe.
        command: The command that was run.
        labels: The C class names, in index order.
        seeds: The seeds asked for.
        counts: Utterances per split.
        systems: In the order of ``GROUPS``, and within a group in the order given.
        versions: The version of each package that matters.
        seconds: What the whole run took.
        document: The dict that was read, as JSON has it.
    """

    corpus: str
    title: str
    source: Mapping[str, Any]
    recipe: str
    command: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    counts: Mapping[str, int]
    systems: tuple[System, ...]
    versions: Mapping[str, str]
    seconds: float
    document: Document

    def group(self, name: str) -> list[System]:
        """The systems of one of ``GROUPS``, in order."""
        return [system for system in self.systems if system.group == name]

    def fused(self, modalities: Iterable[str], fusion: str, distillation: str) -> System | None:
        """The fusion of exactly these modalities with the text teacher, if it was run."""
        wanted = (set(modalities), fusion, distillation, MODALITIES[0])
        for system in self.group("fusion"):
            found = (system.fusion, system.distillation, system.taught_by)
            if (set(system.modalities), *found) == wanted:
                return system
        return None

    def untaught(self, system: System) -> System | None:
        """What a student or fusion would be without distillation, if that was run."""
        wanted = (system.group, set(system.modalities), system.fusion, "none")
        for other in self.systems:
            if (other.group, set(other.modalities), other.fusion, other.distillation) == wanted:
                return other
        return None

    @property
    def teacher(self) -> System | None:
        """The text teacher, if it was run."""
        return next(iter(self.group("teacher")), None)

    @property
    def everything(self) -> tuple[str, ...]:
        """The most modalities that were fused; none without a fusion."""
        fused = [system.modalities for system in self.group("fusion")]
        return max(fused, key=len, default=())

    @property
    def method(self) -> System | None:
        """TelME itself: everything fused by shifting, from students distilled both ways."""
        return self.fused(self.everything, "shifting", "response+feature")

    @property
    def plain(self) -> System | None:
        """Everything fused by concatenation, from students that no teacher taught."""
        return self.fused(self.everything, "concatenation", "none")


def read(results: Mapping[str, Any], *, trained: bool = True) -> Results:
    """Check a results dict from end to end.

    Args:
        results: As the pipeline returns it; a ``report.json`` is one too. Keys unknown here are
            left alone.
        trained: Whether there has to be a system.

    Returns:
        The same, typed.

    Raises:
        InputError: Something is missing, out of range or contradicts something else; the message
            names the key, what was expected, what was received and the remedy.
    """
    document = read_plain(results, "results")
    root = Value(document, "results")
    labels = tuple(label.text() for label in root["labels"].entries())
    root["labels"].require(
        len(labels) > 1 and len(set(labels)) == len(labels), "two or more different labels"
    )
    seeds = tuple(seed.integer() for seed in root["seeds"].entries())
    root["seeds"].require(len(set(seeds)) == len(seeds), "different seeds")
    counts = {split: root["counts"][split].integer() for split in ("train", "dev", "test")}
    systems = [
        _system(value, labels=len(labels), seeds=seeds, tested=counts["test"])
        for value in (root["systems"].entries() if trained or root["systems"].value else ())
    ]
    _refuse_twins(systems)
    return Results(
        corpus=root["corpus"].text(),
        title=root["title"].text(),
        source=root["source"].mapping(),
        recipe=root["recipe"].text(),
        command=root["command"].text(),
        labels=labels,
        seeds=seeds,
        counts=counts,
        systems=tuple(sorted(systems, key=lambda system: GROUPS.index(system.group))),
        versions={name: root["versions"][name].text() for name in root["versions"].mapping()},
        seconds=root["seconds"].number(),
        document=document,
    )


def as_text(document: Mapping[str, Any]) -> str:
    """Write a document as JSON for people too: a list of numbers takes one line.

    Args:
        document: What JSON can hold.

    Returns:
        Lines, the last with its line break.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # One number a line would make a confusion matrix taller than a page.
    return re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: json.dumps(json.loads(found[0])), text)


def read_plain(value: object, where: str) -> Any:  # noqa: ANN401
    """Copy a document into what ``json.loads`` would have made of it.

    Args:
        value: Mappings, sequences, texts, finite numbers, ``None``.
        where: What it is called in messages.

    Raises:
        InputError: It holds something else.
    """
    if isinstance(value, Mapping):
        return {str(key): read_plain(held, f"{where}[{key!r}]") for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [read_plain(held, f"{where}[{i}]") for i, held in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{where}: expected a finite number, got {value}; leave out runs that diverged, "
            "or train them again at a lower learning rate"
        )
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(
        f"{where}: expected what JSON can hold, got a {type(value).__name__}; "
        "convert arrays and tensors with tolist()"
    )


@dataclass(frozen=True)
class Value:
    """A piece of a document that knows where it stands; whatever is asked of it is checked.

    Every method raises an InputError that says where, what was expected and what was received.
    """

    value: Any
    where: str

    def require(self, held: bool, expected: str, remedy: str = "") -> None:
        """Refuse the value unless something holds."""
        if not held:
            received = json.dumps(self.value)
            received = received if len(received) <= 80 else received[:77] + "..."
            remedy = remedy or "mend the results, or run the pipeline again"
            raise InputError(f"{self.where}: expected {expected}, got {received}; {remedy}")

    def __getitem__(self, key: str) -> "Value":
        found = self.mapping()
        if key not in found:
            names = [name if name.isprintable() else repr(name) for name in found]
            present = ", ".join(names)[:_SHOWN] or "nothing"
            raise InputError(
                f"{self.where}[{key!r}]: expected this key, got only {present}; "
                "hand over the results as the pipeline returns them"
            )
        return Value(found[key], f"{self.where}[{key!r}]")

    def get(self, key: str, usual: object) -> "Value":
        """What an object has under a key, or else what is usual."""
        return Value(self.mapping().get(key, usual), f"{self.where}[{key!r}]")

    def mapping(self) -> dict[str, Any]:
        """The value as an object."""
        self.require(isinstance(self.value, dict), "an object")
        return cast(dict[str, Any], self.value)

    def entries(self, count: int | None = None) -> Iterator["Value"]:
        """The value as a list of so many entries, or of one or more."""
        found = len(self.value) if isinstance(self.value, list) else 0
        self.require(
            found == count if count else found > 0, f"a list of {count or 'one or more'} entries"
        )
        return (Value(entry, f"{self.where}[{i}]") for i, entry in enumerate(self.value))

    def text(self) -> str:
        """The value as one line of text."""
        self.require(
            isinstance(self.value, str) and bool(self.value.strip()) and self.value.isprintable(),
            "one line of text",
        )
        return cast(str, self.value)

    def choice(self, allowed: tuple[str | bool | None, ...]) -> Any:  # noqa: ANN401
        """The value, which is one of these."""
        self.require(self.value in allowed, "one of " + json.dumps(allowed)[1:-1])
        return self.value

    def integer(self) -> int:
        """The value as a whole number >= 0."""
        self.require(
            isinstance(self.value, int) and not isinstance(self.value, bool) and self.value >= 0,
            "a whole number >= 0",
        )
        return cast(int, self.value)

    def number(self) -> float:
        """The value as a number."""
        self.require(
            isinstance(self.value, int | float)
            and not isinstance(self.value, bool)
            and abs(self.value) <= sys.float_info.max,
            "a number",
        )
        return float(self.value)

    def fraction(self) -> float:
        """The value as a number in [0, 1]."""
        number = self.number()
        self.require(0 <= number <= 1, "a fraction in [0, 1]", "divide percentages by 100")
        return number


def _system(value: Value, *, labels: int, seeds: tuple[int, ...], tested: int) -> System:
    group = value["group"].choice(GROUPS)
    modalities = tuple(modality.choice(MODALITIES) for modality in value["modalities"].entries())
    value["modalities"].require(
        len(set(modalities)) == len(modalities) and (len(modalities) > 1) == (group == "fusion"),
        "two or more different modalities for a fusion, else one",
    )
    runs = tuple(_run(run, labels=labels, tested=tested) for run in value["runs"].entries())
    ran = [run.seed for run in runs]
    value["runs"].require(
        len(set(ran)) == len(ran) and set(ran) <= set(seeds),
        f"one run for each of the seeds {list(seeds)}, or for some of them",
    )
    return System(
        key=value["key"].text(),
        title=value["title"].text(),
        group=group,
        modalities=modalities,
        distillation=value["distillation"].choice((None,) if group == "teacher" else DISTILLATIONS),
        fusion=value["fusion"].choice(FUSIONS if group == "fusion" else (None,)),
        runs=runs,
        taught_by=value.get("taught_by", MODALITIES[0]).choice(MODALITIES),
        prompt=value.get("prompt", True).choice((True, False)),
    )


def _run(value: Value, *, labels: int, tested: int) -> Run:
    test = value["test"]
    confusion = tuple(
        tuple(count.integer() for count in row.entries(labels))
        for row in test["confusion"].entries(labels)
    )
    total = sum(map(sum, confusion))
    test["confusion"].require(
        total == tested,
        f"counts that add up to results['counts']['test'] = {tested}, not {total}",
        "score every utterance of the test split once",
    )
    history = tuple(
        Epoch(
            number=epoch["epoch"].integer(),
            loss=epoch["loss"].number(),
            dev_weighted_f1=epoch["dev_weighted_f1"].fraction(),
        )
        for epoch in value["history"].entries()
    )
    selected = value["selected_epoch"].integer()
    value["selected_epoch"].require(
        selected in {epoch.number for epoch in history}, "an epoch that is in the history"
    )
    return Run(
        seed=value["seed"].integer(),
        dev=_scores(value["dev"]),
        test=_scores(test),
        per_class_f1=tuple(score.fraction() for score in test["per_class_f1"].entries(labels)),
        confusion=confusion,
        history=history,
        selected_epoch=selected,
        seconds=value["seconds"].number(),
    )


def _scores(value: Value) -> Scores:
    return Scores(
        weighted_f1=value["weighted_f1"].fraction(),
        macro_f1=value["macro_f1"].fraction(),
        accuracy=value["accuracy"].fraction(),
    )


def _refuse_twins(systems: list[System]) -> None:
    """A table looks systems up by what they are, so no two may be the same."""
    seen: dict[tuple[object, ...], str] = {}
    for system in systems:
        what = (
            *(system.group, frozenset(system.modalities), system.distillation, system.fusion),
            *(system.taught_by, system.prompt),
        )
        for name in (("key", system.key), what):
            if name in seen:
                raise InputError(
                    f"results['systems']: expected systems that differ, got {system.key!r} beside "
                    f"{seen[name]!r}, which is the same; drop one of them"
                )
            seen[name] = system.key
