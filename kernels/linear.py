# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportCallIssue=false
"""Matrix products over tokens, with LayerNorm in front and everything elementwise behind, and their gradients.

A layer's three products are one kernel with different ends. With x̂ = (x − μ)/σ of a row and F = diag(γ) W rounded to the
operands' dtype, LayerNorm(x) W = x̂ F + β W = rs·(x F − μ·colsum F) + β W, rs = 1/σ. Then

    project     LN(x) W                    gain v = colsum F,       offset u = β W
    ista        relu(h + h M − ηλ), h = LN(z):
                relu(γ x̂ + x̂ F + u)        gain v = γ + colsum F,   offset u = β + β M − ηλ
    project out o W + b + x                                         offset u = b

The overcomplete step's products (odl.py) have the same ends: what is added, an offset, a relu, and relu's mask in backward.

NORM "folded" multiplies the raw x and mends the result with v. It is exact where the operand is the stored x itself: the
rounding of F cancels, because v sums the rounded F. Where x would be rounded for the product (a float32 stream) or the
product rounds by itself (tf32), NORM "first" normalises on the way in.

Who writes a row leaves its moments, mean and sum of squared deviations, in parts, one a block of columns: (2, parts, rows)
float32, two-pass within a block, of the values as stored. Readers combine them by Chan's formula, so a mean 50 times the
deviation costs nothing beyond what the stream itself rounds (x in 16 bit is rounded with its mean).

Backward needs no full-width row of dx: with g the gradient of the result (masked where relu was zero) and s the result,
LayerNorm's two row sums are c₂ = Σ g·v and c₁ = Σ g·(s − u), and dx = rs·(g Fᵀ [+ γ g] − (c₂ + x̂ c₁)/d).

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. M tokens, N columns of the result, K columns of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .runtime import launch, product_precision

GROUP = 8  # row blocks whose programs run together, so that they share the weight's blocks in L2


class Folded(NamedTuple):
    """A weight with the LayerNorm in front of it folded in. `matrix` (in, out) may be a transposed view."""

    matrix: Tensor  # (in, out), operand dtype: diag(γ) W
    gain: Tensor  # (out,), float32: v
    offset: Tensor  # (out,), float32: u


class Statistics(NamedTuple):
    """Mean and 1/deviation of every token, float32."""

    mean: Tensor
    rstd: Tensor


@triton.jit
def _swizzle(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row block, column block) of this program, in groups of GROUP_M row blocks."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _merge(count, b_mean, b_square, more, b_more_mean, b_more_square):
    """(mean, Σ (x − mean)²) of `count` and of `more` columns together, by Chan's formula; count + more is not 0."""
    b_shift = b_more_mean - b_mean
    share = more * 1.0 / (count + more)
    return b_mean + b_shift * share, b_square + b_more_square + b_shift * b_shift * (count * share)


@triton.jit
def _statistics(p_moments, row, m_row, rows, size, parts, span, eps):
    """(mean, 1/sqrt(variance + eps)) of rows of `size` columns whose moments come in parts of `span`."""
    b_mean = tl.load(p_moments + row, mask=m_row, other=0.0)
    p_square = p_moments + tl.cast(parts, tl.int64) * rows
    b_square = tl.load(p_square + row, mask=m_row, other=0.0)
    for part in range(1, parts):
        p_moments += rows
        p_square += rows
        b_more_mean = tl.load(p_moments + row, mask=m_row, other=0.0)
        b_more_square = tl.load(p_square + row, mask=m_row, other=0.0)
        seen = part * span
        b_mean, b_square = _merge(seen, b_mean, b_square, tl.minimum(size - seen, span), b_more_mean, b_more_square)
    return b_mean, 1.0 / tl.sqrt(b_square / size + eps)


@triton.jit
def _linear_kernel(
    x,  # (rows, inputs), and its strides, any
    weight,  # (inputs, outputs), and its strides, any
    ends,  # the result, (rows, outputs); OFFSET: (outputs,); NORM "folded": gain, (outputs,); SHRINK after a LayerNorm: gamma,
    # (inputs,); RESIDUAL, MASKED: (rows, outputs); all contiguous
    norm,  # NORM: x's moments, (2, parts, rows) float32, parts, columns of each; written: mean and 1/deviation, (rows,)
    p_parts,  # (2, column blocks, rows) float32, written: moments of the result; None: not wanted
    sizes,  # rows, inputs, outputs
    eps,
    NORM: tl.constexpr,  # "none", "first", "folded"
    SHRINK: tl.constexpr,  # add the (normalised) input itself, then rectify: the ISTA step
    OFFSET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RECTIFY: tl.constexpr,  # relu of all that
    MASKED: tl.constexpr,  # all that, where a given relu's result is not 0: the gradient of what went in there
    WHOLE: tl.constexpr,  # the columns are whole blocks
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows, inputs, outputs = sizes
    p_x, stride_xm, stride_xk = x
    p_weight, stride_wk, stride_wn = weight
    p_moments, parts, span, p_mean, p_rstd = norm
    block_m, block_n = _swizzle(rows, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = row < rows
    m_column = column < outputs
    row = row.to(tl.int64)
    p_rows = p_x + row * stride_xm
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    b_rstd = b_mean
    if NORM == "first":
        b_mean, b_rstd = _statistics(p_moments, row, m_row, rows, inputs, parts, span, eps)
    per_row = (row, m_row, p_rows, b_mean, b_rstd)
    WIDE: tl.constexpr = BLOCK_N > 128  # finished whole, triton 3.6 serialises its products
    LARGE: tl.constexpr = (SHRINK or RESIDUAL or MASKED or WIDE) and BLOCK_M * BLOCK_N >= 128 * 128
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if LARGE:  # before the product, so that nothing is waited for, or brought into another layout of registers, behind it
        b_out = _summand(column, m_column, ends, per_row, outputs, stride_xk, NORM, SHRINK, RESIDUAL, WHOLE)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m_k = k < inputs
        b_x = tl.load(p_rows[:, None] + k[None, :] * stride_xk, mask=m_row[:, None] & m_k[None, :], other=0.0)  # [M, K]
        p_w = p_weight + k[:, None] * stride_wk + column[None, :] * stride_wn
        b_w = tl.load(p_w, mask=_mask(m_k, m_column, WHOLE), other=0.0)  # [K, N]
        if NORM == "first":
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
            b_x = tl.where(m_k[None, :], b_x, 0.0)
        b_out = tl.dot(b_x.to(b_w.dtype), b_w, b_out, input_precision=PRECISION)

    if (SHRINK or RESIDUAL) and not LARGE:
        b_out += _summand(column, m_column, ends, per_row, outputs, stride_xk, NORM, SHRINK, RESIDUAL, WHOLE)
    if NORM == "folded":
        b_mean, b_rstd = _statistics(p_moments, row, m_row, rows, inputs, parts, span, eps)
    if NORM != "none" and block_n == 0:
        tl.store(p_mean + row, b_mean, mask=m_row)
        tl.store(p_rstd + row, b_rstd, mask=m_row)
    MOMENTS: tl.constexpr = p_parts is not None
    per_row = (row, m_row, p_rows, b_mean, b_rstd)
    IN_PIECES: tl.constexpr = LARGE or (MOMENTS and BLOCK_M * BLOCK_N >= 128 * 128)
    pieces = _pieces(b_out, 4 if IN_PIECES else 1)
    WIDTH: tl.constexpr = pieces[0].shape[1]
    COUNT: tl.constexpr = BLOCK_N // WIDTH
    left = outputs - block_n * BLOCK_N
    b_square = b_mean
    for piece in tl.static_range(COUNT):
        part = _finish_linear(
            pieces[piece], block_n * COUNT + piece, ends, per_row, outputs, NORM, SHRINK or RECTIFY, OFFSET, MASKED, MOMENTS,
            WHOLE,
        )  # fmt: skip
        if MOMENTS and piece == 0:
            b_mean, b_square = part
        elif MOMENTS:
            b_mean, b_square = _merge_next(piece, left, WIDTH, b_mean, b_square, part)
    if MOMENTS:
        all_rows = tl.cast(rows, tl.int64)  # an argument that is 1 has no .to: Triton makes it a constant
        tl.store(p_parts + block_n * all_rows + row, b_mean, mask=m_row)
        tl.store(p_parts + (tl.cdiv(outputs, BLOCK_N) + block_n) * all_rows + row, b_square, mask=m_row)


@triton.jit
def _summand(
    column, m_column, ends, per_row, outputs, stride_xk, NORM: tl.constexpr, SHRINK: tl.constexpr, RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """What is added to the product: the (normalised, but for 1/deviation where it is folded) input, the residual."""
    row, m_row, p_rows, b_mean, b_rstd = per_row
    _, _, _, p_gamma, p_residual, _ = ends
    m_out = _mask(m_row, m_column, WHOLE)
    b_out = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if SHRINK:
        b_out = tl.load(p_rows[:, None] + column[None, :] * stride_xk, mask=m_out, other=0.0).to(tl.float32)
        if NORM == "first":
            b_out = (b_out - b_mean[:, None]) * b_rstd[:, None]
        if NORM != "none":
            b_out *= _load_columns(p_gamma, column, m_column, WHOLE)[None, :]
    if RESIDUAL:
        b_out += tl.load(p_residual + row[:, None] * outputs + column[None, :], mask=m_out, other=0.0).to(tl.float32)
    return b_out


@triton.jit
def _merge_next(piece, left, WIDTH: tl.constexpr, b_mean, b_square, part):
    """The moments of `piece` pieces of WIDTH columns, of which `left` are there, together with those of the next."""
    b_more_mean, b_more_square = part
    more = tl.minimum(tl.maximum(left - piece * WIDTH, 0), WIDTH)
    return _merge(tl.minimum(left, piece * WIDTH), b_mean, b_square, more, b_more_mean, b_more_square)


@triton.jit
def _pieces(b, COUNT: tl.constexpr):
    """A tile's columns in COUNT pieces, from the left. What follows a large product works on a piece at a time, so that only
    a part of its other operands is in registers."""
    if COUNT > 1:
        left, right = _halves(b)
        pieces = _pieces(left, COUNT // 2) + _pieces(right, COUNT // 2)
    else:
        pieces = (b,)
    return pieces


@triton.jit
def _halves(b):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _mask(m_row, m_column, WHOLE: tl.constexpr):
    """Of a tile, whose columns are all there if WHOLE."""
    return m_row[:, None] if WHOLE else m_row[:, None] & m_column[None, :]


@triton.jit
def _load_columns(p, column, m_column, WHOLE: tl.constexpr):
    """A float32 number a column."""
    b = tl.load(p + column) if WHOLE else tl.load(p + column, mask=m_column, other=0.0)
    return b.to(tl.float32)


@triton.jit
def _finish_linear(
    b_out, block_n, ends, per_row, outputs, NORM: tl.constexpr, RECTIFY: tl.constexpr, OFFSET: tl.constexpr,
    MASKED: tl.constexpr, MOMENTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What follows the product, on block `block_n` of columns; returns, with MOMENTS, those of its columns."""
    row, m_row, _, b_mean, b_rstd = per_row
    p_out, p_offset, p_gain, _, _, p_mask = ends
    WIDTH: tl.constexpr = b_out.shape[1]
    left = outputs - block_n * WIDTH  # columns that are there
    column = block_n * WIDTH + tl.arange(0, WIDTH)
    m_column = column < outputs
    m_out = _mask(m_row, m_column, WHOLE)
    if NORM == "folded":
        b_out = (b_out - b_mean[:, None] * _load_columns(p_gain, column, m_column, WHOLE)[None, :]) * b_rstd[:, None]
    if OFFSET:
        b_out += _load_columns(p_offset, column, m_column, WHOLE)[None, :]
    if RECTIFY:
        b_out = tl.where(b_out <= 0.0, 0.0, b_out)  # keeps NaN, which tl.maximum would swallow
    if MASKED:
        b_mask = tl.load(p_mask + row[:, None] * outputs + column[None, :], mask=m_out, other=0.0)
        b_out = tl.where(b_mask <= 0.0, 0.0, b_out)  # keeps the gradient where the result is NaN
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + row[:, None] * outputs + column[None, :], b_out, mask=m_out)
    b_block_mean = b_mean
    b_square = b_mean
    if MOMENTS:
        b_out = b_out.to(tl.float32)  # as stored; 0 in columns that are not there
        b_block_mean = tl.sum(b_out, 1) / tl.maximum(tl.minimum(left, WIDTH), 1)
        b_out -= b_block_mean[:, None]
        if not WHOLE:
            b_out = tl.where(m_column[None, :], b_out, 0.0)
        b_square = tl.sum(b_out * b_out, 1)
    return b_block_mean, b_square


def linear(
    x: Tensor,
    weight: Tensor,
    out: torch.dtype,
    *,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    shrink: bool = False,
    rectify: bool = False,
    moments: Tensor | None = None,
    name: str = "out_project",
) -> Tensor:
    """x W [+ x, if `shrink`] [+ offset] [+ residual], (rows, in) to (rows, out), without a LayerNorm; rectified if `shrink` or
    `rectify`, and zero where `mask`, the (rows, out) of a relu, is.

    Writes the result's `moments`, from `empty_moments`. name: under what tuning.py has its shape, "ista" if `shrink`.
    """
    result = x.new_empty(x.shape[0], weight.shape[1], dtype=out)
    name = "ista" if shrink else name
    if moments is None:
        name = unmixed(name, x, weight)
    _launch_linear(
        name, x, weight, result, offset=offset, residual=residual, mask=mask, shrink=shrink, rectify=rectify,
        moments_out=moments,
    )  # fmt: skip
    return result


def unmixed(name: str, x: Tensor, weight: Tensor, mixed: str = "mixed_product") -> str:
    """`name` of a product, or `mixed` where the kernel rounds x to the weight's dtype as it loads it."""
    return name if x.dtype == weight.dtype else mixed


def empty_moments(name: str, weight: Tensor, rows: int) -> Tensor:
    """Room for the moments of a product `name` ("ista", "out_project") with `weight` (in, out): (2, parts, rows) float32."""
    block = shapes.matrix(name, weight.dtype, *weight.shape, weight.device).block_n
    return weight.new_empty(2, shapes.blocks(weight.shape[1], block), rows, dtype=torch.float32)


def norm_linear(
    x: Tensor,
    moments: Tensor,
    folded: Folded,
    gamma: Tensor | None,
    out: Tensor,
    eps: float,
    statistics: Statistics,
    moments_out: Tensor | None = None,
) -> None:
    """LN(x) W with the norm folded in W (weights.py) or, with `gamma` given, the ISTA step on LN(x); (rows, in) to (rows, out).

    moments: of x, as its writer left them. Writes the result to `out`, as contiguous rows whatever its shape, x's `statistics`
    and the result's `moments_out`. The normalisation is folded into the product where that is exact: the stored x is the
    16-bit operand itself.
    """
    exact = x.dtype == folded.matrix.dtype and x.dtype != torch.float32
    _launch_linear(
        "project" if gamma is None else "ista",
        x, folded.matrix, out, norm="folded" if exact else "first", offset=folded.offset, gain=folded.gain, gamma=gamma,
        shrink=gamma is not None, moments=moments, statistics=statistics, moments_out=moments_out, eps=eps,
    )  # fmt: skip


def _launch_linear(
    name, x, weight, result, *, norm="none", offset=None, gain=None, gamma=None, residual=None, mask=None, shrink=False,
    rectify=False, moments=None, statistics=None, moments_out=None, eps=0.0,
) -> None:  # fmt: skip
    (rows, inputs), outputs = x.shape, weight.shape[1]
    config = shapes.matrix(name, weight.dtype, inputs, outputs, weight.device)
    programs = shapes.blocks(rows, config.block_m) * shapes.blocks(outputs, config.block_n)
    parts, span = (0, 0) if moments is None else (moments.shape[1], shapes.part_width(inputs, moments.shape[1]))
    launch(
        _linear_kernel, programs, (x, *x.stride()), (weight, *weight.stride()), (result, offset, gain, gamma, residual, mask),
        (moments, parts, span, *(statistics or (None, None))), moments_out, (rows, inputs, outputs), eps, NORM=norm,
        SHRINK=shrink, OFFSET=offset is not None, RESIDUAL=residual is not None, RECTIFY=rectify, MASKED=mask is not None,
        WHOLE=outputs % config.block_n == 0, PRECISION=product_precision(weight.dtype), GROUP_M=GROUP,
        **shapes.constants(config),
    )  # fmt: skip
