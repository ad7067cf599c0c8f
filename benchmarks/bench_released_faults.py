"""What the released formulas do at the edges, and what this library does there.

Each row is one fault of the files that people copy, with its figure, beside ours. The released
formula is the library's own ``eps=1e-8`` definition, called without the library's precision rules
where the fault lies in them.

Run ``python benchmarks/bench_released_faults.py [--annotations FOLDER]``; it writes
``benchmarks/results/<version>/released_faults--cpu.json``. ``FOLDER`` holds the annotation files
that the released repository ships (``meld_csv`` and ``iemocap_csv``); without it the rows about
annotations are left out.
"""

import argparse
import csv
import json
import platform
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

import telme_kd
from telme_kd import AttentionShiftingFusion
from telme_kd.functional import (
    batch_similarity_loss,
    bounded_shift,
    dist_loss,
    intra_class_loss,
)
from telme_kd.reference import dist as definition

RESULTS = Path(__file__).parent / "results" / telme_kd.__version__
TEMPERATURE = 4.0  # MELD's


def equal_logits(num_classes: int) -> dict[str, float]:
    """Loss over τ² of a student that equals its teacher: 64 items, standard normal logits."""
    logits = torch.randn(64, num_classes, generator=torch.manual_seed(0))
    return {
        name: dist_loss(logits, logits, temperature=TEMPERATURE, eps=eps).item() / TEMPERATURE**2
        for name, eps in (("released", 1e-8), ("telme_kd", None))
    }


def largest_gradient(student: Tensor, teacher: Tensor, eps: float | None) -> float:
    """Largest entry of the gradient that a student's logits receive."""
    student = student.clone().requires_grad_()
    dist_loss(student, teacher, temperature=TEMPERATURE, eps=eps).backward()
    assert student.grad is not None
    return student.grad.abs().max().item()


def zero_head() -> dict[str, float]:
    """Largest gradient entry of a zero-initialised head, [4, 7]."""
    teacher = torch.randn(4, 7, generator=torch.manual_seed(0))
    student = torch.zeros(4, 7)
    return {
        "released": largest_gradient(student, teacher, 1e-8),
        "telme_kd": largest_gradient(student, teacher, None),
    }


def half_precision() -> dict[str, float]:
    """Of three float16 batches (one row, constant rows, all zero), how many give a NaN."""
    noise = torch.randn(3, 7, generator=torch.manual_seed(0))
    students = (noise[:1], noise[:, :1].expand(3, 7), torch.zeros(3, 7))
    counts = {"released": 0.0, "telme_kd": 0.0}
    for student in students:
        student, teacher = student.half(), noise[: len(student)].half()
        released = definition.dist_loss(
            student,
            teacher,
            temperature=TEMPERATURE,
            inter_weight=1.0,
            intra_weight=1.0,
            mask=None,
            eps=1e-8,
        )
        counts["released"] += float(released.isnan())
        ours = dist_loss(student, teacher, temperature=TEMPERATURE)
        counts["telme_kd"] += float(ours.isnan())
    return counts


def large_features() -> dict[str, float]:
    """Batch-similarity loss of unrelated features at 1e20, [8, 768]; truth: their loss at 1."""
    student, teacher = torch.randn(2, 8, 768, generator=torch.manual_seed(0))
    normalise = nn.functional.normalize
    student_unit, teacher_unit = normalise(student * 1e20), normalise(teacher * 1e20)
    released = nn.functional.kl_div(
        (teacher_unit @ student_unit.T).log_softmax(-1),
        (teacher_unit @ teacher_unit.T).softmax(-1),
        reduction="batchmean",
    )
    return {
        "released": released.item(),
        "telme_kd": batch_similarity_loss(student * 1e20, teacher * 1e20).item(),
        "truth": batch_similarity_loss(student.double(), teacher.double()).item(),
    }


def large_shift() -> dict[str, float]:
    """Share of NaN in a shift of anchors at 1e18 by displacements at 1e20, [8, 768], float32."""
    anchor, displacement = torch.randn(2, 8, 768, generator=torch.manual_seed(0))
    anchor, displacement = anchor * 1e18, displacement * 1e20
    return {
        name: bounded_shift(anchor, displacement, threshold=0.1, eps=eps)
        .isnan()
        .float()
        .mean()
        .item()
        for name, eps in (("released", 1e-6), ("telme_kd", None))
    }


def company() -> dict[str, float]:
    """Largest change of a fusion logit if an utterance comes alone instead of in a batch of 32."""
    torch.manual_seed(0)
    inputs = [torch.randn(32, 768) for _ in range(3)]
    changes = {}
    for name, attend_over in (("released", "batch"), ("telme_kd", "modalities")):
        head = AttentionShiftingFusion(
            768, (768, 768), num_heads=3, attend_over=attend_over, num_classes=7
        ).eval()
        with torch.no_grad():
            together = head(*inputs)
            alone = torch.cat([head(*(x[i : i + 1] for x in inputs)) for i in range(32)])
        changes[name] = (together - alone).abs().max().item()
    return changes


def shards() -> dict[str, float]:
    """Intra-class loss of [64, 7] as one batch, and as the mean over sixteen shards of four."""
    teacher, noise = torch.randn(2, 64, 7, generator=torch.manual_seed(0))
    student = teacher + noise
    parts = zip(student.split(4), teacher.split(4), strict=True)
    return {
        "whole": intra_class_loss(student, teacher).item(),
        "shards": sum(intra_class_loss(*part).item() for part in parts) / 16,
    }


def annotations(folder: Path) -> dict[str, dict[str, float]]:
    """Faults in the released annotation files and in how the released scripts read them."""
    meld = read_csv(folder / "meld_csv" / "train_meld_emo.csv")
    control = re.compile("[\x80-\x9f]")
    damaged = sum(bool(control.search(row["Utterance"])) for row in meld)
    dialogues = [list(rows) for _, rows in groupby(meld, key=lambda row: row["Dialogue_ID"])]
    iemocap = read_csv(folder / "iemocap_csv" / "IEMOCAP_train.csv")
    beyond_nine = 0
    for _, rows in groupby(iemocap, key=lambda row: row["Dialogue_ID"]):
        beyond_nine += max(0, len({row["Speaker"] for row in rows}) - 9)
    return {
        "meld_train_utterances_with_control_characters": {
            "released": damaged,
            "of": len(meld),
        },
        "meld_train_dialogues_whose_first_speaker_is_not_the_first": {
            "released": misnumbered(dialogues),
            "of": len(dialogues),
        },
        "iemocap_train_utterances_beyond_nine_speaker_tokens": {
            "released": beyond_nine,
            "of": len(iemocap),
        },
    }


def misnumbered(dialogues: list[list[dict[str, str]]]) -> int:
    """Dialogues whose first turn does not get the first speaker token.

    The released reader numbers a dialogue's first turn by the list of the dialogue before, and then
    empties the list without entering that turn's speaker.
    """
    count = 0
    known: list[str] = []
    for dialogue in dialogues:
        first = dialogue[0]["Speaker"]
        count += bool(known) and known[0] != first
        known = list(dict.fromkeys(row["Speaker"] for row in dialogue[1:]))
    return count


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


FAULTS: dict[str, Callable[[], dict[str, float]]] = {
    "equal_logits_7": lambda: equal_logits(7),
    "equal_logits_1000": lambda: equal_logits(1000),
    "equal_logits_50000": lambda: equal_logits(50000),
    "zero_head_gradient": zero_head,
    "half_precision_nan": half_precision,
    "features_at_1e20": large_features,
    "shift_at_1e18": large_shift,
    "company": company,
    "shards": shards,
}


def main() -> None:
    """Measure every fault and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=Path)
    folder = parser.parse_args().annotations
    rows = {name: measure() for name, measure in FAULTS.items()}
    if folder is not None:
        rows |= annotations(folder)
    for name, row in rows.items():
        print(name, {key: f"{value:.4g}" for key, value in row.items()})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "released_faults--cpu.json"
    document = {
        "experiment": "released_faults",
        "command": "python benchmarks/bench_released_faults.py --annotations FOLDER",
        "device": "cpu",
        "versions": {
            "telme_kd": telme_kd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
