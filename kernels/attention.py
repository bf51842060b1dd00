# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
"""Tied attention, forward: what both directions share, the kernel, its launcher; mssa.py has the mathematics.

A head of width p is held in one or two parts of D0 and D1 columns, each a power of two up to 64 (80 = 64 + 16), so that
hardly any product works on padding; without a second part D1 is 0 and its tiles stand for nothing. Tokens of one head are cut
in row tiles of BLOCK_M, one program each, whose last may be TAIL high, against column tiles of BLOCK_N, then of TAIL: 197
tokens cost 208 × 208. Numbers of a token (lse, δ) are kept in rows of a multiple of TAIL, so that column tiles read them
without a mask.

Names: `p_` pointers, `b_` tiles in registers, `m_` masks. M rows, N columns, D head width; i rows, j columns. What
travels together goes as a tuple: a head as (pointer, stride of a token, stride of a column).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .runtime import launch, product_precision
from .tuning import Config

LOG2_E = 1.4426950408889634
TAIL = tl.constexpr(16)


def mssa_forward(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of w: (batch, tokens, heads × width); o contiguous in w's dtype, lse as `empty_results` has it, base 2, +∞ past
    the last token."""
    o, lse = empty_results(w, heads)
    constants, programs = plan("mssa_forward", w, heads)
    sizes = (w.shape[1], lse.shape[2], heads)
    launch(_mssa_forward_kernel, programs, o, lse, w, w.stride(), sizes, scale * LOG2_E, **constants)
    return o, lse


def empty_results(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Memory for (o, lse): o like w but contiguous, lse (batch, heads, `padded_tokens`) float32."""
    batch, tokens, _ = w.shape
    o = torch.empty_like(w, memory_format=torch.contiguous_format)
    return o, torch.empty(batch, heads, padded_tokens(tokens), dtype=torch.float32, device=w.device)


def padded_tokens(tokens: int) -> int:
    """How many numbers a head of so many tokens has in lse and δ: the next multiple of 16."""
    return shapes.blocks(tokens, TAIL.value) * TAIL.value


def plan(name: str, w: Tensor, heads: int) -> tuple[dict, int]:
    """The compile-time constants of a launch and its number of programs."""
    batch, tokens, width = w.shape
    config = shapes.attention(name, w.dtype, width // heads, w.device)
    constants = _constants(name, config, width // heads, w.dtype, product_precision(w.dtype))
    return constants, batch * heads * shapes.blocks(tokens, config.block_m)


@cache
def _constants(name: str, config: Config, head_width: int, dtype: torch.dtype, precision: str) -> dict:
    wide, narrow = _parts(name, head_width, dtype)
    return config.constants() | {"WIDTH": head_width, "D0": wide, "D1": narrow, "PRECISION": precision}


def _parts(name: str, head_width: int, dtype: torch.dtype) -> tuple[int, int]:
    """A head's width as one or two powers of two from 16 to 64 that together are as wide, or least wider; (D0, D1).

    No part is wider: HMMA's accumulators of 64 rows and 128 columns are laid out so that every tile of probabilities goes
    through shared memory, and float32 products hold both operands in registers, over their whole depth.
    """
    whole = triton.next_power_of_2(max(head_width, 16))
    first = whole // 2
    rest = triton.next_power_of_2(max(head_width - first, 16))
    if whole > 64:
        return first, rest
    if name == "mssa_forward" and dtype != torch.float32:
        return whole, 0  # its time is the exponentials: a second chain of products costs more than padding
    return (first, rest) if 16 <= rest < first else (whole, 0)


@triton.jit
def _tile_position(tokens, heads, BLOCK_M: tl.constexpr):
    """(batch, head, first row) of this program; the tiles of one head are neighbours, so that they share it in L2."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    plane = pid // tiles
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), (pid % tiles) * BLOCK_M


@triton.jit
def _head_of(p, strides, batch, head, WIDTH: tl.constexpr):
    """One head of a (batch, tokens, heads * WIDTH) tensor."""
    stride_b, stride_n, stride_d = strides
    return p + batch * stride_b + head * WIDTH * stride_d, stride_n, stride_d


@triton.jit
def _load_part(
    head, first, tokens, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS, columns start .. start + D of one head; zero past the last token, where rows are the LAST
    ones, and past the head's width, where it may be PADDED."""
    p, stride_n, stride_d = head
    row = first + tl.arange(0, ROWS)
    column = start + tl.arange(0, D)
    p_tile = p + (row[:, None] * stride_n + column[None, :] * stride_d)
    if LAST:
        m_tile = (row < tokens)[:, None]
        if PADDED:
            m_tile = m_tile & (column < WIDTH)[None, :]
        b = tl.load(p_tile, mask=m_tile, other=0.0)
    elif PADDED:
        b = tl.load(p_tile, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        b = tl.load(p_tile)
    return b


@triton.jit
def _load_tokens(
    head, first, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LAST: tl.constexpr
):
    """Both parts of rows first .. first + ROWS of one head, [ROWS, D0] and [ROWS, D1]."""
    b_0 = _load_part(head, first, tokens, 0, WIDTH, ROWS, D0, LAST, D0 > WIDTH)
    b_1 = b_0
    if D1 > 0:
        b_1 = _load_part(head, first, tokens, D0, WIDTH, ROWS, D1, LAST, D0 + D1 > WIDTH)
    return b_0, b_1


@triton.jit
def _store_part(
    p_head, b, first, tokens, stride_n, START: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr = True,
    LOCAL: tl.constexpr = False,
):  # fmt: skip
    """Columns START .. of rows first .., LAST where some may lie past the end. LOCAL: rows are counted anew from `first`, so
    that the loads' row numbers are not kept for this."""
    row = first + tl.arange(0, b.shape[0])
    column = START + tl.arange(0, b.shape[1])
    p_rows = p_head + row[:, None] * stride_n + column[None, :]
    if LAST or START + b.shape[1] > WIDTH:
        tl.store(p_rows, b.to(p_head.dtype.element_ty), mask=(row < tokens)[:, None] & (column < WIDTH)[None, :])
    elif LOCAL:
        p_rows = p_head + first * stride_n + tl.arange(0, b.shape[0])[:, None] * stride_n + column[None, :]
        tl.store(p_rows, b.to(p_head.dtype.element_ty))
    else:
        tl.store(p_rows, b.to(p_head.dtype.element_ty))


@triton.jit
def _scores(b_i0, b_i1, b_j0, b_j1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """b_i b_jᵀ over the whole head, [M, N]."""
    b_s = tl.dot(b_i0, tl.trans(b_j0), input_precision=PRECISION)
    if D1 > 0:
        b_s = tl.dot(b_i1, tl.trans(b_j1), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _scores_in_steps(
    head_i, i, head_j, j, tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr = 32,
):  # fmt: skip
    """b_i b_jᵀ of rows i .. and j .., STEP columns at a time: float32 products hold their operands' whole depth in registers,
    and the compiler fetches those of several products at once unless a loop keeps it from that (144 bytes spilled)."""
    b_s = tl.zeros([ROWS, COLUMNS], tl.float32)
    PADDED: tl.constexpr = WIDTH % STEP != 0
    for start in range(0, WIDTH, STEP):
        b_i = _load_part(head_i, i, tokens, start, WIDTH, ROWS, STEP, True, PADDED)
        b_j = _load_part(head_j, j, tokens, start, WIDTH, COLUMNS, STEP, True, PADDED)
        b_s = tl.dot(b_i, tl.trans(b_j), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _mssa_forward_kernel(
    p_o,  # (batch, tokens, heads * WIDTH), contiguous
    p_lse,  # (batch, heads, padded) float32, log2 of the softmax's denominator
    p_w,  # (batch, tokens, heads * WIDTH), any strides
    strides,
    sizes,  # (tokens, padded, heads)
    scale_log2,  # scale · log2(e): the softmax is taken in base 2
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens, padded, heads = sizes
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    w_head = _head_of(p_w, strides, batch, head, WIDTH)
    p_oh = p_o + batch * tokens * heads * WIDTH + head * WIDTH
    results = (p_oh, p_lse + (batch * heads + head) * padded, heads * WIDTH)
    sizes = (first, tokens, padded)
    if BLOCK_M > TAIL and tokens - first <= TAIL:
        _forward_rows(results, w_head, sizes, scale_log2, WIDTH, D0, D1, TAIL, BLOCK_N, PRECISION)
    else:
        _forward_rows(results, w_head, sizes, scale_log2, WIDTH, D0, D1, BLOCK_M, BLOCK_N, PRECISION)


@triton.jit
def _forward_rows(
    results, w_head, sizes, scale_log2, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of ROWS rows of one head."""
    first, tokens, padded = sizes
    b_q = _load_tokens(w_head, first, tokens, WIDTH, ROWS, D0, D1, True)
    full = tokens // BLOCK_N * BLOCK_N if BLOCK_N > TAIL else 0
    HOLD: tl.constexpr = D1 == 0 and D0 <= 64 and w_head[0].dtype.element_ty != tl.float32
    last = tokens
    if HOLD:
        last = (tokens - 1) // TAIL * TAIL
        b_last = _load_tokens(w_head, tl.maximum(last, full), tokens, WIDTH, TAIL, D0, D1, True)  # now: no wait for it later
    state = _no_keys(ROWS, D0, D1)
    for start in range(0, full, BLOCK_N):
        b_k = _load_tokens(w_head, start, tokens, WIDTH, BLOCK_N, D0, D1, False)
        state = _attend_to(w_head, first, b_q, state, b_k, scale_log2, start, tokens, WIDTH, D1, False, PRECISION)
    for start in tl.range(full, last, TAIL, num_stages=1 if HOLD else 3):
        b_k = _load_tokens(w_head, start, tokens, WIDTH, TAIL, D0, D1, True)
        state = _attend_to(w_head, first, b_q, state, b_k, scale_log2, start, tokens, WIDTH, D1, True, PRECISION)
    if HOLD and full <= last:
        state = _attend_to(w_head, first, b_q, state, b_last, scale_log2, last, tokens, WIDTH, D1, True, PRECISION)
    _store_rows(results, state, first, tokens, padded, WIDTH, D0, D1)


@triton.jit
def _no_keys(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    b_max = tl.full([ROWS], -3.0e38, tl.float32)  # finite: where all scores so far overflowed, −∞ − (−∞) would be NaN
    b_sum = tl.zeros([ROWS], tl.float32)
    return b_max, b_sum, tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1 if D1 > 0 else D0], tl.float32)


@triton.jit
def _store_rows(results, state, first, tokens, padded, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    p_o, p_lse, stride_o = results
    b_max, b_sum, b_o0, b_o1 = state
    b_share = 1.0 / b_sum[:, None]
    _store_part(p_o, b_o0 * b_share, first, tokens, stride_o, 0, WIDTH)
    if D1 > 0:
        _store_part(p_o, b_o1 * b_share, first, tokens, stride_o, D0, WIDTH)
    row = first + tl.arange(0, b_sum.shape[0])
    tl.store(p_lse + row, tl.where(row < tokens, b_max + tl.log2(b_sum), float("inf")), mask=row < padded)


@triton.jit
def _attend_to(
    w_head, first, b_q, state, b_k, scale_log2, start, tokens, WIDTH: tl.constexpr, D1: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and result of rows after a tile of keys; with LAST keys may lie past the end."""
    b_q0, b_q1 = b_q
    b_max, b_sum, b_o0, b_o1 = state
    b_k0, b_k1 = b_k
    COLUMNS: tl.constexpr = b_k0.shape[0]
    if b_k0.dtype == tl.float32:
        b_s = _scores_in_steps(w_head, first, w_head, start, tokens, WIDTH, b_q0.shape[0], COLUMNS, PRECISION)
    else:
        b_s = _scores(b_q0, b_q1, b_k0, b_k1, D1, PRECISION)  # [M, N]
    b_s *= scale_log2
    if LAST:
        b_s = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_p = b_p.to(b_k0.dtype)
    b_o0 = tl.dot(b_p, b_k0, b_o0 * b_rescale[:, None], input_precision=PRECISION)
    if D1 > 0:
        b_o1 = tl.dot(b_p, b_k1, b_o1 * b_rescale[:, None], input_precision=PRECISION)
    return b_new_max, b_sum, b_o0, b_o1
