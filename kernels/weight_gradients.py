"""Gradients of the matrix products in linear.py to their weights, in parts that weights.py sums up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes, tuning
from .linear import Statistics
from .runtime import launch, product_precision


@triton.jit
def _weight_gradient_kernel(
    p_x,  # (rows, inputs), any strides
    p_g,  # (rows, outputs), any strides
    p_mean,  # (rows,), NORM
    p_rstd,
    p_product,  # (splits, inputs, outputs) float32, any strides: x̂ᵀ g over the rows of a split
    p_total,  # (splits, outputs) float32: column sums of g
    rows,
    inputs,
    outputs,
    rows_per_split,
    stride_xm,
    stride_xk,
    stride_gm,
    stride_gk,
    stride_ps,
    stride_pi,
    stride_po,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(inputs, BLOCK_M)
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    split = pid // (blocks_m * blocks_n)
    block_m = pid % (blocks_m * blocks_n) // blocks_n
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i = i < inputs
    m_j = j < outputs
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)

    b_product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows_per_split, BLOCK_K):
        row = first + start + tl.arange(0, BLOCK_K)
        m_row = row < last
        b_x = tl.load(p_x + row[:, None] * stride_xm + i[None, :] * stride_xk, mask=m_row[:, None] & m_i[None, :], other=0.0)
        m_g = m_row[:, None] & m_j[None, :]
        b_g = tl.load(p_g + row[:, None] * stride_gm + j[None, :] * stride_gk, mask=m_g, other=0.0)  # [K, N]
        if NORM:
            b_mean = tl.load(p_mean + row, mask=m_row, other=0.0)
            b_rstd = tl.load(p_rstd + row, mask=m_row, other=0.0)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]  # [K, M]
        b_total += tl.sum(b_g.to(tl.float32), 0)
        b_product = tl.dot(tl.trans(b_x.to(OPERAND)), b_g.to(OPERAND), b_product, input_precision=PRECISION)

    p_tile = p_product + split.to(tl.int64) * stride_ps + i[:, None] * stride_pi + j[None, :] * stride_po
    tl.store(p_tile, b_product, mask=m_i[:, None] & m_j[None, :])
    if block_m == 0:
        tl.store(p_total + split * outputs + j, b_total, mask=m_j)


def weight_gradient(
    x: Tensor,
    g: Tensor,
    operand: torch.dtype,
    *,
    statistics: Statistics | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x̂ᵀ g, Σ g) in parts that sum up to them, float32: (splits, in, out), with `transposed` (splits, out, in), and
    (splits, out).

    x̂ is x, normalised on the way in when `statistics` are given. The rows are cut in splits that depend on the shape alone
    and are summed in one order (weights.py): the same bits from run to run.
    """
    (rows, inputs), outputs = x.shape, g.shape[1]
    config = shapes.matrix("weight_gradient", operand, inputs, outputs, x.device)
    tiles = shapes.blocks(inputs, config.block_m) * shapes.blocks(outputs, config.block_n)
    splits = tuning.splits(tiles, rows, config.block_k)
    rows_per_split = shapes.blocks(shapes.blocks(rows, splits), config.block_k) * config.block_k
    shape = (splits, outputs, inputs) if transposed else (splits, inputs, outputs)
    product = torch.empty(shape, dtype=torch.float32, device=x.device)
    total = torch.empty(splits, outputs, dtype=torch.float32, device=x.device)
    mean, rstd = statistics or (None, None)
    strides = product.transpose(1, 2).stride() if transposed else product.stride()
    launch(
        _weight_gradient_kernel, tiles * splits, x, g, mean, rstd, product, total, rows, inputs, outputs,
        rows_per_split, *x.stride(), *g.stride(), *strides, NORM=statistics is not None,
        OPERAND=_TRITON_DTYPE[operand], PRECISION=product_precision(operand), **shapes.constants(config),
    )  # fmt: skip
    return product, total


_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
