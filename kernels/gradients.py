# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
"""Gradients of the matrix products in linear.py to their input.

No full-width row is needed. With g the gradient of a result s, masked where s was rectified to zero, and v, u its gain and
offset, LayerNorm's two row sums are c₁ = Σ g·(s − u) and c₂ = Σ g·v, and

    dx = rs·(g Fᵀ [+ γ g] − (c₂ + x̂ c₁)/d)

What is stored is g' = rs ∘ g, rounded once, and c₁ and c₂ are made of g', so that rs is out of the formula and of the
weight's gradient (weight_gradients.py). g' is of the size of the dx that follows from it.

Mask, both sums and the column sums of g of an ISTA step are made where g is written, by the data gradient of the layer
above, whose x is s and in registers (RECTIFIED below), so that nothing reads s again. Those of a projection are made by a
kernel behind attention's backward (attention_gradient.py), which they would cost a program a multiprocessor. They travel as
parts, float32: row sums (2, parts, rows), one part a block of columns, and column sums (1, parts, columns), one a block of
rows. They are summed where they are used, in one order: no atomics, the same bits from run to run.

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. M tokens, N columns of dx, K columns of g.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .attention import padded_tokens
from .attention_sums import store_head_sums
from .linear import GROUP, Folded, Statistics, _halves, _load_columns, _mask, _swizzle, unmixed
from .runtime import launch, product_precision
from .tuning import Config


class Rectified(NamedTuple):
    """Of the ISTA step that wrote x: what x's gradient is stored with, and its row sums made."""

    gain: Tensor  # (in,) float32
    offset: Tensor  # (in,) float32
    rstd: Tensor  # (rows,) float32, of the step's own input


@triton.jit
def _data_gradient_kernel(
    g,  # (rows, outputs) gradient of the result, and its strides, any
    weight,  # (inputs, outputs), and its strides, any
    ends,  # dx, written, (rows, inputs); its column sums, written, (row blocks, inputs) float32, or None; NORM, HEAD_WIDTH: x,
    # (rows, inputs); NORM with SHRINK: gamma, (inputs,); RESIDUAL: (rows, inputs), added to dx; all contiguous
    norm,  # NORM: mean and 1/deviation of x's rows, (rows,) float32; c₁ and c₂ in parts, (2, parts, rows) float32; parts
    rectified,  # RECTIFIED, of the step that wrote x: gain and offset, (inputs,); what dx is stored times, (rows,) float32
    p_parts,  # float32, written. RECTIFIED: (2, column blocks, rows). HEAD_WIDTH: (heads · PIECES, images, padded)
    sizes,  # rows, inputs, outputs
    images,  # HEAD_WIDTH: (tokens, scale) of what δ is made for
    zero,  # 0, which no compiler knows
    NORM: tl.constexpr,
    SHRINK: tl.constexpr,  # the step added its (normalised) input
    RESIDUAL: tl.constexpr,
    RECTIFIED: tl.constexpr,  # x is the result of a step behind a LayerNorm: make that step's row sums
    MASKED: tl.constexpr,  # it is an ISTA step: mask dx
    HEAD_WIDTH: tl.constexpr,  # not 0: x is the attention's result; make its δ, scale · Σ dx·x over every head
    PIECES: tl.constexpr,  # column blocks that a head can lie in
    PADDING: tl.constexpr,  # numbers of δ past an image's last token, 0
    WHOLE: tl.constexpr,  # the columns are whole blocks
    SPAN: tl.constexpr,  # a power of two of which the number of columns is a multiple
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a power of two, or 3 times one
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows, inputs, outputs = sizes
    p_g, stride_gm, stride_gk = g
    p_weight, stride_wi, stride_wo = weight
    p_dx, p_totals, p_x, p_gamma, p_residual = ends
    p_gain, p_offset, p_scale = rectified
    block_m, block_n = _swizzle(rows, inputs, BLOCK_M, BLOCK_N, GROUP_M)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    THIRD: tl.constexpr = BLOCK_N // 3 if BLOCK_N % 3 == 0 else BLOCK_N
    THIRDS: tl.constexpr = THIRD < BLOCK_N  # three accumulators, two begin with what is added: more, and registers spill
    tl.static_assert(not (THIRDS and (RECTIFIED or HEAD_WIDTH > 0)), "a mask and δ are not made in thirds")
    BYTES: tl.constexpr = p_dx.dtype.element_ty.primitive_bitwidth // 8
    column = block_n * BLOCK_N + tl.arange(0, THIRD)
    m_row = row < rows
    m_column = column < inputs
    m_column1 = column + THIRD < inputs
    m_column2 = column + 2 * THIRD < inputs
    row = row.to(tl.int64)
    ends = (p_dx, p_totals, p_x, p_gamma, p_residual, p_gain, p_offset)
    none = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_terms = none[0], none[0], none[0]
    b_dx = tl.zeros([BLOCK_M, THIRD], tl.float32)
    b_dx1 = b_dx
    b_dx2 = b_dx
    if THIRDS:
        if NORM:
            b_terms = _norm_terms(norm, row, m_row, rows, inputs, BLOCK_M)
        first = (block_m * BLOCK_M).to(tl.int64) * inputs
        b_dx = _begin(column, m_column, first, g, ends, row, m_row, b_terms, inputs, NORM, SHRINK, RESIDUAL, WHOLE)
        b_dx1 = _begin(column + THIRD, m_column1, first, g, ends, row, m_row, b_terms, inputs, NORM, SHRINK, RESIDUAL, WHOLE)
    for start in range(0, outputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m_k = k < outputs
        p_block = p_g + row[:, None] * stride_gm + k[None, :] * stride_gk
        b_g = tl.load(p_block, mask=m_row[:, None] & m_k[None, :], other=0.0)  # [M, K]
        p_w = p_weight + column[None, :] * stride_wi + k[:, None] * stride_wo
        b_w = tl.load(p_w, mask=_mask(m_k, m_column, WHOLE), other=0.0)  # [K, N]
        b_dx = tl.dot(b_g.to(b_w.dtype), b_w, b_dx, input_precision=PRECISION)
        if THIRDS:
            b_w = tl.load(p_w + THIRD * stride_wi, mask=_mask(m_k, m_column1, WHOLE), other=0.0)
            b_dx1 = tl.dot(b_g.to(b_w.dtype), b_w, b_dx1, input_precision=PRECISION)
            b_w = tl.load(p_w + 2 * THIRD * stride_wi, mask=_mask(m_k, m_column2, WHOLE), other=0.0)
            b_dx2 = tl.dot(b_g.to(b_w.dtype), b_w, b_dx2, input_precision=PRECISION)

    if THIRDS:  # what follows is computed anew, since nothing has room for it throughout the loop
        block_m += zero
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = row < rows
        row = row.to(tl.int64)
    first = (block_m * BLOCK_M).to(tl.int64) * inputs
    p_dx += first
    if NORM or HEAD_WIDTH > 0:
        p_x += first
    if RESIDUAL:
        p_residual += first
    if p_totals is not None:
        p_totals += block_m.to(tl.int64) * inputs
    b_scale = none[0]
    if NORM:
        b_terms = _norm_terms(norm, row, m_row, rows, inputs, BLOCK_M)
    if RECTIFIED:
        b_scale = tl.load(p_scale + row, mask=m_row, other=0.0)
    ends = (p_dx, p_totals, p_x, p_gamma, p_residual, p_gain, p_offset)
    per_row = (row, m_row, rows - block_m * BLOCK_M, b_terms[0], b_terms[1], b_terms[2], b_scale)
    # In parts, so that only a part of what is read is in registers.
    PARTS: tl.constexpr = 2 * BYTES if NORM and BLOCK_M * BLOCK_N >= 64 * 128 else 1
    if HEAD_WIDTH > 0:
        _finish_attention(b_dx, block_n, ends, per_row, p_parts, sizes, images, HEAD_WIDTH, PIECES, PADDING)
    elif THIRDS:
        before = none
        for third in tl.static_range(3):
            before = _finish(
                (b_dx, b_dx1, b_dx2)[third], block_n * 3 + third, g, ends, per_row, inputs, zero, before,
                NORM and third == 2, SHRINK and third == 2, RESIDUAL and third == 2,
                RECTIFIED=False, MASKED=False, WHOLE=WHOLE, SPAN=SPAN, PARTS=BYTES,
            )  # fmt: skip
    else:
        b_sum1, b_sum2 = _finish(
            b_dx, block_n, g, ends, per_row, inputs, zero, none, NORM, SHRINK, RESIDUAL,
            RECTIFIED=RECTIFIED, MASKED=MASKED, WHOLE=WHOLE, SPAN=SPAN, PARTS=PARTS,
        )  # fmt: skip
    if RECTIFIED:
        all_rows = tl.cast(rows, tl.int64)  # an argument that is 1 has no .to: Triton makes it a constant
        p_part = p_parts + block_n * all_rows + row
        tl.store(p_part, b_sum1, mask=m_row)
        tl.store(p_part + tl.cdiv(inputs, BLOCK_N) * all_rows, b_sum2, mask=m_row)


@triton.jit
def _norm_terms(norm, row, m_row, rows, inputs, BLOCK_M: tl.constexpr):
    """(mean, rs c₁/d, c₂/d) of the rows: x̂ c₁/d = (x − μ)·(rs c₁/d)."""
    p_mean, p_rstd, p_sums, parts = norm
    b_c1, b_c2 = _sum_parts(p_sums, row, m_row, parts, rows, BLOCK_M)
    b_mean = tl.load(p_mean + row, mask=m_row, other=0.0)
    b_c1 *= tl.load(p_rstd + row, mask=m_row, other=0.0) / inputs
    return b_mean, b_c1, b_c2 / inputs


@triton.jit
def _begin(
    column, m_column, first, g, ends, row, m_row, b_terms, inputs, NORM: tl.constexpr, SHRINK: tl.constexpr,
    RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What is added to the product: read before it, so that nothing waits for it afterwards."""
    m_dx = _mask(m_row, m_column, WHOLE)
    p_tile = (tl.arange(0, row.shape[0]) * inputs)[:, None] + column[None, :]  # from the tile's first row: 32 bits
    p_tile = first + p_tile
    b_dx = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    b_dx, _ = _add_terms(b_dx, p_tile, m_dx, column, m_column, row, g, ends, b_terms, NORM, SHRINK, RESIDUAL, WHOLE)
    return b_dx


@triton.jit
def _add_terms(
    b_dx, p_tile, m_dx, column, m_column, row, g, ends, b_terms, NORM: tl.constexpr, SHRINK: tl.constexpr,
    RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """b_dx plus γ∘g, LayerNorm's two row terms and the residual, of a tile whose entries are `p_tile` from ends' pointers; and
    the tile of x, if NORM."""
    p_g, stride_gm, stride_gk = g
    _, _, p_x, p_gamma, p_residual, _, _ = ends
    b_mean, b_c1, b_c2 = b_terms
    b_x = b_dx
    if SHRINK:
        p_block = p_g + row[:, None] * stride_gm + column[None, :] * stride_gk
        b_g = tl.load(p_block, mask=m_dx, other=0.0).to(tl.float32)  # [M, N]
        if NORM:
            b_g *= _load_columns(p_gamma, column, m_column, WHOLE)[None, :]
        b_dx += b_g
    if NORM:
        b_x = tl.load(p_x + p_tile, mask=m_dx, other=0.0).to(tl.float32)
        b_dx -= b_c2[:, None] + (b_x - b_mean[:, None]) * b_c1[:, None]
    if RESIDUAL:
        b_dx += tl.load(p_residual + p_tile, mask=m_dx, other=0.0).to(tl.float32)
    return b_dx, b_x


@triton.jit
def _finish(
    b_dx, block_n, g, ends, per_row, inputs, zero, before, NORM: tl.constexpr, SHRINK: tl.constexpr, RESIDUAL: tl.constexpr,
    RECTIFIED: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What follows the product, on block `block_n` of columns, in PARTS one after the other; returns, if RECTIFIED, the row
    sums of what was stored.

    Nothing is read for it until `before`, row sums of another block, are finished: the assembler would keep those of all
    blocks unfinished to the end, in 16 registers a block.
    """
    if PARTS > 1:
        b_left, b_right = _halves(b_dx)
        left = _finish(
            b_left, block_n * 2, g, ends, per_row, inputs, zero, before, NORM, SHRINK, RESIDUAL,
            RECTIFIED=RECTIFIED, MASKED=MASKED, WHOLE=WHOLE, SPAN=SPAN, PARTS=PARTS // 2,
        )  # fmt: skip
        right = _finish(
            b_right, block_n * 2 + 1, g, ends, per_row, inputs, zero, left, NORM, SHRINK, RESIDUAL,
            RECTIFIED=RECTIFIED, MASKED=MASKED, WHOLE=WHOLE, SPAN=SPAN, PARTS=PARTS // 2,
        )  # fmt: skip
        return left[0] + right[0], left[1] + right[1]
    p_dx, p_totals, _, _, _, p_gain, p_offset = ends
    row, m_row, height, b_mean, b_c1, b_c2, b_scale = per_row
    b_terms = b_mean, b_c1, b_c2
    BLOCK_M: tl.constexpr = b_dx.shape[0]
    BLOCK_N: tl.constexpr = b_dx.shape[1]
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = column < inputs
    if BLOCK_N <= SPAN and not WHOLE:  # all of these columns are there, or none
        there = tl.where(block_n * BLOCK_N < inputs, height, 0)
        m_dx = (tl.arange(0, BLOCK_M) < there)[:, None]
    else:
        m_dx = _mask(m_row, m_column, WHOLE)
    b_0 = tl.multiple_of((before[0] + before[1]).to(tl.int32, bitcast=True) & zero, 16)
    p_tile = (tl.arange(0, BLOCK_M) * inputs + b_0)[:, None] + column[None, :]  # from the tile's first row: 32 bits
    b_dx, b_x = _add_terms(b_dx, p_tile, m_dx, column, m_column, row, g, ends, b_terms, NORM, SHRINK, RESIDUAL, WHOLE)
    if MASKED:
        b_dx = tl.where(b_x <= 0.0, 0.0, b_dx)  # keeps the gradient where x is NaN
    if p_totals is not None:
        tl.store(p_totals + column, tl.sum(b_dx, 0), mask=m_column)
    if RECTIFIED:
        b_dx *= b_scale[:, None]
    b_dx = b_dx.to(p_dx.dtype.element_ty)
    tl.store(p_dx + p_tile, b_dx, mask=m_dx)
    b_sum1 = b_c1
    b_sum2 = b_c1
    if RECTIFIED:
        b_dx = b_dx.to(tl.float32)  # sums of what was stored, since that is what the products are made of
        b_sum1 = tl.sum(b_dx * (b_x - _load_columns(p_offset, column, m_column, WHOLE)[None, :]), 1)
        b_sum2 = tl.sum(b_dx * _load_columns(p_gain, column, m_column, WHOLE)[None, :], 1)
    return b_sum1, b_sum2


@triton.jit
def _finish_attention(
    b_do, block_n, ends, per_row, p_parts, sizes, images, HEAD_WIDTH: tl.constexpr, PIECES: tl.constexpr, PADDING: tl.constexpr
):
    """Stores block `block_n` of columns of the gradient of the attention's result o, and δ of what was stored."""
    rows, inputs, _ = sizes
    p_do, _, p_o, _, _, _, _ = ends
    row, m_row, _, _, _, _, _ = per_row
    column = block_n * b_do.shape[1] + tl.arange(0, b_do.shape[1])
    m_do = m_row[:, None] & (column < inputs)[None, :]
    p_tile = tl.arange(0, b_do.shape[0])[:, None] * inputs + column[None, :]  # from the tile's first row: 32 bits
    b_o = tl.load(p_o + p_tile, mask=m_do, other=0.0).to(tl.float32)
    b_do = b_do.to(p_do.dtype.element_ty)
    tl.store(p_do + p_tile, b_do, mask=m_do)
    b_product = b_do.to(tl.float32) * b_o
    store_head_sums(p_parts, b_product, block_n, row, m_row, rows, inputs, images, HEAD_WIDTH, PIECES, PADDING=PADDING)


@triton.jit
def _sum_parts(p_sums, row, m_row, parts, rows, BLOCK_M: tl.constexpr):
    """(c₁, c₂) of the rows."""
    b_c1 = tl.zeros([BLOCK_M], tl.float32)
    b_c2 = tl.zeros([BLOCK_M], tl.float32)
    p_c1 = p_sums + row
    p_c2 = p_c1 + tl.cast(parts, tl.int64) * rows
    for _ in range(0, parts):
        b_c1 += tl.load(p_c1, mask=m_row, other=0.0)
        b_c2 += tl.load(p_c2, mask=m_row, other=0.0)
        p_c1 += rows
        p_c2 += rows
    return b_c1, b_c2


def data_gradient(g: Tensor, weight: Tensor, out: torch.dtype, *, shrink: bool = False) -> Tensor:
    """Gradient of `linear` to its x, (rows, out) to (rows, in); with `shrink`, of the ISTA step, g being masked."""
    dx = g.new_empty(g.shape[0], weight.shape[0], dtype=out)
    _launch_data_gradient(_config(unmixed("ista_gradient", g, weight), weight), g, weight, dx, shrink=shrink)
    return dx


def attention_gradient(g: Tensor, weight: Tensor, o: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(do, δ) where g, (rows, out), is the gradient of o W: do like o, which is (batch, tokens, heads × width) contiguous.

    δ = scale · Σ do·o of every head for `mssa_backward`: (heads, pieces, batch, padded tokens) float32, 0 past the last token.
    """
    do, (batch, tokens, width) = torch.empty_like(o), o.shape
    config = _config(unmixed("out_gradient", g, weight), weight)
    pieces = _pieces(width // heads, config.block_n)
    delta = o.new_empty(heads, pieces, batch, padded_tokens(tokens), dtype=torch.float32)
    rows = o.view(-1, width), do.view(-1, width)
    _launch_data_gradient(config, g, weight, rows[1], x=rows[0], parts=delta, head_width=width // heads, images=(tokens, scale))
    return do, delta


class Gradient(NamedTuple):
    """What a layer hands to what stands below its data gradient."""

    dx: Tensor  # (rows, in)
    totals: Tensor  # (1, row blocks, in) float32: parts of its column sums
    sums: Tensor | None  # (2, column blocks, rows) float32: parts of c₁ and c₂ of the ISTA step that wrote x


def norm_data_gradient(
    g: Tensor,
    sums: Tensor,
    x: Tensor,
    folded: Folded,
    gamma: Tensor | None,
    statistics: Statistics,
    residual: Tensor | None = None,
    rectified: Rectified | None = None,
    masked: bool = True,
) -> Gradient:
    """Gradient of `norm_linear` to its x, through the LayerNorm, plus `residual`; in x's dtype. `gamma`: of an ISTA step.

    g is 1/deviation of x's rows times the gradient, masked where the result was rectified, and `sums` (2, parts, rows) are
    parts of its c₁ and c₂. Where x itself is the result of an ISTA step, `rectified`, dx is made the same way for that step;
    with masked=False, of a product behind a LayerNorm that rectifies nothing.
    """
    name = "project_gradient" if gamma is None else unmixed("ista_gradient", g, folded.matrix, "mixed_ista_gradient")
    config, (rows, dim) = _config(name, folded.matrix), x.shape
    gradient = Gradient(
        torch.empty_like(x),
        sums.new_empty(1, shapes.blocks(rows, config.block_m), dim),
        None if rectified is None else sums.new_empty(2, shapes.blocks(dim, config.block_n), rows),
    )
    _launch_data_gradient(
        config, g, folded.matrix, gradient.dx, shrink=gamma is not None, x=x, gamma=gamma, statistics=statistics, sums=sums,
        residual=residual, rectified=rectified, masked=masked, parts=gradient.sums, totals=gradient.totals,
    )  # fmt: skip
    return gradient


def column_blocks(weight: Tensor) -> int:
    """In how many blocks of columns the data gradient of a product with `weight` (in, out) is made."""
    return shapes.blocks(weight.shape[0], _config("project_gradient", weight).block_n)


def row_blocks(weight: Tensor, rows: int) -> int:
    """In how many blocks of rows the data gradient of a product with `weight` (in, out) is made."""
    return shapes.blocks(rows, _config("project_gradient", weight).block_m)


def _config(name: str, weight: Tensor) -> Config:
    return shapes.matrix(name, weight.dtype, *weight.shape, weight.device)


def _pieces(head_width: int, block: int) -> int:
    """In how many blocks of columns a head can lie, wherever it starts."""
    return max(1, head_width // block) if head_width % block == 0 or block % head_width == 0 else (head_width - 2) // block + 2


def _launch_data_gradient(
    config, g, weight, dx, *, shrink=False, x=None, gamma=None, statistics=None, sums=None, residual=None, rectified=None,
    masked=True, parts=None, totals=None, head_width=0, images=(1, 1.0),
) -> None:  # fmt: skip
    rows, (inputs, outputs) = g.shape[0], weight.shape
    programs = shapes.blocks(rows, config.block_m) * shapes.blocks(inputs, config.block_n)
    norm = (None, None, None, 0) if sums is None else (*(statistics or (None, None)), sums, sums.shape[1])
    launch(
        _data_gradient_kernel, programs, (g, *g.stride()), (weight, *weight.stride()), (dx, totals, x, gamma, residual), norm,
        rectified or (None, None, None), parts, (rows, inputs, outputs), images, 0, NORM=sums is not None, SHRINK=shrink,
        RESIDUAL=residual is not None, RECTIFIED=rectified is not None, MASKED=masked and rectified is not None,
        HEAD_WIDTH=head_width,
        PIECES=parts.shape[1] if head_width else 1, PADDING=parts.shape[3] - images[0] if head_width else 0,
        WHOLE=inputs % config.block_n == 0, SPAN=min(inputs & -inputs, config.block_n),
        PRECISION=product_precision(weight.dtype), GROUP_M=GROUP,
        **shapes.constants(config),
    )  # fmt: skip
