"""A finished run, opened to be used: its systems, verified, and the seed to take."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from examples.erc import artifacts, encoding
from examples.erc.artifacts import STAGE, WEIGHTS, Artifact, DamageError
from examples.erc.errors import InputError
from examples.erc.fusion import ConcatenationHead, ShiftingHead
from examples.erc.recipe import FusionRecipe, Optimisation
from examples.erc.systems import TEACHER, System, methods


class FinishedRun:
    """The folder of a run, with every system of the method in it.

    Nothing in it is trusted: records and weights are verified against their digests, stages against
    the encoders that they were made for, and only safetensors and JSON are read.

    Args:
        folder: Of the run.
        corpus: The corpus that it has to be of, in lower case.
        seed: Whose systems to take; ``None``: those of the seed whose fusion is the best on dev.

    Attributes:
        folder: As given.
        record: What the run kept of its encoding; see :func:`examples.erc.encoding.read`.
        title: The corpus as people write it.
        labels: The C class names, in index order.
        modalities: Those of the run, text first.
        seeds: Every seed that was trained.
        seed: The one that was chosen.
        stages: The systems of the method, each with its finished stage.

    Raises:
        InputError: The folder is none of a run, the run is not finished, or files are damaged.
    """

    def __init__(self, folder: Path, corpus: str, seed: int | None = None) -> None:
        self.folder = folder
        self.record = encoding.read(folder, corpus)
        self.title: str = self.record["title"]
        self.labels = tuple(self.record["labels"])
        self.modalities = tuple(self.record["modalities"])
        self.seeds = _find_seeds(folder)
        if seed is not None and seed not in self.seeds:
            raise InputError(
                f"--seed: expected one of {', '.join(map(str, self.seeds)) or 'none'}, which "
                f"{folder} has, got {seed}; leave it out to take the best on dev"
            )
        self.seed = self._choose_seed() if seed is None else seed
        self.stages = self._open(self.seed)

    def optimisation(self, system: System) -> Optimisation:
        """How a system was optimised."""
        return Optimisation(**self.stages[system].settings["recipe"]["optimisation"])

    def build(self, system: System, encoder: nn.Module | None = None) -> nn.Module:
        """Make the model of a system, with its weights.

        Args:
            system: Of the method.
            encoder: For a teacher or a student, its encoder; ``None`` for a fusion.

        Returns:
            The model, on the CPU.

        Raises:
            InputError: The weights are not those of this version's model.
        """
        stage = self.stages[system]
        model = encoder or self._head(system)
        try:
            model.load_state_dict(load_file(stage.folder / WEIGHTS))
        except RuntimeError as error:
            raise InputError(
                f"{stage.folder}: expected weights that fit this version, got others "
                f"({' '.join(str(error).split())[:200]}); run '{self.record['command']}' again"
            ) from error
        return model

    def _head(self, system: System) -> nn.Module:
        settings = dict(self.stages[system].settings["recipe"])
        recipe = FusionRecipe(optimisation=Optimisation(**settings.pop("optimisation")), **settings)
        widths = {
            part.modalities[0]: self.stages[part].outputs("dev")["features"].shape[1]
            for part in system.parts()
        }
        head = ShiftingHead if system.fusion == "shifting" else ConcatenationHead
        return head(widths, len(self.labels), recipe)

    def _choose_seed(self) -> int:
        """The seed whose fusion of everything is the best on dev, the first of equals."""
        best = max(methods(self.modalities), key=lambda system: len(system.modalities))
        scores: dict[int, float] = {}
        for seed in self.seeds:
            folder = self._folder(seed, best)
            if (folder / STAGE).exists():
                with self._explain(folder):
                    scores[seed] = dev_score(artifacts.read_record(folder / STAGE)["record"])
        if not scores:
            raise self._unfinished(f"a stage {best.key}")
        return max(scores, key=lambda seed: scores[seed])

    def _open(self, seed: int) -> dict[System, Artifact]:
        """Open and verify the systems of a seed, each after those that it builds on."""
        stages: dict[System, Artifact] = {}
        for system in methods(self.modalities):
            folder = self._folder(seed, system)
            with self._explain(folder):
                stage = artifacts.open_stage(folder)
            if stage is None:
                raise self._unfinished(f"a stage {folder.relative_to(self.folder)} of this version")
            if not self._fits(system, stage, stages):
                raise self._unfinished(
                    f"a stage {folder.relative_to(self.folder)} of the same input as the others"
                )
            stages[system] = stage
        return stages

    def _fits(self, system: System, stage: Artifact, before: Mapping[System, Artifact]) -> bool:
        """Whether a stage builds on those before it, and not on others that were here once."""
        if system.fusion:
            parts = {part.modalities[0]: before[part].identity for part in system.parts()}
            return bool(stage.settings["encoders"] == parts)
        (modality,) = system.modalities
        taught_by = before[TEACHER].identity if system.distillation else None
        return (stage.settings["source"], stage.settings.get("teacher")) == (
            self.record["source"][modality],
            taught_by,
        )

    def _folder(self, seed: int, system: System) -> Path:
        return self.folder / f"seed-{seed}" / system.key.replace("/", "-")

    @contextmanager
    def _explain(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except DamageError as damage:
            raise InputError(
                f"{folder}: expected a stage as it was written, but {damage}; run "
                f"'{self.record['command']}' again: it makes anew what is damaged"
            ) from damage

    def _unfinished(self, lacking: str) -> InputError:
        return InputError(
            f"{self.folder}: expected a finished run, got one without {lacking}; run "
            f"'{self.record['command']}' again: it goes on where it stopped"
        )


def dev_score(record: Mapping[str, Any]) -> float:
    """The weighted F1 on dev of the selected epoch, a fraction, by the record of a stage."""
    return float(max(epoch["dev_weighted_f1"] for epoch in record["history"]))


def _find_seeds(folder: Path) -> tuple[int, ...]:
    names = [path.name.removeprefix("seed-") for path in folder.glob("seed-*")]
    return tuple(sorted(int(name) for name in names if name.isascii() and name.isdigit()))
