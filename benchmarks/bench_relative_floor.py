"""Which relative floor lets a zero-initialised student learn?

A linear student learns from labels and a small teacher network, by cross-entropy plus DIST, with
SGD (learning rate 0.1, momentum 0.9, no clipping). Started at zero, its predictions are constant,
where Pearson correlation has no derivative and every definition of the loss must choose one. The
released formula's choice throws the student to gradients of a million. This experiment trains

- the released formula and the scale-free one from the usual initialisation: the bar to reach;
- both from zero;
- from zero, a grid of the two constants of the scale-free definition: below ``RELATIVE_FLOOR`` of
  its norm a vector counts as constant, and a constant is pulled as hard as a vector that varies by
  ``CONSTANT_GRADIENT_LIKE`` of its norm. Where the two are equal it is a plain floor.

Run ``python benchmarks/bench_relative_floor.py``; it writes
``benchmarks/results/<version>/relative_floor--cpu.json`` and takes about ten minutes on two cores.
"""

import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import telme_kd
from telme_kd import DISTLoss
from telme_kd.reference import dist as definition

SEEDS = range(5)
RESULTS = Path(__file__).parent / "results" / telme_kd.__version__


@dataclass(frozen=True)
class Task:
    """Inputs and labels of two splits, and what the teacher says about the first."""

    name: str
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    teacher_logits: Tensor


@dataclass(frozen=True)
class Setting:
    """One way to train the student."""

    initialisation: str  # "default" or "zero"
    eps: float | None
    floor: float  # of the scale-free definition; unused with eps
    constant_like: float
    temperature: float
    batch_size: int


def digits() -> Task:
    """Handwritten digits: 64 standardised pixels, 10 classes."""
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.manual_seed(0))
    inputs, labels = inputs[order], labels[order]
    inputs = (inputs - inputs[:1200].mean(0)) / (inputs[:1200].std(0) + 1e-3)
    return taught("digits", inputs, labels, 1200)


def clusters() -> Task:
    """Seven overlapping Gaussian clusters, inputs of unit length: small steps near the floor."""
    generator = torch.manual_seed(0)
    centres = 0.6 * torch.randn(7, 32, generator=generator)
    labels = torch.randint(0, 7, (3000,), generator=generator)
    inputs = centres[labels] + torch.randn(3000, 32, generator=generator)
    return taught("clusters", nn.functional.normalize(inputs), labels, 2000)


def taught(name: str, inputs: Tensor, labels: Tensor, train_size: int) -> Task:
    """Split a data set and train a two-layer teacher on the first part."""
    torch.manual_seed(1)
    classes = int(labels.max()) + 1
    teacher = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, classes))
    optimiser = torch.optim.Adam(teacher.parameters(), 1e-2)
    train_inputs, train_labels = inputs[:train_size], labels[:train_size]
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(teacher(train_inputs), train_labels).backward()
        optimiser.step()
    with torch.no_grad():
        logits = teacher(train_inputs)
    return Task(name, train_inputs, train_labels, inputs[train_size:], labels[train_size:], logits)


def settings() -> Iterator[Setting]:
    """Every setting, the bars first."""
    ours = (definition.RELATIVE_FLOOR, definition.CONSTANT_GRADIENT_LIKE)
    plain_floors = [(floor, floor) for floor in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)]
    gentle = [(floor, 1e-1) for floor in (1e-2, 1e-3, 1e-4)] + [(1e-3, 1.0)]
    for temperature, batch_size in ((1.0, 64), (4.0, 64), (4.0, 4)):
        yield Setting("default", 1e-8, *ours, temperature, batch_size)
        yield Setting("default", None, *ours, temperature, batch_size)
        yield Setting("zero", 1e-8, *ours, temperature, batch_size)
        for floor, constant_like in plain_floors + gentle:
            yield Setting("zero", None, floor, constant_like, temperature, batch_size)


def train(task: Task, setting: Setting, seed: int) -> dict[str, float]:
    """Train one student; return its test accuracy and gradient norms."""
    torch.manual_seed(seed)
    student = nn.Linear(task.inputs.shape[1], task.teacher_logits.shape[1])
    if setting.initialisation == "zero":
        nn.init.zeros_(student.weight)
        nn.init.zeros_(student.bias)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    criterion = DISTLoss(setting.temperature, eps=setting.eps)
    gradient_norms = []
    with (
        mock.patch.object(definition, "RELATIVE_FLOOR", setting.floor),
        mock.patch.object(definition, "CONSTANT_GRADIENT_LIKE", setting.constant_like),
    ):
        for _ in range(10 if setting.batch_size > 4 else 3):
            for rows in torch.randperm(len(task.labels)).split(setting.batch_size):
                optimiser.zero_grad()
                logits = student(task.inputs[rows])
                loss = nn.functional.cross_entropy(logits, task.labels[rows])
                (loss + criterion(logits, task.teacher_logits[rows])).backward()
                norm = nn.utils.get_total_norm([p.grad for p in student.parameters()])
                gradient_norms.append(norm.item())
                optimiser.step()
    with torch.no_grad():
        logits = student(task.test_inputs)
    return {
        "accuracy": (logits.argmax(1) == task.test_labels).float().mean().item(),
        "cross_entropy": nn.functional.cross_entropy(logits, task.test_labels).item(),
        "first_gradient_norm": gradient_norms[0],
        "largest_gradient_norm": max(gradient_norms),
    }


def main() -> None:
    """Train every setting on every task and write the result file."""
    torch.set_num_threads(1)
    rows = []
    work = [(task, setting) for task in (digits(), clusters()) for setting in settings()]
    for task, setting in tqdm(work, desc="relative floor"):
        runs = [train(task, setting, seed) for seed in SEEDS]
        summary = {
            measure: {
                "mean": statistics.fmean(run[measure] for run in runs),
                "standard_deviation": statistics.stdev(run[measure] for run in runs),
            }
            for measure in runs[0]
        }
        rows.append({"task": task.name, **asdict(setting), **summary})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "relative_floor--cpu.json"
    document = {
        "experiment": "relative_floor",
        "command": "python benchmarks/bench_relative_floor.py",
        "device": "cpu",
        "versions": {
            "telme_kd": telme_kd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seeds": len(SEEDS),
        "chosen": {
            "floor": definition.RELATIVE_FLOOR,
            "constant_like": definition.CONSTANT_GRADIENT_LIKE,
        },
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
