# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportReturnType=false
"""Tied attention, backward: the kernel and its launcher, then the small ones around it; mssa.py has the mathematics,
attention.py the names and what both directions share.

In 16 bit the last tokens of a head, if at most TAIL, have a program that reads everything the other way round: the other
tokens are the 64 rows of a product, the tail its 16 columns, which E's symmetry allows. As 16 rows against the columns of
all tokens they would be no wgmma. What decides is how many programs a multiprocessor holds, so that one computes while
another waits for its products: the loop's tile is 32 columns, and row sums of dw are made by a kernel of their own, since
in this one they take registers of its third or fourth program and more time than reading dw and w again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .attention import (
    LOG2_E,
    TAIL,
    _head_of,
    _load_tokens,
    _scores,
    _scores_in_steps,
    _store_part,
    _tile_position,
    padded_tokens,
    plan,
)
from .linear import Folded
from .runtime import launch

SUM_ROWS, SUM_COLUMNS, SUM_PARTS = 16, 128, 256


def mssa_backward(
    w: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    folded: Folded | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dw, sums, totals) from what `mssa_forward` took and gave; dw (batch, tokens, heads × width) contiguous in w's dtype.

    delta: (heads, pieces, batch, padded tokens) float32, parts of scale · Σ do·o of every head, 0 past the last token. With
    `row_scale`, (batch × tokens,) float32, the rows of dw are multiplied by it. With `folded`, of the projection that gave w,
    also sums, (2, parts, batch × tokens): parts of Σ dw·(w − offset) and Σ dw·gain of every row of dw as it is returned, and
    totals, (1, parts, heads × width): parts of the column sums of dw without `row_scale`; both float32.
    """
    heads, pieces, batch, padded = delta.shape
    if w.stride() != do.stride():  # strides in common leave registers for one more program
        w, do = w.contiguous(), do.contiguous()
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    constants, programs = plan("mssa_backward", w, heads)
    sizes = (batch, heads)
    launch(
        _mssa_backward_kernel, programs, dw, (w, do), w.stride(), (lse, delta), row_scale, sizes,
        (scale, scale * LOG2_E), PIECES=pieces, TAIL_STAGES=max(1, constants["num_stages"] - 1), TOKENS=w.shape[1],
        PADDED=padded, **constants,
    )  # fmt: skip
    return dw, *(_sums(dw, w, folded, row_scale) if folded else (None, None))


@triton.jit
def _mssa_backward_kernel(
    p_dw,  # (batch, tokens, heads * WIDTH), contiguous
    operands,  # w and the gradient of o, (batch, tokens, heads * WIDTH), any strides, both the same
    strides,
    numbers,  # lse (batch, heads, padded), +∞ past the last token; δ · scale (heads, PIECES, batch, padded) in parts, then 0
    p_row_scale,  # (batch * TOKENS,) float32, or None
    sizes,  # (batch, heads)
    scales,  # (scale, scale · log2(e))
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    PIECES: tl.constexpr,
    TAIL_STAGES: tl.constexpr,  # of the tail's loop
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batches, heads = sizes
    p_lse, p_delta = numbers
    batch, head, first = _tile_position(TOKENS, heads, BLOCK_M)
    p_w, p_g = operands
    w_head = _head_of(p_w, strides, batch, head, WIDTH)
    g_head = _head_of(p_g, strides, batch, head, WIDTH)
    p_lse += (batch * heads + head) * PADDED
    p_delta += (head * PIECES * batches + batch) * PADDED
    numbers = (p_lse, p_delta, tl.cast(batches, tl.int64) * PADDED)
    p_dwh = p_dw + batch * TOKENS * heads * WIDTH + head * WIDTH
    image = batch.to(tl.int32) * TOKENS
    TAILED: tl.constexpr = p_dw.dtype.element_ty != tl.float32 and D0 >= 64 and D1 == 0  # else no 64 rows for a wgmma
    if TAILED and TOKENS - first <= TAIL:
        b_tail = _tail_gradient(
            w_head, g_head, numbers, first, TOKENS, scales, PIECES, TAIL_STAGES, WIDTH, D0, BLOCK_M, PRECISION
        )
        _store_rows(p_dwh, b_tail, b_tail, p_row_scale, image, first, TOKENS, heads * WIDTH, WIDTH, D0, D1)
    else:
        REACH: tl.constexpr = TAIL if TAILED else 0
        LAST: tl.constexpr = TOKENS % BLOCK_M > REACH
        if p_row_scale is not None:
            token = first + tl.arange(0, BLOCK_M)
            b_scale = tl.load(p_row_scale + (image + token), mask=token < TOKENS if LAST else None, other=0.0 if LAST else None)
        b_dw0, b_dw1 = _rows_gradient(
            w_head, g_head, numbers, first, TOKENS, scales, PIECES, WIDTH, D0, D1, BLOCK_M, BLOCK_N, LAST, PRECISION
        )
        if p_row_scale is not None:
            b_dw0 *= b_scale[:, None]
            b_dw1 *= b_scale[:, None]
        SCALED: tl.constexpr = p_row_scale is not None
        _store_part(p_dwh, b_dw0, first, TOKENS, heads * WIDTH, 0, WIDTH, LAST, SCALED)
        if D1 > 0:
            _store_part(p_dwh, b_dw1, first, TOKENS, heads * WIDTH, D0, WIDTH, LAST, SCALED)


@triton.jit
def _rows_gradient(
    w_head, g_head, numbers, first, TOKENS: tl.constexpr, scales, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of ROWS rows of one head, LAST where some may lie past the end, over columns of BLOCK_N tokens, then of the rest."""
    b_w0, b_w1 = _load_tokens(w_head, first, TOKENS, WIDTH, ROWS, D0, D1, LAST)
    b_g0, b_g1 = _load_tokens(g_head, first, TOKENS, WIDTH, ROWS, D0, D1, LAST)
    b_lse, b_delta = _load_numbers(numbers, first, TOKENS, PIECES, ROWS, LAST)
    rows = (b_w0, b_w1, b_g0, b_g1, b_lse, b_delta)
    b_dw0 = tl.zeros([ROWS, D0], tl.float32)
    b_dw1 = tl.zeros([ROWS, D1 if D1 > 0 else D0], tl.float32)
    # float32: one loop, or the compiler fetches the operands of the last tile's products all at once, and spills
    FULL: tl.constexpr = TOKENS // BLOCK_N * BLOCK_N if b_w0.dtype != tl.float32 else TOKENS
    REST: tl.constexpr = TAIL if TOKENS - FULL <= TAIL else BLOCK_N
    HELD: tl.constexpr = FULL < TOKENS and REST == TAIL and D1 == 0
    if HELD:
        rest = _load_columns(w_head, g_head, FULL, TOKENS, WIDTH, REST, D0, D1, True)  # now: no wait for them later
    for start in range(0, FULL, BLOCK_N):
        columns = _load_columns(w_head, g_head, start, TOKENS, WIDTH, BLOCK_N, D0, D1, FULL % BLOCK_N > 0)
        b_dw0, b_dw1 = _gradient_from(
            b_dw0, b_dw1, rows, columns, w_head, g_head, numbers, first, start, TOKENS, scales, PIECES, WIDTH, D1,
            BLOCK_N, FULL % BLOCK_N > 0, PRECISION,
        )  # fmt: skip
    if FULL < TOKENS:
        if not HELD:
            rest = _load_columns(w_head, g_head, FULL, TOKENS, WIDTH, REST, D0, D1, True)
        b_dw0, b_dw1 = _gradient_from(
            b_dw0, b_dw1, rows, rest, w_head, g_head, numbers, first, FULL, TOKENS, scales, PIECES, WIDTH, D1, REST, True,
            PRECISION,
        )  # fmt: skip
    return b_dw0, b_dw1


@triton.jit
def _gradient_from(
    b_dw0, b_dw1, rows, columns, w_head, g_head, numbers, first, start, tokens, scales, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, D1: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of rows after a tile of COLUMNS columns; with LAST columns may lie past the end."""
    b_wi0, b_wi1, b_gi0, b_gi1, b_lse_i, b_delta_i = rows
    scale, scale_log2 = scales
    ROWS: tl.constexpr = b_wi0.shape[0]
    b_wj0, b_wj1, b_gj0, b_gj1 = columns
    b_lse_j, b_delta_j = _load_numbers(numbers, start, tokens, PIECES, COLUMNS, LAST and COLUMNS > TAIL)
    if b_wi0.dtype == tl.float32:
        b_s = _scores_in_steps(w_head, first, w_head, start, tokens, WIDTH, ROWS, COLUMNS, PRECISION)
        b_dpt = _scores_in_steps(w_head, first, g_head, start, tokens, WIDTH, ROWS, COLUMNS, PRECISION)
        b_dp = _scores_in_steps(g_head, first, w_head, start, tokens, WIDTH, ROWS, COLUMNS, PRECISION)
    else:
        b_s = _scores(b_wi0, b_wi1, b_wj0, b_wj1, D1, PRECISION)  # [M, N]
        b_dpt = _scores(b_wi0, b_wi1, b_gj0, b_gj1, D1, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse_j[None, :])  # P_ji
    b_e = b_p * (b_dpt * scale - b_delta_j[None, :])
    b_p = b_p.to(b_gj0.dtype)
    b_dw0 = tl.dot(b_p, b_gj0, b_dw0, input_precision=PRECISION)
    if D1 > 0:
        b_dw1 = tl.dot(b_p, b_gj1, b_dw1, input_precision=PRECISION)
    if b_wi0.dtype != tl.float32:
        b_dp = _scores(b_gi0, b_gi1, b_wj0, b_wj1, D1, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse_i[:, None])  # P_ij
    if LAST:
        b_p = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], b_p, 0.0)
    b_e = (b_e + b_p * (b_dp * scale - b_delta_i[:, None])).to(b_wj0.dtype)
    b_dw0 = tl.dot(b_e, b_wj0, b_dw0, input_precision=PRECISION)
    if D1 > 0:
        b_dw1 = tl.dot(b_e, b_wj1, b_dw1, input_precision=PRECISION)
    return b_dw0, b_dw1


@triton.jit
def _load_columns(
    w_head, g_head, start, tokens, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    b_w0, b_w1 = _load_tokens(w_head, start, tokens, WIDTH, COLUMNS, D0, D1, LAST)
    b_g0, b_g1 = _load_tokens(g_head, start, tokens, WIDTH, COLUMNS, D0, D1, LAST)
    return b_w0, b_w1, b_g0, b_g1


@triton.jit
def _load_numbers(numbers, first, tokens, PIECES: tl.constexpr, LENGTH: tl.constexpr, LAST: tl.constexpr):
    """(lse, δ · scale) of LENGTH tokens of one head; with LAST they may end past the padding, and +∞ and 0 stand there."""
    p_lse, p_delta, pieces_apart = numbers
    token = first + tl.arange(0, LENGTH)
    mask = token < tokens if LAST else None
    b_delta = tl.load(p_delta + token, mask=mask, other=0.0 if LAST else None)
    for piece in tl.static_range(1, PIECES):
        b_delta += tl.load(p_delta + piece * pieces_apart + token, mask=mask, other=0.0 if LAST else None)
    return tl.load(p_lse + token, mask=mask, other=float("inf") if LAST else None), b_delta


@triton.jit
def _tail_gradient(
    w_head, g_head, numbers, first, tokens, scales, PIECES: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of the tokens from `first` on, at most TAIL, [TAIL, D]. The tokens before them, of which there is a multiple of
    ROWS, are rows i, they are columns j; E_ij is E_ji, and their gradient is made transposed."""
    scale, scale_log2 = scales
    columns = _load_columns(w_head, g_head, first, tokens, WIDTH, TAIL, D, 0, True)
    b_wj, b_wj1, b_gj, b_gj1 = columns
    b_lse_j, b_delta_j = _load_numbers(numbers, first, tokens, PIECES, TAIL, False)
    b_dw = tl.zeros([D, TAIL], tl.float32)
    for start in tl.range(0, first, ROWS, num_stages=STAGES):
        b_wi, _, b_gi, _ = _load_columns(w_head, g_head, start, tokens, WIDTH, ROWS, D, 0, False)
        b_lse_i, b_delta_i = _load_numbers(numbers, start, tokens, PIECES, ROWS, False)
        b_s = tl.dot(b_wi, tl.trans(b_wj))  # [M, TAIL]
        b_p = tl.exp2(b_s * scale_log2 - b_lse_i[:, None])
        b_dpt = tl.dot(b_wi, tl.trans(b_gj)) * scale
        b_e = tl.exp2(b_s * scale_log2 - b_lse_j[None, :]) * (b_dpt - b_delta_j[None, :])
        b_dp = tl.dot(b_gi, tl.trans(b_wj)) * scale
        b_e = (b_e + b_p * (b_dp - b_delta_i[:, None])).to(b_wi.dtype)
        b_more = tl.dot(tl.trans(b_wi), b_e)
        b_dw += tl.dot(tl.trans(b_gi), b_p.to(b_gi.dtype), b_more)
    b_0 = tl.zeros([TAIL, D], tl.float32)
    tail = (b_wj, b_wj1, b_gj, b_gj1, b_lse_j, b_delta_j)
    b_0, _ = _gradient_from(
        b_0, b_0, tail, columns, w_head, g_head, numbers, first, first, tokens, scales, PIECES, WIDTH, 0, TAIL, True, PRECISION
    )
    return b_0 + tl.trans(b_dw)


@triton.jit
def _store_rows(
    p_dw, b_dw0, b_dw1, p_row_scale, image, first, tokens, width, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """Rows of dw from `first` on, each by its scale."""
    if p_row_scale is not None:
        row = first + tl.arange(0, b_dw0.shape[0])
        b_scale = tl.load(p_row_scale + (image + row), mask=row < tokens, other=0.0)[:, None]
        b_dw0 *= b_scale
        b_dw1 *= b_scale
    _store_part(p_dw, b_dw0, first, tokens, width, 0, WIDTH)
    if D1 > 0:
        _store_part(p_dw, b_dw1, first, tokens, width, D0, WIDTH)


def _sums(dw: Tensor, w: Tensor, folded: Folded, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums, totals) of `mssa_backward`."""
    batch, tokens, width = w.shape
    rows, columns = batch * tokens, shapes.blocks(width, SUM_COLUMNS)
    chunk = shapes.blocks(shapes.blocks(rows, SUM_PARTS), SUM_ROWS) * SUM_ROWS
    parts = shapes.blocks(rows, chunk)
    sums = torch.empty(2, columns, rows, dtype=torch.float32, device=w.device)
    totals = torch.empty(1, parts, width, dtype=torch.float32, device=w.device)
    launch(
        _sums_kernel, parts * columns, sums, totals, dw, (w, *w.stride()), (folded.gain, folded.offset), row_scale,
        (rows, tokens, width, columns, chunk), BLOCK_M=SUM_ROWS, BLOCK_N=SUM_COLUMNS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums, totals


@triton.jit
def _sums_kernel(
    p_sums,  # (2, columns, rows) float32: parts of Σ dw·(w − offset) and Σ dw·gain
    p_totals,  # (1, parts, width) float32: parts of the column sums of dw over its row scale
    p_dw,  # (rows, width), contiguous
    w,  # (batch, tokens, width), any strides
    folded,  # gain and offset, (width,) float32
    p_row_scale,  # (rows,) float32 that rows of dw were multiplied by, or None
    sizes,  # (rows, tokens, width, blocks of columns, rows of a part)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, tokens, width, columns, chunk = sizes
    p_w, stride_b, stride_n, stride_d = w
    p_gain, p_offset = folded
    part = tl.program_id(0) // columns
    block = tl.program_id(0) % columns
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = column < width
    b_gain = tl.load(p_gain + column, mask=m_column, other=0.0)[None, :]
    b_offset = tl.load(p_offset + column, mask=m_column, other=0.0)[None, :]
    b_totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = part.to(tl.int64) * chunk
    for start in range(0, chunk, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        m_row = row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        b_dw = tl.load(p_dw + row[:, None] * width + column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        p_row = p_w + row // tokens * stride_b + row % tokens * stride_n
        b_w = tl.load(p_row[:, None] + column[None, :] * stride_d, mask=m_tile, other=0.0).to(tl.float32)
        p_row = p_sums + block.to(tl.int64) * rows + row
        tl.store(p_row, tl.sum(b_dw * (b_w - b_offset), 1), mask=m_row)
        tl.store(p_row + tl.cast(columns, tl.int64) * rows, tl.sum(b_dw * b_gain, 1), mask=m_row)
        if p_row_scale is not None:
            b_dw /= tl.load(p_row_scale + row, mask=m_row, other=1.0)[:, None]
        b_totals += b_dw
    tl.store(p_totals + part * width + column, tl.sum(b_totals, 0), mask=m_column)


def head_products(o: Tensor, do: Tensor, heads: int, scale: float) -> Tensor:
    """δ · scale = scale · Σ do·o of every head, (heads, 1, batch, padded tokens) float32, 0 past the last token.

    o: (batch, tokens, heads × width) contiguous.
    """
    batch, tokens, width = o.shape
    padded, block = padded_tokens(tokens), 32
    delta = torch.empty(heads, 1, batch, padded, dtype=torch.float32, device=o.device)
    constants = {"WIDTH": width // heads, "BLOCK_D": triton.next_power_of_2(width // heads), "BLOCK_M": block}
    programs = shapes.blocks(batch * padded, block) * heads
    sizes = (batch, tokens, padded, heads)
    launch(_delta_kernel, programs, delta, o, (do, *do.stride()), sizes, scale, **constants, num_warps=4, num_stages=1)
    return delta


@triton.jit
def _delta_kernel(
    p_delta,  # (heads, batch, padded) float32
    p_o,  # (batch, tokens, heads * WIDTH), contiguous
    g,  # the same, any strides
    sizes,  # (batch, tokens, padded, heads)
    scale,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    batches, tokens, padded, heads = sizes
    p_g, stride_b, stride_n, stride_d = g
    head = (tl.program_id(0) % heads).to(tl.int64)
    number = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    batch = number // padded
    token = number % padded
    m_number = batch < batches
    m_tile = (m_number & (token < tokens))[:, None] & (column < WIDTH)[None, :]
    p_oh = p_o + (batch * tokens + token)[:, None] * (heads * WIDTH) + head * WIDTH + column[None, :]
    p_gh = p_g + (batch * stride_b + token * stride_n)[:, None] + (head * WIDTH + column)[None, :] * stride_d
    b_product = tl.load(p_oh, mask=m_tile, other=0.0).to(tl.float32) * tl.load(p_gh, mask=m_tile, other=0.0).to(tl.float32)
    p_number = p_delta + head * batches * padded + number
    tl.store(p_number, tl.sum(b_product, 1) * scale, mask=m_number)
