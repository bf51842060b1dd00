# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportReturnType=false
"""Tied attention, backward: the launcher, then the kernel downward; mssa.py has the mathematics, attention.py the names and
what both directions share.

In 16 bit the last tokens of a head, if at most TAIL, have a program of their own. Where products are wgmma it reads
everything the other way round: the other tokens are the 64 rows of a product, the tail its 16 columns, which E's symmetry
allows; as 16 rows against the columns of all tokens they would be no wgmma. HMMA takes 16 rows as they are, and the other
way round it would pass every tile through shared memory (20 barriers a turn). What decides is how many programs a
multiprocessor holds, so that one computes while another waits for its products: the loop's tile is 32 columns, and row sums
of dw are made by a kernel of their own, since in this one they take registers of its third or fourth program and more time
than reading dw and w again.
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
    plan,
)
from .attention_sums import gradient_sums
from .linear import Folded
from .runtime import launch


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
        PADDED=padded, HMMA=shapes.architecture(w.device) == 80, **constants,
    )  # fmt: skip
    return dw, *(gradient_sums(dw, w, folded, row_scale) if folded else (None, None))


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
    HMMA: tl.constexpr,  # products are HMMA
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
    given = (w_head, g_head, numbers, scales)
    p_dwh = p_dw + batch * TOKENS * heads * WIDTH + head * WIDTH
    image = batch.to(tl.int32) * TOKENS
    TAILED: tl.constexpr = p_dw.dtype.element_ty != tl.float32 and D0 >= 64 and D1 == 0  # else no 64 rows for a wgmma
    if TAILED and TOKENS - first <= TAIL:
        if HMMA:
            b_dw, _ = _rows_gradient(given, first, TOKENS, PIECES, WIDTH, D0, D1, TAIL, BLOCK_N, True, PRECISION)
        else:
            b_dw = _tail_gradient(given, first, TOKENS, PIECES, TAIL_STAGES, WIDTH, D0, BLOCK_M, PRECISION)
        if p_row_scale is not None:
            b_dw *= _load_scale(p_row_scale, image, first, TOKENS, TAIL, True)
        _store_part(p_dwh, b_dw, first, TOKENS, heads * WIDTH, 0, WIDTH)
    else:
        REACH: tl.constexpr = TAIL if TAILED else 0
        LAST: tl.constexpr = TOKENS % BLOCK_M > REACH
        SCALED: tl.constexpr = p_row_scale is not None
        if SCALED and D1 == 0:  # now: no wait for it later; heads in two parts have no registers for it
            b_scale = _load_scale(p_row_scale, image, first, TOKENS, BLOCK_M, LAST)
        b_dw0, b_dw1 = _rows_gradient(given, first, TOKENS, PIECES, WIDTH, D0, D1, BLOCK_M, BLOCK_N, LAST, PRECISION)
        if SCALED and D1 > 0:
            b_scale = _load_scale(p_row_scale, image, first, TOKENS, BLOCK_M, LAST)
        if SCALED:
            b_dw0 *= b_scale
            b_dw1 *= b_scale
        _store_part(p_dwh, b_dw0, first, TOKENS, heads * WIDTH, 0, WIDTH, LAST, SCALED)
        if D1 > 0:
            _store_part(p_dwh, b_dw1, first, TOKENS, heads * WIDTH, D0, WIDTH, LAST, SCALED)


@triton.jit
def _load_scale(p_row_scale, image, first, TOKENS: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr):
    """The row scale of ROWS tokens of an image, [ROWS, 1]; with LAST some may lie past the end."""
    token = first + tl.arange(0, ROWS)
    return tl.load(p_row_scale + (image + token), mask=token < TOKENS if LAST else None, other=0.0 if LAST else None)[:, None]


@triton.jit
def _rows_gradient(
    given, first, TOKENS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of ROWS rows of one head, LAST where some may lie past the end, over columns of BLOCK_N tokens, then of the rest.
    given: the head of w, that of the gradient of o, the numbers of their tokens, the scales."""
    b_i = _load_both(given, first, TOKENS, WIDTH, ROWS, D0, D1, LAST)
    rows = (first, b_i, _load_numbers(given, first, TOKENS, PIECES, ROWS, LAST))
    b_dw = (tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1 if D1 > 0 else D0], tl.float32))
    # float32: one loop, or the compiler fetches the operands of the last tile's products all at once, and spills
    FULL: tl.constexpr = TOKENS // BLOCK_N * BLOCK_N if given[0][0].dtype.element_ty != tl.float32 else TOKENS
    REST: tl.constexpr = TAIL if TOKENS - FULL <= TAIL else BLOCK_N
    HELD: tl.constexpr = FULL < TOKENS and REST == TAIL and D1 == 0
    if HELD:
        rest = _load_both(given, FULL, TOKENS, WIDTH, REST, D0, D1, True)  # now: no wait for them later
    for start in range(0, FULL, BLOCK_N):
        columns = _load_both(given, start, TOKENS, WIDTH, BLOCK_N, D0, D1, FULL % BLOCK_N > 0)
        b_dw = _gradient_from(b_dw, rows, columns, given, start, TOKENS, PIECES, WIDTH, D1, FULL % BLOCK_N > 0, PRECISION)
    if FULL < TOKENS:
        if not HELD:
            rest = _load_both(given, FULL, TOKENS, WIDTH, REST, D0, D1, True)
        b_dw = _gradient_from(b_dw, rows, rest, given, FULL, TOKENS, PIECES, WIDTH, D1, True, PRECISION)
    return b_dw


@triton.jit
def _gradient_from(
    b_dw, rows, columns, given, start, TOKENS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, D1: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of rows after a tile of columns; with LAST columns may lie past the end."""
    b_dw0, b_dw1 = b_dw
    first, b_i, numbers_i = rows
    b_wi0, b_wi1, b_gi0, b_gi1 = b_i
    b_lse_i, b_delta_i = numbers_i
    b_wj0, b_wj1, b_gj0, b_gj1 = columns
    w_head, g_head, _, scales = given
    scale, scale_log2 = scales
    ROWS: tl.constexpr = b_wi0.shape[0]
    COLUMNS: tl.constexpr = b_wj0.shape[0]
    b_lse_j, b_delta_j = _load_numbers(given, start, TOKENS, PIECES, COLUMNS, LAST and COLUMNS > TAIL)
    if b_wi0.dtype == tl.float32:
        b_s = _scores_in_steps(w_head, first, w_head, start, TOKENS, WIDTH, ROWS, COLUMNS, PRECISION)
        b_dpt = _scores_in_steps(w_head, first, g_head, start, TOKENS, WIDTH, ROWS, COLUMNS, PRECISION)
        b_dp = _scores_in_steps(g_head, first, w_head, start, TOKENS, WIDTH, ROWS, COLUMNS, PRECISION)
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
        b_p = tl.where((start + tl.arange(0, COLUMNS) < TOKENS)[None, :], b_p, 0.0)
    b_e = (b_e + b_p * (b_dp * scale - b_delta_i[:, None])).to(b_wj0.dtype)
    b_dw0 = tl.dot(b_e, b_wj0, b_dw0, input_precision=PRECISION)
    if D1 > 0:
        b_dw1 = tl.dot(b_e, b_wj1, b_dw1, input_precision=PRECISION)
    return b_dw0, b_dw1


@triton.jit
def _load_both(
    given, first, TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Both parts of ROWS tokens of w, then of the gradient of o."""
    b_w0, b_w1 = _load_tokens(given[0], first, TOKENS, WIDTH, ROWS, D0, D1, LAST)
    b_g0, b_g1 = _load_tokens(given[1], first, TOKENS, WIDTH, ROWS, D0, D1, LAST)
    return b_w0, b_w1, b_g0, b_g1


@triton.jit
def _load_numbers(given, first, TOKENS: tl.constexpr, PIECES: tl.constexpr, LENGTH: tl.constexpr, LAST: tl.constexpr):
    """(lse, δ · scale) of LENGTH tokens of one head; with LAST they may end past the padding, and +∞ and 0 stand there."""
    p_lse, p_delta, pieces_apart = given[2]
    token = first + tl.arange(0, LENGTH)
    mask = token < TOKENS if LAST else None
    b_delta = tl.load(p_delta + token, mask=mask, other=0.0 if LAST else None)
    for piece in tl.static_range(1, PIECES):
        b_delta += tl.load(p_delta + piece * pieces_apart + token, mask=mask, other=0.0 if LAST else None)
    return tl.load(p_lse + token, mask=mask, other=float("inf") if LAST else None), b_delta


@triton.jit
def _tail_gradient(
    given, first, TOKENS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw of the tokens from `first` on, at most TAIL, [TAIL, D]. The tokens before them, of which there is a multiple of
    ROWS, are rows i, they are columns j; E_ij is E_ji, and their gradient is made transposed."""
    scale, scale_log2 = given[3]
    columns = _load_both(given, first, TOKENS, WIDTH, TAIL, D, 0, True)
    b_wj, _, b_gj, _ = columns
    numbers_j = _load_numbers(given, first, TOKENS, PIECES, TAIL, False)
    b_lse_j, b_delta_j = numbers_j
    b_dw = tl.zeros([D, TAIL], tl.float32)
    for start in tl.range(0, first, ROWS, num_stages=STAGES):
        others = _load_both(given, start, TOKENS, WIDTH, ROWS, D, 0, False)
        b_wi, b_gi = others[0], others[2]
        b_lse_i, b_delta_i = _load_numbers(given, start, TOKENS, PIECES, ROWS, False)
        b_s = tl.dot(b_wi, tl.trans(b_wj))  # [M, TAIL]
        b_p = tl.exp2(b_s * scale_log2 - b_lse_i[:, None])
        b_dpt = tl.dot(b_wi, tl.trans(b_gj)) * scale
        b_e = tl.exp2(b_s * scale_log2 - b_lse_j[None, :]) * (b_dpt - b_delta_j[None, :])
        b_dp = tl.dot(b_gi, tl.trans(b_wj)) * scale
        b_e = (b_e + b_p * (b_dp - b_delta_i[:, None])).to(b_wi.dtype)
        b_more = tl.dot(tl.trans(b_wi), b_e)
        b_dw += tl.dot(tl.trans(b_gi), b_p.to(b_gi.dtype), b_more)
    b_0 = tl.zeros([TAIL, D], tl.float32)
    rows = (first, columns, numbers_j)
    b_0, _ = _gradient_from((b_0, b_0), rows, columns, given, first, TOKENS, PIECES, WIDTH, 0, True, PRECISION)
    return b_0 + tl.trans(b_dw)
