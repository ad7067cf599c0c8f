"""The training loop: one model, one objective, the best epoch on dev.

A stage's result is a function of its settings and its seed alone, so that a stage that is run again
gives what it gave before (to the bit on the same machine, as far as its kernels are deterministic).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from examples.erc.errors import InputError, TrainingError
from examples.erc.metrics import weighted_f1
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, SPLITS, Dataset

SMALLEST_BATCH = 3
"""With one row a relation says nothing, and with two every correlation is 1 or -1."""

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision: TypeAlias = Literal["no", "fp16", "bf16"]

Objective: TypeAlias = Callable[[Any, Tensor], Tensor]
"""The loss of a model's output for the batch with these rows: a scalar."""


@dataclass(frozen=True)
class Hardware:
    """What a stage runs on.

    Attributes:
        device: ``"auto"`` takes an accelerator if there is one.
        mixed_precision: The dtype of autocast; losses compute in float32 all the same.

    Raises:
        InputError: The machine has no such device, or the device no such precision.
    """

    device: Device = "auto"
    mixed_precision: MixedPrecision = "no"

    def __post_init__(self) -> None:
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not present.get(self.device, True):
            raise InputError(
                f"--device: expected a device of this machine, got {self.device}, which PyTorch "
                "does not find; choose cpu, or install a build of PyTorch for it"
            )
        # Accelerate would train in float32 then, and say nothing.
        if self.accelerator().device.type == "cpu" and self.mixed_precision == "fp16":
            raise InputError(
                "--mixed-precision: expected no or bf16 on a processor, got fp16; choose bf16"
            )

    def accelerator(self) -> Accelerator:
        """A fresh one for every stage, as its gradient scaler remembers the stage before."""
        try:
            accelerator = Accelerator(
                cpu=self.device == "cpu", mixed_precision=self.mixed_precision
            )
        except ValueError as error:
            raise InputError(
                f"--mixed-precision: expected one that the device supports, got "
                f"{self.mixed_precision} ({error}); choose no"
            ) from error
        if accelerator.num_processes > 1:
            raise InputError(
                f"expected one process, got {accelerator.num_processes}; start the pipeline with "
                "python -m, without a launcher"
            )
        return accelerator


@dataclass(frozen=True)
class Epoch:
    """One pass over the training split: its mean loss, and weighted F1 on dev as a fraction."""

    epoch: int
    loss: float
    dev_weighted_f1: float


@dataclass(frozen=True)
class Trained:
    """A model at its best epoch, and all that it says about the corpus.

    Attributes:
        weights: The state dict, on the CPU.
        outputs: For each split the fields of the model's output, each ``[N, ...]``, float32.
        history: Every epoch trained.
        selected_epoch: The epoch with the best weighted F1 on dev, the first of equals.
        seconds: What training and computing the outputs took.
    """

    weights: dict[str, Tensor]
    outputs: dict[str, dict[str, Tensor]]
    history: tuple[Epoch, ...]
    selected_epoch: int
    seconds: float

    def record(self) -> dict[str, JSON]:
        """What a reader of the artifact wants to know, as JSON."""
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "selected_epoch": self.selected_epoch,
            "seconds": self.seconds,
        }


def train(
    build: Callable[[], nn.Module],
    objective: Objective,
    datasets: Mapping[str, Dataset],
    dev_targets: Tensor,
    optimisation: Optimisation,
    *,
    seed: int,
    hardware: Hardware,
    title: str,
) -> Trained:
    """Train a model, keep its best epoch on dev, and compute its outputs once.

    Args:
        build: Makes the model; called after seeding. ``model(**batch)`` returns a named tuple of
            ``[B, ...]`` tensors, ``logits`` among them.
        objective: The loss; its tensors are on the hardware's device.
        datasets: One for each split.
        dev_targets: The labels of dev, int64, ``[N]``, on the CPU.
        optimisation: How it is optimised.
        seed: Of the initial weights, dropout and the order of the rows.
        hardware: What it runs on.
        title: What the progress bar says.

    Returns:
        The model's best epoch.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    started = time.perf_counter()
    set_seed(seed)
    order = torch.Generator().manual_seed(seed)
    steps = optimisation.epochs * len(
        draw_batches(len(datasets["train"]), optimisation.batch_size, order)
    )
    accelerator = hardware.accelerator()
    model = build()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: rate_share(step, steps, optimisation.warmup)
    )
    model, optimiser, scheduler = accelerator.prepare(model, optimiser, scheduler)

    history: list[Epoch] = []
    best = Epoch(0, float("nan"), -1.0)
    weights: dict[str, Tensor] = {}
    with tqdm(total=steps, desc=title, unit="step", leave=False, disable=None) as progress:
        for number in range(1, optimisation.epochs + 1):
            model.train()
            total = torch.zeros((), device=accelerator.device)
            batches = draw_batches(len(datasets["train"]), optimisation.batch_size, order)
            for rows in batches:
                batch = send_to_device(datasets["train"][rows], accelerator.device)
                loss = objective(model(**batch), torch.tensor(rows, device=accelerator.device))
                optimiser.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), optimisation.max_gradient_norm)
                optimiser.step()
                scheduler.step()
                total += loss.detach() * len(rows)
                progress.update()
            if not total.isfinite():
                raise TrainingError(
                    f"{title}: the loss of epoch {number} is {total.item()}; lower the learning "
                    "rate, or train without mixed precision"
                )
            dev = compute(model, datasets["dev"], optimisation.batch_size)
            score = weighted_f1(dev_targets, dev["logits"])
            history.append(Epoch(number, total.item() / len(datasets["train"]), score))
            progress.set_postfix_str(f"epoch {number}, dev {100 * score:.2f}")
            if score > best.dev_weighted_f1:
                best = history[-1]
                weights = {
                    name: value.detach().cpu().clone() for name, value in model.state_dict().items()
                }
            elif optimisation.patience and number - best.epoch >= optimisation.patience:
                break
    model.load_state_dict(weights)
    outputs = {split: compute(model, datasets[split], optimisation.batch_size) for split in SPLITS}
    return Trained(weights, outputs, tuple(history), best.epoch, time.perf_counter() - started)


@torch.no_grad()
def compute(model: nn.Module, dataset: Dataset, batch_size: int) -> dict[str, Tensor]:
    """Compute a model's outputs for a whole split, in row order.

    Args:
        model: Called as ``model(**batch)``; it returns a named tuple of ``[B, ...]`` tensors.
        dataset: N rows.
        batch_size: Rows at a time, >= 1.

    Returns:
        The fields of the tuple, each ``[N, ...]``, float32, on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = list(range(len(dataset)))
    parts = [
        model(**send_to_device(dataset[rows[first : first + batch_size]], device))._asdict()
        for first in range(0, len(rows), batch_size)
    ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def draw_batches(count: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """Shuffle rows and cut them into batches.

    A last batch too small for relations joins the one before it: dropping it would cost rows, and
    training on it would teach nothing but cross-entropy.

    Args:
        count: The number of rows, >= 1.
        size: Rows in a batch, >= 1.
        generator: The source of the order.

    Returns:
        Every row once; batches of ``size``, the last one of up to ``size + 2`` or of fewer rows.
    """
    rows = torch.randperm(count, generator=generator).tolist()
    batches = [rows[first : first + size] for first in range(0, count, size)]
    if len(batches) > 1 and len(batches[-1]) < min(SMALLEST_BATCH, size):
        last = batches.pop()
        batches[-1] += last
    return batches


def rate_share(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate that a step takes: up linearly, then down linearly.

    Args:
        step: The optimiser step, from 0.
        steps: All optimiser steps, >= 1.
        warmup: The share of the steps that go up, in [0, 1].

    Returns:
        A number in (0, 1] for the steps of a run: no step is wasted on a rate of zero.
    """
    rising = round(warmup * steps)
    return min(1.0, (step + 1) / max(rising, 1), (steps - step) / max(steps - rising, 1))
