"""A whole CRATE layer by four kernels forward and seven backward.

    w  = LN(x) Uᵀ                       norm_linear        saved: x, w, o, z, y (the next layer's x), lse and the
    o  = softmax(w wᵀ · scale) w        mssa_forward       statistics of both norms: four activations a layer, nothing
    z  = x + o Woᵀ + b                  linear             normalised, nothing tokens × tokens
    y  = relu(h + h M − ηλ), h = LN(z)  norm_linear

The stream (x, z, y) and the operands (w, o, weights) have dtypes of their own. With float16 operands gradients are float16
too, multiplied by one power of two: `leave_stack` sets it from the gradient that enters, every layer divides it out of its
weights' gradients in float32, `enter_stack` out of the gradient that leaves. Between them it travels as the gradient of a
scalar that the layers hand on, so it stays on the device, every backward pass has its own, and autograd orders the uses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import Folded, Statistics, fold, linear, linear_backward, norm_linear, norm_linear_backward, weight_gradient
from .mssa import mssa_backward, mssa_forward
from .runtime import operator

SCALE_EXPONENT = 4
"""The largest gradient that enters the stack is scaled to [2^3, 2^4): a factor 4,096 of room above, 10^8 below."""


class LayerWeights(NamedTuple):
    """What a layer is differentiated by, in any floating dtype."""

    norm1_weight: Tensor  # (dim,)
    norm1_bias: Tensor  # (dim,)
    project: Tensor  # (inner, dim), U
    out_weight: Tensor  # (dim, inner), Wo
    out_bias: Tensor  # (dim,)
    norm2_weight: Tensor  # (dim,)
    norm2_bias: Tensor  # (dim,)
    operator: Tensor  # (dim, dim) float32, M = η(D − DᵀD)


class PreparedWeights(NamedTuple):
    """A layer's weights as the kernels read them, in the operands' dtype."""

    project: Tensor  # (inner, dim): U diag(γ₁)
    project_gain: Tensor  # (inner,)
    project_offset: Tensor  # (inner,)
    out_weight: Tensor  # (dim, inner)
    ista: Tensor  # (dim, dim): diag(γ₂) M
    ista_gain: Tensor  # (dim,)
    ista_offset: Tensor  # (dim,)

    def folded(self) -> tuple[Folded, Folded]:
        """The projection and the ISTA step as (in, out) products."""
        project = Folded(self.project.t(), self.project_gain, self.project_offset)
        return project, Folded(self.ista, self.ista_gain, self.ista_offset)


class LayerSettings(NamedTuple):
    """A layer's numbers that are not learned."""

    heads: int
    scale: float
    eps_mssa: float
    eps_ista: float
    shrinkage: float  # ηλ


def prepare_layer(weights: LayerWeights, settings: LayerSettings, operand: torch.dtype) -> PreparedWeights:
    """Folds the norms into the weights and rounds them to `operand`; no gradient."""
    weights = LayerWeights(*(w.detach() for w in weights))
    project = fold(weights.project.t(), weights.norm1_weight, weights.norm1_bias, operand)
    ista = fold(weights.operator, weights.norm2_weight, weights.norm2_bias, operand, settings.shrinkage)
    out_weight = weights.out_weight.to(operand)
    return PreparedWeights(project.matrix.t(), project.gain, project.offset, out_weight, *ista)


class Activations(NamedTuple):
    """What a layer keeps for backward: `8 · dim + 4 · heads + 16` bytes a token in 16 bit, y being the next layer's x."""

    x: Tensor  # (batch, tokens, dim) stream
    w: Tensor  # (batch, tokens, inner) operand
    o: Tensor  # (batch, tokens, inner) operand
    z: Tensor  # (batch, tokens, dim) stream
    y: Tensor  # (batch, tokens, dim) stream
    lse: Tensor  # (batch, heads, tokens) float32
    statistics: Tensor  # (4, batch * tokens) float32: mean and 1/deviation of x, then of z


def _forward_shapes(x, prepared, out_bias, norm2_weight, heads, scale, eps_mssa, eps_ista):
    batch, tokens, _ = x.shape
    w = x.new_empty(batch, tokens, prepared[0].shape[0], dtype=prepared[0].dtype)
    lse = x.new_empty(batch, heads, tokens, dtype=torch.float32)
    statistics = x.new_empty(4, batch * tokens, dtype=torch.float32)
    return w, torch.empty_like(w), torch.empty_like(x), torch.empty_like(x), lse, statistics


@operator(fake=_forward_shapes)
def layer_forward(
    x: Tensor,
    prepared: list[Tensor],
    out_bias: Tensor,
    norm2_weight: Tensor,
    heads: int,
    scale: float,
    eps_mssa: float,
    eps_ista: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(w, o, z, y, lse, statistics) of x: (batch, tokens, dim), contiguous; see `Activations`."""
    weights = PreparedWeights(*prepared)
    project, ista = weights.folded()
    batch, tokens, dim = x.shape
    rows = x.view(-1, dim)
    statistics = torch.empty(4, batch * tokens, dtype=torch.float32, device=x.device)
    w = norm_linear(rows, project, None, project.matrix.dtype, eps_mssa, Statistics(*statistics[:2]))
    w = w.view(batch, tokens, -1)
    o, lse = mssa_forward(w, heads, scale)
    z = linear(o.view(batch * tokens, -1), weights.out_weight.t(), x.dtype, offset=out_bias, residual=rows)
    y = norm_linear(z, ista, norm2_weight, x.dtype, eps_ista, Statistics(*statistics[2:]))
    return w, o, z.view(x.shape), y.view(x.shape), lse, statistics


def _backward_shapes(dy, gradient_scale, saved, prepared, weights, heads, scale, wanted):
    dx = torch.empty_like(saved[0])
    groups = (wanted[0],) * 3 + (wanted[1],) * 2 + (wanted[2],) * 3
    gradients = [w.new_empty(w.shape if want else (0,), dtype=torch.float32) for w, want in zip(weights, groups, strict=True)]
    return [dx, *gradients]


@operator(fake=_backward_shapes)
def layer_backward(
    dy: Tensor,
    gradient_scale: Tensor,
    saved: list[Tensor],
    prepared: list[Tensor],
    weights: list[Tensor],
    heads: int,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """[dx, then the gradients of `LayerWeights` in order, float32 and unscaled].

    `wanted`: whether the weights of the projection, the projection back, the ISTA step are wanted; empty tensors where not.
    """
    a, w = Activations(*saved), LayerWeights(*weights)
    project, ista = PreparedWeights(*prepared).folded()
    out_weight = prepared[3]
    dim, inner, operand = a.x.shape[-1], a.w.shape[-1], a.w.dtype
    x, z, y, o = a.x.view(-1, dim), a.z.view(-1, dim), a.y.view(-1, dim), a.o.view(-1, inner)
    stats1, stats2 = Statistics(*a.statistics[:2]), Statistics(*a.statistics[2:])
    unscale = gradient_scale.reciprocal()

    dy = dy.reshape(-1, dim)
    dz = norm_linear_backward(dy, y, z, ista, w.norm2_weight, stats2)
    ista_gradients = _ista_gradients(z, dy, y, stats2, w, operand, unscale) if wanted[2] else _nothing(x, 3)
    do = linear_backward(dz, out_weight.t(), operand)
    out_gradients = _nothing(x, 2)
    if wanted[1]:
        product, total = weight_gradient(o, dz, operand, transposed=True)
        out_gradients = [product * unscale, total * unscale]
    dw = mssa_backward(a.w, a.o, do.view(a.w.shape), a.lse, heads, scale).view(-1, inner)
    dx = norm_linear_backward(dw, a.w.view(-1, inner), x, project, None, stats1, residual=dz)
    project_gradients = _project_gradients(x, dw, stats1, w, operand, unscale) if wanted[0] else _nothing(x, 3)
    return [dx.view(a.x.shape), *project_gradients, *out_gradients, *ista_gradients]


def _ista_gradients(z, dy, y, statistics, w: LayerWeights, operand, unscale) -> list[Tensor]:
    """dγ₂, dβ₂, dM from G = x̂ᵀ g and Σ g."""
    product, total = weight_gradient(z, dy, operand, result=y, statistics=statistics)
    product, total = product * unscale, total * unscale
    d_gamma = product.diagonal() + (product * w.operator).sum(1)
    d_beta = total + w.operator @ total
    return [d_gamma, d_beta, _unfold(product, total, w.norm2_weight, w.norm2_bias)]


def _project_gradients(x, dw, statistics, w: LayerWeights, operand, unscale) -> list[Tensor]:
    """dγ₁, dβ₁, dU from G = x̂ᵀ dw and Σ dw."""
    product, total = weight_gradient(x, dw, operand, statistics=statistics)
    product, total = product * unscale, total * unscale
    u = w.project.float()
    return [(product * u.t()).sum(1), total @ u, _unfold(product, total, w.norm1_weight, w.norm1_bias).t().contiguous()]


def _unfold(product: Tensor, total: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """LN(x)ᵀ g = γ ∘ x̂ᵀ g + β ⊗ Σ g, (in, out)."""
    return torch.addcmul(gamma.float()[:, None] * product, beta.float()[:, None], total)


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(0, dtype=torch.float32) for _ in range(count)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gradient_scale: Tensor, settings: LayerSettings, *weights_and_prepared: Tensor):
        weights, prepared = weights_and_prepared[:8], weights_and_prepared[8:]
        w = LayerWeights(*weights)
        numbers = (settings.heads, settings.scale, settings.eps_mssa, settings.eps_ista)
        activations = layer_forward(x, list(prepared), w.out_bias, w.norm2_weight, *numbers)
        y = activations[3]
        ctx.save_for_backward(x, *activations, *weights, *prepared)
        ctx.heads, ctx.scale = settings.heads, settings.scale
        return y, gradient_scale.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, gradient_scale: Tensor):
        saved = list(ctx.saved_tensors)
        saved, weights, prepared = saved[:7], saved[7:15], saved[15:]
        need = ctx.needs_input_grad[3:11]
        wanted = [any(need[:3]), any(need[3:5]), any(need[5:])]
        dx, *gradients = layer_backward(dy, gradient_scale, saved, prepared, weights, ctx.heads, ctx.scale, wanted)
        gradients = [g.to(w.dtype) if n else None for g, w, n in zip(gradients, weights, need, strict=True)]
        return dx, gradient_scale, None, *gradients, *[None] * len(prepared)


def fused_layer(
    x: Tensor, gradient_scale: Tensor, weights: LayerWeights, prepared: PreparedWeights, settings: LayerSettings
) -> tuple[Tensor, Tensor]:
    """One layer on the stream x: (batch, tokens, dim), between `enter_stack` and `leave_stack`; differentiable once."""
    return _Layer.apply(x, gradient_scale, settings, *weights, *prepared)


class _EnterStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, stream: torch.dtype):
        ctx.dtype = x.dtype
        return x.to(stream, memory_format=torch.contiguous_format, copy=True), x.new_ones((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor, gradient_scale: Tensor):
        return (dx.float() / gradient_scale).to(ctx.dtype), None


class _LeaveStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gradient_scale: Tensor, out: torch.dtype, pool: str | None, scaled: bool) -> Tensor:
        ctx.shape, ctx.stream, ctx.pool, ctx.scaled = x.shape, x.dtype, pool, scaled
        if pool == "cls":
            return x[:, 0].to(out, copy=True)
        return x.mean(1, dtype=torch.float32).to(out) if pool == "mean" else x.to(out, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dy = dy.float()
        if ctx.pool == "mean":
            dy = dy / ctx.shape[1]
        scale = _power_of_two_scale(dy) if ctx.scaled else dy.new_ones(())
        dy = (dy * scale).to(ctx.stream)
        if ctx.pool == "cls":
            dx = dy.new_zeros(ctx.shape)
            dx[:, 0] = dy
        else:
            dx = dy[:, None].expand(ctx.shape).contiguous() if ctx.pool == "mean" else dy
        return dx, scale, None, None, None


def _power_of_two_scale(g: Tensor) -> Tensor:
    """The power of two that brings the largest |g| just under 2^SCALE_EXPONENT; 1 where that is 0 or not finite."""
    largest = g.abs().amax()
    _, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), (SCALE_EXPONENT - exponent).clamp(-100, 100))
    return torch.where(torch.isfinite(largest) & (largest > 0), scale, 1.0)


def enter_stack(x: Tensor, stream: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in the stream's dtype, contiguous; the scalar whose gradient is the gradients' scale)."""
    return _EnterStack.apply(x, stream)


def leave_stack(x: Tensor, gradient_scale: Tensor, out: torch.dtype, pool: str | None, scaled: bool) -> Tensor:
    """All tokens in dtype `out`, or their pooling ("cls", "mean") as (batch, dim); `scaled` where operands are float16."""
    return _LeaveStack.apply(x, gradient_scale, out, pool, scaled)
