"""DIST behind two linear layers, whose logits never exist as a whole.

The intra-class term couples all items, so no chunk of rows can know its gradient before the last
chunk has been seen. Hence two sweeps, each with Z = H W^T + b of one chunk at a time in a buffer:

- forward, Z goes into the statistics of rows and columns (``observe``), which then become the
  coefficients of the gradient (``conclude``);
- backward, Z is computed again, dZ follows from it and the coefficients (``gradient``), and
  dH = dZ W, dW += dZ^T H, db += sum of dZ.

Saved in between: the inputs and O(N + V) numbers. Logits have the dtype of the layer; statistics,
and sums over several chunks, are accumulated in float32 or float64.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd.kernels.cpu import dist as cpu
from telme_kd.reference import linear_dist as reference


class _Options(NamedTuple):
    """What defines the loss, by the names that a backend's passes take."""

    temperature: float
    inter_weight: float
    intra_weight: float
    eps: float | None


class _Head(NamedTuple):
    """One side: hidden states (N, d), a layer's weight (V, d) and its bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits_into(self, buffer: Tensor, rows: slice) -> Tensor:
        """Compute the logits of some rows into the front of a buffer."""
        hidden = self.hidden[rows]
        logits = buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=logits)
        return torch.addmm(self.bias, hidden, self.weight.T, out=logits)


def linear_dist_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    mask: Tensor | None,
    eps: float | None,
    chunk_bytes: int,
    backend: str,
) -> Tensor:
    """Eq. 12 over H W^T + b of both sides, by a fused backend."""
    inputs = (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
    )
    options = _Options(temperature, inter_weight, intra_weight, eps)
    if torch.compiler.is_compiling():
        loss: Tensor
        loss, _, _ = _linear_dist_loss(*inputs, mask, *options, chunk_bytes, backend)
        return loss
    applied: Tensor = _LinearDist.apply(  # type: ignore[no-untyped-call]
        *inputs, mask, options, chunk_bytes, _passes(backend)
    )
    return applied


def _passes(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from telme_kd.kernels.triton import dist as triton  # it may be absent elsewhere

    return triton


# --- the two sweeps -------------------------------------------------------------------------------


def _forward(
    student: _Head,
    teacher: _Head,
    mask: Tensor | None,
    options: _Options,
    chunk_bytes: int,
    passes: ModuleType,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss () and the coefficients of its gradient, per row and per column."""
    rows, columns = _new_statistics(student, teacher, passes)
    for _, *logits, present, of_rows in _sweep(student, teacher, mask, rows, chunk_bytes):
        passes.observe(*logits, present, of_rows, columns, **options._asdict())
    loss = passes.conclude(rows, columns, mask, **options._asdict())
    return loss, rows, columns


def _backward(
    grad_output: Tensor,
    student: _Head,
    teacher: _Head,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    options: _Options,
    chunk_bytes: int,
    needed: Sequence[bool],
    passes: ModuleType,
) -> tuple[Tensor | None, ...]:
    """Return the six gradients, None where none is needed."""
    whole = len(student.hidden) <= _chunk_length(student, teacher, chunk_bytes)
    gradients = (
        _Gradients(student, needed[:3], grad_output.dtype, whole, chunk_bytes),
        _Gradients(teacher, needed[3:], grad_output.dtype, whole, chunk_bytes),
    )
    for chunk, *logits, present, of_rows in _sweep(student, teacher, mask, rows, chunk_bytes):
        of_logits = passes.gradient(
            grad_output,
            *logits,
            present,
            of_rows,
            columns,
            **options._asdict(),
            student_needs_grad=any(needed[:3]),
            teacher_needs_grad=any(needed[3:]),
        )
        for side, of_side in zip(gradients, of_logits, strict=True):
            if of_side is not None:
                side.add(chunk, of_side, present)
    return *gradients[0].finished(), *gradients[1].finished()


def _new_statistics(student: _Head, teacher: _Head, passes: ModuleType) -> tuple[Tensor, Tensor]:
    statistics: tuple[Tensor, Tensor] = passes.new_statistics(
        student.hidden.shape[0],
        student.weight.shape[0],
        dtype=accumulation_dtype(student.hidden, teacher.hidden),
        device=student.hidden.device,
    )
    return statistics


def _chunk_length(student: _Head, teacher: _Head, chunk_bytes: int) -> int:
    """Return how many rows a chunk has: the logits of both sides fit the budget."""
    row_bytes = student.hidden.element_size() + teacher.hidden.element_size()
    return max(1, chunk_bytes // (row_bytes * len(student.weight)))


def _sweep(
    student: _Head, teacher: _Head, mask: Tensor | None, rows: Tensor, chunk_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor]]:
    """Yield of every chunk: its place, both sides' logits, its mask and its row numbers."""
    items, classes = len(student.hidden), len(student.weight)
    length = min(items, _chunk_length(student, teacher, chunk_bytes))
    buffers = [head.hidden.new_empty(length, classes) for head in (student, teacher)]
    for start in range(0, items, length):
        chunk = slice(start, start + length)
        student_logits, teacher_logits = (
            head.logits_into(buffer, chunk)
            for head, buffer in zip((student, teacher), buffers, strict=True)
        )
        present = None if mask is None else mask[chunk]
        yield chunk, student_logits, teacher_logits, present, rows[:, chunk]


class _Gradients:
    """The gradients of one side while chunks add to them."""

    def __init__(
        self,
        head: _Head,
        needed: Sequence[bool],
        dtype: torch.dtype,
        whole: bool,
        product_bytes: int,
    ) -> None:
        """Prepare.

        Args:
            head: the side.
            needed: whether its hidden states, weight and bias need a gradient.
            dtype: of sums over chunks.
            whole: whether one chunk is all there is, so that a product is no sum.
            product_bytes: a budget for a product on its way to a sum of another dtype.
        """
        self.head, self.product_bytes = head, product_bytes
        classes, width = head.weight.shape
        self.hidden = torch.empty_like(head.hidden) if needed[0] else None
        self.weight = self.bias = None
        if needed[1]:
            sum_dtype = head.weight.dtype if whole else dtype
            self.weight = head.weight.new_zeros(classes, width, dtype=sum_dtype)
        if needed[2]:
            self.bias = head.weight.new_zeros(classes, dtype=dtype)

    def add(self, chunk: slice, of_logits: Tensor, present: Tensor | None) -> None:
        """Take in the gradient (R, V) of a chunk's logits."""
        if self.hidden is not None:
            self.hidden[chunk] = of_logits @ self.head.weight
        if self.bias is not None:
            self.bias += of_logits.sum(dim=0, dtype=self.bias.dtype)
        if self.weight is not None:
            hidden = self.head.hidden[chunk]
            if present is not None:  # an absent item may hold NaN, and 0 NaN is NaN
                hidden = hidden.masked_fill(~present[:, None], 0.0)
            self._add_to_weight(of_logits, hidden)

    def _add_to_weight(self, of_logits: Tensor, hidden: Tensor) -> None:
        assert self.weight is not None
        if self.weight.dtype == hidden.dtype:
            torch.addmm(self.weight, of_logits.T, hidden, out=self.weight)
            return
        # A product in half precision, which is as large as the weight, some classes at a time.
        step = max(1, self.product_bytes // (hidden.shape[1] * hidden.element_size()))
        for start in range(0, len(self.weight), step):
            classes = slice(start, start + step)
            self.weight[classes] += of_logits[:, classes].T @ hidden

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return them in the dtypes of what they are gradients of."""
        dtype = self.head.weight.dtype
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
        )


# --- as PyTorch calls them ------------------------------------------------------------------------


class _LinearDist(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        mask: Tensor | None,
        options: _Options,
        chunk_bytes: int,
        passes: ModuleType,
    ) -> Tensor:
        student = _Head(student_hidden, student_weight, student_bias)
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias)
        loss, rows, columns = _forward(student, teacher, mask, options, chunk_bytes, passes)
        ctx.save_for_backward(*student, *teacher, mask, rows, columns)
        ctx.options, ctx.chunk_bytes, ctx.passes = options, chunk_bytes, passes
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask, rows, columns = ctx.saved_tensors
        needed = ctx.needs_input_grad[:6]
        with outside_autocast(grad_output.device):
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                gradients = _differentiable_gradients(
                    grad_output, inputs, mask, ctx.options, needed
                )
            else:
                gradients = _backward(
                    grad_output,
                    _Head(*inputs[:3]),
                    _Head(*inputs[3:]),
                    mask,
                    rows,
                    columns,
                    ctx.options,
                    ctx.chunk_bytes,
                    needed,
                    ctx.passes,
                )
        return *gradients, None, None, None, None


def _differentiable_gradients(
    grad_output: Tensor,
    inputs: Sequence[Any],
    mask: Tensor | None,
    options: _Options,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated themselves: autograd's, of the definition."""
    # By views, through which no other path leads: one input may have been made from another.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    loss = reference.linear_dist_loss(*inputs, mask=mask, **options._asdict())
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


@torch.library.custom_op("telme_kd::linear_dist_loss", mutates_args=())
def _linear_dist_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(
        _Head(student_hidden, student_weight, student_bias),
        _Head(teacher_hidden, teacher_weight, teacher_bias),
        mask,
        _Options(temperature, inter_weight, intra_weight, eps),
        chunk_bytes,
        _passes(backend),
    )


@_linear_dist_loss.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = _new_statistics(
        _Head(student_hidden, student_weight, student_bias),
        _Head(teacher_hidden, teacher_weight, teacher_bias),
        _passes(backend),
    )
    return rows.new_empty(()), rows, columns


@torch.library.custom_op("telme_kd::linear_dist_loss_backward", mutates_args=())
def _linear_dist_loss_backward(
    grad_output: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    chunk_bytes: int,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    student = _Head(student_hidden, student_weight, student_bias)
    teacher = _Head(teacher_hidden, teacher_weight, teacher_bias)
    with outside_autocast(grad_output.device):
        gradients = _backward(
            grad_output,
            student,
            teacher,
            mask,
            rows,
            columns,
            _Options(temperature, inter_weight, intra_weight, eps),
            chunk_bytes,
            needed,
            _passes(backend),
        )
    return [gradient for gradient in gradients if gradient is not None]


@_linear_dist_loss_backward.register_fake
def _(
    grad_output: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    eps: float | None,
    chunk_bytes: int,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
    )
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(inputs, needed, strict=True)
        if need and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.inter_weight, ctx.intra_weight, ctx.eps, ctx.chunk_bytes = (
        inputs[:-1]
    )
    ctx.backend = inputs[-1]
    _, rows, columns = output
    ctx.save_for_backward(*tensors, rows, columns)


def _backward_of_operator(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:6])
    gradients = iter(
        _linear_dist_loss_backward(
            grad_output,
            *ctx.saved_tensors,
            ctx.temperature,
            ctx.inter_weight,
            ctx.intra_weight,
            ctx.eps,
            ctx.chunk_bytes,
            ctx.backend,
            needed,
        )
    )
    return *(next(gradients) if need else None for need in needed), *[None] * 7


_linear_dist_loss.register_autograd(_backward_of_operator, setup_context=_setup_context)
