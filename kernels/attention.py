"""The Triton kernel of tied attention, forward, and what it shares with the gradient's; mssa.py has the mathematics and
launches them.

A head of width p is held in one or two parts of D0 and D1 columns, each a power of two (48 = 32 + 16), so that no product
works on padding; without a second part D1 is 0 and its blocks stand for nothing. Tokens of one head are cut in row blocks
of BLOCK_M, one program each, whose last may be TAIL high, against column blocks of BLOCK_N, then of TAIL: 197 tokens cost
208 × 208.

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. M rows, N columns, D head width; i rows, j columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAIL = tl.constexpr(16)


@triton.jit
def _tile_position(tokens, heads, BLOCK_M: tl.constexpr):
    """(batch, head, first row) of this program; the tiles of one head are neighbours, so that they share it in L2."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    plane = pid // tiles
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), (pid % tiles) * BLOCK_M


@triton.jit
def _load_part(
    p_head, first, tokens, stride_n, stride_d, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS, columns start .. start + D of one head; zero past the last token and, where it may be
    PADDED, past the head's width."""
    row = first + tl.arange(0, ROWS)
    column = start + tl.arange(0, D)
    p_rows = p_head + row.to(tl.int64)[:, None] * stride_n + column[None, :] * stride_d
    m_rows = (row < tokens)[:, None]
    if PADDED:
        m_rows = m_rows & (column < WIDTH)[None, :]
    return tl.load(p_rows, mask=m_rows, other=0.0)


@triton.jit
def _load_tokens(
    p_head, first, tokens, stride_n, stride_d, WIDTH: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """Both parts of rows first .. first + ROWS of one head, [ROWS, D0] and [ROWS, D1]."""
    b_0 = _load_part(p_head, first, tokens, stride_n, stride_d, 0, WIDTH, ROWS, D0, D0 > WIDTH)
    b_1 = b_0
    if D1 > 0:
        b_1 = _load_part(p_head, first, tokens, stride_n, stride_d, D0, WIDTH, ROWS, D1, D0 + D1 > WIDTH)
    return b_0, b_1


@triton.jit
def _store_part(p_head, b, first, tokens, stride_n, START: tl.constexpr, WIDTH: tl.constexpr):
    row = first + tl.arange(0, b.shape[0])
    column = START + tl.arange(0, b.shape[1])
    p_rows = p_head + row.to(tl.int64)[:, None] * stride_n + column[None, :]
    tl.store(p_rows, b.to(p_head.dtype.element_ty), mask=(row < tokens)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _scores(b_i0, b_i1, b_j0, b_j1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """b_i b_jᵀ over the whole head, [M, N]."""
    b_s = tl.dot(b_i0, tl.trans(b_j0), input_precision=PRECISION)
    if D1 > 0:
        b_s = tl.dot(b_i1, tl.trans(b_j1), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _scores_in_steps(
    p_i, i, stride_in, stride_id, p_j, j, stride_jn, stride_jd, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr = 32,
):  # fmt: skip
    """b_i b_jᵀ of rows i .. and j .., STEP columns at a time: float32 products hold their operands' whole depth in registers,
    and the compiler fetches those of several products at once unless a loop keeps it from that (144 bytes spilled)."""
    b_s = tl.zeros([ROWS, COLUMNS], tl.float32)
    PADDED: tl.constexpr = WIDTH % STEP != 0
    for start in range(0, WIDTH, STEP):
        b_i = _load_part(p_i, i, tokens, stride_in, stride_id, start, WIDTH, ROWS, STEP, PADDED)
        b_j = _load_part(p_j, j, tokens, stride_jn, stride_jd, start, WIDTH, COLUMNS, STEP, PADDED)
        b_s = tl.dot(b_i, tl.trans(b_j), b_s, input_precision=PRECISION)
    return b_s


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
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, first = _tile_position(tokens, heads, BLOCK_M)
    width = heads * WIDTH
    p_wh = p_w + batch * stride_wb + head * WIDTH * stride_wd
    p_oh = p_o + batch * tokens * width + head * WIDTH
    p_lseh = p_lse + (batch * heads + head) * tokens
    if BLOCK_M > TAIL and tokens - first <= TAIL:
        _forward_rows(
            p_wh, p_oh, p_lseh, first, tokens, width, stride_wn, stride_wd, scale_log2, WIDTH, D0, D1, TAIL, BLOCK_N, PRECISION
        )
    else:
        _forward_rows(
            p_wh,
            p_oh,
            p_lseh,
            first,
            tokens,
            width,
            stride_wn,
            stride_wd,
            scale_log2,
            WIDTH,
            D0,
            D1,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
        )


@triton.jit
def _forward_rows(
    p_wh, p_oh, p_lseh, first, tokens, width, stride_wn, stride_wd, scale_log2,
    WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of ROWS rows of one head."""
    b_q0, b_q1 = _load_tokens(p_wh, first, tokens, stride_wn, stride_wd, WIDTH, ROWS, D0, D1)
    b_max = tl.full([ROWS], -3.0e38, tl.float32)  # finite: where all scores so far overflowed, −∞ − (−∞) would be NaN
    b_sum = tl.zeros([ROWS], tl.float32)
    b_o0 = tl.zeros([ROWS, D0], tl.float32)
    b_o1 = tl.zeros([ROWS, D1 if D1 > 0 else D0], tl.float32)
    full = tokens // BLOCK_N * BLOCK_N if BLOCK_N > TAIL else 0
    for start in range(0, full, BLOCK_N):
        b_max, b_sum, b_o0, b_o1 = _attend_to(
            p_wh, first, b_q0, b_q1, b_max, b_sum, b_o0, b_o1, scale_log2, start, tokens, stride_wn, stride_wd,
            WIDTH, D0, D1, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for start in range(full, tokens, TAIL):
        b_max, b_sum, b_o0, b_o1 = _attend_to(
            p_wh, first, b_q0, b_q1, b_max, b_sum, b_o0, b_o1, scale_log2, start, tokens, stride_wn, stride_wd,
            WIDTH, D0, D1, TAIL, True, PRECISION,
        )  # fmt: skip
    _store_part(p_oh, b_o0 / b_sum[:, None], first, tokens, width, 0, WIDTH)
    if D1 > 0:
        _store_part(p_oh, b_o1 / b_sum[:, None], first, tokens, width, D0, WIDTH)
    row = first + tl.arange(0, ROWS)
    tl.store(p_lseh + row, b_max + tl.log2(b_sum), mask=row < tokens)


@triton.jit
def _attend_to(
    p_wh, first, b_q0, b_q1, b_max, b_sum, b_o0, b_o1, scale_log2, start, tokens, stride_wn, stride_wd,
    WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and result of rows after a block of keys; with LAST keys may lie past the end."""
    b_k0, b_k1 = _load_tokens(p_wh, start, tokens, stride_wn, stride_wd, WIDTH, COLUMNS, D0, D1)
    if b_k0.dtype == tl.float32:
        b_s = _scores_in_steps(
            p_wh, first, stride_wn, stride_wd, p_wh, start, stride_wn, stride_wd, tokens, WIDTH, b_q0.shape[0], COLUMNS,
            PRECISION,
        )  # fmt: skip
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
