"""The training loop: one model, one objective, the best epoch on dev.

A stage's result is a function of its settings and its seed alone, so that a stage that is run again
gives what it gave before (to the bit on the same machine, as far as its kernels are deterministic),
and so does one that was killed and goes on from a checkpoint.

A batch may be cut into parts, for several processes or for want of memory. Distillation compares
the rows of a batch with each other, so that the mean of the parts' losses would be another loss:
every loss here is that of the whole batch. Each part draws from random generators of its own, so
that N parts give the same result in N processes as one after another in a single one, up to the
order of sums.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from types import FrameType
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    send_to_device,
)
from torch import Tensor, nn
from tqdm import tqdm

from examples.erc import processes, random_state
from examples.erc.checkpoint import Checkpoints
from examples.erc.errors import InputError, TrainingError
from examples.erc.metrics import weighted_f1
from examples.erc.objectives import Share, Stateful
from examples.erc.random_state import RandomState
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, SPLITS, Dataset
from telme_kd import accumulate_gradient

SMALLEST_BATCH = 3
"""With one row a relation says nothing, and with two every correlation is 1 or -1."""

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision: TypeAlias = Literal["no", "fp16", "bf16"]

Objective: TypeAlias = Callable[[Any, Share], Tensor]
"""The loss of a model's output for a share of a batch: a scalar; see the module of that name."""


@dataclass(frozen=True)
class Hardware:
    """What a stage runs on.

    Attributes:
        device: ``"auto"`` takes an accelerator if there is one.
        mixed_precision: The dtype of autocast; losses compute in float32 all the same.
        accumulation: How many parts of a batch each process computes one after another, >= 1.

    Raises:
        InputError: The machine has no such device, or the device no such precision.
    """

    device: Device = "auto"
    mixed_precision: MixedPrecision = "no"
    accumulation: int = 1

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

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return int(self.accelerator().num_processes)

    @property
    def parts(self) -> int:
        """Into how many parts a batch is cut."""
        return self.processes * self.accumulation

    def accelerator(self) -> Accelerator:
        """A fresh one for every stage, as its gradient scaler remembers the stage before."""
        try:
            return Accelerator(
                cpu=self.device == "cpu",
                mixed_precision=self.mixed_precision,
                # The batch is the same however many share it, and so is the schedule.
                dataloader_config=DataLoaderConfiguration(split_batches=True),
                # One process decodes a corpus while the others wait; if it dies, torchrun ends all.
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
            )
        except ValueError as error:
            raise InputError(
                f"--mixed-precision: expected one that the device supports, got "
                f"{self.mixed_precision} ({error}); choose no"
            ) from error


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
        seconds: What training and computing the outputs took, interruptions left out.
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
    checkpoints: Checkpoints | None = None,
    lengths: Mapping[str, Sequence[int]] | None = None,
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
        checkpoints: Where the state is kept on the way, and gone on from; ``None``: nowhere.
        lengths: See :func:`compute`, for each split; ``None``: no dialogues.

    Returns:
        The model's best epoch.

    Raises:
        InputError: A batch has fewer rows than parts, or a checkpoint is of another device.
        TrainingError: The loss is no longer finite.
        KeyboardInterrupt: After a checkpoint of everything up to the last whole step.
    """
    training = _Training(
        build, objective, datasets, dev_targets, optimisation, seed, hardware, title, lengths or {}
    )
    with tqdm(
        total=optimisation.epochs * training.steps_of_an_epoch,
        desc=title,
        unit="step",
        leave=False,
        disable=None if processes.first() else True,
    ) as progress:
        if checkpoints is not None:
            training.resume(checkpoints)
        progress.update(training.step)
        try:
            while not training.finished:
                for _ in training.steps():
                    progress.update()
                    if checkpoints is not None and checkpoints.due(training.step, epoch_ends=False):
                        training.save(checkpoints)
                training.close_epoch()
                progress.set_postfix_str(training.describe())
                if checkpoints is not None and (
                    training.finished or checkpoints.due(training.step, epoch_ends=True)
                ):
                    training.save(checkpoints)
        except KeyboardInterrupt:
            # Several processes are not interrupted at the same step; they keep what they saved.
            if checkpoints is not None and processes.count() == 1:
                training.save(checkpoints)
            raise
    return training.result()


def evaluate(
    build: Callable[[], nn.Module],
    weights: Mapping[str, Tensor],
    datasets: Mapping[str, Dataset],
    batch_size: int,
    hardware: Hardware,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Compute the outputs of a trained model again, as :func:`train` computed them.

    Args:
        build: Makes the model.
        weights: Its state dict, as :class:`Trained` has it.
        datasets: One for each split.
        batch_size: That of the training.
        hardware: What it runs on.
        lengths: As for :func:`train`.

    Returns:
        As the ``outputs`` of :class:`Trained`.
    """
    # Mixed precision comes with it.
    model = hardware.accelerator().prepare_model(build(), evaluation_mode=True)
    return _say(model, weights, datasets, batch_size, lengths or {})


def _say(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    datasets: Mapping[str, Dataset],
    batch_size: int,
    lengths: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Tensor]]:
    """What a model with these weights says about every split."""
    model.load_state_dict(weights)
    return {
        split: compute(model, datasets[split], batch_size, lengths.get(split)) for split in SPLITS
    }


class _Training:
    """A stage in training: whatever changes from step to step is an attribute, and is saved.

    Attributes:
        steps_of_an_epoch: Optimiser steps in each epoch.
        step: Optimiser steps done.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        objective: Objective,
        datasets: Mapping[str, Dataset],
        dev_targets: Tensor,
        optimisation: Optimisation,
        seed: int,
        hardware: Hardware,
        title: str,
        lengths: Mapping[str, Sequence[int]],
    ) -> None:
        self._started = time.perf_counter()
        self._objective = objective
        self._datasets = datasets
        self._lengths = lengths
        self._dev_targets = dev_targets
        self._optimisation = optimisation
        self._title = title
        self._accelerator = hardware.accelerator()
        self._device = self._accelerator.device
        first = self._accelerator.process_index * hardware.accumulation
        self._own = range(first, first + hardware.accumulation)
        self._parts = self._accelerator.num_processes * hardware.accumulation

        random_state.seed(seed, 0)
        self._order = torch.Generator().manual_seed(seed)
        batches = self._draw()
        check_parts(batches, self._parts, title)
        self.steps_of_an_epoch = len(batches)
        self._bare = build()
        self._prepare(optimisation, optimisation.epochs * len(batches))
        self._streams = [self._begin_stream(seed, part) for part in self._own]
        if len(self._own) == 1:
            random_state.restore(self._streams[0], self._device)

        self.step = 0
        self._epoch_order = self._order.get_state()
        self._total = torch.zeros((), device=self._device)
        self._history: list[Epoch] = []
        self._weights: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is over."""
        count, patience = len(self._history), self._optimisation.patience
        if count >= self._optimisation.epochs:
            return True
        return bool(patience and count and count - self._best.epoch >= patience)

    def steps(self) -> Iterator[None]:
        """Do the rest of the epoch, one optimiser step at a time."""
        self._bare.train()
        done = self.step - len(self._history) * self.steps_of_an_epoch
        self._order.set_state(self._epoch_order)
        for batch in self._draw()[done:]:
            with self._whole():
                self._do(batch)
                self.step += 1
            yield

    def close_epoch(self) -> None:
        """Evaluate the epoch on dev, note what it gave, and keep its weights if it is the best.

        Raises:
            TrainingError: The loss is not finite.
        """
        number = len(self._history) + 1
        if not self._total.isfinite():
            raise TrainingError(
                f"{self._title}: the loss of epoch {number} is {self._total.item()}; lower the "
                "learning rate, or train without mixed precision"
            )
        dev = self._compute_split("dev")
        score = weighted_f1(self._dev_targets, dev["logits"])
        with self._whole():
            loss = self._total.item() / len(self._datasets["train"])
            self._history.append(Epoch(number, loss, score))
            self._total = torch.zeros_like(self._total)
            self._epoch_order = self._order.get_state()
            if self._best.epoch == number:
                self._weights = {
                    name: value.detach().cpu().clone()
                    for name, value in self._bare.state_dict().items()
                }

    def describe(self) -> str:
        """The last epoch, for the progress bar."""
        last = self._history[-1]
        return f"epoch {last.epoch}, dev {100 * last.dev_weighted_f1:.2f}"

    def result(self) -> Trained:
        """The best epoch, and what it says about every split."""
        outputs = _say(
            self._bare, self._weights, self._datasets, self._optimisation.batch_size, self._lengths
        )
        return Trained(
            self._weights, outputs, tuple(self._history), self._best.epoch, self._seconds
        )

    def save(self, checkpoints: Checkpoints) -> None:
        """Save everything that the rest depends on; called by all processes at the same step."""
        streams = self._streams
        if len(self._own) == 1:
            streams = [random_state.read(self._device)]
        streams = processes.gather(streams)
        if not processes.first():
            return
        optimiser = self._optimiser.state_dict()
        scaler = self._accelerator.scaler
        checkpoints.save(
            self.step,
            len(self._history),
            {
                "device": self._device.type,
                "step": self.step,
                "history": [asdict(epoch) for epoch in self._history],
                "seconds": self._seconds,
                "order": self._epoch_order,
                "total": self._total,
                "streams": streams,
                "schedule": self._schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "optimiser": {
                    "groups": optimiser["param_groups"],
                    "state": {str(index): held for index, held in optimiser["state"].items()},
                },
                "objective": (
                    self._objective.state_dict() if isinstance(self._objective, Stateful) else {}
                ),
                "weights": self._bare.state_dict(),
                "best": self._weights,
            },
        )

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            InputError: It was saved on another kind of device.
        """
        path = processes.tell(checkpoints.newest() if processes.first() else None)
        if path is None:
            return
        state = checkpoints.load(path)
        if state["device"] != self._device.type:
            raise InputError(
                f"{path}: expected a checkpoint of the device {self._device.type}, got one of "
                f"{state['device']}; go on with --device {state['device']}, or remove {path.parent}"
            )
        self.step = state["step"]
        self._history = [Epoch(**epoch) for epoch in state["history"]]
        self._started -= state["seconds"]
        self._epoch_order = state["order"]
        self._total = state["total"].to(self._device)
        self._weights = state["best"]
        self._bare.load_state_dict(state["weights"])
        if isinstance(self._objective, Stateful):
            self._objective.load_state_dict(state["objective"])
        self._optimiser.load_state_dict(
            {
                "param_groups": state["optimiser"]["groups"],
                "state": {int(index): held for index, held in state["optimiser"]["state"].items()},
            }
        )
        self._schedule.load_state_dict(state["schedule"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._streams = [state["streams"][part] for part in self._own]
        if len(self._own) == 1:
            random_state.restore(self._streams[0], self._device)

    @property
    def _best(self) -> Epoch:
        """The first of the best epochs so far; there is one."""
        return max(self._history, key=lambda epoch: epoch.dev_weighted_f1)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _draw(self) -> list[list[int]]:
        return draw_batches(
            len(self._datasets["train"]), self._optimisation.batch_size, self._order
        )

    def _prepare(self, optimisation: Optimisation, steps: int) -> None:
        optimiser = torch.optim.AdamW(
            self._bare.parameters(),
            lr=optimisation.learning_rate,
            weight_decay=optimisation.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate_share(step, steps, optimisation.warmup)
        )
        # Where a process leaves a layer out, its gradients are not to be waited for.
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=leaves_layers_out(self._bare)
        )
        self._model, self._optimiser, self._schedule = self._accelerator.prepare(
            self._bare, optimiser, schedule
        )

    def _begin_stream(self, seed: int, part: int) -> RandomState:
        """The first part goes on where building the model stopped."""
        if part:
            random_state.seed(seed, part)
        return random_state.read(self._device)

    def _whole(self) -> AbstractContextManager[None]:
        """Keep Ctrl-C from tearing what belongs together."""
        return uninterrupted() if processes.count() == 1 else nullcontext()

    def _do(self, batch: Sequence[int]) -> None:
        """One optimiser step."""
        self._optimiser.zero_grad()
        parts = cut(batch, self._parts)[self._own.start : self._own.stop]
        share = Share(
            torch.tensor([row for part in parts for row in part], device=self._device),
            torch.tensor(batch, device=self._device),
        )
        inputs = [send_to_device(self._datasets["train"][part], self._device) for part in parts]
        if len(inputs) == 1:
            loss = self._objective(self._model(**inputs[0]), share)
            self._accelerator.backward(loss)
        else:
            loss = self._accumulate(inputs, share)
        # Unscales the gradients first.
        self._accelerator.clip_grad_norm_(
            self._model.parameters(), self._optimisation.max_gradient_norm
        )
        self._optimiser.step()
        self._schedule.step()
        mean = processes.add(loss.detach()) / processes.count()
        self._total += mean * len(batch)

    def _accumulate(self, inputs: Sequence[Mapping[str, Tensor]], share: Share) -> Tensor:
        """Add up the gradient of the whole batch's loss, holding the graph of one part at a time.

        A part goes through the model twice, both times from where its own generators stand, those
        of Python and NumPy included, which the library leaves to its callers.
        """
        ends = [*self._streams]
        kind: Any = None
        loss = torch.zeros(())

        def forward(part: int) -> Any:  # noqa: ANN401
            nonlocal kind
            random_state.restore(self._streams[part], self._device)
            output = self._model(**inputs[part])
            ends[part] = random_state.read(self._device)
            kind = type(output)
            return output

        def criterion(*fields: Tensor) -> Tensor:
            nonlocal loss
            loss = self._objective(kind(*fields), share)
            scaler = self._accelerator.scaler
            return loss if scaler is None else scaler.scale(loss)

        accumulate_gradient(
            range(len(inputs)),
            forward,
            criterion,
            no_sync=lambda: self._accelerator.no_sync(self._model),
        )
        self._streams = ends
        return loss

    def _compute_split(self, split: str) -> dict[str, Tensor]:
        return compute(
            self._bare,
            self._datasets[split],
            self._optimisation.batch_size,
            self._lengths.get(split),
        )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block.

    Raises:
        KeyboardInterrupt: At the end, if it came.
    """
    came = False

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    if threading.current_thread() is not threading.main_thread():  # which alone receives it
        yield
        return
    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@torch.no_grad()
def compute(
    model: nn.Module, dataset: Dataset, batch_size: int, lengths: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Compute a model's outputs for a whole split, in row order.

    Several processes share the work; the batches are the same. No batch holds rows of two
    dialogues, for the last bits of a row may depend on its batch: what is said about a dialogue
    is then the same to the bit wherever it stands.

    Args:
        model: Called as ``model(**batch)``; it returns a named tuple of ``[B, ...]`` tensors.
        dataset: N rows.
        batch_size: Rows at a time, >= 1.
        lengths: The number of rows of each dialogue, in order; ``None``: all are one dialogue.

    Returns:
        The fields of the tuple, each ``[N, ...]``, float32, on the CPU; the same in each process.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = list(range(len(dataset)))
    ends = list(accumulate([len(rows)] if lengths is None else lengths, initial=0))
    batches = [
        rows[first : min(first + batch_size, end)]
        for start, end in pairwise(ends)
        for first in range(start, end, batch_size)
    ]
    shared = 1 < processes.count() <= len(batches)
    own = batches[processes.index() :: processes.count()] if shared else batches
    whole: dict[str, Tensor] = {}
    for batch in own:
        for name, part in model(**send_to_device(dataset[batch], device))._asdict().items():
            if name not in whole:
                whole[name] = part.new_zeros(len(rows), *part.shape[1:])
            whole[name][batch[0] : batch[-1] + 1] = part
    if shared:  # what is another's is still zero
        whole = {name: processes.add(values) for name, values in whole.items()}
    return {name: values.cpu() for name, values in whole.items()}


def leaves_layers_out(model: nn.Module) -> bool:
    """Whether a step may pass by some parameters, as speech encoders do at random.

    Args:
        model: With the configurations of transformers, if it has parts of theirs.
    """
    options = ("layerdrop", "encoder_layerdrop", "apply_spec_augment")
    configurations = [getattr(part, "config", None) for part in model.modules()]
    return any(
        bool(getattr(configuration, option, False))
        for configuration in configurations
        for option in options
    )


def cut(batch: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a batch into parts, in order, whose sizes differ by at most one.

    Args:
        batch: The rows.
        parts: >= 1.

    Returns:
        The parts, the longer ones first.
    """
    size, longer = divmod(len(batch), parts)
    ends = [size * part + min(part, longer) for part in range(parts + 1)]
    return [list(batch[start:end]) for start, end in pairwise(ends)]


def check_parts(batches: Sequence[Sequence[int]], parts: int, title: str) -> None:
    """Refuse batches that cannot be cut into parts.

    Args:
        batches: As :func:`draw_batches` draws them.
        parts: Into how many each is to be cut.
        title: Of the corpus or the stage, for the message.

    Raises:
        InputError: A batch has fewer rows than parts.
    """
    smallest = min(map(len, batches))
    if smallest < parts:
        raise InputError(
            f"{title}: expected at least {parts} rows in every batch, one for each part that "
            f"processes and --accumulate cut it into, got {smallest}; take fewer processes, a "
            "lower --accumulate or another --batch-size"
        )


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
