"""One batch that comes in parts, a backward pass at a time: the gradient it has as a whole."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from telme_kd import _checks

Part = TypeVar("Part")


def accumulate_gradient(
    parts: Sequence[Part],
    forward: Callable[[Part], Tensor | tuple[Tensor, ...]],
    criterion: Callable[..., Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Backpropagate a loss of a whole batch through a model that takes it in parts.

    A relational loss couples the items of its batch, so the sum of the gradients of parts is
    another gradient than that of the whole. Here the model runs twice over every part: once without
    a graph, for the outputs of the whole batch, which the loss is differentiated by; and once with
    one, through which those derivatives flow. Memory holds one part's activations and the whole
    batch's outputs. Random numbers, as dropout draws, are the same in both runs.

    Args:
        parts: what ``forward`` takes, one element for each part of the batch.
        forward: gives for a part the output of the model, or a tuple of outputs, that depend on its
            parameters: tensors (b, ...) whose first axis is the batch; b may differ between parts.
        criterion: the loss of the whole batch, a scalar; takes the outputs, joined along the first
            axis in the order of the parts. What else it needs, such as a teacher's outputs, it has
            to know.
        no_sync: makes the context for all parts but the last, such as the method ``no_sync`` of
            DistributedDataParallel, which then averages gradients once.

    Returns:
        The loss (), without a graph. Gradients were added to ``.grad`` of the parameters, and of
        those of the criterion, as a call of ``backward`` does.

    Raises:
        DTypeError: the parts are no sequence, or an output is no floating tensor.
        ShapeError: there is no part, an output has no axis, or the second run's outputs have other
            shapes than the first's.

    Note:
        Outputs must be the same when they are computed again. What a model counts itself, such as
        the running mean of BatchNorm, is counted twice. With a gradient scaler, scale the loss in
        the criterion. With ``group=`` of the losses every process must call this, with any number
        of parts of its own.

    Example:
        >>> import torch
        >>> from telme_kd import accumulate_gradient
        >>> from telme_kd.functional import dist_loss
        >>> model, x = torch.nn.Linear(5, 7), torch.randn(12, 5)
        >>> teacher_logits = torch.randn(12, 7)
        >>> loss = accumulate_gradient(x.split(4), model, lambda z: dist_loss(z, teacher_logits))
        >>> gradient = model.weight.grad.clone()
        >>> model.zero_grad()
        >>> dist_loss(model(x), teacher_logits).backward()
        >>> torch.allclose(gradient, model.weight.grad, atol=1e-6)
        True
    """
    _checks.parts(parts)
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_RandomState())
            outputs.append(_outputs(forward, part))
        _checks.as_many_outputs([len(of_part) for of_part in outputs])
        joined = [torch.cat(of_parts) for of_parts in zip(*outputs, strict=True)]
    shapes = [[output.shape for output in of_part] for of_part in outputs]
    del outputs
    with torch.enable_grad():
        loss = criterion(*(output.requires_grad_() for output in joined))
    loss.backward()  # type: ignore[no-untyped-call]
    lengths = [of_part[0][0] for of_part in shapes]
    gradients = [None if leaf.grad is None else torch.split(leaf.grad, lengths) for leaf in joined]

    afterwards = _RandomState()
    try:
        for index, (part, state) in enumerate(zip(parts, states, strict=True)):
            state.restore()
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else no_sync(), torch.enable_grad():
                of_part = _outputs(forward, part)
                _checks.outputs_again([output.shape for output in of_part], shapes[index])
                _backward(of_part, [None if g is None else g[index] for g in gradients])
    finally:
        afterwards.restore()
    return loss.detach()


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Backpropagate the gradients of those outputs that have one and a graph."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _outputs(forward: Callable[[Part], Tensor | tuple[Tensor, ...]], part: Part) -> list[Tensor]:
    outputs = forward(part)
    listed = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    _checks.outputs_of_part(listed)
    return listed


class _RandomState:
    """What PyTorch's generators draw next."""

    def __init__(self) -> None:
        self.of_cpu = torch.get_rng_state()
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.of_cuda = torch.cuda.get_rng_state_all() if on_cuda else []

    def restore(self) -> None:
        torch.set_rng_state(self.of_cpu)
        if self.of_cuda:
            torch.cuda.set_rng_state_all(self.of_cuda)
