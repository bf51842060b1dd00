"""Tied attention: multi-head subspace self-attention with one tensor as query, key and value.

For one head, w of shape (N, p), S = w wᵀ · scale, which is symmetric:

    forward     P = softmax(S) over rows,   o = P w,   lse = log2 Σ exp(S), kept for backward
    backward    δ = rowsum(do ∘ o)
                E = P ∘ (do wᵀ − δ) + Pᵀ ∘ (w doᵀ − δᵀ)          (dS + dSᵀ, symmetric)
                dw = scale · E w + Pᵀ do

Both P and Pᵀ come from one tile of S, because S is symmetric, so a program that owns the rows of a tile writes all of their
gradient: 5 products a tile, no atomics, no dQ, dK or dV, and the same bits from run to run.

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. M query rows, N key rows, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .runtime import float32_precision, launch, operator

LOG2_E = 1.4426950408889634


@triton.jit
def _tile_position(tokens, heads, BLOCK_M: tl.constexpr):
    """(batch, head, first row) of this program; the tiles of one head are neighbours, so that they share it in L2."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    plane = pid // tiles
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), (pid % tiles) * BLOCK_M


@triton.jit
def _load_tokens(p_head, first, tokens, stride_n, stride_d, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first .. first + ROWS of one head, [ROWS, BLOCK_D]; zero past the last token and past the head's width."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    p_rows = p_head + row.to(tl.int64)[:, None] * stride_n + column[None, :] * stride_d
    if WIDTH == BLOCK_D:
        return tl.load(p_rows, mask=(row < tokens)[:, None], other=0.0)
    return tl.load(p_rows, mask=(row < tokens)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_tokens(p_head, b, first, tokens, stride_n, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    p_rows = p_head + row.to(tl.int64)[:, None] * stride_n + column[None, :]
    tl.store(p_rows, b.to(p_head.dtype.element_ty), mask=(row < tokens)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _mssa_forward_kernel(
    p_w,  # (batch, tokens, heads * WIDTH), any strides
    p_o,  # the same, contiguous
    p_lse,  # (batch, heads, tokens) float32, log2 of the softmax's denominator
    tokens,
    heads,
    stride_wb,
    stride_wn,
    stride_wd,
    scale_log2,  # scale · log2(e): the softmax is taken in base 2
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    b_q = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        b_k = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [M, N]
        m_key = start + tl.arange(0, BLOCK_N) < tokens
        b_s = tl.where(m_key[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_k.dtype), b_k, b_o * b_rescale[:, None], input_precision=PRECISION)
        b_max = b_new_max

    width = heads * WIDTH
    p_oh = p_o + batch * tokens * width + head * WIDTH
    _store_tokens(p_oh, b_o / b_sum[:, None], first, tokens, width, WIDTH, BLOCK_M, BLOCK_D)
    row = first + tl.arange(0, BLOCK_M)
    tl.store(p_lse + (batch * heads + head) * tokens + row, b_max + tl.log2(b_sum), mask=row < tokens)


@triton.jit
def _mssa_backward_kernel(
    p_w,  # (batch, tokens, heads * WIDTH), any strides
    p_o,  # (batch, tokens, heads * WIDTH), contiguous
    p_do,  # the same, any strides
    p_lse,  # (batch, heads, tokens) float32
    p_dw,  # (batch, tokens, heads * WIDTH), contiguous
    tokens,
    heads,
    stride_wb,
    stride_wn,
    stride_wd,
    stride_gb,
    stride_gn,
    stride_gd,
    scale,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    width = heads * WIDTH
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    p_gh = p_do + batch * stride_gb + head * WIDTH * stride_gd
    p_oh = p_o + batch * tokens * width + head * WIDTH
    p_lseh = p_lse + (batch * heads + head) * tokens

    row = first + tl.arange(0, BLOCK_M)
    b_wi = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]
    b_gi = _load_tokens(p_gh, first, tokens, stride_gn, stride_gd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]
    b_oi = _load_tokens(p_oh, first, tokens, width, 1, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]
    b_delta_i = tl.sum(b_gi.to(tl.float32) * b_oi.to(tl.float32), 1)  # [M]
    b_lse_i = tl.load(p_lseh + row, mask=row < tokens, other=0.0)  # [M]

    b_dw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        b_wj = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_gj = _load_tokens(p_gh, start, tokens, stride_gn, stride_gd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        # δ of the columns again from o: an o tile out of L2 costs less than a kernel that would write δ.
        b_oj = _load_tokens(p_oh, start, tokens, width, 1, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_delta_j = tl.sum(b_gj.to(tl.float32) * b_oj.to(tl.float32), 1)  # [N]
        b_lse_j = tl.load(p_lseh + column, mask=column < tokens, other=0.0)  # [N]

        b_s = tl.dot(b_wi, tl.trans(b_wj), input_precision=PRECISION) * scale_log2  # [M, N]
        b_s = tl.where((column < tokens)[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse_i[:, None])  # P_ij
        b_pt = tl.exp2(b_s - b_lse_j[None, :])  # P_ji
        b_dp = tl.dot(b_gi, tl.trans(b_wj), input_precision=PRECISION)
        b_dpt = tl.dot(b_wi, tl.trans(b_gj), input_precision=PRECISION)
        b_e = (b_p * (b_dp - b_delta_i[:, None]) + b_pt * (b_dpt - b_delta_j[None, :])) * scale
        b_dw = tl.dot(b_pt.to(b_gj.dtype), b_gj, b_dw, input_precision=PRECISION)
        b_dw = tl.dot(b_e.to(b_wj.dtype), b_wj, b_dw, input_precision=PRECISION)

    _store_tokens(p_dw + batch * tokens * width + head * WIDTH, b_dw, first, tokens, width, WIDTH, BLOCK_M, BLOCK_D)


def mssa_forward(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of w: (batch, tokens, heads × width); o contiguous in w's dtype, lse (batch, heads, tokens) float32, base 2."""
    o, lse = _empty_results(w, heads)
    constants, programs = _plan("mssa_forward", w, heads)
    launch(_mssa_forward_kernel, programs, w, o, lse, w.shape[1], heads, *w.stride(), scale * LOG2_E, **constants)
    return o, lse


def mssa_backward(w: Tensor, o: Tensor, do: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    """dw, (batch, tokens, heads × width) contiguous in w's dtype, from what `mssa_forward` took and gave."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    constants, programs = _plan("mssa_backward", w, heads)
    sizes = (w.shape[1], heads, *w.stride(), *do.stride())
    launch(_mssa_backward_kernel, programs, w, o, do, lse, dw, *sizes, scale, scale * LOG2_E, **constants)
    return dw


def _plan(name: str, w: Tensor, heads: int) -> tuple[dict, int]:
    """The compile-time constants of a launch and its number of programs."""
    batch, tokens, width = w.shape
    head_width = width // heads
    config = tuning.attention(name, w.dtype, head_width)
    constants = config | {
        "WIDTH": head_width,
        "BLOCK_D": triton.next_power_of_2(head_width),
        "PRECISION": float32_precision(),
    }
    return constants, batch * heads * triton.cdiv(tokens, config["BLOCK_M"])


def _empty_results(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = w.shape
    o = torch.empty_like(w, memory_format=torch.contiguous_format)
    return o, torch.empty(batch, heads, tokens, dtype=torch.float32, device=w.device)


@operator(fake=lambda w, heads, scale: _empty_results(w, heads))
def attend(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return mssa_forward(w, heads, scale)


@operator(fake=lambda w, o, do, lse, heads, scale: torch.empty_like(w, memory_format=torch.contiguous_format))
def attend_backward(w: Tensor, o: Tensor, do: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    return mssa_backward(w, o, do, lse, heads, scale)


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
