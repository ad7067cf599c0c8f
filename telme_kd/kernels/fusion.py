"""The gate and the shift as one differentiable operator over a backend's hand-written passes.

Two steps. ``products`` multiplies with W_1 and W_2 through PyTorch's BLAS: W_1 is split into the
columns that read the anchor and those that read the non-verbal side, the second product accumulates
into the first's result, and nothing is concatenated, forward or backward. ``gate_and_shift`` does
the rest, row by row: biases, ReLU, product, shift, LayerNorm, dropout.

Gate and value of the non-verbal side are two products on purpose. One would need both weights in
one matrix: rows of W_1 are d + n apart and those of W_2 n, which no stride and no batched product
of cuBLAS spans. With d = 768 and n = 1536 in float32,

- a joint copy moves 18.9 MB at every step (5.6 us at 3.35 TB/s), where all three products together
  read 11.8 MB of weights (3.5 us), and it is a launch itself: three forward either way. Backward,
  one product less gives the non-verbal gradient, but the weights' gradients, from one product,
  must be taken apart again. At best one launch of nine (1 to 2 us in a replayed graph) is saved,
  and the copy is kept until backward;
- a copy kept until a weight changes would go stale in a replayed CUDA graph, which moves no version
  counter;
- two parameters that are views of one storage stop being so at the first ``.to()``, copy, loading
  or wrapping in a process group's module, and one of them would not be contiguous.

The second step is an :class:`torch.autograd.Function` eagerly and a custom operator while
``torch.compile`` traces; see :mod:`telme_kd.kernels.dist` for the reason. Dropout's randomness is
an argument of it, drawn before: a function of its arguments may be recomputed, and differentiated
twice.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from telme_kd._precision import accumulation_dtype, layer_dtype, outside_autocast
from telme_kd.kernels.cpu import fusion as cpu
from telme_kd.reference import fusion as reference

# --- the products ---------------------------------------------------------------------------------


def products(
    anchor: Tensor, nonverbal: Tensor, gate_weight: Tensor, value_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return W_1 <F, A> and W_2 A, in the dtype that linear layers would return."""
    common = torch.promote_types(anchor.dtype, nonverbal.dtype)
    tensors = [
        tensor.to(layer_dtype(tensor))
        for tensor in (anchor.to(common), nonverbal.to(common), gate_weight, value_weight)
    ]
    with outside_autocast(anchor.device):
        if torch.compiler.is_compiling():
            return _products(*tensors)
        applied: tuple[Tensor, Tensor] = _Products.apply(*tensors)  # type: ignore[no-untyped-call]
        return applied


def _products(
    anchor: Tensor, nonverbal: Tensor, gate_weight: Tensor, value_weight: Tensor
) -> tuple[Tensor, Tensor]:
    width = anchor.shape[1]
    gate = torch.addmm(anchor @ gate_weight[:, :width].T, nonverbal, gate_weight[:, width:].T)
    return gate, nonverbal @ value_weight.T


class _Products(torch.autograd.Function):
    # Autograd through views of the weight would add two weight-sized gradients full of zeros.
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, nonverbal: Tensor, gate_weight: Tensor, value_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(anchor, nonverbal, gate_weight, value_weight)
        width = anchor.shape[1]
        gate = torch.mm(anchor, gate_weight[:, :width].T)
        gate.addmm_(nonverbal, gate_weight[:, width:].T)
        return gate, torch.mm(nonverbal, value_weight.T)

    @staticmethod
    def backward(ctx: Any, to_gate: Tensor, to_value: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with outside_autocast(to_gate.device):
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                return _differentiated(
                    _products, tensors, (to_gate, to_value), ctx.needs_input_grad
                )
            return _products_backward(to_gate, to_value, *tensors, needs_grad=ctx.needs_input_grad)


def _products_backward(
    to_gate: Tensor,
    to_value: Tensor,
    anchor: Tensor,
    nonverbal: Tensor,
    gate_weight: Tensor,
    value_weight: Tensor,
    *,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    width = anchor.shape[1]
    to_anchor = to_nonverbal = to_gate_weight = to_value_weight = None
    if needs_grad[0]:
        to_anchor = torch.mm(to_gate, gate_weight[:, :width])
    if needs_grad[1]:
        to_nonverbal = torch.mm(to_gate, gate_weight[:, width:]).addmm_(to_value, value_weight)
    if needs_grad[2]:
        to_gate_weight = torch.empty_like(gate_weight)
        torch.mm(to_gate.T, anchor, out=to_gate_weight[:, :width])
        torch.mm(to_gate.T, nonverbal, out=to_gate_weight[:, width:])
    if needs_grad[3]:
        to_value_weight = torch.mm(to_value.T, nonverbal)
    return to_anchor, to_nonverbal, to_gate_weight, to_value_weight


def _differentiated(
    function: Any,
    tensors: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated themselves: autograd's, of a plain function."""
    # Aliases: one argument may have been made of another, whose gradient must not count it twice.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    inputs = [
        alias
        for alias, needed in zip(aliases, needs_grad, strict=True)
        if needed and alias is not None
    ]
    outputs = function(*aliases)
    gradients = iter(
        torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=True, allow_unused=True)
    )
    return tuple(next(gradients) if needed else None for needed in needs_grad)


# --- the rows -------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What the passes take beside tensors."""

    threshold: float
    eps: float | None
    norm_eps: float | None
    rate: float
    output_dtype: torch.dtype
    backend: str


def gate_and_shift(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    output_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Eq. 16-19 from the products (B, d) on, in float32 at least.

    LayerNorm follows unless ``norm_eps`` is None, then dropout unless ``rate`` is 0. The tensors
    may have any floating dtype and strides; a bias or weight that is None is left out.
    """
    noise = _passes(backend).draw(anchor) if rate > 0.0 else None
    tensors = (anchor, gate, value, gate_bias, value_bias, norm_weight, norm_bias, noise)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    options = Options(threshold, eps, norm_eps, rate, output_dtype, backend)
    output: Tensor
    with outside_autocast(anchor.device):
        if torch.compiler.is_compiling():
            output, *_ = _gate_and_shift(*tensors, *options, needs_grad)
        elif needs_grad:
            output = _GateAndShift.apply(*tensors, options)  # type: ignore[no-untyped-call]
        else:
            output, _ = _forward(tensors, options, needs_grad=False)
    return output


def _passes(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from telme_kd.kernels.triton import fusion as triton  # it may be absent elsewhere

    return triton


def _forward(
    tensors: Sequence[Tensor | None], options: Options, *, needs_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    output: Tensor
    output, saved = _passes(options.backend).forward(
        *tensors,
        threshold=options.threshold,
        eps=options.eps,
        norm_eps=options.norm_eps,
        rate=options.rate,
        dtype=_computed_in(tensors),
        output_dtype=options.output_dtype,
        needs_grad=needs_grad,
    )
    return output, saved


def _backward(
    grad_output: Tensor,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    options: Options,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = _passes(options.backend).backward(
        grad_output,
        *tensors,
        saved,
        threshold=options.threshold,
        eps=options.eps,
        norm_eps=options.norm_eps,
        rate=options.rate,
        dtype=_computed_in(tensors),
        needs_grad=needs_grad,
    )
    return gradients


def _computed_in(tensors: Sequence[Tensor | None]) -> torch.dtype:
    return accumulation_dtype(*(tensor for tensor in tensors[:3] if tensor is not None))


class _GateAndShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, options = arguments
        output, saved = _forward(tensors, options, needs_grad=True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        both = ctx.saved_tensors  # unpacked at every mention
        tensors, saved = both[:8], both[8:]
        needs_grad = ctx.needs_input_grad[:7]
        with outside_autocast(grad_output.device):
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                gradients: Sequence[Tensor | None] = _differentiated(
                    lambda *tensors: _definition(tensors, ctx.options),
                    tensors,
                    (grad_output,),
                    (*needs_grad, False),
                )[:7]
            else:
                gradients = _backward(grad_output, tensors, saved, ctx.options, needs_grad)
        return *gradients, None, None


def _definition(tensors: Sequence[Tensor | None], options: Options) -> Tensor:
    """What the passes compute, differentiable any number of times, on the same random numbers."""
    *rows, noise = tensors
    dtype = _computed_in(tensors)
    fused = reference.gate_and_shift(
        *(None if tensor is None else tensor.to(dtype) for tensor in rows),  # type: ignore[arg-type]
        threshold=options.threshold,
        eps=options.eps,
        norm_eps=options.norm_eps,
    )
    if noise is not None:
        fused = fused * _passes(options.backend).kept(noise, fused.shape, options.rate, dtype)
    return fused.to(options.output_dtype)


@torch.library.custom_op("telme_kd::gate_and_shift", mutates_args=())
def _gate_and_shift(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    output_dtype: torch.dtype,
    backend: str,
    needs_grad: bool,
) -> list[Tensor]:
    tensors = (anchor, gate, value, gate_bias, value_bias, norm_weight, norm_bias, noise)
    options = Options(threshold, eps, norm_eps, rate, output_dtype, backend)
    output, saved = _forward(tensors, options, needs_grad=needs_grad)
    return [output, *saved]


@_gate_and_shift.register_fake
def _(
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    output_dtype: torch.dtype,
    backend: str,
    needs_grad: bool,
) -> list[Tensor]:
    saved: list[Tensor] = []
    if needs_grad:
        dtype = _computed_in((anchor, gate, value))
        saved = _passes(backend).empty_saved(anchor, dtype, eps=eps, norm_eps=norm_eps)
    return [anchor.new_empty(anchor.shape, dtype=output_dtype), *saved]


@torch.library.custom_op("telme_kd::gate_and_shift_backward", mutates_args=())
def _gate_and_shift_backward(
    grad_output: Tensor,
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    saved: list[Tensor],
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    output_dtype: torch.dtype,
    backend: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    tensors = (anchor, gate, value, gate_bias, value_bias, norm_weight, norm_bias, noise)
    options = Options(threshold, eps, norm_eps, rate, output_dtype, backend)
    with outside_autocast(grad_output.device):
        gradients = _backward(grad_output, tensors, saved, options, needs_grad)
    return [gradient for gradient in gradients if gradient is not None]


@_gate_and_shift_backward.register_fake
def _(
    grad_output: Tensor,
    anchor: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    noise: Tensor | None,
    saved: list[Tensor],
    threshold: float,
    eps: float | None,
    norm_eps: float | None,
    rate: float,
    output_dtype: torch.dtype,
    backend: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    tensors = (anchor, gate, value, gate_bias, value_bias, norm_weight, norm_bias)
    return [
        tensor.new_empty(tensor.shape)
        for tensor, needed in zip(tensors, needs_grad, strict=True)
        if needed and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:-1]
    ctx.save_for_backward(*tensors, *output[1:])


def _backward_of_operator(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    both = ctx.saved_tensors
    tensors, saved = both[:8], list(both[8:])
    needs_grad = list(ctx.needs_input_grad[:7])
    gradients = iter(
        _gate_and_shift_backward(grad_outputs[0], *tensors, saved, *ctx.options, needs_grad)
    )
    return (
        *(next(gradients) if needed else None for needed in needs_grad),
        *[None] * (2 + len(ctx.options)),
    )


_gate_and_shift.register_autograd(_backward_of_operator, setup_context=_setup_context)
