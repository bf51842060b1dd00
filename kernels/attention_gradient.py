"""Triton kernels of tied attention's gradient; mssa.py has their mathematics and launches them, attention.py the names."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import TAIL, _load_tokens, _scores, _scores_in_steps, _store_part, _tile_position


@triton.jit
def _mssa_backward_kernel(
    p_w,  # (batch, tokens, heads * WIDTH), any strides
    p_do,  # the same, any strides
    p_lse,  # (batch, heads, tokens) float32
    p_delta,  # (heads, PIECES, batch * tokens) float32, summed over PIECES: Σ do·o
    p_dw,  # (batch, tokens, heads * WIDTH), contiguous
    p_gain,  # (heads * WIDTH,) float32, SUMS
    p_offset,
    p_sums,  # (2, heads, batch * tokens) float32, SUMS: parts of Σ dw·(w − offset) and Σ dw·gain, of dw as it is stored
    p_scale,  # (batch * tokens,) float32, SUMS: dw is stored this times
    p_totals,  # (programs of a head, heads * WIDTH) float32, SUMS: column sums of dw
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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    width = heads * WIDTH
    rows = tl.cast(batches, tl.int64) * tokens  # an argument that is 1 has no .to: Triton makes it a constant
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    p_gh = p_do + batch * stride_gb + head * WIDTH * stride_gd
    p_lseh = p_lse + (batch * heads + head) * tokens
    p_deltah = p_delta + head * PIECES * rows + batch * tokens
    p_dwh = p_dw + batch * tokens * width + head * WIDTH
    if SUMS:
        p_gain += head * WIDTH
        p_offset += head * WIDTH
        p_sums += head * rows + batch * tokens
        p_scale += batch * tokens
        p_totals += (batch * tl.cdiv(tokens, BLOCK_M) + first // BLOCK_M) * width + head * WIDTH
    if BLOCK_M > TAIL and tokens - first <= TAIL:
        _backward_rows(
            p_wh, p_gh, p_lseh, p_deltah, p_dwh, p_gain, p_offset, p_sums, p_scale, p_totals, first, tokens,
            rows, heads, stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, SUMS, PIECES, WIDTH, D0, D1, TAIL,
            BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        _backward_rows(
            p_wh, p_gh, p_lseh, p_deltah, p_dwh, p_gain, p_offset, p_sums, p_scale, p_totals, first, tokens,
            rows, heads, stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, SUMS, PIECES, WIDTH, D0, D1, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    p_wh, p_gh, p_lseh, p_deltah, p_dwh, p_gain, p_offset, p_sums, p_scale, p_totals, first, tokens, rows,
    heads, stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, SUMS: tl.constexpr, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of ROWS rows of one head, and its row sums."""
    b_wi0, b_wi1 = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, ROWS, D0, D1)
    b_gi0, b_gi1 = _load_tokens(p_gh, first, tokens, stride_gn, stride_gd, WIDTH, ROWS, D0, D1)
    b_lse, b_delta = _load_numbers(p_lseh, p_deltah, first, tokens, rows, PIECES, ROWS)
    b_dw0 = tl.zeros([ROWS, D0], tl.float32)
    b_dw1 = tl.zeros([ROWS, D1 if D1 > 0 else D0], tl.float32)
    full = tokens // BLOCK_N * BLOCK_N if BLOCK_N > TAIL else 0
    for start in range(0, full, BLOCK_N):
        b_dw0, b_dw1 = _gradient_from(
            p_wh, p_gh, p_lseh, p_deltah, b_dw0, b_dw1, b_wi0, b_wi1, b_gi0, b_gi1, b_lse, b_delta, first, start, tokens, rows,
            stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, PIECES, WIDTH, D0, D1, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for start in range(full, tokens, TAIL):
        b_dw0, b_dw1 = _gradient_from(
            p_wh, p_gh, p_lseh, p_deltah, b_dw0, b_dw1, b_wi0, b_wi1, b_gi0, b_gi1, b_lse, b_delta, first, start, tokens, rows,
            stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, PIECES, WIDTH, D0, D1, TAIL, True, PRECISION,
        )  # fmt: skip

    if SUMS:
        row = first + tl.arange(0, ROWS)
        b_scale = tl.load(p_scale + row, mask=row < tokens, other=0.0)
        b_dw0 = _store_totals(p_totals, b_dw0, b_scale, row < tokens, 0, WIDTH)
        if D1 > 0:
            b_dw1 = _store_totals(p_totals, b_dw1, b_scale, row < tokens, D0, WIDTH)
    b_dw0, b_dw1 = b_dw0.to(p_dwh.dtype.element_ty), b_dw1.to(p_dwh.dtype.element_ty)
    _store_part(p_dwh, b_dw0, first, tokens, heads * WIDTH, 0, WIDTH)
    if D1 > 0:
        _store_part(p_dwh, b_dw1, first, tokens, heads * WIDTH, D0, WIDTH)
    if SUMS:
        # Rows of w again, from the cache: kept in registers they cost a program a multiprocessor.
        b_wi0, b_wi1 = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, ROWS, D0, D1)
        b_c1, b_c2 = _row_sums(b_dw0, b_wi0, p_gain, p_offset, 0, WIDTH)
        if D1 > 0:
            b_more1, b_more2 = _row_sums(b_dw1, b_wi1, p_gain, p_offset, D0, WIDTH)
            b_c1, b_c2 = b_c1 + b_more1, b_c2 + b_more2
        tl.store(p_sums + row, b_c1, mask=row < tokens)
        tl.store(p_sums + heads * rows + row, b_c2, mask=row < tokens)


@triton.jit
def _load_numbers(p_lse, p_delta, first, tokens, rows, PIECES: tl.constexpr, ROWS: tl.constexpr):
    """(lse, δ) of rows; lse is infinite past the last token, so that no weight goes there."""
    row = first + tl.arange(0, ROWS)
    b_delta = tl.load(p_delta + row, mask=row < tokens, other=0.0)
    for piece in tl.static_range(1, PIECES):
        b_delta += tl.load(p_delta + piece * rows + row, mask=row < tokens, other=0.0)
    return tl.load(p_lse + row, mask=row < tokens, other=float("inf")), b_delta


@triton.jit
def _gradient_from(
    p_wh, p_gh, p_lseh, p_deltah, b_dw0, b_dw1, b_wi0, b_wi1, b_gi0, b_gi1, b_lse_i, b_delta_i, first, start, tokens, rows,
    stride_wn, stride_wd, stride_gn, stride_gd, scale, scale_log2, PIECES: tl.constexpr, WIDTH: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of rows after a block of COLUMNS columns; with LAST columns may lie past the end."""
    b_wj0, b_wj1 = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, COLUMNS, D0, D1)
    b_gj0, b_gj1 = _load_tokens(p_gh, start, tokens, stride_gn, stride_gd, WIDTH, COLUMNS, D0, D1)
    b_lse_j, b_delta_j = _load_numbers(p_lseh, p_deltah, start, tokens, rows, PIECES, COLUMNS)
    if b_wi0.dtype == tl.float32:
        ROWS: tl.constexpr = b_wi0.shape[0]
        b_s = _scores_in_steps(
            p_wh, first, stride_wn, stride_wd, p_wh, start, stride_wn, stride_wd, tokens, WIDTH, ROWS, COLUMNS, PRECISION
        )
        b_dpt = _scores_in_steps(
            p_wh, first, stride_wn, stride_wd, p_gh, start, stride_gn, stride_gd, tokens, WIDTH, ROWS, COLUMNS, PRECISION
        )
        b_dp = _scores_in_steps(
            p_gh, first, stride_gn, stride_gd, p_wh, start, stride_wn, stride_wd, tokens, WIDTH, ROWS, COLUMNS, PRECISION
        )
    else:
        b_s = _scores(b_wi0, b_wi1, b_wj0, b_wj1, D1, PRECISION)  # [M, N]
        b_dpt = _scores(b_wi0, b_wi1, b_gj0, b_gj1, D1, PRECISION)
        b_dp = _scores(b_gi0, b_gi1, b_wj0, b_wj1, D1, PRECISION)
    b_s *= scale_log2
    if LAST:
        b_s = tl.where((start + tl.arange(0, COLUMNS) < tokens)[None, :], b_s, float("-inf"))
    b_pt = tl.exp2(b_s - b_lse_j[None, :])  # P_ji
    b_e = b_pt * (b_dpt - b_delta_j[None, :])
    b_pt = b_pt.to(b_gj0.dtype)
    b_dw0 = tl.dot(b_pt, b_gj0, b_dw0, input_precision=PRECISION)
    if D1 > 0:
        b_dw1 = tl.dot(b_pt, b_gj1, b_dw1, input_precision=PRECISION)
    b_e += tl.exp2(b_s - b_lse_i[:, None]) * (b_dp - b_delta_i[:, None])  # P_ij (dP_ij - δ_i)
    b_e = (b_e * scale).to(b_wj0.dtype)
    b_dw0 = tl.dot(b_e, b_wj0, b_dw0, input_precision=PRECISION)
    if D1 > 0:
        b_dw1 = tl.dot(b_e, b_wj1, b_dw1, input_precision=PRECISION)
    return b_dw0, b_dw1


@triton.jit
def _store_totals(p_totals, b_dw, b_scale, m_row, START: tl.constexpr, WIDTH: tl.constexpr):
    """dw of a part's columns, scaled, its column sums being stored before."""
    column = START + tl.arange(0, b_dw.shape[1])
    tl.store(p_totals + column, tl.sum(tl.where(m_row[:, None], b_dw, 0.0), 0), mask=column < WIDTH)
    return b_dw * b_scale[:, None]


@triton.jit
def _row_sums(b_dw, b_w, p_gain, p_offset, START: tl.constexpr, WIDTH: tl.constexpr):
    """Σ dw·(w − offset) and Σ dw·gain over a part's columns, of dw as it was stored."""
    column = START + tl.arange(0, b_dw.shape[1])
    b_gain = tl.load(p_gain + column, mask=column < WIDTH, other=0.0)
    b_offset = tl.load(p_offset + column, mask=column < WIDTH, other=0.0)
    b_dw = b_dw.to(tl.float32)
    return tl.sum(b_dw * (b_w.to(tl.float32) - b_offset[None, :]), 1), tl.sum(b_dw * b_gain[None, :], 1)


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
