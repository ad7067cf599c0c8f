"""A finished run: what it writes down at its end, and how it is opened to be used.

``finished.json`` names all stages of the run by their identity, and holds the labels of dev and
test with who says what there. It makes the run finished, as ``stage.json`` does a stage.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from examples.erc import artifacts, encoding
from examples.erc.artifacts import STAGE, WEIGHTS, Artifact, DamageError
from examples.erc.errors import InputError
from examples.erc.fusion import ShiftingHead
from examples.erc.recipe import FusionRecipe, Optimisation
from examples.erc.source import Line, Source
from examples.erc.systems import System, methods

FORMAT = 1
"""Raised whenever the record changes its form."""

RECORD = "finished.json"

SCORED = ("dev", "test")
"""The splits that it holds the labels of."""


def keep(source: Source, finished: Mapping[int, Mapping[System, Artifact]], folder: Path) -> None:
    """Write down that a run is finished.

    Args:
        source: The corpus, prepared.
        finished: For each seed the stage of each system.
        folder: Of the run; it holds the encoding.
    """
    artifacts.write_record(
        folder / RECORD,
        {
            "format": FORMAT,
            "encoding": artifacts.file_sha256(folder / encoding.FOLDER / encoding.RECORD),
            "stages": {
                str(seed): {system.key: stage.identity for system, stage in stages.items()}
                for seed, stages in finished.items()
            },
            **{
                split: {
                    "targets": source.targets(split).tolist(),
                    "lines": [list(line) for line in source.lines(split)],
                }
                for split in SCORED
            },
        },
    )


class FinishedRun:
    """The folder of a run, with every system of the method in it.

    Nothing in it is trusted: every file that is read is verified against its digest, and only
    safetensors and JSON are read.

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
        self._finished = self._read()
        self.seeds = tuple(map(int, self._finished["stages"]))
        if seed is not None and seed not in self.seeds:
            raise InputError(
                f"--seed: expected one of {', '.join(map(str, self.seeds))}, which "
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
        model = self._head(system) if encoder is None else encoder
        try:
            model.load_state_dict(load_file(stage.folder / WEIGHTS))
        except RuntimeError as error:
            raise InputError(
                f"{stage.folder}: expected weights that fit this version, got others "
                f"({' '.join(str(error).split())[:200]}); run '{self.record['command']}' again"
            ) from error
        return model

    def _head(self, system: System) -> ShiftingHead:
        settings = dict(self.stages[system].settings["recipe"])
        recipe = FusionRecipe(optimisation=Optimisation(**settings.pop("optimisation")), **settings)
        widths = {
            part.modalities[0]: self.stages[part].outputs("dev")["features"].shape[1]
            for part in system.parts()
        }
        return ShiftingHead(widths, len(self.labels), recipe)

    def lines(self, split: str) -> list[Line]:
        """Who says what in dev or test, row by row."""
        return [Line(*line) for line in self._finished[split]["lines"]]

    def targets(self, split: str) -> list[int]:
        """The labels of dev or test."""
        targets: list[int] = self._finished[split]["targets"]
        return targets

    def _read(self) -> dict[str, Any]:
        path = self.folder / RECORD
        if not path.is_file():
            raise self._unfinished(RECORD)
        with self._explain(path):
            record = artifacts.read_record(path)
        digest = artifacts.file_sha256(self.folder / encoding.FOLDER / encoding.RECORD)
        if (record["format"], record["encoding"]) != (FORMAT, digest):
            # The same command was begun anew since, with other options or another version.
            raise self._unfinished(f"a {RECORD} of its own")
        return record

    def _choose_seed(self) -> int:
        """The seed whose fusion of everything is the best on dev, the first of equals."""
        best = max(methods(self.modalities), key=lambda system: len(system.modalities))
        scores: dict[int, float] = {}
        for seed in self.seeds:
            folder = self._folder(seed, best)
            if not (folder / STAGE).is_file():
                raise self._unfinished(f"the stage {folder.relative_to(self.folder)}")
            with self._explain(folder):
                scores[seed] = dev_score(artifacts.read_record(folder / STAGE)["record"])
        return max(scores, key=lambda seed: scores[seed])

    def _open(self, seed: int) -> dict[System, Artifact]:
        """Open and verify the systems of a seed, each after those that it builds on."""
        made = self._finished["stages"][str(seed)]
        stages: dict[System, Artifact] = {}
        for system in methods(self.modalities):
            folder = self._folder(seed, system)
            with self._explain(folder):
                stage = artifacts.open_stage(folder)
            if stage is None or stage.identity != made.get(system.key):
                raise self._unfinished(f"the stage {folder.relative_to(self.folder)} that it made")
            stages[system] = stage
        return stages

    def _folder(self, seed: int, system: System) -> Path:
        return self.folder / f"seed-{seed}" / system.key.replace("/", "-")

    @contextmanager
    def _explain(self, path: Path) -> Iterator[None]:
        try:
            yield
        except DamageError as damage:
            raise InputError(
                f"{path}: expected what the run wrote there, but {damage}; run "
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
