"""Every check of what users pass in; the only place that tells them of a mistake.

Each message says which argument, what was expected, what came, and the remedy. Checks look at
types, shapes, dtypes and devices, never at a tensor's values: nothing here makes a GPU wait.
"""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeVar, get_args

import torch
import torch.distributed
from torch import Tensor

from telme_kd._precision import layer_dtype
from telme_kd._typing import AttendOver, Backend, LinearHead, ProcessGroup
from telme_kd.errors import (
    BackendError,
    DegenerateBatchWarning,
    DeviceError,
    DistributedError,
    DTypeError,
    RangeError,
    ShapeError,
)

# What stands between the code that warns and the code that called: of modules, PyTorch's call too.
_INNER = ("telme_kd.", "torch.nn.modules.module.")

Word = TypeVar("Word", bound=str)

_BACKENDS: tuple[str, ...] = get_args(Backend)
_ATTEND_OVER: tuple[str, ...] = get_args(AttendOver)


def logits_pair(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    class_dim: int,
    mask: Tensor | None,
    may_be_empty: bool,
) -> int:
    """Check logits, and the mask over their batch axes; return the axis of the classes."""
    class_axis = _axis_of("class_dim", class_dim, "student_logits", student_logits)
    _matrix_pair(
        student_logits,
        teacher_logits,
        what="logits",
        mask=mask,
        axis=class_axis,
        may_be_empty=may_be_empty,
        remedy="both must score the same items over the same label set",
    )
    return class_axis


def features_pair(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    mask: Tensor | None,
    may_be_empty: bool,
) -> None:
    """Check features, and the mask over their batch axes."""
    _matrix_pair(
        student_features,
        teacher_features,
        what="features",
        mask=mask,
        axis=-1,
        may_be_empty=may_be_empty,
        remedy="project the student's features to the teacher's width first",
    )


def _matrix_pair(
    student: Tensor,
    teacher: Tensor,
    *,
    what: str,
    mask: Tensor | None,
    axis: int,
    may_be_empty: bool,
    remedy: str,
) -> None:
    for name, value in ((f"student_{what}", student), (f"teacher_{what}", teacher)):
        floating(name, value)
        if value.ndim < 2:
            raise ShapeError(
                f"{name}: expected at least 2 axes, a batch and its {what}, got shape "
                f"{tuple(value.shape)}; for a single item use .unsqueeze(0)"
            )
    if student.shape != teacher.shape:
        raise ShapeError(
            f"teacher_{what}: expected {tuple(student.shape)} to match student_{what}, "
            f"got {tuple(teacher.shape)}; {remedy}"
        )
    same_device(f"teacher_{what}", teacher, f"student_{what}", student)
    batch_shape = student.shape[: axis % student.ndim] + student.shape[axis % student.ndim + 1 :]
    empty_batch = 0 in batch_shape
    if student.shape[axis] == 0 or (empty_batch and not may_be_empty):
        raise ShapeError(
            f"student_{what}: expected at least one item and one column, got shape "
            f"{tuple(student.shape)}; skip the loss for an empty batch"
        )
    if mask is not None:
        item_mask(mask, batch_shape, student)


def linear_heads(student: LinearHead, teacher: LinearHead, mask: Tensor | None) -> None:
    """Check hidden states, weight and bias of both sides, and the mask over their batch axes."""
    student_hidden, student_weight, _ = student
    teacher_hidden, teacher_weight, _ = teacher
    for side, head in (("student", student), ("teacher", teacher)):
        _linear_head(side, *head)
    same_batch_axes("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ShapeError(
            f"teacher_weight: expected {student_weight.shape[0]} classes (rows) as "
            f"student_weight, got {teacher_weight.shape[0]}; both must score the same label set"
        )
    if mask is not None:
        item_mask(mask, student_hidden.shape[:-1], student_hidden)


def _linear_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    hidden_name, weight_name, bias_name = f"{side}_hidden", f"{side}_weight", f"{side}_bias"
    floating(hidden_name, hidden)
    floating(weight_name, weight)
    if hidden.ndim < 2:
        raise ShapeError(
            f"{hidden_name}: expected at least 2 axes, a batch and its hidden states, got shape "
            f"{tuple(hidden.shape)}; for a single item use .unsqueeze(0)"
        )
    if 0 in hidden.shape:
        raise ShapeError(
            f"{hidden_name}: expected at least one item and one column, got shape "
            f"{tuple(hidden.shape)}; skip the loss for an empty batch"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ShapeError(
            f"{weight_name}: expected (V, {hidden.shape[-1]}) with V >= 1 for {hidden_name} "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}; pass a linear layer's weight as "
            "it is"
        )
    others = [(weight_name, weight)]
    if bias is not None:
        floating(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ShapeError(
                f"{bias_name}: expected ({weight.shape[0]},) for {weight_name} "
                f"{tuple(weight.shape)}, got {tuple(bias.shape)}; pass a linear layer's bias as "
                "it is"
            )
        others.append((bias_name, bias))
    for name, value in others:
        same_device(name, value, hidden_name, hidden)
        if layer_dtype(value) != layer_dtype(hidden):
            raise DTypeError(
                f"{name}: expected dtype {hidden.dtype} as {hidden_name}, got {value.dtype}; "
                "convert one of them, or call inside torch.autocast"
            )


def item_mask(mask: Tensor, batch_shape: Sequence[int], like: Tensor) -> None:
    """Check a bool mask over batch axes: True keeps an item, False leaves it out."""
    if not isinstance(mask, Tensor):
        raise DTypeError(
            f"mask: expected a bool tensor, got {_kind(mask)}; use torch.tensor(..., dtype=bool)"
        )
    if mask.dtype is not torch.bool:
        raise DTypeError(
            f"mask: expected dtype torch.bool (True keeps an item), got {mask.dtype}; "
            "use mask.bool()"
        )
    if tuple(mask.shape) != tuple(batch_shape):
        raise ShapeError(
            f"mask: expected the batch axes {tuple(batch_shape)}, got {tuple(mask.shape)}; "
            "give one entry per item"
        )
    same_device("mask", mask, "the tensors it masks", like)


def floating(name: str, value: Tensor) -> None:
    """Check that a value is a tensor of a real floating dtype."""
    if not isinstance(value, Tensor):
        raise DTypeError(
            f"{name}: expected a torch.Tensor, got {_kind(value)}; use torch.as_tensor"
        )
    if not value.is_floating_point():
        raise DTypeError(
            f"{name}: expected a real floating dtype, got {value.dtype}; use {name}.float()"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors lie on one device."""
    if value.device != other.device:
        raise DeviceError(
            f"{name}: expected device {other.device} as {other_name}, got {value.device}; "
            f"use {name}.to({str(other.device)!r})"
        )


def class_labels(labels: Tensor, batch_shape: Sequence[int], logits: Tensor) -> None:
    """Check integer class labels over the batch axes of logits."""
    if not isinstance(labels, Tensor):
        raise DTypeError(
            f"labels: expected an int64 tensor, got {_kind(labels)}; use torch.as_tensor"
        )
    if labels.dtype is not torch.int64:
        raise DTypeError(
            f"labels: expected dtype torch.int64 (class indices), got {labels.dtype}; "
            "use labels.long()"
        )
    if tuple(labels.shape) != tuple(batch_shape):
        raise ShapeError(
            f"labels: expected the batch axes {tuple(batch_shape)} of student_logits, "
            f"got {tuple(labels.shape)}; give one class index per item"
        )
    same_device("labels", labels, "student_logits", logits)


def last_axis(name: str, value: Tensor, width: int) -> None:
    """Check a floating tensor (..., width)."""
    floating(name, value)
    if value.ndim < 1 or value.shape[-1] != width:
        raise ShapeError(
            f"{name}: expected (..., {width}), got {tuple(value.shape)}; "
            "check the widths given to the constructor"
        )


def same_batch_axes(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors agree in all axes but the last, and in device."""
    if value.shape[:-1] != other.shape[:-1]:
        raise ShapeError(
            f"{name}: expected the batch axes {tuple(other.shape[:-1])} of {other_name}, "
            f"got {tuple(value.shape[:-1])}; give one row per item in both"
        )
    same_device(name, value, other_name, other)


def shift_pair(anchor: Tensor, displacement: Tensor) -> None:
    """Check the two arguments of a bounded shift: same shape, floating, at least one entry."""
    floating("anchor", anchor)
    floating("displacement", displacement)
    if anchor.ndim < 1 or anchor.shape[-1] == 0:
        raise ShapeError(
            f"anchor: expected (..., d) with d >= 1, got {tuple(anchor.shape)}; "
            "the last axis is the vector"
        )
    if anchor.shape != displacement.shape:
        raise ShapeError(
            f"displacement: expected {tuple(anchor.shape)} to match anchor, "
            f"got {tuple(displacement.shape)}; project it to the anchor's width first"
        )
    same_device("displacement", displacement, "anchor", anchor)


def positive_temperature(value: float) -> float:
    """Return a temperature as a float: finite and above 0, as is its square, which scales DIST."""
    number = _real("temperature", value, "a finite number > 0")
    if not (number > 0 and 0 < number * number < math.inf):
        raise RangeError(
            f"temperature: expected a finite number > 0 whose square is too, got {value!r}; "
            "1.0 is neutral"
        )
    return number


def non_negative(name: str, value: float) -> float:
    """Return a finite number, 0 or more, as a float."""
    number = _real(name, value, "a finite number >= 0")
    if number < 0:
        raise RangeError(
            f"{name}: expected a finite number >= 0, got {value!r}; 0 switches its effect off"
        )
    return number


def optional_eps(eps: float | None) -> float | None:
    """Return the constant of a released formula, or None for the scale-free definition."""
    return None if eps is None else non_negative("eps", eps)


def positive_integer(name: str, value: int) -> int:
    """Return an integer of 1 or more."""
    number = integer(name, value)
    if number < 1:
        raise RangeError(f"{name}: expected an integer >= 1, got {number}; counts start at 1")
    return number


def memory_size(value: int) -> int:
    """Return how many items a memory holds: an integer of 0 or more."""
    number = integer("memory_size", value)
    if number < 0:
        raise RangeError(
            f"memory_size: expected an integer >= 0, got {number}; 0 does without a memory"
        )
    return number


def same_memory_size(name: str, given: int, size: int) -> None:
    """Check that a term of an objective has the memory that the objective is to have."""
    if given != size:
        raise RangeError(
            f"{name}: expected a term with memory_size={size} as the objective's, got {given}; "
            "give the size to the term, and leave it out of the objective or repeat it there"
        )


def memory_can_learn() -> None:
    """Check that state may be written: torch.func's functions are to have none."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise BackendError(
            "memory: expected no transform of torch.func, inside which it cannot be written, got "
            "one; call .eval() on the loss, to do without, or on its memory, to leave it as it is"
        )


def memory_fits(held: Tensor, width: int, device: torch.device) -> None:
    """Check that rows can stand beside those (size, n) that a memory holds."""
    if held.shape[1] != width:
        raise ShapeError(
            f"memory: expected rows of width {held.shape[1]}, as those that are remembered, got "
            f"{width}; call reset() on the memory, or have a loss for each label set or width"
        )
    if held.device != device:
        raise DeviceError(
            f"memory: expected device {device} as the batch, got {held.device}; "
            f"use .to({str(device)!r}) on the loss"
        )


def probability(name: str, value: float) -> float:
    """Return a number in [0, 1) as a float."""
    number = _real(name, value, "a number in [0, 1)")
    if not 0 <= number < 1:
        raise RangeError(f"{name}: expected a number in [0, 1), got {value!r}; 0 switches it off")
    return number


def integer(name: str, value: int) -> int:
    """Return an integer of either sign."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DTypeError(f"{name}: expected an integer, got {_kind(value)}; use int(...)")
    return int(value)


def environment_word(name: str, allowed: Sequence[Word]) -> Word:
    """Return the word that an environment variable holds; the first if it is not set."""
    given = os.environ.get(name, allowed[0])
    for word in allowed:
        if given == word:
            return word
    words = ", ".join(map(repr, allowed))
    raise RangeError(
        f"{name}: expected one of {words} in the environment, got {given!r}; "
        f"leave it unset for {allowed[0]!r}"
    )


def environment_integer(name: str, default: int) -> int:
    """Return the integer of 1 or more that an environment variable holds, or a default."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal() or int(given) < 1:
        raise RangeError(
            f"{name}: expected an integer >= 1 in the environment, got {given!r}; "
            f"leave it unset for {default}"
        )
    return int(given)


def _axis_of(name: str, axis: int, value_name: str, value: Tensor) -> int:
    """Return an axis that a tensor has."""
    axis = integer(name, axis)
    floating(value_name, value)
    if not -value.ndim <= axis < value.ndim:
        raise RangeError(
            f"{name}: expected an axis of {value_name} {tuple(value.shape)}, got {axis}; "
            "-1 is the last axis"
        )
    return axis


def backend_word(backend: str) -> None:
    """Check the name of a backend."""
    _word("backend", backend, _BACKENDS)


def attend_over_word(attend_over: str) -> None:
    """Check what the fusion's attention runs over."""
    _word("attend_over", attend_over, _ATTEND_OVER)


def group_word(group: object, name: str = "group") -> None:
    """Check the kind of an argument that stands for processes."""
    if group is None or group == "world":
        return
    if torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup):
        return
    raise DTypeError(
        f"{name}: expected a torch.distributed.ProcessGroup, 'world' or None, got {_kind(group)}; "
        "make one with torch.distributed.new_group()"
    )


def process_group(group: object, name: str = "group") -> ProcessGroup:
    """Return the process group that an argument stands for."""
    group_word(group, name)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise DistributedError(
            f"{name}: expected an initialised torch.distributed, got none; call "
            f"torch.distributed.init_process_group() first, or pass {name}=None"
        )
    if isinstance(group, torch.distributed.ProcessGroup):
        return group
    world = torch.distributed.group.WORLD
    assert world is not None  # it is there once torch.distributed is initialised
    return world


def group_of_several(group: object, name: str = "group") -> ProcessGroup | None:
    """Return the process group that an argument stands for; None if that is one process alone."""
    group_word(group, name)
    if group is None:
        return None
    processes = process_group(group, name)
    return processes if processes.size() > 1 else None


def same_group(name: str, given: object, group: object) -> None:
    """Check that a term of an objective is over the objective's processes."""
    if given != group:
        raise RangeError(
            f"{name}: expected a term over the group of the objective, got one over "
            f"{'none' if given is None else 'another'}; build it with the same group="
        )


def agree_across_processes(
    *, rows: Sequence[int], columns: Sequence[tuple[int, int]], settings: Sequence[int]
) -> None:
    """Check what the processes of a group have told each other about their rows.

    Args:
        rows: of each process.
        columns: of each process, how many, and the bits that an entry is computed with.
        settings: of each process, a number that stands for the loss and its options.
    """
    if len(set(columns)) > 1:
        listed = ", ".join(f"{width} x {bits} bit" for width, bits in columns)
        raise DistributedError(
            f"group: expected one width and dtype in all processes, got {listed}; "
            "give every process the same label set or feature width, and dtype"
        )
    _same_settings("group", settings)
    if not any(rows):
        raise ShapeError(
            "group: expected at least one item in one of the processes, got none; "
            "skip the loss for an empty batch"
        )


def agree_across_class_group(
    *, items: Sequence[tuple[int, int]], bits: Sequence[int], settings: Sequence[int]
) -> None:
    """Check what processes with the same items have told each other.

    Args:
        items: of each process, how many, and how many of them count.
        bits: of each process, those that an entry is computed with.
        settings: of each process, a number that stands for the loss and its options.
    """
    if len(set(items)) > 1:
        listed = ", ".join(f"{counted} of {rows}" for rows, counted in items)
        raise DistributedError(
            f"class_group: expected the same items, and mask, in all processes, got {listed}; "
            "give every process its classes of the same batch"
        )
    if len(set(bits)) > 1:
        raise DistributedError(
            f"class_group: expected one dtype in all processes, got "
            f"{', '.join(f'{number} bit' for number in bits)}; give every process the same dtype"
        )
    _same_settings("class_group", settings)


def _same_settings(name: str, settings: Sequence[int]) -> None:
    others = [rank for rank, number in enumerate(settings) if number != settings[0]]
    if others:
        raise DistributedError(
            f"{name}: expected one loss with the same options in all processes, got others in "
            f"{', '.join(map(str, others))} than in 0; call the same loss everywhere, and with the "
            "same backend"
        )


def differentiated_once(again: bool) -> None:
    """Refuse to differentiate the gradient of a loss over a group."""
    if again:
        raise DistributedError(
            "group: expected a gradient that is not differentiated itself, got create_graph=True; "
            "compute the loss in one process, with group=None"
        )


def widths(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return one or more positive integers as a tuple."""
    if isinstance(values, (str, Integral)) or not isinstance(values, Sequence):
        raise DTypeError(
            f"{name}: expected a tuple of integers >= 1, got {_kind(values)}; for one use (width,)"
        )
    if not values:
        raise RangeError(f"{name}: expected at least one width, got none; give one per student")
    return tuple(positive_integer(f"{name}[{index}]", value) for index, value in enumerate(values))


def student_count(students: Sequence[Tensor], student_dims: Sequence[int]) -> None:
    """Check that a fusion head got as many students as it was built for."""
    if len(students) != len(student_dims):
        raise ShapeError(
            f"students: expected {len(student_dims)} tensors for student_dims "
            f"{tuple(student_dims)}, got {len(students)}; pass them after the anchor, in order"
        )


def divides(name: str, divisor: int, width: int, width_name: str) -> None:
    """Check that a number divides a width."""
    if width % divisor:
        raise RangeError(
            f"{name}: expected a divisor of {width_name}, {width}, got {divisor}; "
            "check it against the checkpoint's training"
        )


def sum_is(name: str, values: Sequence[int], total: int) -> None:
    """Check that widths add up to one that is given."""
    if sum(values) != total:
        raise RangeError(
            f"{name}: expected widths that add up to {total}, got {tuple(values)}; "
            "check them against the checkpoint's training"
        )


def causal_choice(causal: bool, attend_over: str) -> None:
    """Check that only attention over a dialogue is causal."""
    if not isinstance(causal, bool):
        raise DTypeError(f"causal: expected True or False, got {_kind(causal)}; pass a bool")
    if causal and attend_over != "dialogue":
        raise RangeError(
            f"causal: expected False with attend_over={attend_over!r}, got True; "
            "only a dialogue has a past"
        )


def has_sequence(name: str, value: Tensor, attend_over: str) -> None:
    """Check that a tensor has an axis to attend over."""
    if value.ndim < 2:
        raise ShapeError(
            f"{name}: expected at least 2 axes with attend_over={attend_over!r}, got shape "
            f"{tuple(value.shape)}; for a single utterance use .unsqueeze(0)"
        )


def mask_means_padding(attend_over: str) -> None:
    """Refuse a mask where no item sees another, so none is padding."""
    if attend_over == "modalities":
        raise RangeError(
            "mask: expected None with attend_over='modalities', got a tensor; there items do not "
            "see each other, so leave it out"
        )


def class_weight(value: Tensor) -> None:
    """Check weights of classes: a floating vector."""
    floating("class_weight", value)
    if value.ndim != 1:
        raise ShapeError(
            f"class_weight: expected (C,), got {tuple(value.shape)}; give one weight per class"
        )


def class_weight_fits(value: Tensor, logits: Tensor, class_axis: int) -> None:
    """Check that weights of classes match the logits."""
    if value.shape[0] != logits.shape[class_axis]:
        raise ShapeError(
            f"class_weight: expected ({logits.shape[class_axis]},) to match student_logits "
            f"{tuple(logits.shape)}, got {tuple(value.shape)}; give one weight per class"
        )
    same_device("class_weight", value, "student_logits", logits)


def feature_given(name: str, value: Tensor | None) -> Tensor:
    """Return features that a feature term compares."""
    if value is None:
        raise DTypeError(
            f"{name}: expected a tensor (..., d), got None; pass it, or build the loss with "
            "feature_weight=0"
        )
    return value


def module(name: str, value: object, kind: type[torch.nn.Module]) -> None:
    """Check that a building block is of its class."""
    if not isinstance(value, kind):
        raise DTypeError(
            f"{name}: expected a {kind.__name__}, got {_kind(value)}; "
            f"build one with {kind.__name__}(...)"
        )


def parts(value: Sequence[object]) -> None:
    """Check that a batch comes in one part or more, which can be looked at twice."""
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise DTypeError(
            f"parts: expected a sequence, got {_kind(value)}; use list(...), as each is taken twice"
        )
    if len(value) == 0:
        raise ShapeError("parts: expected at least one, got none; skip the step of an empty batch")


def outputs_of_part(outputs: Sequence[Tensor]) -> None:
    """Check what a model gives for a part: floating tensors with one number of items."""
    for output in outputs:
        floating("forward(part)", output)
        if output.ndim < 1:
            raise ShapeError(
                "forward(part): expected tensors (b, ...), got a scalar; return outputs of the "
                "model, and compute the loss in the criterion"
            )
    if len({output.shape[0] for output in outputs}) != 1:
        raise ShapeError(
            "forward(part): expected outputs with one number of items, got lengths "
            f"{[output.shape[0] for output in outputs]}; return one row per item in each"
        )


def as_many_outputs(counts: Sequence[int]) -> None:
    """Check that a model gives as many outputs for each part."""
    if len(set(counts)) > 1:
        raise ShapeError(
            f"forward(part): expected as many outputs for each part, got {list(counts)}; "
            "return the same outputs for all"
        )


def outputs_again(shapes: Sequence[torch.Size], first: Sequence[torch.Size]) -> None:
    """Check that a model gives outputs of the same shapes when it sees a part again."""
    if list(shapes) != list(first):
        raise ShapeError(
            f"forward(part): expected shapes {[tuple(shape) for shape in first]} again, got "
            f"{[tuple(shape) for shape in shapes]}; it must give the same outputs when called twice"
        )


def relations_exist(batch_size: int, num_classes: int, *, intra_weight: float = 1.0) -> None:
    """Warn, once per kind, of a batch whose relations are the same whatever the student does."""
    if torch.compiler.is_compiling():
        return
    if not intra_weight:
        pass  # items are not related
    elif batch_size == 1:
        _warn_once("batch_size=1: the intra-class term is constant and gives no gradient")
    elif batch_size == 2:
        _warn_once("batch_size=2: every intra-class correlation is +1, -1 or 0")
    if num_classes == 1:
        _warn_once("num_classes=1: both terms are constant and give no gradient")
    elif num_classes == 2:
        _warn_once("num_classes=2: every inter-class correlation is +1, -1 or 0")


def similarities_exist(batch_size: int) -> None:
    """Warn, once, of a batch whose similarity loss is 0 whatever the student does."""
    if batch_size == 1 and not torch.compiler.is_compiling():
        _warn_once("batch_size=1: the batch-similarity loss is 0 and gives no gradient")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, DegenerateBatchWarning, stacklevel=_steps_to_the_caller())


def _steps_to_the_caller() -> int:
    """How far up the stack of ``_warn_once`` the code is that called this library."""
    frame, steps = sys._getframe(1), 1
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(_INNER):
        frame, steps = frame.f_back, steps + 1
    return steps


def _word(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        listed = ", ".join(repr(word) for word in words)
        raise RangeError(f"{name}: expected one of {listed}, got {value!r}; check the spelling")


def _real(name: str, value: float, expectation: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DTypeError(
            f"{name}: expected {expectation}, got {_kind(value)}; pass a Python number"
        )
    if not math.isfinite(value):
        raise RangeError(f"{name}: expected {expectation}, got {value!r}; pass a Python number")
    return float(value)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
