"""What can be trained, and which of it a run trains, from the modalities at hand."""

from dataclasses import dataclass
from itertools import product

from examples.erc.results import FUSIONS
from examples.erc.source import JSON, MODALITIES

EVERYTHING = "response+feature"
"""Both distillations."""

TAUGHT = ("none", "response", EVERYTHING)
"""How the students of the full comparison are taught, from nothing to everything."""


@dataclass(frozen=True)
class System:
    """A teacher, a student or a fusion of the teacher with students.

    Attributes:
        modalities: What it sees: the teacher's first, if at all.
        distillation: How its student or students were taught; ``None`` for the teacher.
        fusion: How its modalities come together; ``None`` for the teacher and for a student.
        taught_by: The modality of the teacher: its own, its students', that which is shifted.
        prompt: Whether the text of the teacher ends in the question for the emotion.
    """

    modalities: tuple[str, ...]
    distillation: str | None = None
    fusion: str | None = None
    taught_by: str = MODALITIES[0]
    prompt: bool = True

    @property
    def group(self) -> str:
        """The kind of system: ``"teacher"``, ``"student"`` or ``"fusion"``."""
        if self.fusion:
            return "fusion"
        return "student" if self.distillation else "teacher"

    @property
    def key(self) -> str:
        """Its name in files, such as ``"text+audio/shifting/response"``; unique."""
        other = self.distillation and self.taught_by != MODALITIES[0]
        parts = (
            "+".join(self.modalities),
            self.fusion,
            self.distillation,
            f"by-{self.taught_by}" if other else None,
            None if self.prompt else "no-prompt",
        )
        return "/".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """Its name for people."""
        seen = " + ".join(self.modalities).capitalize()
        ending = "" if self.prompt else ", no prompt"
        if not self.distillation:
            return f"{seen} teacher{ending}"
        how = f" by {self.fusion}" if self.fusion else " student"
        taught = "not distilled" if self.distillation == "none" else self.distillation
        if self.taught_by != MODALITIES[0]:
            ending = f", taught by {self.taught_by}{ending}"
        return f"{seen}{how}, {taught.replace('+', ' + ')}{ending}"

    @property
    def teacher(self) -> "System":
        """The teacher of its students, or itself."""
        return System((self.taught_by,), taught_by=self.taught_by, prompt=self.prompt)

    def parts(self) -> list["System"]:
        """The encoders whose features a fusion fuses, in order."""
        return [
            self.teacher if modality == self.taught_by else self._student(modality)
            for modality in self.modalities
        ]

    def needs(self) -> list["System"]:
        """What has to be trained before it."""
        if self.fusion:
            return self.parts()
        return [self.teacher] if self.distillation else []

    def _student(self, modality: str) -> "System":
        if self.distillation == "none":  # whoever does not teach
            return System((modality,), "none")
        return System((modality,), self.distillation, None, self.taught_by, self.prompt)

    def describe(self) -> dict[str, JSON]:
        """Everything above, as the results have it; what is as usual is not mentioned."""
        described: dict[str, JSON] = {
            "key": self.key,
            "title": self.title,
            "group": self.group,
            "modalities": self.modalities,
            "distillation": self.distillation,
            "fusion": self.fusion,
        }
        if self.taught_by != MODALITIES[0]:
            described["taught_by"] = self.taught_by
        if not self.prompt:
            described["prompt"] = False
        return described


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
    systems += [System((student,), taught) for student, taught in product(students, TAUGHT)]
    if students:
        systems += [
            System(modalities, taught, fusion) for fusion, taught in product(FUSIONS, TAUGHT)
        ]
    if len(students) > 1:
        systems += [
            System((*TEACHER.modalities, student), EVERYTHING, fusion)
            for student, fusion in product(students, FUSIONS)
        ]
    return systems
