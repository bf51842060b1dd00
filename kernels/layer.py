# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
"""A whole CRATE layer by four kernels forward and eight backward.

    w  = LN(x) Uᵀ                       norm_linear        saved: x, w, o, z, y (the next layer's x), lse and the
    o  = softmax(w wᵀ · scale) w        mssa_forward       statistics of both norms: four activations a layer, nothing
    z  = x + o Woᵀ + b                  linear             normalised, nothing tokens × tokens
    y  = relu(h + h M − ηλ), h = LN(z)  norm_linear

The activations x, z, y and the operands w, o and weights have dtypes of their own; stack.py has how layers are strung together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .attention import padded_tokens
from .gradients import Rectified, attention_gradient, column_blocks, norm_data_gradient, row_blocks
from .linear import Folded, Statistics, empty_moments, linear, norm_linear
from .mssa import attention_backward_flops, attention_flops, mssa_backward, mssa_forward
from .stack import StackState, fit_sums
from .weight_gradients import weight_gradient
from .weights import NormProduct, finish_layer, prepare_weights


class LayerWeights(NamedTuple):
    """What a layer is differentiated by, in any floating dtype."""

    norm1_weight: Tensor  # (dim,)
    norm1_bias: Tensor  # (dim,)
    project: Tensor  # (inner, dim), U
    out_weight: Tensor  # (dim, inner), Wo
    out_bias: Tensor  # (dim,)
    norm2_weight: Tensor  # (dim,)
    norm2_bias: Tensor  # (dim,)
    matrix: Tensor  # (dim, dim) float32, M of the step of sparsification, relu(h + h M − ηλ): for ISTA η(D − DᵀD)


class PreparedWeights(NamedTuple):
    """A layer's weights as the kernels read them: matrices in the operands' dtype, (in, out), vectors float32."""

    project: Tensor  # (dim, inner): diag(γ₁) Uᵀ, stored transposed
    project_gain: Tensor  # (inner,)
    project_offset: Tensor  # (inner,)
    out_weight: Tensor  # (inner, dim): Woᵀ, stored transposed
    ista: Tensor  # (dim, dim): diag(γ₂) M
    ista_gain: Tensor  # (dim,)
    ista_offset: Tensor  # (dim,)

    def folded(self) -> tuple[Folded, Folded]:
        """The projection and the ISTA step."""
        return Folded(*self[:3]), Folded(*self[4:])


class LayerSettings(NamedTuple):
    """A layer's numbers that are not learned."""

    heads: int
    scale: float
    eps_mssa: float
    eps_ista: float
    shrinkage: float  # ηλ


def stack_weights(layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The weights of like layers, stacked by kind, contiguous, in one copy, which is one launch up to 18 layers (torch.cat
    takes 128 tensors at a time); None for out_bias, which needs no preparation.

    layers: of each as `LayerWeights`, with what M is made of, any number of tensors, in its place.
    """
    kinds, out_bias = list(zip(*layers, strict=True)), LayerWeights._fields.index("out_bias")
    del kinds[out_bias]
    with torch.no_grad():
        flat = torch.ops.aten.flatten_dense_tensors([w for kind in kinds for w in kind])  # cat of all as vectors
    parts = flat.split([len(kind) * kind[0].numel() for kind in kinds])
    stacked = [part.view(-1, *kind[0].shape) for part, kind in zip(parts, kinds, strict=True)]
    return [*stacked[:out_bias], None, *stacked[out_bias:]]


def prepare_layers(stacked: Sequence[Tensor], shrinkage: float, operand: torch.dtype) -> list[PreparedWeights]:
    """Folds the norms into the weights of all layers and rounds them to `operand`; no gradient. One launch.

    stacked: `stack_weights` of them, with their M. shrinkage: ηλ.
    """
    w = LayerWeights(*stacked)
    prepared = prepare_weights(
        w.project, w.norm1_weight, w.norm1_bias, w.out_weight, w.matrix, w.norm2_weight, w.norm2_bias, operand, shrinkage
    )
    at_once = PreparedWeights(*prepared)  # transposed here, not in each layer twice
    at_once = at_once._replace(project=at_once.project.mT, out_weight=at_once.out_weight.mT)
    return [PreparedWeights(*layer) for layer in zip(*(p.unbind() for p in at_once), strict=True)]


class Activations(NamedTuple):
    """What a layer keeps for backward: `8 · dim + 4 · heads + 16` bytes a token in 16 bit, y being the next layer's x."""

    x: Tensor  # (batch, tokens, dim) activation_dtype
    w: Tensor  # (batch, tokens, inner) operand_dtype
    o: Tensor  # (batch, tokens, inner) operand_dtype
    z: Tensor  # (batch, tokens, dim) activation_dtype
    y: Tensor  # (batch, tokens, dim) activation_dtype
    lse: Tensor  # (batch, heads, tokens rounded up to a multiple of 16) float32
    statistics: Tensor  # (4, batch * tokens) float32: mean and 1/deviation of x, then of z


def _forward_shapes(x, moments, prepared, out_bias, norm2_weight, heads, scale, eps_mssa, eps_ista):
    batch, tokens, _ = x.shape
    w = x.new_empty(batch, tokens, prepared[0].shape[1], dtype=prepared[0].dtype)
    lse = x.new_empty(batch, heads, padded_tokens(tokens), dtype=torch.float32)
    statistics = x.new_empty(4, batch * tokens, dtype=torch.float32)
    handed_on = empty_moments("ista", prepared[4], batch * tokens), _empty_totals(x, prepared)
    return w, torch.empty_like(w), torch.empty_like(x), torch.empty_like(x), lse, statistics, *handed_on


def _empty_totals(x: Tensor, prepared: list[Tensor]) -> Tensor:
    """Room for the column sums of a gradient like x, (1, parts, dim) float32."""
    batch, tokens, dim = x.shape
    return x.new_empty(1, row_blocks(prepared[0], batch * tokens), dim, dtype=torch.float32)


def _forward_flops(x, moments, prepared, *_) -> int:
    w = x.new_empty(*x.shape[:2], prepared[0].shape[1], device="meta")
    return 2 * x.numel() * (2 * w.shape[2] + x.shape[2]) + attention_flops(w)


@operator(fake=_forward_shapes, flops=_forward_flops)
def layer_forward(
    x: Tensor,
    moments: Tensor,
    prepared: list[Tensor],
    out_bias: Tensor,
    norm2_weight: Tensor,
    heads: int,
    scale: float,
    eps_mssa: float,
    eps_ista: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(w, o, z, y, lse, statistics), see `Activations`, y's moments, and a placeholder for its gradient's column sums.

    x: (batch, tokens, dim), contiguous; moments: of x, (2, parts, batch * tokens) float32, see linear.py.
    """
    weights = PreparedWeights(*prepared)
    project, ista = weights.folded()
    batch, tokens, dim = x.shape
    rows, out, count = x.view(-1, dim), weights.out_weight, batch * tokens  # not len(rows): 0.26 µs
    statistics = x.new_empty(4, count, dtype=torch.float32)
    mean1, rstd1, mean2, rstd2 = statistics.unbind()
    z_moments, y_moments = empty_moments("out_project", out, count), empty_moments("ista", ista.matrix, count)
    stats1, stats2 = Statistics(mean1, rstd1), Statistics(mean2, rstd2)
    w = x.new_empty(batch, tokens, out.shape[0], dtype=out.dtype)
    norm_linear(rows, moments, project, None, w, eps_mssa, stats1)
    o, lse = mssa_forward(w, heads, scale)
    z = linear(o.view(count, -1), out, x.dtype, offset=out_bias, residual=rows, moments=z_moments)
    y = torch.empty_like(x)  # and no view of what is written, of which FSDP2 warns where a layer returns one
    norm_linear(z, z_moments, ista, norm2_weight, y, eps_ista, stats2, y_moments)
    return w, o, z.view(x.shape), y, lse, statistics, y_moments, _empty_totals(x, prepared)


def _backward_shapes(dy, sums, totals, gradient_scale, saved, prepared, weights, below, scale, wanted):
    groups = (wanted[0],) * 3 + (wanted[1],) * 2 + (wanted[2],) * 3
    gradients = [w.new_empty(w.shape if want else (0,), dtype=torch.float32) for w, want in zip(weights, groups, strict=True)]
    x = saved[0]
    sums = x.new_empty(2, column_blocks(prepared[0]), x.shape[0] * x.shape[1], dtype=torch.float32)
    dx_sums = (sums, _empty_totals(x, prepared)) if below else _nothing(gradient_scale, 2)
    return [torch.empty_like(x), *dx_sums, *gradients]


def _backward_flops(dy, sums, totals, gradient_scale, saved, prepared, weights, below, scale, wanted) -> int:
    x, w = saved[:2]
    of_matrices = [2 * x.numel() * w.shape[2], 2 * x.numel() * w.shape[2], 2 * x.numel() * x.shape[2]]
    return sum(each * (1 + want) for each, want in zip(of_matrices, wanted, strict=True)) + attention_backward_flops(w)


@operator(fake=_backward_shapes, flops=_backward_flops)
def layer_backward(
    dy: Tensor,
    sums: Tensor,
    totals: Tensor,
    gradient_scale: Tensor,
    saved: list[Tensor],
    prepared: list[Tensor],
    weights: list[Tensor],
    below: list[Tensor],
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """[dx, its row sums and column sums, then the gradients of `LayerWeights` in order, float32 and unscaled].

    dy is masked where y is 0 and stored 1/deviation of z's rows times; `sums` (2, parts, rows) are its row sums, `totals`
    (1, parts, dim) its column sums (gradients.py). below: `Rectified` of the layer that wrote x, for which dx is made the
    same way; empty if none did. wanted: whether the weights of the projection, the projection back, the ISTA step are
    wanted. Tensors are empty where something is not.
    """
    a, w = Activations(*saved), LayerWeights(*weights)
    project, ista = PreparedWeights(*prepared).folded()
    dim, inner, operand = a.x.shape[-1], a.w.shape[-1], a.w.dtype
    x, z, o = a.x.view(-1, dim), a.z.view(-1, dim), a.o.view(-1, inner)
    mean1, rstd1, mean2, rstd2 = a.statistics.unbind()
    stats1, stats2 = Statistics(mean1, rstd1), Statistics(mean2, rstd2)
    of_project = of_out = of_ista = None

    dy = dy.reshape(-1, dim)
    dz = norm_data_gradient(dy, sums, z, ista, w.norm2_weight, stats2)
    if wanted[2]:
        product = weight_gradient(z, dy, operand, mean=mean2, totals=totals)
        of_ista = NormProduct(product, w.matrix, w.norm2_weight, w.norm2_bias)
    do, delta = attention_gradient(dz.dx, prepared[3], a.o, a.lse.shape[1], scale)
    if wanted[1]:
        of_out = weight_gradient(o, dz.dx, operand, totals=dz.totals, transposed=True)
    dw, dw_sums, dw_totals = mssa_backward(a.w, do, a.lse, delta, scale, project, rstd1)
    dw = dw.view(-1, inner)
    rectified = Rectified(*below) if below else None
    dx = norm_data_gradient(dw, dw_sums, x, project, None, stats1, residual=dz.dx, rectified=rectified)
    if wanted[0]:
        product = weight_gradient(x, dw, operand, mean=mean1, totals=dw_totals)
        of_project = NormProduct(product, w.project.t(), w.norm1_weight, w.norm1_bias)
    gradients = finish_layer(gradient_scale, of_project, of_out, of_ista)
    dx_sums = (dx.sums, dx.totals) if below else _nothing(gradient_scale, 2)
    return [dx.dx.view(a.x.shape), *dx_sums, *gradients]


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(0, dtype=torch.float32) for _ in range(count)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient_scale, moments, totals, gain, offset, rstd, settings: LayerSettings, *tensors: Tensor):
        weights, prepared = tensors[:8], tensors[8:]
        w = LayerWeights(*weights)
        numbers = (settings.heads, settings.scale, settings.eps_mssa, settings.eps_ista)
        *activations, y_moments, y_totals = layer_forward(x, moments, list(prepared), w.out_bias, w.norm2_weight, *numbers)
        below = () if gain is None else (gain, offset, rstd)
        ctx.save_for_backward(x, *activations, *weights, *prepared, *below)
        ctx.scale, ctx.shapes = settings.scale, (moments.shape, totals.shape) if below else None
        y_rstd = activations[-1][3]
        ctx.mark_non_differentiable(y_rstd)
        ctx.set_materialize_grads(False)  # else y_rstd gets a gradient of zeros
        return activations[3], torch.empty_like(gradient_scale), y_moments, y_totals, y_rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, gradient_scale: Tensor, sums: Tensor, totals: Tensor, _):
        tensors = list(ctx.saved_tensors)
        saved, weights, prepared, below = tensors[:7], tensors[7:15], tensors[15:22], tensors[22:]
        need = ctx.needs_input_grad[8:16]
        wanted = [any(need[:3]), any(need[3:5]), any(need[5:])]
        given = (dy, sums, totals, gradient_scale)
        dx, *results = layer_backward(*given, saved, prepared, weights, below, ctx.scale, wanted)
        dx_sums = map(fit_sums, results[:2], ctx.shapes) if below else (None, None)
        gradients = [_in_dtype(g, w) if n else None for g, w, n in zip(results[2:], weights, need, strict=True)]
        return dx, gradient_scale, *dx_sums, *[None] * 4, *gradients, *[None] * len(prepared)


def _in_dtype(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient if gradient.dtype is weight.dtype else gradient.to(weight.dtype)


def fused_layer(state: StackState, weights: LayerWeights, prepared: PreparedWeights, settings: LayerSettings) -> StackState:
    """One layer, between `enter_stack` and `leave_stack`; differentiable once. The result may go to one place only."""
    writer = state.writer or (None, None, None)
    *handed_on, rstd = _Layer.apply(*state[:4], *writer, settings, *weights, *prepared)
    return StackState(*handed_on, Rectified(prepared.ista_gain, prepared.ista_offset, rstd))
