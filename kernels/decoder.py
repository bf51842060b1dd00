# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportOptionalIterable=false
"""A whole layer of CRATE-MAE's decoder by four kernels forward and eight backward, those of the encoder's layer.

    z  = LN(x) Wᵀ                       norm_linear        saved: x, z, w, o (y is the next layer's x), lse and the
    w  = LN(z) Uᵀ                       norm_linear        statistics of both norms
    o  = softmax(w wᵀ · scale) w        mssa_forward
    y  = z − o Woᵀ − b                  linear, of −Wo and −b

Nothing is rectified, so a layer hands the one below its gradient as it is, with its column sums beside it; the gradient of z is
stored 1/deviation of x's rows times, with its row and column sums, by the product that makes it (gradients.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .attention import padded_tokens
from .gradients import Rectified, attention_gradient, norm_data_gradient, row_blocks
from .linear import Folded, Statistics, empty_moments, linear, norm_linear
from .mssa import mssa_backward, mssa_forward
from .stack import enter_stack, fit_sums, power_of_two_scale
from .weight_gradients import weight_gradient
from .weights import NormProduct, finish_layer


class DecoderWeights(NamedTuple):
    """What a layer is differentiated by, in any floating dtype."""

    norm1_weight: Tensor  # (dim,)
    norm1_bias: Tensor  # (dim,)
    dictionary: Tensor  # (dim, dim), W
    norm2_weight: Tensor  # (dim,)
    norm2_bias: Tensor  # (dim,)
    project: Tensor  # (inner, dim), U
    out_weight: Tensor  # (dim, inner), Wo
    out_bias: Tensor  # (dim,)


class PreparedDecoder(NamedTuple):
    """A layer's weights as the kernels read them: matrices in the operands' dtype, (in, out) and stored transposed, vectors
    float32."""

    dictionary: Tensor  # (dim, dim): diag(γ₁) Wᵀ
    dictionary_gain: Tensor  # (dim,)
    dictionary_offset: Tensor  # (dim,)
    project: Tensor  # (dim, inner): diag(γ₂) Uᵀ
    project_gain: Tensor  # (inner,)
    project_offset: Tensor  # (inner,)
    out_weight: Tensor  # (inner, dim): −Woᵀ
    out_bias: Tensor  # (dim,): −b

    def folded(self) -> tuple[Folded, Folded]:
        """Both products behind a LayerNorm."""
        return Folded(*self[:3]), Folded(*self[3:6])


class DecoderSettings(NamedTuple):
    """A layer's numbers that are not learned."""

    heads: int
    scale: float
    eps_dictionary: float
    eps_mssa: float


class DecoderState(NamedTuple):
    """What layers hand on; see `StackState`."""

    x: Tensor  # (batch, tokens, dim), contiguous
    gradient_scale: Tensor  # (): its gradient is the factor on all gradients
    moments: Tensor  # (2, parts, batch * tokens) float32, of x
    totals: Tensor | None  # (1, parts, dim): its gradient are the column sums of x's; None where nobody wants them


@torch.no_grad()
def prepare_decoder(layers: Sequence[DecoderWeights], operand: torch.dtype) -> list[PreparedDecoder]:
    """The weights of layers in the form that the kernels read, of layers that are alike together; no gradient."""
    if any(a.shape != b.shape for layer in layers for a, b in zip(layer, layers[0], strict=True)):
        return [prepared for layer in layers for prepared in prepare_decoder([layer], operand)]
    w = DecoderWeights(*(torch.stack(kind).float() for kind in zip(*layers, strict=True)))
    stacked = (
        *_fold(w.dictionary, w.norm1_weight, w.norm1_bias, operand),
        *_fold(w.project, w.norm2_weight, w.norm2_bias, operand),
        w.out_weight.neg().to(operand).mT,
        w.out_bias.neg(),
    )
    return [PreparedDecoder(*layer) for layer in zip(*(kind.unbind() for kind in stacked), strict=True)]


def _fold(weight: Tensor, gamma: Tensor, beta: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """F, stored transposed, v and u (linear.py) of (layers, out, in); v of the rounded F, so that its rounding cancels."""
    matrix = (weight * gamma[:, None]).to(operand)
    return matrix.mT, matrix.float().sum(2), (weight * beta[:, None]).sum(2)


def _forward_shapes(x, moments, prepared, heads, scale, eps_dictionary, eps_mssa):
    batch, tokens, dim = x.shape
    w = x.new_empty(batch, tokens, prepared[3].shape[1], dtype=prepared[3].dtype)
    lse = x.new_empty(batch, heads, padded_tokens(tokens), dtype=torch.float32)
    statistics = x.new_empty(4, batch * tokens, dtype=torch.float32)
    y_moments = empty_moments("out_project", prepared[6], batch * tokens)
    totals = x.new_empty(1, row_blocks(prepared[0], batch * tokens), dim, dtype=torch.float32)
    return torch.empty_like(x), w, torch.empty_like(w), lse, statistics, torch.empty_like(x), y_moments, totals


@operator(fake=_forward_shapes)
def decoder_forward(
    x: Tensor, moments: Tensor, prepared: list[Tensor], heads: int, scale: float, eps_dictionary: float, eps_mssa: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(z, w, o, lse, statistics, y, y's moments, a placeholder for the column sums of y's gradient).

    x: (batch, tokens, dim), contiguous; moments: of x, see linear.py. statistics: (4, rows) float32, mean and 1/deviation of x,
    then of z.
    """
    weights = PreparedDecoder(*prepared)
    dictionary, project = weights.folded()
    batch, tokens, dim = x.shape
    rows, out, count = x.view(-1, dim), weights.out_weight, batch * tokens
    statistics = x.new_empty(4, count, dtype=torch.float32)
    mean1, rstd1, mean2, rstd2 = statistics.unbind()
    z_moments, y_moments = empty_moments("project", dictionary.matrix, count), empty_moments("out_project", out, count)
    z, w = torch.empty_like(x), x.new_empty(batch, tokens, out.shape[0], dtype=out.dtype)
    norm_linear(rows, moments, dictionary, None, z, eps_dictionary, Statistics(mean1, rstd1), z_moments)
    rows = z.view(-1, dim)
    norm_linear(rows, z_moments, project, None, w, eps_mssa, Statistics(mean2, rstd2))
    o, lse = mssa_forward(w, heads, scale)
    y = linear(o.view(count, -1), out, x.dtype, offset=weights.out_bias, residual=rows, moments=y_moments)
    totals = x.new_empty(1, row_blocks(dictionary.matrix, count), dim, dtype=torch.float32)
    return z, w, o, lse, statistics, y.view(x.shape), y_moments, totals


def _backward_shapes(dy, totals, gradient_scale, saved, prepared, weights, scale, wanted):
    groups = (wanted[0],) * 3 + (wanted[1],) * 3 + (wanted[2],) * 2
    gradients = [w.new_empty(w.shape if want else (0,), dtype=torch.float32) for w, want in zip(weights, groups, strict=True)]
    x = saved[0]
    parts = row_blocks(prepared[0], x.shape[0] * x.shape[1])
    return [torch.empty_like(x), x.new_empty(1, parts, x.shape[2], dtype=torch.float32), *gradients]


@operator(fake=_backward_shapes)
def decoder_backward(
    dy: Tensor,
    totals: Tensor,
    gradient_scale: Tensor,
    saved: list[Tensor],
    prepared: list[Tensor],
    weights: list[Tensor],
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """[dx, its column sums in parts, then the gradients of `DecoderWeights` in order, float32 and unscaled].

    saved: x, z, w, o, lse, statistics. totals: parts of the column sums of dy. wanted: whether the weights of the
    dictionary, the projection, the projection back are wanted; tensors are empty where not.
    """
    x, z, w, o, lse, statistics = saved
    own = DecoderWeights(*weights)
    dictionary, project = PreparedDecoder(*prepared).folded()
    shape, dim, inner, operand = x.shape, x.shape[-1], w.shape[-1], w.dtype
    x, z, dy = x.view(-1, dim), z.view(-1, dim), dy.reshape(-1, dim)
    mean1, rstd1, mean2, rstd2 = statistics.unbind()
    of_dictionary = of_project = of_out = None

    do, delta = attention_gradient(dy, prepared[6], o, lse.shape[1], scale)
    if wanted[2]:
        of_out = weight_gradient(o.view(-1, inner), dy, operand, totals=totals, transposed=True)
    dw, dw_sums, dw_totals = mssa_backward(w, do, lse, delta, scale, project, rstd2)
    dw = dw.view(-1, inner)
    if wanted[1]:
        product = weight_gradient(z, dw, operand, mean=mean2, totals=dw_totals)
        of_project = NormProduct(product, own.project.t(), own.norm2_weight, own.norm2_bias)
    of_z = Rectified(dictionary.gain, dictionary.offset, rstd1)
    stats2 = Statistics(mean2, rstd2)
    dz = norm_data_gradient(dw, dw_sums, z, project, None, stats2, residual=dy, rectified=of_z, masked=False)
    if wanted[0]:
        product = weight_gradient(x, dz.dx, operand, mean=mean1, totals=dz.totals)
        of_dictionary = NormProduct(product, own.dictionary.t(), own.norm1_weight, own.norm1_bias)
    dx = norm_data_gradient(dz.dx, dz.sums, x, dictionary, None, Statistics(mean1, rstd1))
    gradients = finish_layer(gradient_scale, of_dictionary, None, None)[:3]
    gradients += finish_layer(gradient_scale, of_project, None, None)[:3]
    gradients += finish_layer(-gradient_scale, None, of_out, None)[3:5]  # of −Wo and −b
    return [dx.dx.view(shape), dx.totals, *gradients]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient_scale, moments, totals, settings: DecoderSettings, *tensors: Tensor):
        weights, prepared = tensors[:8], tensors[8:]
        *saved, y, y_moments, y_totals = decoder_forward(x, moments, list(prepared), *settings)
        ctx.save_for_backward(x, *saved, *weights, *prepared)
        ctx.scale, ctx.shape = settings.scale, None if totals is None else totals.shape
        ctx.set_materialize_grads(False)  # else the moments get a gradient of zeros
        return y, torch.empty_like(gradient_scale), y_moments, y_totals

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, gradient_scale: Tensor, _, totals: Tensor):
        tensors = list(ctx.saved_tensors)
        saved, weights, prepared = tensors[:6], tensors[6:14], tensors[14:]
        need = ctx.needs_input_grad[5:13]
        wanted = [any(need[:3]), any(need[3:6]), any(need[6:])]
        dx, below, *results = decoder_backward(dy, totals, gradient_scale, saved, prepared, weights, ctx.scale, wanted)
        gradients = [g.to(w.dtype) if n else None for g, w, n in zip(results, weights, need, strict=True)]
        below = None if ctx.shape is None else fit_sums(below, ctx.shape)
        return dx, gradient_scale, None, below, None, *gradients, *[None] * len(prepared)


class _LeaveDecoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gradient_scale: Tensor, totals: Tensor, out: torch.dtype, scaled: bool):
        ctx.dtype, ctx.shape, ctx.scaled = x.dtype, totals.shape, scaled
        return x.to(out, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        largest = dy.abs().amax().float()
        scale = power_of_two_scale(largest) if ctx.scaled else torch.ones_like(largest)
        dx = (dy.float() * scale).to(ctx.dtype).contiguous()
        totals = dx.sum((0, 1), dtype=torch.float32)[None, None]
        return dx, scale, fit_sums(totals, ctx.shape), None, None


def enter_decoder(x: Tensor, activation_dtype: torch.dtype) -> DecoderState:
    """What the first layer takes of x: (batch, tokens, dim), any strides."""
    return DecoderState(*enter_stack(x, activation_dtype)[:4])


def fused_decoder_layer(
    state: DecoderState, weights: DecoderWeights, prepared: PreparedDecoder, settings: DecoderSettings
) -> DecoderState:
    """One layer, between `enter_decoder` and `leave_decoder`; differentiable once. The result may go to one place only."""
    return DecoderState(*_DecoderLayer.apply(*state, settings, *weights, *prepared))


def leave_decoder(state: DecoderState, out: torch.dtype, scaled: bool) -> Tensor:
    """All tokens in dtype `out`; `scaled` where operands are float16. state: what `fused_decoder_layer` returned."""
    return _LeaveDecoder.apply(state.x, state.gradient_scale, state.totals, out, scaled)
