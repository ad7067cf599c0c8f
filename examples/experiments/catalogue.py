"""The experiments: which systems each compares, and with what.

An experiment is data. It says which systems it needs from the modalities at hand; whoever runs it
trains each system once, whichever experiments ask for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from examples.erc.comparison import COMBINATIONS, listed, named
from examples.erc.results import DISTILLATIONS, FUSIONS
from examples.erc.systems import EVERYTHING, TEACHER, System

Modalities = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        words: What it is, one for each head.
        system: Whose scores it has.
        baseline: What they are compared with; ``None``: with nothing.
    """

    words: tuple[str, ...]
    system: System
    baseline: System | None = None


@dataclass(frozen=True)
class Comparison:
    """A table to be: systems, line by line.

    Attributes:
        key: Its name in files; unique.
        title: Its name for people.
        note: What is compared, and with what.
        heads: The heads of the columns of words.
        lines: One or more.
    """

    key: str
    title: str
    note: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Experiment:
    """A table or a figure of the paper.

    Attributes:
        name: As it is typed.
        title: Its name for people.
        paper: Where it stands there.
        plan: What it compares, from the modalities at hand; nothing if they do not suffice.
        least: The modalities that it needs, at least.
        prompt: Whether it needs words, to ask for the emotion or not.
    """

    name: str
    title: str
    paper: str
    plan: Callable[[Modalities], Sequence[Comparison]]
    least: int = 2
    prompt: bool = False

    def systems(self, modalities: Modalities) -> list[System]:
        """All that has to be trained."""
        lines = (line for table in self.plan(modalities) for line in table.lines)
        return [
            system
            for line in lines
            for system in (line.baseline, line.system)
            if system is not None
        ]


def _beside(baseline: System, words: tuple[str, ...], system: System) -> Line:
    """A line of a system and its baseline, or of the baseline itself."""
    return Line(words, system, None if system == baseline else baseline)


def _method(modalities: Modalities) -> System:
    return System(modalities, EVERYTHING, "shifting")


def _plain(modalities: Modalities) -> System:
    return System(modalities, "none", "concatenation")


def _led(modalities: Modalities, teacher: str) -> System:
    others = tuple(modality for modality in modalities if modality != teacher)
    return System((teacher, *others), EVERYTHING, "shifting", teacher)


def _comparison(modalities: Modalities) -> list[Comparison]:
    systems = (TEACHER, _plain(modalities), _method(modalities))
    return [
        Comparison(
            "comparison",
            "Comparison with what is published",
            "Published scores are of encoders trained on the clips themselves; ours are of the "
            "source that this report names. The baseline is our text teacher.",
            ("System",),
            tuple(_beside(TEACHER, (f"{system.title}, ours",), system) for system in systems),
        )
    ]


def _ablation(modalities: Modalities) -> list[Comparison]:
    baseline = _plain(modalities)
    systems = [
        System(modalities, taught, fusion) for fusion, taught in product(FUSIONS, DISTILLATIONS)
    ]
    return [
        Comparison(
            "ablation",
            "Ablation",
            f"The fusion of {listed(modalities)}, by fusion head and by what the students learnt "
            "from the teacher. The baseline has neither shifting nor distillation: its first line.",
            ("Fusion", "Distillation"),
            tuple(
                _beside(baseline, (named(system.fusion), named(system.distillation)), system)
                for system in systems
            ),
        )
    ]


def _modalities(modalities: Modalities) -> list[Comparison]:
    lines = []
    for seen in COMBINATIONS:
        if not {*seen} <= {*modalities}:
            continue
        if len(seen) > 1:
            system = _method(seen)
        else:
            system = TEACHER if seen == TEACHER.modalities else System(seen, EVERYTHING)
        words = (listed(seen).capitalize(), system.group.capitalize())
        lines.append(_beside(TEACHER, words, system))
    return [
        Comparison(
            "modalities",
            "Modalities",
            "What each set of modalities is good for: students taught both ways, fusions by "
            "shifting. The baseline is the text teacher.",
            ("Modalities", "System"),
            tuple(lines),
        )
    ]


def _teacher(modalities: Modalities) -> list[Comparison]:
    usual = _method(modalities)
    fusions = [
        _beside(usual, (teacher.capitalize(), "Fusion"), _led(modalities, teacher))
        for teacher in modalities
    ]
    alone = [
        Line((teacher.capitalize(), "Teacher alone"), System((teacher,), taught_by=teacher))
        for teacher in modalities
    ]
    students = []
    for modality in modalities:
        untaught = System((modality,), "none")
        students.append(Line((modality.capitalize(), "None"), untaught))
        students += [
            Line(
                (modality.capitalize(), teacher.capitalize()),
                System((modality,), EVERYTHING, None, teacher),
                untaught,
            )
            for teacher in modalities
            if teacher != modality
        ]
    return [
        Comparison(
            "teacher",
            "Teacher modality",
            "Everything at hand fused by shifting, the teacher's feature being the one that is "
            "shifted and the other modalities its students. The baseline is the text teacher's "
            "fusion.",
            ("Teacher", "System"),
            (*fusions, *alone),
        ),
        Comparison(
            "students_by_teacher",
            "Students by their teacher",
            "Each student on its own, distilled both ways from each teacher. The baseline is the "
            "same student without distillation.",
            ("Student", "Teacher"),
            tuple(students),
        ),
    ]


def _prompt(modalities: Modalities) -> list[Comparison]:
    silent = System(TEACHER.modalities, prompt=False)
    return [
        Comparison(
            "prompt",
            "Prompt",
            "The text teacher reads the dialogue so far; with the prompt the text ends in a "
            "question for the emotion, whose mask is classified, and without it in the last word, "
            "and the token at the beginning is. The baseline has no prompt.",
            ("Prompt",),
            (Line(("No",), silent), Line(("Yes",), TEACHER, silent)),
        )
    ]


def _students(modalities: Modalities) -> list[Comparison]:
    return [
        Comparison(
            "students",
            "Students by distillation",
            "Each student on its own, by what it learnt from the text teacher. The baseline is the "
            "same student without distillation.",
            ("Student", "Distillation"),
            tuple(
                _beside(
                    System((modality,), "none"),
                    (modality.capitalize(), named(taught)),
                    System((modality,), taught),
                )
                for modality, taught in product(modalities[1:], DISTILLATIONS)
            ),
        )
    ]


def _classes(modalities: Modalities) -> list[Comparison]:
    return []


def _confusions(modalities: Modalities) -> list[Comparison]:
    plain = _plain(modalities)
    return [
        Comparison(
            "confusions",
            "Confusions",
            "TelME beside the same without its means, concatenation of students that nobody "
            "taught, which is the baseline, and beside its text teacher.",
            ("System",),
            (
                Line(("Without shifting and distillation",), plain),
                Line(("Text teacher",), TEACHER, plain),
                Line(("TelME",), _method(modalities), plain),
            ),
        )
    ]


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("comparison", "Comparison with what is published", "Table 2", _comparison),
        Experiment("ablation", "Ablation", "Table 3", _ablation),
        Experiment("modalities", "Modalities", "Table 4", _modalities),
        Experiment("teacher", "Teacher modality", "Tables 5 to 7", _teacher),
        Experiment("prompt", "Prompt", "Table 8", _prompt, least=1, prompt=True),
        Experiment("students", "Students by distillation", "Fig. 5", _students),
        Experiment("classes", "Class distribution", "Fig. 6", _classes, least=1),
        Experiment("confusions", "Confusions", "Fig. 7", _confusions),
    )
}
"""By name, in the order of the paper."""
