"""Tied attention: multi-head subspace self-attention with one tensor as query, key and value.

For one head, w of shape (N, p), S = w wᵀ · scale, which is symmetric:

    forward     P = softmax(S) over rows,   o = P w,   lse = log2 Σ exp(S), kept for backward
    backward    δ = rowsum(do ∘ o)                                 made where do is (gradients.py), or by a kernel here
                E = P ∘ (do wᵀ − δ) + Pᵀ ∘ (w doᵀ − δᵀ)          (dS + dSᵀ, symmetric)
                dw = scale · E w + Pᵀ do

Both P and Pᵀ come from one tile of S, because S is symmetric, so a program that owns the rows of a tile writes all of their
gradient: 5 products a tile, no atomics, no dQ, dK or dV, and the same bits from run to run. The kernels are in
attention.py and attention_gradient.py.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import shapes
from .attention import _mssa_forward_kernel
from .attention_gradient import _delta_kernel, _mssa_backward_kernel
from .linear import Folded
from .runtime import launch, operator, product_precision, readable
from .tuning import Config

LOG2_E = 1.4426950408889634


def mssa_forward(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of w: (batch, tokens, heads × width); o contiguous in w's dtype, lse (batch, heads, tokens) float32, base 2."""
    o, lse = _empty_results(w, heads)
    constants, programs = _plan("mssa_forward", w, heads)
    launch(_mssa_forward_kernel, programs, w, o, lse, w.shape[1], heads, *w.stride(), scale * LOG2_E, **constants)
    return o, lse


def mssa_backward(
    w: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    folded: Folded | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dw, (batch, tokens, heads × width) contiguous in w's dtype, from what `mssa_forward` took and gave.

    delta: (heads, pieces, batch × tokens) float32, which sum up to Σ do·o of every head. With `folded`, of the projection
    that gave w, dw is stored `row_scale` (batch × tokens,) float32 times, and its row sums for `norm_data_gradient` are made,
    (2, heads, batch × tokens) float32, and the column sums of dw itself, (1, parts, heads × width) float32.
    """
    heads, pieces, rows = delta.shape
    dw, sums = torch.empty_like(w, memory_format=torch.contiguous_format), None
    constants, programs = _plan("mssa_backward", w, heads)
    totals = None
    if folded is not None:
        sums = torch.empty(2, heads, rows, dtype=torch.float32, device=w.device)
        totals = torch.empty(1, programs // heads, w.shape[2], dtype=torch.float32, device=w.device)
    _, gain, offset = folded or (None, None, None)
    launch(
        _mssa_backward_kernel, programs, w, do, lse, delta, dw, gain, offset, sums, row_scale, totals, *w.shape[:2],
        heads, *w.stride(), *do.stride(), scale, scale * LOG2_E, SUMS=folded is not None, PIECES=pieces, **constants,
    )  # fmt: skip
    return dw, sums, totals


def head_products(o: Tensor, do: Tensor, heads: int) -> Tensor:
    """δ = Σ do·o of every head, (heads, 1, batch × tokens) float32; o: (batch, tokens, heads × width) contiguous."""
    batch, tokens, width = o.shape
    rows, block = batch * tokens, 32
    delta = torch.empty(heads, 1, rows, dtype=torch.float32, device=o.device)
    constants = {"WIDTH": width // heads, "BLOCK_D": triton.next_power_of_2(width // heads), "BLOCK_M": block}
    programs = shapes.blocks(rows, block) * heads
    launch(_delta_kernel, programs, o, do, delta, rows, tokens, *do.stride(), heads, **constants, num_warps=4, num_stages=1)
    return delta


def _plan(name: str, w: Tensor, heads: int) -> tuple[dict, int]:
    """The compile-time constants of a launch and its number of programs."""
    batch, tokens, width = w.shape
    config = shapes.attention(name, w.dtype, width // heads, w.device)
    constants = _constants(config, width // heads, w.dtype, product_precision(w.dtype))
    return constants, batch * heads * shapes.blocks(tokens, config.block_m)


@cache
def _constants(config: Config, head_width: int, dtype: torch.dtype, precision: str) -> dict:
    wide, narrow = _parts(head_width, dtype)
    return config.constants() | {"WIDTH": head_width, "D0": wide, "D1": narrow, "PRECISION": precision}


def _parts(head_width: int, dtype: torch.dtype) -> tuple[int, int]:
    """A head's width as one or two powers of two, of 16 or more, that together are as wide, or least wider; (D0, D1)."""
    whole = triton.next_power_of_2(max(head_width, 16))
    first = whole // 2
    if first < 16 or (head_width == whole and dtype != torch.float32):
        return whole, 0
    rest = triton.next_power_of_2(max(head_width - first, 16))
    if head_width == whole:  # float32 products hold both operands in registers, over their whole depth
        return (first, first) if whole > 64 else (whole, 0)
    return (first, rest) if rest < first else (whole, 0)


def _empty_results(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = w.shape
    o = torch.empty_like(w, memory_format=torch.contiguous_format)
    return o, torch.empty(batch, heads, tokens, dtype=torch.float32, device=w.device)


@operator(fake=lambda w, heads, scale: _empty_results(w, heads))
def attend(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return mssa_forward(readable(w), heads, scale)


@operator(fake=lambda w, o, do, lse, heads, scale: torch.empty_like(w, memory_format=torch.contiguous_format))
def attend_backward(w: Tensor, o: Tensor, do: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    w, do = readable(w), readable(do)
    return mssa_backward(w, do, lse, head_products(o, do, heads), scale)[0]


class MSSA(torch.autograd.Function):
    """softmax(w wᵀ · scale) w for each head, by the kernels; `MSSA.apply(w, heads, scale)`, differentiable once.

    w: (batch, tokens ≥ 1, heads × width), width 16 to 128, float16, bfloat16 or float32, any strides.
    """

    @staticmethod
    def forward(ctx, w: Tensor, heads: int, scale: float) -> Tensor:
        o, lse = attend(w, heads, scale)
        ctx.save_for_backward(w, o, lse)
        ctx.heads, ctx.scale = heads, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        w, o, lse = ctx.saved_tensors
        return attend_backward(w, o, do, lse, ctx.heads, ctx.scale), None, None
