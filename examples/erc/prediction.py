"""What a finished run says about dialogues that it has not seen.

Every utterance is answered by the system that sees the most of what the utterance has: the fusion
of everything where all modalities are there, a fusion of fewer, the text teacher, or a student. Of
two students the one that is better on dev answers. What all the others say is kept beside it.

A dialogue is computed in the same batches as in the run itself, so that on the same machine the
answers about a dialogue of the corpus are those of the run to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.erc import encoding
from examples.erc.errors import InputError
from examples.erc.finished import FinishedRun, dev_score
from examples.erc.fusion import FrozenFeatures
from examples.erc.prediction_inputs import Inputs, name_of
from examples.erc.source import Dataset, Line
from examples.erc.systems import System
from examples.erc.training import Device, Hardware, MixedPrecision, compute


@dataclass(frozen=True)
class Answer:
    """What is said about one utterance.

    Attributes:
        line: Who says what.
        present: The modalities that it has.
        system: Who answers; ``None`` where there is nothing to go by.
        probabilities: What each system says that sees no more than the utterance has: C
            probabilities, float32.
        faults: What is wrong with its clips, by modality.
    """

    line: Line
    present: tuple[str, ...]
    system: System | None
    probabilities: Mapping[System, Sequence[float]]
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def shares(self) -> Sequence[float]:
        """The probabilities of the system that answers; none where nobody does."""
        return () if self.system is None else self.probabilities[self.system]


def emotion_of(answer: Answer, labels: Sequence[str]) -> str | None:
    """The emotion with the largest probability."""
    if not answer.shares:
        return None
    return labels[max(range(len(labels)), key=lambda index: answer.shares[index])]


def answer(run: FinishedRun, inputs: Inputs, device: Device = "auto") -> list[Answer]:
    """Let every system of a run speak that sees no more than there is.

    Args:
        run: The run.
        inputs: The dialogues.
        device: What it is computed on.

    Returns:
        An answer for each row, but for those that are left out.
    """
    with torch.random.fork_rng(devices=[]):  # blank encoders draw weights, and drop them
        logits = _compute(run, inputs, device)
    for system, values in logits.items():
        wrong = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if wrong:
            raise InputError(
                f"{name_of(inputs.lines[wrong[0]])}: expected features of a usual size, but what "
                f"{system.key} makes of them is not finite; extract them as for the run"
            )
    probabilities = {system: values.softmax(dim=1).tolist() for system, values in logits.items()}
    order = sorted(
        logits,
        key=lambda system: (-len(system.modalities), -dev_score(run.stages[system].record)),
    )
    answers = []
    for row, line in enumerate(inputs.lines):
        if row in inputs.left_out:
            continue
        present = tuple(modality for modality, held in inputs.present.items() if held[row])
        able = [system for system in order if {*system.modalities} <= {*present}]
        answers.append(
            Answer(
                line,
                present,
                able[0] if able else None,
                {system: probabilities[system][row] for system in logits if system in able},
                inputs.faults[row],
            )
        )
    return answers


def _compute(run: FinishedRun, inputs: Inputs, device: Device) -> dict[System, Tensor]:
    """The logits of every system that sees no more than there is, ``[N, C]``."""
    kept = encoding.load(run.folder, run.record)
    outputs: dict[System, dict[str, Tensor]] = {}
    for system, stage in run.stages.items():
        if not {*system.modalities} <= {*inputs.datasets}:
            continue
        if system.fusion:
            model = run.build(system)
            dataset: Dataset = FrozenFeatures(
                {part.modalities[0]: outputs[part]["features"] for part in system.parts()}
            )
        else:
            model = run.build(system, kept.encoder(system.modalities[0]))
            dataset = inputs.datasets[system.modalities[0]]
        hardware = _hardware(device, stage.settings["mixed_precision"])
        ready = hardware.accelerator().prepare_model(model, evaluation_mode=True)
        batch_size = run.optimisation(system).batch_size
        outputs[system] = compute(ready, dataset, batch_size, inputs.lengths)
    return {system: held["logits"] for system, held in outputs.items()}


def _hardware(device: Device, precision: MixedPrecision) -> Hardware:
    """The device, and the precision of the run as far as the device has it."""
    # Asked before there is any Hardware: accelerate holds on to the first precision it is told.
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    if precision == "fp16" and (device == "cpu" or not accelerated):
        precision = "no"
    return Hardware(device, precision)
