"""Which systems a run trains, from the modalities at hand."""

from dataclasses import dataclass
from itertools import product

from examples.erc.results import DISTILLATIONS, FUSIONS
from examples.erc.source import JSON, MODALITIES

EVERYTHING = DISTILLATIONS[-1]
"""Both distillations."""

_TAUGHT = {"none": "not distilled", "response": "response", EVERYTHING: "response + feature"}


@dataclass(frozen=True)
class System:
    """A teacher, a student or a fusion of the teacher with students.

    Attributes:
        modalities: What it sees: text first, if at all.
        distillation: How its student or students were taught; ``None`` for the teacher.
        fusion: How its modalities come together; ``None`` for the teacher and for a student.
    """

    modalities: tuple[str, ...]
    distillation: str | None = None
    fusion: str | None = None

    @property
    def group(self) -> str:
        """The kind of system: ``"teacher"``, ``"student"`` or ``"fusion"``."""
        if self.fusion:
            return "fusion"
        return "student" if self.distillation else "teacher"

    @property
    def key(self) -> str:
        """Its name in files, such as ``"text+audio/shifting/response"``; unique."""
        parts = ("+".join(self.modalities), self.fusion, self.distillation)
        return "/".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """Its name for people."""
        seen = " + ".join(self.modalities).capitalize()
        if not self.distillation:
            return f"{seen} teacher"
        how = f" by {self.fusion}" if self.fusion else " student"
        return f"{seen}{how}, {_TAUGHT[self.distillation]}"

    def parts(self) -> list["System"]:
        """The encoders whose features a fusion fuses, in order."""
        return [
            TEACHER if modality in TEACHER.modalities else System((modality,), self.distillation)
            for modality in self.modalities
        ]

    def describe(self) -> dict[str, JSON]:
        """Everything above, as the results have it."""
        return {
            "key": self.key,
            "title": self.title,
            "group": self.group,
            "modalities": self.modalities,
            "distillation": self.distillation,
            "fusion": self.fusion,
        }


TEACHER = System(MODALITIES[:1])
"""The only one that learns from nobody."""


def methods(modalities: tuple[str, ...]) -> list[System]:
    """List the systems of TelME itself: the teacher, and what learns all that it has to teach.

    Args:
        modalities: Text first.

    Returns:
        Of :func:`plan` those without or with both distillations, and of the fusions those that
        shift.
    """
    return [
        system
        for system in plan(modalities)
        if system.distillation in (None, EVERYTHING) and system.fusion in (None, FUSIONS[-1])
    ]


def plan(modalities: tuple[str, ...]) -> list[System]:
    """List the systems to train, each after those that it builds on.

    Everything at hand is fused in both ways from students taught in all three ways; each student
    alone with the teacher is fused from students taught both ways.

    Args:
        modalities: Text first.

    Returns:
        The teacher, the students, the fusions.
    """
    _, *students = modalities
    systems = [TEACHER]
    systems += [System((student,), taught) for student, taught in product(students, DISTILLATIONS)]
    if students:
        systems += [
            System(modalities, taught, fusion) for fusion, taught in product(FUSIONS, DISTILLATIONS)
        ]
    if len(students) > 1:
        systems += [
            System((*TEACHER.modalities, student), EVERYTHING, fusion)
            for student, fusion in product(students, FUSIONS)
        ]
    return systems
