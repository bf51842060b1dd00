"""Tied attention: multi-head subspace self-attention with one tensor as query, key and value.

For one head, w of shape (N, p), S = w wᵀ · scale, which is symmetric:

    forward     P = softmax(S) over rows,   o = P w,   lse = log2 Σ exp(S), kept for backward
    backward    δ = rowsum(do ∘ o)                                 made where do is (gradients.py), or by a kernel here
                E = P ∘ (do wᵀ − δ) + Pᵀ ∘ (w doᵀ − δᵀ)          (dS + dSᵀ, symmetric)
                dw = scale · E w + Pᵀ do

Both P and Pᵀ come from one tile of S, because S is symmetric, so a program that owns the rows of a tile writes all of their
gradient: 5 products a tile, no atomics, no dQ, dK or dV, and the same bits from run to run. Columns come in full blocks,
then in narrow ones (TAIL), so that 197 tokens cost 208 columns and full blocks need no mask.

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. M query rows, N key rows, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .linear import Folded
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
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    b_q = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = tokens // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        b_k = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_max, b_sum, b_o = _attend_to(b_q, b_k, b_max, b_sum, b_o, scale_log2, start, tokens, False, PRECISION)
    for start in range(full, tokens, TAIL):
        b_k = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, TAIL, BLOCK_D)
        b_max, b_sum, b_o = _attend_to(b_q, b_k, b_max, b_sum, b_o, scale_log2, start, tokens, True, PRECISION)

    width = heads * WIDTH
    p_oh = p_o + batch * tokens * width + head * WIDTH
    _store_tokens(p_oh, b_o / b_sum[:, None], first, tokens, width, WIDTH, BLOCK_M, BLOCK_D)
    row = first + tl.arange(0, BLOCK_M)
    tl.store(p_lse + (batch * heads + head) * tokens + row, b_max + tl.log2(b_sum), mask=row < tokens)


@triton.jit
def _attend_to(b_q, b_k, b_max, b_sum, b_o, scale_log2, start, tokens, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """The running maximum, sum and result of a row block after a block of keys; with LAST keys may lie past the end."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [M, N]
    if LAST:
        b_s = tl.where((start + tl.arange(0, b_k.shape[0]) < tokens)[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_k.dtype), b_k, b_o * b_rescale[:, None], input_precision=PRECISION)
    return b_new_max, b_sum, b_o


@triton.jit
def _mssa_backward_kernel(
    p_w,  # (batch, tokens, heads * WIDTH), any strides
    p_do,  # the same, any strides
    p_lse,  # (batch, heads, tokens) float32
    p_delta,  # (heads, PIECES, batch * tokens) float32, summed over PIECES: Σ do·o
    p_dw,  # (batch, tokens, heads * WIDTH), contiguous
    p_gain,  # (heads * WIDTH,) float32, SUMS
    p_offset,
    p_sums,  # (2, heads, batch * tokens) float32, SUMS: parts of Σ dw·(w − offset) and Σ dw·gain
    batches,
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
    SUMS: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    width = heads * WIDTH
    rows = batches.to(tl.int64) * tokens
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    p_gh = p_do + batch * stride_gb + head * WIDTH * stride_gd
    p_lseh = p_lse + (batch * heads + head) * tokens
    p_deltah = p_delta + head * PIECES * rows + batch * tokens

    b_wi = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]
    b_gi = _load_tokens(p_gh, first, tokens, stride_gn, stride_gd, WIDTH, BLOCK_M, BLOCK_D)  # [M, D]
    b_lse_i, b_delta_i = _load_sums(p_lseh, p_deltah, first, tokens, rows, PIECES, BLOCK_M)  # [M]

    b_dw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = tokens // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        b_wj = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_gj = _load_tokens(p_gh, start, tokens, stride_gn, stride_gd, WIDTH, BLOCK_N, BLOCK_D)  # [N, D]
        b_lse_j, b_delta_j = _load_sums(p_lseh, p_deltah, start, tokens, rows, PIECES, BLOCK_N)  # [N]
        b_dw = _gradient_from(
            b_dw, b_wi, b_gi, b_lse_i, b_delta_i, b_wj, b_gj, b_lse_j, b_delta_j, start, tokens, scale, scale_log2,
            False, PRECISION,
        )  # fmt: skip
    for start in range(full, tokens, TAIL):
        b_wj = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, TAIL, BLOCK_D)
        b_gj = _load_tokens(p_gh, start, tokens, stride_gn, stride_gd, WIDTH, TAIL, BLOCK_D)
        b_lse_j, b_delta_j = _load_sums(p_lseh, p_deltah, start, tokens, rows, PIECES, TAIL)
        b_dw = _gradient_from(
            b_dw, b_wi, b_gi, b_lse_i, b_delta_i, b_wj, b_gj, b_lse_j, b_delta_j, start, tokens, scale, scale_log2,
            True, PRECISION,
        )  # fmt: skip

    b_dw = b_dw.to(p_dw.dtype.element_ty)
    _store_tokens(p_dw + batch * tokens * width + head * WIDTH, b_dw, first, tokens, width, WIDTH, BLOCK_M, BLOCK_D)
    if SUMS:
        column = tl.arange(0, BLOCK_D)
        row = first + tl.arange(0, BLOCK_M)
        b_gain = tl.load(p_gain + head * WIDTH + column, mask=column < WIDTH, other=0.0)
        b_offset = tl.load(p_offset + head * WIDTH + column, mask=column < WIDTH, other=0.0)
        b_dw = b_dw.to(tl.float32)  # sums of what was stored
        p_part = p_sums + head * rows + batch * tokens + row
        tl.store(p_part, tl.sum(b_dw * (b_wi.to(tl.float32) - b_offset[None, :]), 1), mask=row < tokens)
        tl.store(p_part + heads * rows, tl.sum(b_dw * b_gain[None, :], 1), mask=row < tokens)


@triton.jit
def _load_sums(p_lse, p_delta, first, tokens, rows, PIECES: tl.constexpr, ROWS: tl.constexpr):
    """(lse, δ) of rows; lse is infinite past the last token, so that no weight goes there."""
    row = first + tl.arange(0, ROWS)
    b_delta = tl.load(p_delta + row, mask=row < tokens, other=0.0)
    for piece in tl.static_range(1, PIECES):
        b_delta += tl.load(p_delta + piece * rows + row, mask=row < tokens, other=0.0)
    return tl.load(p_lse + row, mask=row < tokens, other=float("inf")), b_delta


@triton.jit
def _gradient_from(
    b_dw, b_wi, b_gi, b_lse_i, b_delta_i, b_wj, b_gj, b_lse_j, b_delta_j, start, tokens, scale, scale_log2,
    LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of a row block after a block of columns; with LAST columns may lie past the end."""
    b_s = tl.dot(b_wi, tl.trans(b_wj), input_precision=PRECISION) * scale_log2  # [M, N]
    if LAST:
        b_s = tl.where((start + tl.arange(0, b_wj.shape[0]) < tokens)[None, :], b_s, float("-inf"))
    b_p = tl.exp2(b_s - b_lse_i[:, None])  # P_ij
    b_pt = tl.exp2(b_s - b_lse_j[None, :])  # P_ji
    b_dp = tl.dot(b_gi, tl.trans(b_wj), input_precision=PRECISION)
    b_dpt = tl.dot(b_wi, tl.trans(b_gj), input_precision=PRECISION)
    b_e = (b_p * (b_dp - b_delta_i[:, None]) + b_pt * (b_dpt - b_delta_j[None, :])) * scale
    b_dw = tl.dot(b_pt.to(b_gj.dtype), b_gj, b_dw, input_precision=PRECISION)
    return tl.dot(b_e.to(b_wj.dtype), b_wj, b_dw, input_precision=PRECISION)


@triton.jit
def _delta_kernel(
    p_o,  # (rows, heads * WIDTH), contiguous
    p_do,  # (batch, tokens, heads * WIDTH), any strides
    p_delta,  # (heads, rows) float32
    rows,
    tokens,
    stride_gb,
    stride_gn,
    stride_gd,
    heads,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    m_tile = (row < rows)[:, None] & (column < WIDTH)[None, :]
    p_oh = p_o + row[:, None] * (heads * WIDTH) + head * WIDTH + column[None, :]
    p_row = p_do + row // tokens * stride_gb + row % tokens * stride_gn
    p_gh = p_row[:, None] + (head * WIDTH + column)[None, :] * stride_gd
    b_product = tl.load(p_oh, mask=m_tile, other=0.0).to(tl.float32) * tl.load(p_gh, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_delta + head * rows + row, tl.sum(b_product, 1), mask=row < rows)


def mssa_forward(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of w: (batch, tokens, heads × width); o contiguous in w's dtype, lse (batch, heads, tokens) float32, base 2."""
    o, lse = _empty_results(w, heads)
    constants, programs = _plan("mssa_forward", w, heads)
    launch(_mssa_forward_kernel, programs, w, o, lse, w.shape[1], heads, *w.stride(), scale * LOG2_E, **constants)
    return o, lse


def mssa_backward(
    w: Tensor, do: Tensor, lse: Tensor, delta: Tensor, scale: float, folded: Folded | None = None
) -> tuple[Tensor, Tensor | None]:
    """dw, (batch, tokens, heads × width) contiguous in w's dtype, from what `mssa_forward` took and gave.

    delta: (heads, pieces, batch × tokens) float32, which sum up to Σ do·o of every head. With `folded`, of the projection
    that gave w, also dw's row sums for `norm_data_gradient`, (2, heads, batch × tokens) float32.
    """
    heads, pieces, rows = delta.shape
    dw, sums = torch.empty_like(w, memory_format=torch.contiguous_format), None
    if folded is not None:
        sums = torch.empty(2, heads, rows, dtype=torch.float32, device=w.device)
    _, gain, offset = folded or (None, None, None)
    constants, programs = _plan("mssa_backward", w, heads)
    launch(
        _mssa_backward_kernel, programs, w, do, lse, delta, dw, gain, offset, sums, *w.shape[:2], heads, *w.stride(),
        *do.stride(), scale, scale * LOG2_E, SUMS=folded is not None, PIECES=pieces, **constants,
    )  # fmt: skip
    return dw, sums


def head_products(o: Tensor, do: Tensor, heads: int) -> Tensor:
    """δ = Σ do·o of every head, (heads, 1, batch × tokens) float32; o: (batch, tokens, heads × width) contiguous."""
    batch, tokens, width = o.shape
    rows, block = batch * tokens, 32
    delta = torch.empty(heads, 1, rows, dtype=torch.float32, device=o.device)
    constants = {"WIDTH": width // heads, "BLOCK_D": triton.next_power_of_2(width // heads), "BLOCK_M": block}
    programs = triton.cdiv(rows, block) * heads
    launch(_delta_kernel, programs, o, do, delta, rows, tokens, *do.stride(), heads, **constants, num_warps=4, num_stages=1)
    return delta


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
