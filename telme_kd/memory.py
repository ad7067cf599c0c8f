"""Recent outputs of student and teacher, which extend a batch too small for its relations.

Four items hardly relate: their columns are four numbers long. A loss with a memory takes the items
of earlier steps into its statistics, as they were then, and moves those of its batch alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from telme_kd import _checks
from telme_kd._precision import accumulation_dtype
from telme_kd._typing import Group
from telme_kd.distributed import agree
from telme_kd.kernels.distributed.spread import all_rows


class Arrivals(NamedTuple):
    """Rows of a batch, of all processes that share it, without their graph.

    Attributes:
        student: (B, n).
        teacher: (B, n).
        mask: bool (B,), the items that count.
        usable: bool (B,), the items that count and are worth remembering.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor
    usable: Tensor


class ExtendedBatch(NamedTuple):
    """What a memory holds, and a batch behind it.

    Attributes:
        student: (M + B, n), in float32 or float64; the last B rows have their graph.
        teacher: (M + B, n).
        mask: bool (M + B,): places of the memory that are taken, items of the batch that count.
        counted: (), how many items of the batch count, of all processes.
        total: (), the same and what is remembered.
        arrivals: what :meth:`RelationMemory.remember` takes in.
        is_first: whether the memory was never used: the loss is then that of the batch alone.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor
    counted: Tensor
    total: Tensor
    arrivals: Arrivals
    is_first: bool

    def compensated(self, loss: Tensor) -> Tensor:
        """Return a loss () of the extended batch with its gradient times ``total / counted``.

        Each item moves as strongly then as it would in its batch alone. The value stays, but for
        the 0 of a batch without an item that counts.
        """
        counted, total = self.counted.to(loss.dtype), self.total.to(loss.dtype)
        value = loss.detach()
        slope = total / counted.clamp(min=1.0)
        return torch.where(counted > 0, value, 0.0) + slope * (loss - value)


class RelationMemory(nn.Module):
    """The last items that a loss has seen, as student and teacher put them.

    A loss with ``memory_size=`` makes one, as its attribute ``memory``. It is a queue of fixed
    length: the oldest item leaves when a new one needs its place. Only whole items enter, the rows
    of student and teacher together; none that is masked does, and none with a NaN or an infinity
    that would make the loss NaN. It is state: the state dict has it, so a training that goes on
    from a checkpoint goes on with the memory it had.

    Args:
        size: how many items it holds, >= 1.

    Raises:
        RangeError: the size is below 1.
        DTypeError: the size is no integer.

    Attributes:
        student: (size, n), the student's rows, oldest first and the last place filled first; in the
            dtype that the loss computed in. n is 0 until the first training step.
        teacher: (size, n), the teacher's rows of the same items.
        present: bool (size,), the places that are taken.

    Note:
        The memory learns in training mode alone. After ``memory.eval()`` a loss in training mode
        still uses it, and leaves it as it is: for a second forward pass over the same batch.

    Example:
        >>> import torch
        >>> from telme_kd import DISTLoss
        >>> criterion = DISTLoss(temperature=4.0, memory_size=64)
        >>> for _ in range(3):
        ...     loss = criterion(torch.randn(4, 7), torch.randn(4, 7))
        >>> criterion.memory.present.sum()
        tensor(12)
    """

    student: Tensor
    teacher: Tensor
    present: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _checks.positive_integer("size", size)
        self.register_buffer("student", torch.zeros(self.size, 0))
        self.register_buffer("teacher", torch.zeros(self.size, 0))
        self.register_buffer("present", torch.zeros(self.size, dtype=torch.bool))

    @property
    def is_unused(self) -> bool:
        """Whether it has seen no batch since it was made or reset."""
        return self.student.shape[1] == 0

    def reset(self) -> None:
        """Forget everything, the width of the rows included; a captured CUDA graph ends here."""
        self.student = self.student.new_zeros(self.size, 0)
        self.teacher = self.teacher.new_zeros(self.size, 0)
        self.present = torch.zeros_like(self.present)

    def check(self, width: int, device: torch.device) -> None:
        """Check that rows of a width, on a device, can stand beside those that it holds.

        Raises:
            ShapeError: the width is not what it was.
            DeviceError: the memory lies elsewhere.
            BackendError: it would learn, and a transform of ``torch.func`` is active.
        """
        if self.training:
            _checks.memory_can_learn()
        if not self.is_unused:
            _checks.memory_fits(self.student, width, device)

    def extend(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        *,
        usable: Tensor,
        group: Group = None,
    ) -> ExtendedBatch:
        """Put what is remembered before a batch.

        Args:
            student: (B, n), floating, that :meth:`check` has nothing against.
            teacher: (B, n).
            mask: bool (B,), or None for all.
            usable: bool (B,), the items that may be remembered if they count.
            group: the processes that share the batch; they hold the same memory, which the first
                of them brings in.

        Returns:
            The extended batch; the memory is as before.

        Raises:
            DistributedError: the processes disagree.
        """
        is_first = self.is_unused
        dtype = accumulation_dtype(student, teacher)
        student, teacher = student.to(dtype), teacher.to(dtype)
        if mask is None:
            mask = torch.ones_like(usable)
        arrivals = Arrivals(student.detach(), teacher.detach(), mask, mask & usable)
        is_its_bearer = True
        if group is not None:
            arrivals = _of_all_processes(arrivals, group, ("memory", self.size, is_first))
            is_its_bearer = _checks.process_group(group).rank() == 0
        counted = arrivals.mask.sum()
        total = counted if is_first else counted + self.present.sum()
        if is_its_bearer and not is_first:
            student = torch.cat([self.student.to(dtype), student])
            teacher = torch.cat([self.teacher.to(dtype), teacher])
            mask = torch.cat([self.present, mask])
        return ExtendedBatch(student, teacher, mask, counted, total, arrivals, is_first)

    @torch.no_grad()
    def remember(self, batch: ExtendedBatch) -> None:
        """Take in the items of a batch, in order, for those that have been here longest."""
        if not self.training:
            return
        student, teacher, _, usable = batch.arrivals
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            self._make_room(student)
        else:
            with torch.inference_mode(mode=False):  # or no later step could write there
                self._make_room(student)
        present = torch.cat([self.present, usable])
        # Who stays goes to the end, the order kept; no count has to be known on the host.
        kept = present.to(torch.uint8).argsort(stable=True)[-self.size :]
        present = present[kept]
        student, teacher = (
            torch.cat([held, rows]).index_select(0, kept).masked_fill_(~present[:, None], 0.0)
            for held, rows in ((self.student, student), (self.teacher, teacher))
        )
        if torch.compiler.is_compiling():
            # A compiled backward pass computes again what it can from the buffers as they were.
            self.student, self.teacher, self.present = student, teacher, present
        else:  # where they are, for a captured graph
            self.student.copy_(student)
            self.teacher.copy_(teacher)
            self.present.copy_(present)

    def _make_room(self, rows: Tensor) -> None:
        """Have the width, dtype and, of a memory that is unused, the device of rows (B, n)."""
        if self.is_unused:
            self.student = rows.new_zeros(self.size, rows.shape[1])
            self.teacher = rows.new_zeros(self.size, rows.shape[1])
            self.present = self.present.to(rows.device)
        elif self.student.dtype != rows.dtype:
            self.student, self.teacher = self.student.to(rows.dtype), self.teacher.to(rows.dtype)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, object], prefix: str, *arguments: object
    ) -> None:
        """Have the width and dtype of what is loaded, unless both have a width and they differ."""
        for name in ("student", "teacher"):
            held, saved = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.ndim == 2 and len(saved) == self.size:
                width = saved.shape[1]
                if width == held.shape[1] or 0 in (width, held.shape[1]):
                    setattr(self, name, held.new_zeros(self.size, width, dtype=saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return f"size={self.size}"


def _of_all_processes(arrivals: Arrivals, group: Group, settings: object) -> Arrivals:
    """Return the rows of all processes, in rank order."""
    student, teacher, mask, usable = arrivals
    agreement = agree(student, teacher, None, group, settings)
    own = torch.cat([student, teacher, mask[:, None], usable[:, None]], dim=1)
    together = all_rows(own, agreement.rows, _checks.process_group(group))
    width = student.shape[1]
    student, teacher, marks = torch.split(together, [width, width, 2], dim=1)
    mask, usable = marks.bool().unbind(dim=1)
    return Arrivals(student, teacher, mask, usable)
