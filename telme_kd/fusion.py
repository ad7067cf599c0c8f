"""Shifting fusion: students displace the teacher's feature, by no more than a share of its length.

The teacher leads: whatever the students say, the fused feature stays within ``threshold`` times the
anchor's norm of the anchor.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from telme_kd import _checks
from telme_kd._dispatch import choose
from telme_kd._precision import accumulation_dtype, outside_autocast
from telme_kd._typing import AttendOver, Backend
from telme_kd.kernels.fusion import products
from telme_kd.reference import fusion as reference


def bounded_shift(
    anchor: Tensor, displacement: Tensor, *, threshold: float, eps: float | None = None
) -> Tensor:
    r"""Add a displacement, shortened to a share of the anchor's norm where it is longer.

    .. math::

        Z = F + \lambda H, \qquad
        \lambda = \min\Bigl(\theta \frac{\|F\|}{\|H\|},\; 1\Bigr)

    Source: :cite:t:`yun2024telme`, Eq. 18-19, after :cite:t:`rahman2020mag`. Rows are independent.

    Args:
        anchor: :math:`F` (..., d), floating, any magnitude; gradient: yes.
        displacement: :math:`H`, of the same shape; gradient: yes.
        threshold: :math:`\theta` >= 0, dimensionless; 0 returns the anchor.
        eps: None for the equation as printed, at any magnitude. A number for the released code,
            which divides by :math:`\|H\| + \epsilon` (theirs is 1e-6, and a zero norm counts as 1);
            it matters where displacements are short: at norms of 1e-7 it turns a threshold of 0.1
            into one below 0.01.

    Returns:
        :math:`Z` (..., d), in the anchor's dtype; computed in float32 at least.
        :math:`\|Z - F\| \le \min(\theta \|F\|, \|H\|)` up to rounding; :math:`Z = F` to the bit
        where the displacement or the threshold is zero.

    Raises:
        ShapeError: shapes differ, or d = 0.
        DTypeError: an input is no floating tensor, or a number of another type.
        DeviceError: the tensors lie on different devices.
        RangeError: a number is out of range.

    Example:
        >>> import torch
        >>> from telme_kd.functional import bounded_shift
        >>> bounded_shift(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 9.0]), threshold=0.2)
        tensor([3., 5.])
    """
    _checks.shift_pair(anchor, displacement)
    threshold = _checks.non_negative("threshold", threshold)
    eps = _checks.optional_eps(eps)
    dtype = accumulation_dtype(anchor, displacement)
    with outside_autocast(anchor.device):
        shifted = reference.bounded_shift(
            anchor.to(dtype), displacement.to(dtype), threshold=threshold, eps=eps
        )
    return shifted.to(anchor.dtype)


class ShiftingFusion(nn.Module):
    r"""Gate what the non-verbal side says and let it shift the anchor.

    .. math::

        g = \mathrm{ReLU}(W_1 \langle F, A \rangle + b_1), \qquad
        H = g \odot (W_2 A + b_2), \qquad
        Z = F + \lambda H

    with :math:`F` the anchor, :math:`A` the non-verbal feature and :math:`\lambda` of
    :func:`bounded_shift`. Source: :cite:t:`yun2024telme`, Eq. 16-19. The gate is a vector, one
    entry per feature, as in the released code; the columns of :math:`W_1` that read the anchor come
    first.

    Args:
        anchor_dim: width of the anchor, >= 1.
        displacement_dim: width of the non-verbal feature, >= 1.
        threshold: :math:`\theta` >= 0; the released code has 0.1 for MELD and 0.2 for IEMOCAP.
        eps: as in :func:`bounded_shift`.
        backend: ``"auto"``, or a name out of :func:`telme_kd.available_backends`. ``gate`` and
            ``value`` may be replaced by other modules, or carry hooks: they are called as modules
            then, and the rest is fused all the same.

    Raises:
        RangeError: a number or word is out of range.
        DTypeError: a number is of another type.

    Example:
        >>> import torch
        >>> from telme_kd import ShiftingFusion
        >>> fusion = ShiftingFusion(anchor_dim=768, displacement_dim=256)
        >>> fusion(torch.randn(4, 768), torch.randn(4, 256)).shape
        torch.Size([4, 768])
    """

    def __init__(
        self,
        anchor_dim: int,
        displacement_dim: int,
        threshold: float = 0.1,
        *,
        eps: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.backend_word(backend)
        self.backend: Backend = backend
        self.anchor_dim = _checks.positive_integer("anchor_dim", anchor_dim)
        self.displacement_dim = _checks.positive_integer("displacement_dim", displacement_dim)
        self.threshold = _checks.non_negative("threshold", threshold)
        self.eps = _checks.optional_eps(eps)
        self.gate = nn.Linear(self.anchor_dim + self.displacement_dim, self.anchor_dim)
        self.value = nn.Linear(self.displacement_dim, self.anchor_dim)

    def forward(self, anchor: Tensor, nonverbal: Tensor) -> Tensor:
        """Return the shifted anchor.

        Args:
            anchor: (..., anchor_dim), floating.
            nonverbal: (..., displacement_dim), with the same batch axes.

        Returns:
            (..., anchor_dim), in the anchor's dtype.

        Raises:
            ShapeError: a width or batch axis does not fit.
            DTypeError: an input is no floating tensor.
            DeviceError: the tensors lie on different devices.
            BackendError: the named backend cannot serve this call.
        """
        return self._fuse(anchor, nonverbal, None, None)

    def _fuse(
        self,
        anchor: Tensor,
        nonverbal: Tensor,
        norm: nn.LayerNorm | None,
        dropout: nn.Dropout | None,
    ) -> Tensor:
        """Shift, then normalise and drop out if given modules for it, which are not called."""
        _checks.last_axis("anchor", anchor, self.anchor_dim)
        _checks.last_axis("nonverbal", nonverbal, self.displacement_dim)
        _checks.same_batch_axes("nonverbal", nonverbal, "anchor", anchor)
        norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
        if plain := _is_plain(self.gate, nn.Linear) and _is_plain(self.value, nn.Linear):
            gate_bias, value_bias = self.gate.bias, self.value.bias
            tensors = [anchor, nonverbal, self.gate.weight, self.value.weight]
        else:
            gate_bias, value_bias = None, None  # the layers add them
            gate, value = self._by_layers(anchor, nonverbal)
            tensors = [anchor, gate, value]
        parameters = (gate_bias, value_bias, norm_weight, norm_bias)
        implementation = choose(
            "gate_and_shift",
            self.backend,
            [*tensors, *(parameter for parameter in parameters if parameter is not None)],
        )
        if implementation.backend == "reference":
            if plain:
                gate, value = self._by_layers(anchor, nonverbal)
            displacement = torch.relu(gate) * value  # Eq. 17
            fused = bounded_shift(anchor, displacement, threshold=self.threshold, eps=self.eps)
            fused = fused if norm is None else norm(fused)
            return fused if dropout is None else dropout(fused)
        rows = anchor.reshape(-1, self.anchor_dim)
        if plain:
            others = nonverbal.reshape(-1, self.displacement_dim)
            gate, value = products(rows, others, self.gate.weight, self.value.weight)
        fused = implementation.function(
            rows,
            gate.reshape(rows.shape),
            value.reshape(rows.shape),
            *parameters,
            threshold=self.threshold,
            eps=self.eps,
            norm_eps=None if norm is None else norm.eps,
            rate=dropout.p if dropout is not None and dropout.training else 0.0,
            output_dtype=anchor.dtype if norm is None else _normalised_dtype(anchor),
        )
        return fused.reshape(anchor.shape)

    def _by_layers(self, anchor: Tensor, nonverbal: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of Eq. 16's ReLU and of Eq. 17's product."""
        return self.gate(torch.cat((anchor, nonverbal), dim=-1)), self.value(nonverbal)

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return f"threshold={self.threshold}, eps={self.eps}, backend={self.backend!r}"


class AttentionShiftingFusion(nn.Module):
    r"""Let the students attend to each other, then shift the anchor by what they agree on.

    Multi-head self-attention over the students' features, with a residual sum, LayerNorm and
    dropout, gives the non-verbal feature :math:`A`; :class:`ShiftingFusion` moves the anchor by it;
    LayerNorm and dropout follow, and a linear classifier if asked for. Source:
    :cite:t:`yun2024telme`, Section 3.4 and Eq. 16-19.

    What the tokens of the attention are is a choice (``attend_over``):

    ``"modalities"`` (default)
        Each student is a token, mapped to a common width. An item's output depends on that item
        alone.
    ``"dialogue"``
        Each utterance is a token, its students side by side; the sequence is the second last axis
        of (..., U, d). ``mask`` leaves padding out; ``causal=True`` hides the future.
    ``"batch"``
        As the released code does, whose two-dimensional call makes the *batch* the sequence: an
        item's output depends on which others share its batch, test items included. Only for
        checkpoints that were trained so.

    Deviations: the paper does not say what attends to what; the released code's answer is
    ``"batch"``. ``num_heads`` need not divide the width: each head takes the width over the number
    of heads, rounded up, which is the usual attention wherever it divides.

    Args:
        anchor_dim: width of the anchor (the teacher's feature), >= 1.
        student_dims: widths of the students' features, one or more.
        num_heads: heads of the attention; the released code has 3 for MELD and 4 for IEMOCAP.
        threshold: :math:`\theta` of :func:`bounded_shift`; the released code has 0.1 for MELD and
            0.2 for IEMOCAP.
        dropout: probability in [0, 1), after each LayerNorm.
        attend_over: ``"modalities"``, ``"dialogue"`` or ``"batch"``.
        num_classes: None to return fused features, or the number of classes for logits.
        causal: with ``attend_over="dialogue"``, an utterance sees itself and what came before.
        eps: as in :func:`bounded_shift`.
        backend: what computes everything after the attention, as in :class:`ShiftingFusion`. If
            ``shift``, ``norm`` or ``dropout`` is replaced by another module or carries hooks, each
            is called as a module.

    Raises:
        RangeError: a number or word is out of range, or ``causal`` without a dialogue.
        DTypeError: a number is of another type.

    Example:
        >>> import torch
        >>> from telme_kd import AttentionShiftingFusion
        >>> fusion = AttentionShiftingFusion(768, (512, 256), num_heads=4, num_classes=7)
        >>> text, audio, visual = torch.randn(4, 768), torch.randn(4, 512), torch.randn(4, 256)
        >>> fusion(text, audio, visual).shape
        torch.Size([4, 7])
    """

    def __init__(
        self,
        anchor_dim: int,
        student_dims: tuple[int, ...],
        num_heads: int = 4,
        threshold: float = 0.1,
        dropout: float = 0.1,
        attend_over: AttendOver = "modalities",
        num_classes: int | None = None,
        *,
        causal: bool = False,
        eps: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.anchor_dim = _checks.positive_integer("anchor_dim", anchor_dim)
        self.student_dims = _checks.widths("student_dims", student_dims)
        heads = _checks.positive_integer("num_heads", num_heads)
        _checks.attend_over_word(attend_over)
        _checks.causal_choice(causal, attend_over)
        rate = _checks.probability("dropout", dropout)
        classes = (
            None if num_classes is None else _checks.positive_integer("num_classes", num_classes)
        )
        self.attend_over: AttendOver = attend_over
        self.causal = causal

        if attend_over == "modalities":
            token_dim = max(self.student_dims)
            self.embeddings = nn.ModuleList(nn.Linear(dim, token_dim) for dim in self.student_dims)
            nonverbal_dim = token_dim * len(self.student_dims)
        else:
            token_dim = nonverbal_dim = sum(self.student_dims)
        self.attention = _SelfAttention(token_dim, heads)
        self.attention_norm = nn.LayerNorm(token_dim)
        self.attention_dropout = nn.Dropout(rate)
        self.shift = ShiftingFusion(
            self.anchor_dim, nonverbal_dim, threshold, eps=eps, backend=backend
        )
        self.norm = nn.LayerNorm(self.anchor_dim)
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Identity() if classes is None else nn.Linear(self.anchor_dim, classes)

    def forward(self, anchor: Tensor, *students: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return fused features, or logits if the head has a classifier.

        Args:
            anchor: (..., anchor_dim), floating; at least (U, anchor_dim) if attending over a
                dialogue or batch.
            students: (..., student_dims[k]) each, with the anchor's batch axes.
            mask: bool over the batch axes, for attention over a dialogue or batch: False marks
                padding, which nothing attends to and whose own output means nothing.

        Returns:
            (..., anchor_dim), or (..., num_classes).

        Raises:
            ShapeError: a width, a batch axis or the number of students does not fit.
            DTypeError: an input is no floating tensor, or the mask not bool.
            DeviceError: the tensors lie on different devices.
            RangeError: a mask with attention over modalities, where nothing is padding.
            BackendError: the named backend cannot serve this call.
        """
        self._check(anchor, students, mask)
        if self.attend_over == "modalities":
            embedded = zip(self.embeddings, students, strict=True)
            tokens = torch.stack([embed(student) for embed, student in embedded], dim=-2)
            attended = self._attend(tokens, mask=None)
            nonverbal = rearrange(attended, "... student width -> ... (student width)")
        else:
            tokens = torch.cat(students, dim=-1)
            if mask is not None:
                # Padding may hold anything, NaN included, and 0 times NaN is NaN.
                tokens = tokens.masked_fill(~mask[..., None], 0.0)
                anchor = anchor.masked_fill(~mask[..., None], 0.0)
            if self.attend_over == "batch":
                attended = self._attend(
                    tokens.flatten(0, -2), None if mask is None else mask.flatten()
                )
                nonverbal = attended.reshape(tokens.shape)
            else:
                nonverbal = self._attend(tokens, mask)
        fused: Tensor
        if self._is_fusible():
            fused = self.shift._fuse(anchor, nonverbal, self.norm, self.dropout)
        else:
            fused = self.dropout(self.norm(self.shift(anchor, nonverbal)))
        classified: Tensor = self.classifier(fused)
        return classified

    def _is_fusible(self) -> bool:
        return (
            _is_plain(self.shift, ShiftingFusion)
            and _is_plain(self.norm, nn.LayerNorm)
            and self.norm.normalized_shape == (self.anchor_dim,)
            and _is_plain(self.dropout, nn.Dropout)
            and self.dropout.p < 1.0
        )

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        attended = tokens + self.attention(tokens, mask=mask, causal=self.causal)
        normalised: Tensor = self.attention_dropout(self.attention_norm(attended))
        return normalised

    def _check(self, anchor: Tensor, students: tuple[Tensor, ...], mask: Tensor | None) -> None:
        _checks.last_axis("anchor", anchor, self.anchor_dim)
        _checks.student_count(students, self.student_dims)
        for index, (student, width) in enumerate(zip(students, self.student_dims, strict=True)):
            _checks.last_axis(f"students[{index}]", student, width)
            _checks.same_batch_axes(f"students[{index}]", student, "anchor", anchor)
        if self.attend_over != "modalities":
            _checks.has_sequence("anchor", anchor, self.attend_over)
        if mask is not None:
            _checks.mask_means_padding(self.attend_over)
            _checks.item_mask(mask, anchor.shape[:-1], anchor)

    def extra_repr(self) -> str:
        """Return the options, as ``repr`` shows them."""
        return f"attend_over={self.attend_over!r}, causal={self.causal}"


class _SelfAttention(nn.Module):
    """Multi-head self-attention over the second last axis, for any width and number of heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * -(-width // num_heads)
        self.query_key_value = nn.Linear(width, 3 * inner)
        self.output = nn.Linear(inner, width)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        query, key, value = rearrange(
            self.query_key_value(tokens),
            "... n (three h d) -> three ... h n d",
            three=3,
            h=self.num_heads,
        )
        visible = self._visible(tokens, mask, causal)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        merged: Tensor = self.output(rearrange(attended, "... h n d -> ... n (h d)"))
        return merged

    def _visible(self, tokens: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
        """What a query (second last axis) may attend to (last axis); None: everything."""
        if mask is None and not causal:
            return None
        length = tokens.shape[-2]
        visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device)
        if causal:
            visible = visible.tril()
        if mask is not None:
            # Padding may look at itself, lest its softmax, and so its gradient, be of nothing.
            itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
            visible = (visible & mask[..., None, None, :]) | itself
        return visible


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does what its class says and nobody listens: then it need not be called."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not module_hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _normalised_dtype(rows: Tensor) -> torch.dtype:
    """What LayerNorm returns: its input's dtype, but float32 at least under CUDA's autocast."""
    if rows.is_cuda and torch.is_autocast_enabled("cuda"):
        return accumulation_dtype(rows)
    return rows.dtype
