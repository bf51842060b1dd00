# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
"""Tied attention: multi-head subspace self-attention with one tensor as query, key and value.

For one head, w of shape (N, p), S = w wᵀ · scale, which is symmetric:

    forward     P = softmax(S) over rows,   o = P w,   lse = log2 Σ exp(S), kept for backward
    backward    δ = rowsum(do ∘ o)                                 made where do is (gradients.py), or by a kernel of its own
                E = P ∘ (do wᵀ − δ) + Pᵀ ∘ (w doᵀ − δᵀ)          (dS + dSᵀ, symmetric)
                dw = scale · E w + Pᵀ do

Both P and Pᵀ come from one tile of S, because S is symmetric, so a program that owns the rows of a tile writes all of their
gradient: 5 products a tile, no atomics, no dQ, dK or dV, and the same bits from run to run. Kernels and launchers are in
attention.py and attention_gradient.py; here is what PyTorch sees of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .attention import empty_results, mssa_forward
from .attention_gradient import mssa_backward
from .attention_sums import head_products
from .runtime import readable


def attention_flops(w: Tensor) -> int:
    """Of S and P w, for w of (batch, tokens, heads × width); the same for any number of heads."""
    return 4 * w.numel() * w.shape[1]


def attention_backward_flops(w: Tensor) -> int:
    """Of S again, do wᵀ, w doᵀ, E w and Pᵀ do."""
    return 10 * w.numel() * w.shape[1]


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy, whose columns and tokens 32 bits address within one image, as the kernels do."""
    return readable(x) if x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


@operator(fake=lambda w, heads, scale: empty_results(w, heads), flops=lambda w, *_: attention_flops(w))
def attend(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return mssa_forward(_addressable(w), heads, scale)


@operator(
    fake=lambda w, o, do, lse, heads, scale: torch.empty_like(w, memory_format=torch.contiguous_format),
    flops=lambda w, *_: attention_backward_flops(w),
)
def attend_backward(w: Tensor, o: Tensor, do: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    w, do = _addressable(w), _addressable(do)
    return mssa_backward(w, do, lse, head_products(o, do, heads, scale), scale)[0]


class Saved(NamedTuple):
    """What MSSA keeps for backward."""

    w: Tensor  # (batch, tokens, heads × width)
    o: Tensor  # the same
    lse: Tensor  # (batch, heads, padded tokens) float32


class MSSA(torch.autograd.Function):
    """softmax(w wᵀ · scale) w for each head, by the kernels; `MSSA.apply(w, heads, scale)`, differentiable once.

    w: (batch, tokens ≥ 1, heads × width), width 16 to 128, float16, bfloat16 or float32, any strides.
    """

    @staticmethod
    def forward(ctx, w: Tensor, heads: int, scale: float) -> Tensor:
        o, lse = attend(w, heads, scale)
        ctx.save_for_backward(*Saved(w, o, lse))
        ctx.heads, ctx.scale = heads, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        saved = Saved(*ctx.saved_tensors)
        return attend_backward(saved.w, saved.o, do, saved.lse, ctx.heads, ctx.scale), None, None
