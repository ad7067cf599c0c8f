"""Every mistake a user can make: its type, ours and the built-in, and all four parts of its text.

A message says which argument, what was expected, what came, and the remedy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from telme_kd import (
    AttentionShiftingFusion,
    BatchSimilarityLoss,
    DISTLoss,
    RelationMemory,
    ShiftingFusion,
    StudentLoss,
    errors,
)
from telme_kd.errors import (
    BackendError,
    CheckpointError,
    DegenerateBatchWarning,
    DeviceError,
    DistributedError,
    DTypeError,
    RangeError,
    ShapeError,
    TelmeKDError,
)
from telme_kd.functional import (
    batch_similarity_loss,
    bounded_shift,
    dist_loss,
    inter_class_loss,
    intra_class_loss,
    linear_dist_loss,
    sharded_dist_loss,
)

BUILT_IN = {
    ShapeError: ValueError,
    RangeError: ValueError,
    DTypeError: TypeError,
    DeviceError: ValueError,
    BackendError: RuntimeError,
    DistributedError: RuntimeError,
    CheckpointError: ValueError,
}

X = torch.randn(4, 7, generator=torch.manual_seed(0))
META = X.to("meta")
W = torch.randn(9, 7, generator=torch.manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 6])
MASK = torch.ones(4, dtype=torch.bool)
INF, NAN = float("inf"), float("nan")

POSITIVE_TEXT = "a finite number > 0( whose square is too)?"

# Who calls, the class of the error, the argument, what was expected, what came, the remedy.
Mistake = tuple[Callable[[], Any], type[TelmeKDError], str, str, str, str]


def _pair_mistakes(
    name: str, loss: Callable[..., Any], what: str, remedy: str
) -> dict[str, Mistake]:
    student, teacher = f"student_{what}", f"teacher_{what}"
    tensor, floating = r"a torch\.Tensor", "a real floating dtype"
    two, matching = f"at least 2 axes, a batch and its {what}", rf"\(4, 7\) to match {student}"
    empty = "skip the loss for an empty batch"
    return {
        f"{name}: list": (
            lambda: loss([[1.0]], X), DTypeError, student, tensor, "a list", "use torch.as_tensor",
        ),
        f"{name}: no teacher": (
            lambda: loss(X, None), DTypeError, teacher, tensor, "a NoneType", "use torch.as_tensor",
        ),
        f"{name}: integers": (
            lambda: loss(X.long(), X), DTypeError, student, floating, r"torch\.int64",
            rf"use {student}\.float\(\)",
        ),
        f"{name}: bool teacher": (
            lambda: loss(X, X > 0), DTypeError, teacher, floating, r"torch\.bool",
            rf"use {teacher}\.float\(\)",
        ),
        f"{name}: complex": (
            lambda: loss(X, X + 0j), DTypeError, teacher, floating, r"torch\.complex64", "use .*",
        ),
        f"{name}: one axis": (
            lambda: loss(X[0], X[0]), ShapeError, student, two, r"shape \(7,\)",
            r"for a single item use \.unsqueeze\(0\)",
        ),
        f"{name}: teacher with one axis": (
            lambda: loss(X, X[0]), ShapeError, teacher, two, r"shape \(7,\)", "for a single .*",
        ),
        f"{name}: widths differ": (
            lambda: loss(X, X[:, :6]), ShapeError, teacher, matching, r"\(4, 6\)", remedy,
        ),
        f"{name}: one teacher for all": (
            lambda: loss(X, X[:1]), ShapeError, teacher, matching, r"\(1, 7\)", remedy,
        ),
        f"{name}: axes differ": (
            lambda: loss(X, X[None]), ShapeError, teacher, matching, r"\(1, 4, 7\)", remedy,
        ),
        f"{name}: devices differ": (
            lambda: loss(X, META), DeviceError, teacher, f"device cpu as {student}", "meta",
            rf"use {teacher}\.to\('cpu'\)",
        ),
        f"{name}: no items": (
            lambda: loss(X[:0], X[:0]), ShapeError, student, "at least one item and one column",
            r"shape \(0, 7\)", empty,
        ),
        f"{name}: no columns": (
            lambda: loss(X[:, :0], X[:, :0]), ShapeError, student,
            "at least one item and one column", r"shape \(4, 0\)", empty,
        ),
        f"{name}: no items in the second batch axis": (
            lambda: loss(X.reshape(2, 2, 7)[:, :0], X.reshape(2, 2, 7)[:, :0]), ShapeError, student,
            "at least one item and one column", r"shape \(2, 0, 7\)", empty,
        ),
        f"{name}: float mask": (
            lambda: loss(X, X, mask=torch.ones(4)), DTypeError, "mask",
            r"dtype torch\.bool \(True keeps an item\)", r"torch\.float32", r"use mask\.bool\(\)",
        ),
        f"{name}: list mask": (
            lambda: loss(X, X, mask=[True] * 4), DTypeError, "mask", "a bool tensor", "a list",
            r"use torch\.tensor\(\.\.\., dtype=bool\)",
        ),
        f"{name}: short mask": (
            lambda: loss(X, X, mask=MASK[:3]), ShapeError, "mask", r"the batch axes \(4,\)",
            r"\(3,\)", "give one entry per item",
        ),
        f"{name}: mask per entry": (
            lambda: loss(X, X, mask=X > 0), ShapeError, "mask", r"the batch axes \(4,\)",
            r"\(4, 7\)", "give one entry per item",
        ),
        f"{name}: mask elsewhere": (
            lambda: loss(X, X, mask=MASK.to("meta")), DeviceError, "mask",
            "device cpu as the tensors it masks", "meta", r"use mask\.to\('cpu'\)",
        ),
        f"{name}: number as group": (
            lambda: loss(X, X, group=3), DTypeError, "group",
            r"a torch\.distributed\.ProcessGroup, 'world' or None", "an? int",
            r"make one with torch\.distributed\.new_group\(\)",
        ),
        f"{name}: no processes": (
            lambda: loss(X, X, group="world"), DistributedError, "group",
            r"an initialised torch\.distributed", "none",
            r"call torch\.distributed\.init_process_group\(\) first, or pass group=None",
        ),
        f"{name}: unknown backend": (
            lambda: loss(X, X, backend="cuda"), RangeError, "backend",
            "one of 'auto', 'reference', .*", "'cuda'", "check the spelling",
        ),
        f"{name}: no backend": (
            lambda: loss(X, X, backend=None), RangeError, "backend", "one of 'auto', .*", "None",
            "check the spelling",
        ),
        f"{name}: temperature as text": (
            lambda: loss(X, X, temperature="1"), DTypeError, "temperature", POSITIVE_TEXT,
            "a str", "pass a Python number",
        ),
        f"{name}: temperature as tensor": (
            lambda: loss(X, X, temperature=torch.ones(())), DTypeError, "temperature",
            POSITIVE_TEXT, "a Tensor", "pass a Python number",
        ),
    }  # fmt: skip


def _number_mistakes(
    name: str, call: Callable[[Any], Any], argument: str, expectation: str, values: list[Any]
) -> dict[str, Mistake]:
    remedies = {
        POSITIVE_TEXT: r"(1\.0 is neutral|pass a Python number)",
        "a finite number >= 0": r"(0 switches its effect off|pass a Python number)",
        r"a number in \[0, 1\)": r"(0 switches it off|pass a Python number)",
        "an integer >= 1": "counts start at 1",
        "an integer >= 0": "0 does without a memory",
        "an integer": r"use int\(\.\.\.\)",
    }
    return {
        f"{name}: {argument}={value!r}": (
            (lambda value=value: call(value)),
            RangeError if isinstance(value, (int, float)) and not isinstance(value, bool)
            and expectation != "an integer" else DTypeError,
            argument, expectation, ".+", remedies[expectation],
        )
        for value in values
    }  # fmt: skip


POSITIVE = [0, 0.0, -1, -1e-300, 1e-300, 1e200, NAN, INF, -INF, None, True, "4", [4.0], 1j]
NON_NEGATIVE = [-1, -1e-300, NAN, INF, -INF, True, "4", 1j]
COUNT = [0, -1]
INTEGER = [1.0, "1", None, True, NAN]


def _after(loss: torch.nn.Module, rows: torch.Tensor) -> torch.nn.Module:
    """A loss that has seen a batch."""
    loss(rows, rows)
    return loss


MISTAKES: dict[str, Mistake] = {
    **_pair_mistakes(
        "dist_loss", dist_loss, "logits", "both must score the same items over the same label set"
    ),
    **_pair_mistakes(
        "batch_similarity_loss", batch_similarity_loss, "features",
        "project the student's features to the teacher's width first",
    ),
    # dist_loss alone
    "class_dim beyond": (
        lambda: dist_loss(X, X, class_dim=2), RangeError, "class_dim",
        r"an axis of student_logits \(4, 7\)", "2", "-1 is the last axis",
    ),
    "class_dim before": (
        lambda: dist_loss(X, X, class_dim=-3), RangeError, "class_dim",
        r"an axis of student_logits \(4, 7\)", "-3", "-1 is the last axis",
    ),
    "mask over class_dim's batch": (
        lambda: dist_loss(X, X, class_dim=0, mask=MASK), ShapeError, "mask",
        r"the batch axes \(7,\)", r"\(4,\)", "give one entry per item",
    ),
    "inter_class_loss": (
        lambda: inter_class_loss(X, X[:1]), ShapeError, "teacher_logits",
        r"\(4, 7\) to match student_logits", r"\(1, 7\)", "both must .*",
    ),
    "intra_class_loss": (
        lambda: intra_class_loss(X, X, temperature=-1), RangeError, "temperature",
        POSITIVE_TEXT, "-1", r"1\.0 is neutral",
    ),
    **_number_mistakes(
        "dist_loss", lambda v: dist_loss(X, X, class_dim=v), "class_dim", "an integer", INTEGER
    ),
    **_number_mistakes(
        "dist_loss", lambda v: dist_loss(X, X, temperature=v), "temperature",
        POSITIVE_TEXT, POSITIVE,
    ),
    **_number_mistakes(
        "dist_loss", lambda v: dist_loss(X, X, inter_weight=v), "inter_weight",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "dist_loss", lambda v: dist_loss(X, X, intra_weight=v), "intra_weight",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "dist_loss", lambda v: dist_loss(X, X, eps=v), "eps", "a finite number >= 0", NON_NEGATIVE
    ),
    **_number_mistakes(
        "batch_similarity_loss", lambda v: batch_similarity_loss(X, X, temperature=v),
        "temperature", POSITIVE_TEXT, POSITIVE,
    ),
    # memory
    **_number_mistakes(
        "RelationMemory", lambda v: RelationMemory(v), "size", "an integer >= 1", COUNT
    ),
    **_number_mistakes(
        "RelationMemory", lambda v: RelationMemory(v), "size", "an integer", INTEGER
    ),
    **{
        name: mistake
        for module in (DISTLoss, BatchSimilarityLoss, StudentLoss)
        for name, mistake in {
            **_number_mistakes(
                module.__name__, lambda v, module=module: module(memory_size=v), "memory_size",
                "an integer >= 0", [-1],
            ),
            **_number_mistakes(
                module.__name__, lambda v, module=module: module(memory_size=v), "memory_size",
                "an integer", INTEGER,
            ),
        }.items()
    },
    "StudentLoss: response without the memory": (
        lambda: StudentLoss(response=DISTLoss(), memory_size=8), RangeError, "response",
        "a term with memory_size=8 as the objective's", "0",
        "give the size to the term, and leave it out of the objective or repeat it there",
    ),
    "StudentLoss: feature with another memory": (
        lambda: StudentLoss(feature=BatchSimilarityLoss(memory_size=4), memory_size=8), RangeError,
        "feature", "a term with memory_size=8 as the objective's", "4", "give the size .*",
    ),
    "DISTLoss: other classes than remembered": (
        lambda: _after(DISTLoss(memory_size=8), X)(X[:, :6], X[:, :6]), ShapeError, "memory",
        "rows of width 7, as those that are remembered", "6",
        r"call reset\(\) on the memory, or have a loss for each label set or width",
    ),
    "BatchSimilarityLoss: other features than remembered": (
        lambda: _after(BatchSimilarityLoss(memory_size=8), X)(X[:, :6], X[:, :6]), ShapeError,
        "memory", "rows of width 7, as those that are remembered", "6", "call .*",
    ),
    "DISTLoss: a memory inside a transform": (
        lambda: torch.func.grad(lambda x: DISTLoss(memory_size=8)(x, X))(X), BackendError, "memory",
        r"no transform of torch\.func, inside which it cannot be written", "one",
        r"call \.eval\(\) on the loss, .*, or on its memory, to leave it as it is",
    ),
    "StudentLoss: elsewhere than remembered": (
        lambda: StudentLoss(
            0.0, response=DISTLoss(), feature=_after(BatchSimilarityLoss(memory_size=8), X)
        )(META, META, LABELS.to("meta"), student_features=META, teacher_features=META),
        DeviceError, "memory", "device meta as the batch", "cpu",
        r"use \.to\('meta'\) on the loss",
    ),
    # linear_dist_loss
    "student_hidden: list": (
        lambda: linear_dist_loss([[1.0]], W, X, W), DTypeError, "student_hidden",
        r"a torch\.Tensor", "a list", r"use torch\.as_tensor",
    ),
    "student_weight: layer": (
        lambda: linear_dist_loss(X, torch.nn.Linear(7, 9), X, W), DTypeError, "student_weight",
        r"a torch\.Tensor", "a Linear", r"use torch\.as_tensor",
    ),
    "teacher_weight: integers": (
        lambda: linear_dist_loss(X, W, X, W.long()), DTypeError, "teacher_weight",
        "a real floating dtype", r"torch\.int64", r"use teacher_weight\.float\(\)",
    ),
    "student_hidden: one axis": (
        lambda: linear_dist_loss(X[0], W, X, W), ShapeError, "student_hidden",
        "at least 2 axes, a batch and its hidden states", r"shape \(7,\)",
        r"for a single item use \.unsqueeze\(0\)",
    ),
    "student_hidden: no items": (
        lambda: linear_dist_loss(X[:0], W, X[:0], W), ShapeError, "student_hidden",
        "at least one item and one column", r"shape \(0, 7\)", "skip the loss for an empty batch",
    ),
    "teacher_hidden: no width": (
        lambda: linear_dist_loss(X, W, X[:, :0], W[:, :0]), ShapeError, "teacher_hidden",
        "at least one item and one column", r"shape \(4, 0\)", "skip the loss .*",
    ),
    "student_weight: transposed": (
        lambda: linear_dist_loss(X, W.T, X, W), ShapeError, "student_weight",
        r"\(V, 7\) with V >= 1 for student_hidden \(4, 7\)", r"\(7, 9\)",
        "pass a linear layer's weight as it is",
    ),
    "teacher_weight: one axis": (
        lambda: linear_dist_loss(X, W, X, W[0]), ShapeError, "teacher_weight",
        r"\(V, 7\) with V >= 1 for teacher_hidden \(4, 7\)", r"\(7,\)", "pass a linear .*",
    ),
    "student_weight: no classes": (
        lambda: linear_dist_loss(X, W[:0], X, W[:0]), ShapeError, "student_weight",
        r"\(V, 7\) with V >= 1 for student_hidden \(4, 7\)", r"\(0, 7\)", "pass a linear .*",
    ),
    "student_bias: per width": (
        lambda: linear_dist_loss(X, W, X, W, student_bias=W[0]), ShapeError, "student_bias",
        r"\(9,\) for student_weight \(9, 7\)", r"\(7,\)", "pass a linear layer's bias as it is",
    ),
    "teacher_bias: number": (
        lambda: linear_dist_loss(X, W, X, W, teacher_bias=0.0), DTypeError, "teacher_bias",
        r"a torch\.Tensor", "a float", r"use torch\.as_tensor",
    ),
    "student_weight: dtype": (
        lambda: linear_dist_loss(X, W.half(), X, W), DTypeError, "student_weight",
        r"dtype torch\.float32 as student_hidden", r"torch\.float16",
        r"convert one of them, or call inside torch\.autocast",
    ),
    "teacher_bias: dtype": (
        lambda: linear_dist_loss(X, W, X, W, teacher_bias=W[:, 0].double()), DTypeError,
        "teacher_bias", r"dtype torch\.float32 as teacher_hidden", r"torch\.float64",
        "convert one of them, .*",
    ),
    "student_weight: device": (
        lambda: linear_dist_loss(X, W.to("meta"), X, W), DeviceError, "student_weight",
        "device cpu as student_hidden", "meta", r"use student_weight\.to\('cpu'\)",
    ),
    "teacher_hidden: device": (
        lambda: linear_dist_loss(X, W, META, W.to("meta")), DeviceError, "teacher_hidden",
        "device cpu as student_hidden", "meta", r"use teacher_hidden\.to\('cpu'\)",
    ),
    "teacher_hidden: other items": (
        lambda: linear_dist_loss(X, W, X[:3], W), ShapeError, "teacher_hidden",
        r"the batch axes \(4,\) of student_hidden", r"\(3,\)", "give one row per item in both",
    ),
    "teacher_weight: other classes": (
        lambda: linear_dist_loss(X, W, X, W[:8]), ShapeError, "teacher_weight",
        r"9 classes \(rows\) as student_weight", "8", "both must score the same label set",
    ),
    "linear_dist_loss: short mask": (
        lambda: linear_dist_loss(X, W, X, W, mask=MASK[:3]), ShapeError, "mask",
        r"the batch axes \(4,\)", r"\(3,\)", "give one entry per item",
    ),
    "linear_dist_loss: unknown backend": (
        lambda: linear_dist_loss(X, W, X, W, backend="cuda"), RangeError, "backend",
        "one of 'auto', 'reference', .*", "'cuda'", "check the spelling",
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, chunk_bytes=v), "chunk_bytes",
        "an integer >= 1", COUNT,
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, chunk_bytes=v), "chunk_bytes",
        "an integer", INTEGER,
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, temperature=v), "temperature",
        POSITIVE_TEXT, POSITIVE,
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, inter_weight=v),
        "inter_weight", "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, intra_weight=v),
        "intra_weight", "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "linear_dist_loss", lambda v: linear_dist_loss(X, W, X, W, eps=v), "eps",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    # modules tell at construction
    **_number_mistakes(
        "DISTLoss", lambda v: DISTLoss(temperature=v), "temperature", POSITIVE_TEXT,
        POSITIVE,
    ),
    **_number_mistakes(
        "DISTLoss", lambda v: DISTLoss(1.0, v), "inter_weight", "a finite number >= 0",
        NON_NEGATIVE,
    ),
    **_number_mistakes(
        "DISTLoss", lambda v: DISTLoss(1.0, 1.0, v), "intra_weight", "a finite number >= 0",
        NON_NEGATIVE,
    ),
    **_number_mistakes(
        "DISTLoss", lambda v: DISTLoss(eps=v), "eps", "a finite number >= 0", NON_NEGATIVE
    ),
    **_number_mistakes(
        "DISTLoss", lambda v: DISTLoss(class_dim=v), "class_dim", "an integer", INTEGER
    ),
    **_number_mistakes(
        "BatchSimilarityLoss", BatchSimilarityLoss, "temperature", POSITIVE_TEXT, POSITIVE
    ),
    **{
        f"{module.__name__}: backend": (
            (lambda module=module: module(backend="gpu")), RangeError, "backend",
            "one of 'auto', .*", "'gpu'", "check the spelling",
        )
        for module in (DISTLoss, BatchSimilarityLoss)
    },
    **{
        f"{module.__name__}: group": (
            (lambda module=module: module(group="all")), DTypeError, "group",
            r"a torch\.distributed\.ProcessGroup, 'world' or None", "a str", "make one .*",
        )
        for module in (DISTLoss, BatchSimilarityLoss)
    },
    "sharded_dist_loss: number as group": (
        lambda: sharded_dist_loss(X, X, class_group=3), DTypeError, "class_group",
        r"a torch\.distributed\.ProcessGroup, 'world' or None", "an? int",
        r"make one with torch\.distributed\.new_group\(\)",
    ),
    "sharded_dist_loss: no processes": (
        lambda: sharded_dist_loss(X, X, class_group="world"), DistributedError, "class_group",
        r"an initialised torch\.distributed", "none",
        r"call torch\.distributed\.init_process_group\(\) first, or pass class_group=None",
    ),
    "sharded_dist_loss: shapes": (
        lambda: sharded_dist_loss(X, X[:, :6], class_group=None), ShapeError, "teacher_logits",
        r"\(4, 7\) to match student_logits", r"\(4, 6\)", "both must .*",
    ),
    **_number_mistakes(
        "sharded_dist_loss",
        lambda v: sharded_dist_loss(X, X, class_group=None, temperature=v),
        "temperature", POSITIVE_TEXT, POSITIVE,
    ),
    "StudentLoss: group": (
        lambda: StudentLoss(group="all"), DTypeError, "group",
        r"a torch\.distributed\.ProcessGroup, 'world' or None", "a str", "make one .*",
    ),
    "StudentLoss: response of another group": (
        lambda: StudentLoss(response=DISTLoss(), group="world"), RangeError, "response",
        "a term over the group of the objective", "one over none", "build it with the same group=",
    ),
    # bounded_shift
    "anchor: list": (
        lambda: bounded_shift([1.0], X, threshold=0.1), DTypeError, "anchor",
        r"a torch\.Tensor", "a list", r"use torch\.as_tensor",
    ),
    "displacement: integers": (
        lambda: bounded_shift(X, X.int(), threshold=0.1), DTypeError, "displacement",
        "a real floating dtype", r"torch\.int32", r"use displacement\.float\(\)",
    ),
    "anchor: scalar": (
        lambda: bounded_shift(X[0, 0], X[0, 0], threshold=0.1), ShapeError, "anchor",
        r"\(\.\.\., d\) with d >= 1", r"\(\)", "the last axis is the vector",
    ),
    "anchor: no entries": (
        lambda: bounded_shift(X[:, :0], X[:, :0], threshold=0.1), ShapeError, "anchor",
        r"\(\.\.\., d\) with d >= 1", r"\(4, 0\)", "the last axis is the vector",
    ),
    "displacement: width": (
        lambda: bounded_shift(X, X[:, :6], threshold=0.1), ShapeError, "displacement",
        r"\(4, 7\) to match anchor", r"\(4, 6\)", "project it to the anchor's width first",
    ),
    "displacement: one row for all": (
        lambda: bounded_shift(X, X[:1], threshold=0.1), ShapeError, "displacement",
        r"\(4, 7\) to match anchor", r"\(1, 7\)", "project it .*",
    ),
    "displacement: device": (
        lambda: bounded_shift(X, META, threshold=0.1), DeviceError, "displacement",
        "device cpu as anchor", "meta", r"use displacement\.to\('cpu'\)",
    ),
    **_number_mistakes(
        "bounded_shift", lambda v: bounded_shift(X, X, threshold=v), "threshold",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "bounded_shift", lambda v: bounded_shift(X, X, threshold=0.1, eps=v), "eps",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    # ShiftingFusion
    **_number_mistakes(
        "ShiftingFusion", lambda v: ShiftingFusion(v, 4), "anchor_dim", "an integer >= 1", COUNT
    ),
    **_number_mistakes(
        "ShiftingFusion", lambda v: ShiftingFusion(v, 4), "anchor_dim", "an integer", INTEGER
    ),
    **_number_mistakes(
        "ShiftingFusion", lambda v: ShiftingFusion(4, v), "displacement_dim", "an integer >= 1",
        COUNT,
    ),
    **_number_mistakes(
        "ShiftingFusion", lambda v: ShiftingFusion(4, 4, v), "threshold", "a finite number >= 0",
        NON_NEGATIVE,
    ),
    **_number_mistakes(
        "ShiftingFusion", lambda v: ShiftingFusion(4, 4, eps=v), "eps", "a finite number >= 0",
        NON_NEGATIVE,
    ),
    "ShiftingFusion: anchor width": (
        lambda: ShiftingFusion(6, 7)(X, X), ShapeError, "anchor", r"\(\.\.\., 6\)", r"\(4, 7\)",
        "check the widths given to the constructor",
    ),
    "ShiftingFusion: nonverbal width": (
        lambda: ShiftingFusion(7, 6)(X, X), ShapeError, "nonverbal", r"\(\.\.\., 6\)", r"\(4, 7\)",
        "check the widths given to the constructor",
    ),
    "ShiftingFusion: scalar": (
        lambda: ShiftingFusion(7, 7)(X[0, 0], X), ShapeError, "anchor", r"\(\.\.\., 7\)", r"\(\)",
        "check .*",
    ),
    "ShiftingFusion: integers": (
        lambda: ShiftingFusion(7, 7)(X, X.long()), DTypeError, "nonverbal",
        "a real floating dtype", r"torch\.int64", r"use nonverbal\.float\(\)",
    ),
    "ShiftingFusion: batch": (
        lambda: ShiftingFusion(7, 7)(X, X[:1]), ShapeError, "nonverbal",
        r"the batch axes \(4,\) of anchor", r"\(1,\)", "give one row per item in both",
    ),
    "ShiftingFusion: device": (
        lambda: ShiftingFusion(7, 7)(X, META), DeviceError, "nonverbal", "device cpu as anchor",
        "meta", r"use nonverbal\.to\('cpu'\)",
    ),
    # AttentionShiftingFusion
    **_number_mistakes(
        "AttentionShiftingFusion", lambda v: AttentionShiftingFusion(v, (4,)), "anchor_dim",
        "an integer >= 1", COUNT,
    ),
    **_number_mistakes(
        "AttentionShiftingFusion", lambda v: AttentionShiftingFusion(4, (4,), v), "num_heads",
        "an integer >= 1", COUNT,
    ),
    **_number_mistakes(
        "AttentionShiftingFusion", lambda v: AttentionShiftingFusion(4, (4,), num_classes=v),
        "num_classes", "an integer >= 1", COUNT,
    ),
    **_number_mistakes(
        "AttentionShiftingFusion", lambda v: AttentionShiftingFusion(4, (4,), 2, v), "threshold",
        "a finite number >= 0", NON_NEGATIVE,
    ),
    **_number_mistakes(
        "AttentionShiftingFusion", lambda v: AttentionShiftingFusion(4, (4,), dropout=v),
        "dropout", r"a number in \[0, 1\)", [1, 1.0, -0.1, NAN, INF, True, None, "0"],
    ),
    "student_dims: a number": (
        lambda: AttentionShiftingFusion(4, 4), DTypeError, "student_dims",
        "a tuple of integers >= 1", "an? int", r"for one use \(width,\)",
    ),
    "student_dims: none": (
        lambda: AttentionShiftingFusion(4, ()), RangeError, "student_dims",
        "at least one width", "none", "give one per student",
    ),
    "student_dims: zero": (
        lambda: AttentionShiftingFusion(4, (4, 0)), RangeError, r"student_dims\[1\]",
        "an integer >= 1", "0", "counts start at 1",
    ),
    "student_dims: a fraction": (
        lambda: AttentionShiftingFusion(4, (4.0,)), DTypeError, r"student_dims\[0\]",
        "an integer", "a float", r"use int\(\.\.\.\)",
    ),
    "attend_over": (
        lambda: AttentionShiftingFusion(4, (4,), attend_over="time"), RangeError, "attend_over",
        "one of 'modalities', 'dialogue', 'batch'", "'time'", "check the spelling",
    ),
    "causal without a dialogue": (
        lambda: AttentionShiftingFusion(4, (4,), causal=True), RangeError, "causal",
        "False with attend_over='modalities'", "True", "only a dialogue has a past",
    ),
    "causal over a batch": (
        lambda: AttentionShiftingFusion(4, (4,), attend_over="batch", causal=True), RangeError,
        "causal", "False with attend_over='batch'", "True", "only a dialogue has a past",
    ),
    "causal: a number": (
        lambda: AttentionShiftingFusion(4, (4,), attend_over="dialogue", causal=1), DTypeError,
        "causal", "True or False", "an? int", "pass a bool",
    ),
    "too few students": (
        lambda: AttentionShiftingFusion(7, (7, 7))(X, X), ShapeError, "students",
        r"2 tensors for student_dims \(7, 7\)", "1", "pass them after the anchor, in order",
    ),
    "too many students": (
        lambda: AttentionShiftingFusion(7, (7,))(X, X, X), ShapeError, "students",
        r"1 tensors? for student_dims \(7,\)", "2", "pass them .*",
    ),
    "student's width": (
        lambda: AttentionShiftingFusion(7, (7, 6))(X, X, X), ShapeError, r"students\[1\]",
        r"\(\.\.\., 6\)", r"\(4, 7\)", "check the widths given to the constructor",
    ),
    "student's batch": (
        lambda: AttentionShiftingFusion(7, (7, 7))(X, X, X[:3]), ShapeError, r"students\[1\]",
        r"the batch axes \(4,\) of anchor", r"\(3,\)", "give one row per item in both",
    ),
    "student's device": (
        lambda: AttentionShiftingFusion(7, (7,))(X, META), DeviceError, r"students\[0\]",
        "device cpu as anchor", "meta", r"use students\[0\]\.to\('cpu'\)",
    ),
    "head's anchor width": (
        lambda: AttentionShiftingFusion(6, (7,))(X, X), ShapeError, "anchor", r"\(\.\.\., 6\)",
        r"\(4, 7\)", "check .*",
    ),
    "dialogue without utterances": (
        lambda: AttentionShiftingFusion(7, (7,), attend_over="dialogue")(X[0], X[0]), ShapeError,
        "anchor", "at least 2 axes with attend_over='dialogue'", r"shape \(7,\)",
        r"for a single utterance use \.unsqueeze\(0\)",
    ),
    "batch without items": (
        lambda: AttentionShiftingFusion(7, (7,), attend_over="batch")(X[0], X[0]), ShapeError,
        "anchor", "at least 2 axes with attend_over='batch'", r"shape \(7,\)", "for .*",
    ),
    "mask over modalities": (
        lambda: AttentionShiftingFusion(7, (7,))(X, X, mask=MASK), RangeError, "mask",
        "None with attend_over='modalities'", "a tensor",
        "there items do not see each other, so leave it out",
    ),
    "mask of floats": (
        lambda: AttentionShiftingFusion(7, (7,), attend_over="dialogue")(X, X, mask=X[:, 0]),
        DTypeError, "mask", r"dtype torch\.bool .*", r"torch\.float32", r"use mask\.bool\(\)",
    ),
    "mask's shape": (
        lambda: AttentionShiftingFusion(7, (7,), attend_over="dialogue")(X, X, mask=MASK[:2]),
        ShapeError, "mask", r"the batch axes \(4,\)", r"\(2,\)", "give one entry per item",
    ),
    # StudentLoss
    **_number_mistakes(
        "StudentLoss", StudentLoss, "response_weight", "a finite number >= 0", NON_NEGATIVE
    ),
    **_number_mistakes(
        "StudentLoss", lambda v: StudentLoss(1.0, v), "feature_weight", "a finite number >= 0",
        NON_NEGATIVE,
    ),
    **_number_mistakes(
        "StudentLoss", lambda v: StudentLoss(label_smoothing=v), "label_smoothing",
        r"a number in \[0, 1\)", [1, 1.0, -0.1, NAN, True, None],
    ),
    "response: a function": (
        lambda: StudentLoss(response=dist_loss), DTypeError, "response", "a DISTLoss",
        "a function", r"build one with DISTLoss\(\.\.\.\)",
    ),
    "feature: the other loss": (
        lambda: StudentLoss(feature=DISTLoss()), DTypeError, "feature", "a BatchSimilarityLoss",
        "a DISTLoss", r"build one with BatchSimilarityLoss\(\.\.\.\)",
    ),
    "class_weight: list": (
        lambda: StudentLoss(class_weight=[1.0] * 7), DTypeError, "class_weight",
        r"a torch\.Tensor", "a list", r"use torch\.as_tensor",
    ),
    "class_weight: integers": (
        lambda: StudentLoss(class_weight=LABELS), DTypeError, "class_weight",
        "a real floating dtype", r"torch\.int64", r"use class_weight\.float\(\)",
    ),
    "class_weight: matrix": (
        lambda: StudentLoss(class_weight=X), ShapeError, "class_weight", r"\(C,\)", r"\(4, 7\)",
        "give one weight per class",
    ),
    "class_weight: too few": (
        lambda: StudentLoss(class_weight=torch.ones(6))(X, X, LABELS), ShapeError, "class_weight",
        r"\(7,\) to match student_logits \(4, 7\)", r"\(6,\)", "give one weight per class",
    ),
    "labels: list": (
        lambda: StudentLoss()(X, X, [0] * 4), DTypeError, "labels", "an int64 tensor", "a list",
        r"use torch\.as_tensor",
    ),
    "labels: floats": (
        lambda: StudentLoss()(X, X, X[:, 0]), DTypeError, "labels",
        r"dtype torch\.int64 \(class indices\)", r"torch\.float32", r"use labels\.long\(\)",
    ),
    "labels: too few": (
        lambda: StudentLoss()(X, X, LABELS[:3]), ShapeError, "labels",
        r"the batch axes \(4,\) of student_logits", r"\(3,\)", "give one class index per item",
    ),
    "labels: device": (
        lambda: StudentLoss()(X, X, LABELS.to("meta")), DeviceError, "labels",
        "device cpu as student_logits", "meta", r"use labels\.to\('cpu'\)",
    ),
    "student_features: none": (
        lambda: StudentLoss()(X, X, LABELS, teacher_features=X), DTypeError, "student_features",
        r"a tensor \(\.\.\., d\)", "None", "pass it, or build the loss with feature_weight=0",
    ),
    "teacher_features: none": (
        lambda: StudentLoss()(X, X, LABELS, student_features=X), DTypeError, "teacher_features",
        r"a tensor \(\.\.\., d\)", "None", "pass it, or build the loss with feature_weight=0",
    ),
    "StudentLoss: teacher's classes": (
        lambda: StudentLoss(feature_weight=0)(X, X[:, :6], LABELS), ShapeError, "teacher_logits",
        r"\(4, 7\) to match student_logits", r"\(4, 6\)", "both must .*",
    ),
    "StudentLoss: features": (
        lambda: StudentLoss()(X, X, LABELS, student_features=X, teacher_features=X[:, :3]),
        ShapeError, "teacher_features", r"\(4, 7\) to match student_features", r"\(4, 3\)",
        "project .*",
    ),
    "StudentLoss: student list": (
        lambda: StudentLoss()([1.0], X, LABELS), DTypeError, "student_logits",
        r"a torch\.Tensor", "a list", "use .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_by_argument_expectation_value_and_remedy(name: str) -> None:
    call, ours, argument, expected, got, remedy = MISTAKES[name]
    with pytest.raises(ours, match=rf"^{argument}: expected {expected}, got .*{got}.*; {remedy}$"):
        call()
    with pytest.raises(BUILT_IN[ours]):
        call()
    with pytest.raises(TelmeKDError):
        call()


def test_every_error_is_also_a_built_in_one() -> None:
    ours = [
        value for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]  # fmt: skip
    assert set(ours) == {TelmeKDError, DegenerateBatchWarning, *BUILT_IN}
    for error, built_in in BUILT_IN.items():
        assert issubclass(error, TelmeKDError)
        assert issubclass(error, built_in)
        assert error.__doc__
    assert issubclass(DegenerateBatchWarning, UserWarning)


class ViewsOnly(TorchDispatchMode):
    """Tensors can be looked at and reshaped here, but not computed with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bookkeeping = func.is_view or func in (aten.promote_types.default, aten.new_zeros.default)
        assert bookkeeping, f"{func} ran before the check"
        return func(*args, **kwargs or {})


aten = torch.ops.aten
FUSION = AttentionShiftingFusion(7, (7, 7))
DIALOGUE = AttentionShiftingFusion(7, (7,), attend_over="dialogue")


@pytest.mark.parametrize(
    "call",
    [
        partial(dist_loss, X, X, temperature=0),
        partial(dist_loss, X, X, eps=-1),
        partial(dist_loss, X, X, backend="gpu"),
        partial(dist_loss, X.double(), X, backend="triton"),
        partial(dist_loss, X, X, group="world"),
        partial(dist_loss, X, X, mask=MASK[:2]),
        partial(batch_similarity_loss, X, X, temperature=0),
        partial(batch_similarity_loss, X, X, backend="gpu"),
        partial(bounded_shift, X, X, threshold=-1),
        partial(ShiftingFusion(7, 7), X, X[:2]),
        partial(FUSION, X, X, X[:2]),
        partial(DIALOGUE, X, X, mask=MASK[:2]),
        partial(StudentLoss(), X, X, LABELS[:3]),
        partial(StudentLoss(), X, X, LABELS, student_features=X),
        partial(StudentLoss(), X, X[:2], LABELS, student_features=X, teacher_features=X),
        partial(DISTLoss(memory_size=2, backend="triton"), X.double(), X),
        partial(_after(DISTLoss(memory_size=2), X), X[:, :6], X[:, :6]),
        partial(BatchSimilarityLoss(memory_size=2, group="world"), X, X),
        partial(_after(BatchSimilarityLoss(memory_size=2), X), X[:, :6], X[:, :6]),
    ],
)
def test_mistake_is_told_before_any_work(call: Callable[[], Any]) -> None:
    with pytest.raises(TelmeKDError), ViewsOnly():
        call()
