# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportGeneralTypeIssues=false
"""Gradients of the matrix products in linear.py to their weights, in parts that weights.py sums up.

A pure product: nothing is in the loop but loads and products. Behind a LayerNorm the writer of the result's gradient g stored
g' = rs ∘ g, and x̂ᵀ g = Σ (x − μ) g' over the rows, which is P = xᵀ g' less the mean of P over its rows, because μ is the mean
of x over the same columns. So P is made of the stored x, and weights.py takes the mean away: what x was rounded to cancels.
Where x would be rounded for the product, or its product rounds by itself, x − μ is what is multiplied, and the mean of P is
rounding alone.

Column sums of g come in parts from its writer, one a block of rows; here they are only brought together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tuning
from .linear import _mask
from .runtime import launch, product_precision


class Parts(NamedTuple):
    """A weight's gradient in parts that sum up to it, float32, one a split of the rows."""

    product: Tensor  # (splits, in, out), or (splits, out, in)
    total: Tensor | None = None  # (splits, out): column sums of g
    sums: Tensor | None = None  # (splits, blocks of inputs, out): column sums of the product


@triton.jit
def _weight_gradient_kernel(
    x,  # (rows, inputs), and its strides, any
    g,  # (rows, outputs), and its strides, any
    p_mean,  # (rows,) float32, taken from x; None: x as it is
    totals,  # (parts, outputs) float32: parts of the column sums of g, or None: not wanted; parts; parts of a split
    product,  # written, (splits, inputs, outputs) float32: xᵀ g over the rows of a split; and its strides, any
    sums,  # written, float32: (splits, outputs), sums of totals; (splits, blocks of inputs, outputs), column sums of the
    # product, or None: not wanted
    sizes,  # rows, inputs, outputs, rows of a split
    WHOLE: tl.constexpr,  # inputs and outputs are multiples of their blocks
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a power of two, or 3 times one
    BLOCK_K: tl.constexpr,
):
    p_x, stride_xm, stride_xk = x
    p_g, stride_gm, stride_gk = g
    p_totals, parts, parts_per_split = totals
    p_product, stride_ps, stride_pi, stride_po = product
    p_total, p_sums = sums
    rows, inputs, outputs, rows_per_split = sizes
    THIRD: tl.constexpr = BLOCK_N // 3 if BLOCK_N % 3 == 0 else BLOCK_N
    blocks_m = tl.cdiv(inputs, BLOCK_M)
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    split = tl.program_id(0) // (blocks_m * blocks_n)
    block_m = tl.program_id(0) % (blocks_m * blocks_n) // blocks_n
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, THIRD)
    first = split.to(tl.int64) * rows_per_split
    left = tl.minimum(rows - first, rows_per_split).to(tl.int32)

    row = tl.arange(0, BLOCK_K)
    p_tile_x = p_x + (first + row)[:, None] * stride_xm + i[None, :] * stride_xk  # [K, M]
    p_tile_g = p_g + (first + row)[:, None] * stride_gm + j[None, :] * stride_gk  # [K, THIRD]
    m_i = i < inputs
    m_j = j < outputs
    m_j1 = j + THIRD < outputs
    m_j2 = j + 2 * THIRD < outputs
    b_0 = tl.zeros([BLOCK_M, THIRD], tl.float32)
    b_1 = b_0
    b_2 = b_0
    for start in range(0, rows_per_split, BLOCK_K):
        m_row = row < left - start
        b_x = tl.load(p_tile_x, mask=_mask(m_row, m_i, WHOLE), other=0.0)
        if p_mean is not None:
            b_x = b_x.to(tl.float32) - tl.load(p_mean + first + start + row, mask=m_row, other=0.0)[:, None]
            b_x = tl.where(m_i[None, :], b_x, 0.0)
        b_x = tl.trans(b_x.to(OPERAND))
        b_g = tl.load(p_tile_g, mask=_mask(m_row, m_j, WHOLE), other=0.0)
        b_0 = tl.dot(b_x, b_g.to(OPERAND), b_0, input_precision=PRECISION)
        if THIRD < BLOCK_N:
            b_g = tl.load(p_tile_g + THIRD * stride_gk, mask=_mask(m_row, m_j1, WHOLE), other=0.0)
            b_1 = tl.dot(b_x, b_g.to(OPERAND), b_1, input_precision=PRECISION)
            b_g = tl.load(p_tile_g + 2 * THIRD * stride_gk, mask=_mask(m_row, m_j2, WHOLE), other=0.0)
            b_2 = tl.dot(b_x, b_g.to(OPERAND), b_2, input_precision=PRECISION)
        p_tile_x += BLOCK_K * stride_xm
        p_tile_g += BLOCK_K * stride_gm

    p_product += split.to(tl.int64) * stride_ps
    if p_sums is not None:
        p_sums += (split * blocks_m + block_m) * outputs
    _store_part(p_product, p_sums, b_0, i, j, inputs, outputs, stride_pi, stride_po)
    if THIRD < BLOCK_N:
        _store_part(p_product, p_sums, b_1, i, j + THIRD, inputs, outputs, stride_pi, stride_po)
        _store_part(p_product, p_sums, b_2, i, j + 2 * THIRD, inputs, outputs, stride_pi, stride_po)
    if p_totals is not None and block_m == 0:
        for third in tl.static_range(0, BLOCK_N // THIRD):
            _sum_totals(p_totals, p_total, split, j + third * THIRD, parts, parts_per_split, outputs)


@triton.jit
def _store_part(p_product, p_sums, b_product, i, j, inputs, outputs, stride_pi, stride_po):
    m_j = j < outputs
    tl.store(p_product + i[:, None] * stride_pi + j[None, :] * stride_po, b_product, mask=(i < inputs)[:, None] & m_j[None, :])
    if p_sums is not None:
        tl.store(p_sums + j, tl.sum(b_product, 0), mask=m_j)


@triton.jit
def _sum_totals(p_totals, p_total, split, j, parts, parts_per_split, outputs):
    """The sums of a split's parts, in one order."""
    part = split * parts_per_split + tl.arange(0, 16)
    last = tl.minimum((split + 1) * parts_per_split, parts)
    b_total = tl.zeros([16, j.shape[0]], tl.float32)
    for start in range(0, parts_per_split, 16):
        m_part = (part + start < last)[:, None] & (j < outputs)[None, :]
        b_total += tl.load(p_totals + (part + start).to(tl.int64)[:, None] * outputs + j[None, :], mask=m_part, other=0.0)
    tl.store(p_total + split * outputs + j, tl.sum(b_total, 0), mask=j < outputs)


def weight_gradient(
    x: Tensor,
    g: Tensor,
    operand: torch.dtype,
    *,
    mean: Tensor | None = None,
    totals: Tensor | None = None,
    transposed: bool = False,
    name: str = "weight_gradient",
) -> Parts:
    """xᵀ g, or with the mean of x's rows, behind a LayerNorm, (x − mean)ᵀ g once the mean of the product is taken away.

    g: behind a LayerNorm rs times the gradient; totals: (1, parts, out) float32, parts of the gradient's column sums.
    The rows are cut in splits that depend on the shape alone and are summed in one order (weights.py): the same bits from
    run to run. With `transposed` a part is (out, in). name: under what tuning.py has its shape.
    """
    (rows, inputs), outputs = x.shape, g.shape[1]
    name = name if x.dtype == g.dtype == operand else "mixed_gradient"  # where the kernel rounds what it loads
    config = shapes.matrix(name, operand, inputs, outputs, x.device)
    blocks_m, tiles, splits, rows_per_split = _cut(config, inputs, outputs, rows, name in tuning.ODL)
    parts = 0 if totals is None else totals.shape[1]
    new = Parts(
        x.new_empty((splits, outputs, inputs) if transposed else (splits, inputs, outputs), dtype=torch.float32),
        None if totals is None else totals.new_empty(splits, outputs),
        None if mean is None else mean.new_empty(splits, blocks_m, outputs),
    )
    centre = mean is not None and (x.dtype != operand or x.dtype == torch.float32)
    strides = (inputs * outputs, 1, inputs) if transposed else (inputs * outputs, outputs, 1)
    launch(
        _weight_gradient_kernel, tiles * splits, (x, *x.stride()), (g, *g.stride()), mean if centre else None,
        (totals, parts, shapes.blocks(parts, splits)), (new.product, *strides), (new.total, new.sums),
        (rows, inputs, outputs, rows_per_split),
        WHOLE=inputs % config.block_m == 0 and outputs % config.block_n == 0, OPERAND=_TRITON_DTYPE[operand],
        PRECISION=product_precision(operand), **shapes.constants(config),
    )  # fmt: skip
    return new


@lru_cache(maxsize=1024)  # arithmetic of 2 µs, for three products a layer
def _cut(config: tuning.Config, inputs: int, outputs: int, rows: int, even: bool) -> tuple[int, int, int, int]:
    """(blocks of inputs, tiles of the product, splits of the rows, rows of a split)."""
    blocks_m = shapes.blocks(inputs, config.block_m)
    tiles = blocks_m * shapes.blocks(outputs, config.block_n)
    splits = tuning.splits(tiles, rows, config, even)
    return blocks_m, tiles, splits, shapes.blocks(shapes.blocks(rows, splits), config.block_k) * config.block_k


_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
