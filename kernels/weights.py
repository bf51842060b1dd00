# A kernel is read by Triton: there a plain value is a constant, its ranges can be looped over, constants decide what is bound.
# pyright: reportArgumentType=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportReturnType=false, reportOptionalMemberAccess=false
"""What a step does to the weights alone, whatever the number of tokens: one launch for all layers before the forward pass,
one a layer in the backward pass.

Before, LayerNorm's γ and β are folded in: for LN(x) W [+ LN(x), the ISTA step's own residual] the products take

    F = diag(γ) W,    v = colsum F [+ γ],    u = β W [+ β − ηλ]

with F rounded to the operands' dtype and v summed over the rounded F, so that its rounding cancels (linear.py).

After, a weight's gradient is taken out of G = x̂ᵀ g and t = Σ g, multiplied by one power of two:

    dW = γ ∘ G + β ⊗ t,    dγ = rowsum(G ∘ W) [+ diag G],    dβ = W t [+ t]

t comes in parts, and so does P, which is G but for the mean of its rows (weight_gradients.py).

Names: `p_` pointers, `b_` blocks in registers, `m_` masks. K rows of a weight, N columns, S splits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.operators import operator

from .runtime import launch
from .shapes import blocks
from .weight_gradients import Parts

BLOCK = 64


@triton.jit
def _prepare_kernel(
    weights,  # the tensors that `prepare_weights` takes, in its order
    prepared,  # its results
    dim,
    inner,
    shrinkage,
    BLOCK: tl.constexpr,
):
    p_project, p_gamma1, p_beta1, p_out, p_matrix, p_gamma2, p_beta2 = weights
    p_project_matrix, p_project_gain, p_project_offset, p_out_matrix, p_ista_matrix, p_ista_gain, p_ista_offset = prepared
    projects = tl.cdiv(inner, BLOCK)
    steps = tl.cdiv(dim, BLOCK)
    layer = (tl.program_id(0) // (projects + 2 * steps)).to(tl.int64)
    block = tl.program_id(0) % (projects + 2 * steps)
    weight = layer * inner * dim
    if block < projects:
        _fold_columns(
            (p_project + weight, p_gamma1 + layer * dim, p_beta1 + layer * dim),
            (p_project_matrix + weight, p_project_gain + layer * inner, p_project_offset + layer * inner),
            (dim, inner, 1, dim), block, 0.0, False, BLOCK,
        )  # fmt: skip
    elif block < projects + steps:
        _fold_columns(
            (p_matrix + layer * dim * dim, p_gamma2 + layer * dim, p_beta2 + layer * dim),
            (p_ista_matrix + layer * dim * dim, p_ista_gain + layer * dim, p_ista_offset + layer * dim),
            (dim, dim, dim, 1), block - projects, shrinkage, True, BLOCK,
        )  # fmt: skip
    else:
        _round_rows(p_out + weight, p_out_matrix + weight, block - projects - steps, dim, inner, BLOCK)


@triton.jit
def _fold_columns(weights, folded, layout, block, shrinkage, SHRINK: tl.constexpr, BLOCK: tl.constexpr):
    """F, v and u, `folded`, of one block of columns of a weight, γ and β; layout: inputs, outputs and their strides."""
    p_weight, p_gamma, p_beta = weights
    p_matrix, p_gain, p_offset = folded
    inputs, outputs, stride_k, stride_n = layout
    column = block * BLOCK + tl.arange(0, BLOCK)
    m_column = column < outputs
    b_gain = tl.zeros([BLOCK], tl.float32)
    b_offset = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        m_k = k < inputs
        m_w = m_k[:, None] & m_column[None, :]
        tile = k[:, None] * stride_k + column[None, :] * stride_n
        b_w = tl.load(p_weight + tile, mask=m_w, other=0.0).to(tl.float32)  # [K, N]
        b_gamma = tl.load(p_gamma + k, mask=m_k, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + k, mask=m_k, other=0.0).to(tl.float32)
        b_folded = (b_gamma[:, None] * b_w).to(p_matrix.dtype.element_ty)
        tl.store(p_matrix + tile, b_folded, mask=m_w)
        b_gain += tl.sum(b_folded.to(tl.float32), 0)  # of the rounded values: their rounding then cancels
        b_offset += tl.sum(b_beta[:, None] * b_w, 0)
    if SHRINK:
        b_gain += tl.load(p_gamma + column, mask=m_column, other=0.0).to(tl.float32)
        b_offset += tl.load(p_beta + column, mask=m_column, other=0.0).to(tl.float32) - shrinkage
    tl.store(p_gain + column, b_gain, mask=m_column)
    tl.store(p_offset + column, b_offset, mask=m_column)


@triton.jit
def _round_rows(p_weight, p_matrix, block, inputs, outputs, BLOCK: tl.constexpr):
    """A block of rows in the operands' dtype."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, outputs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tile = row[:, None] * outputs + column[None, :]
        m_tile = (row < inputs)[:, None] & (column < outputs)[None, :]
        tl.store(p_matrix + tile, tl.load(p_weight + tile, mask=m_tile).to(p_matrix.dtype.element_ty), mask=m_tile)


def _prepared_shapes(project, gamma1, beta1, out, matrix, gamma2, beta2, operand, shrinkage):
    vectors = [(len(w), w.shape[1]) for w in (project, out)]
    gains = [torch.empty(shape, dtype=torch.float32, device=out.device) for shape in vectors for _ in range(2)]
    matrices = [torch.empty_like(w, dtype=operand) for w in (project, out, matrix)]
    return matrices[0], *gains[:2], *matrices[1:], *gains[2:]


@operator(fake=_prepared_shapes)
def prepare_weights(
    project: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    out: Tensor,
    matrix: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    operand: torch.dtype,
    shrinkage: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`PreparedWeights` of all layers, each with the layers in front, in one launch.

    project: (layers, inner, dim); gamma1, beta1, gamma2, beta2: (layers, dim); out: (layers, dim, inner); matrix: M,
    (layers, dim, dim) float32; all contiguous. shrinkage: ηλ.
    """
    results = _prepared_shapes(project, gamma1, beta1, out, matrix, gamma2, beta2, operand, shrinkage)
    layers, inner, dim = project.shape
    block = BLOCK if dim % 16 == inner % 16 == 0 else BLOCK // 2  # an address for each element: of 64 × 64 they spill
    programs = layers * (blocks(inner, block) + 2 * blocks(dim, block))
    weights = (project, gamma1, beta1, out, matrix, gamma2, beta2)
    launch(_prepare_kernel, programs, weights, results, dim, inner, shrinkage, BLOCK=block, num_warps=4, num_stages=2)
    return results


@triton.jit
def _finish_kernel(
    p_scale,  # (): the factor on everything in parts
    project,  # a NormProduct's tensors, see `_norm_arguments`; None: not wanted
    ista,  # the same
    out,  # a product's without a norm, see `_plain_arguments`
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    unscale = 1.0 / tl.load(p_scale)
    block = tl.program_id(0)
    if project is not None:
        if block < tl.cdiv(project[0], BLOCK_K):
            _finish_norm_product(project, block, unscale, False, BLOCK_K, BLOCK_N, BLOCK_S)
        block -= tl.cdiv(project[0], BLOCK_K)
    if ista is not None:
        if (block >= 0) & (block < tl.cdiv(ista[0], BLOCK_K)):
            _finish_norm_product(ista, block, unscale, True, BLOCK_K, BLOCK_N, BLOCK_S)
        block -= tl.cdiv(ista[0], BLOCK_K)
    if out is not None and block >= 0:
        _finish_product(out, block, unscale, BLOCK_K, BLOCK_N, BLOCK_S)


@triton.jit
def _finish_norm_product(
    arguments, block, unscale, IDENTITY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """BLOCK_K rows of a weight's gradient. IDENTITY: the product's own input is added to it, the ISTA step."""
    rows, columns, splits, sums, stride_wk, stride_wn, stride_dk, stride_dn = arguments[:8]
    p_product, p_total, p_sums, p_weight, p_gamma, p_beta, p_dgamma, p_dbeta, p_dweight = arguments[8:]
    ROWS: tl.constexpr = BLOCK_S * BLOCK_K  # of a part that is a row: as much in flight as of a tile
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = k < rows
    k = k.to(tl.int64)
    b_gamma = tl.load(p_gamma + k, mask=m_k, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + k, mask=m_k, other=0.0).to(tl.float32)
    b_dgamma = tl.zeros([BLOCK_K], tl.float32)
    b_dbeta = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        m_n = n < columns
        m_tile = m_k[:, None] & m_n[None, :]
        b_g = _sum_splits(p_product + k[:, None] * columns + n[None, :], m_tile, rows * columns, splits, BLOCK_S) * unscale
        b_t = _sum_splits((p_total + n)[None, :], m_n[None, :], columns, splits, ROWS) * unscale  # [1, N]
        b_g -= _sum_splits((p_sums + n)[None, :], m_n[None, :], columns, sums, ROWS) * unscale / rows
        b_w = tl.load(p_weight + k[:, None] * stride_wk + n[None, :] * stride_wn, mask=m_tile, other=0.0).to(tl.float32)
        if IDENTITY:
            b_w += tl.where(k[:, None] == n[None, :], 1.0, 0.0)
        b_dgamma += tl.sum(b_g * b_w, 1)
        b_dbeta += tl.sum(b_t * b_w, 1)
        b_g = b_gamma[:, None] * b_g + b_beta[:, None] * b_t
        tl.store(p_dweight + k[:, None] * stride_dk + n[None, :] * stride_dn, b_g, mask=m_tile)
    tl.store(p_dgamma + k, b_dgamma, mask=m_k)
    tl.store(p_dbeta + k, b_dbeta, mask=m_k)


@triton.jit
def _finish_product(arguments, block, unscale, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """BLOCK_K rows of the gradient of a weight (out, in) and its bias."""
    rows, columns, splits, p_product, p_total, p_dweight, p_dbias = arguments
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = k < rows
    k = k.to(tl.int64)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        m_tile = m_k[:, None] & (n < columns)[None, :]
        tile = k[:, None] * columns + n[None, :]
        b_g = _sum_splits(p_product + tile, m_tile, rows * columns, splits, BLOCK_S) * unscale
        tl.store(p_dweight + tile, b_g, mask=m_tile)
    b_t = _sum_splits((p_total + k)[:, None], m_k[:, None], rows, splits, BLOCK_S)
    tl.store(p_dbias + k, tl.sum(b_t, 1) * unscale, mask=m_k)


@triton.jit
def _sum_splits(p_tile, m_tile, stride, splits, BLOCK_S: tl.constexpr):
    """Sum of a tile over the splits, BLOCK_S of them in flight at a time, always in the same order."""
    b_sum = tl.zeros([BLOCK_S, p_tile.shape[0], p_tile.shape[1]], tl.float32)  # warps share a sum: once, not every turn
    for start in range(0, splits, BLOCK_S):
        split = (start + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None, None]
        b_sum += tl.load(p_tile[None, :, :] + split * stride, mask=(split < splits) & m_tile[None, :, :], other=0.0)
    return tl.sum(b_sum, 0)


class NormProduct(NamedTuple):
    """LN(x) W, whose gradients are wanted."""

    parts: Parts  # of x̂ᵀ g, but for the mean of its rows
    weight: Tensor  # (in, out), any strides
    gamma: Tensor  # (in,)
    beta: Tensor  # (in,)


def finish_layer(scale: Tensor, project: NormProduct | None, out: Parts | None, ista: NormProduct | None) -> list[Tensor]:
    """The gradients of LN(x) W (dγ, dβ, dWᵀ), x Wᵀ + b (dW, db) and LN(x) (1 + W) (dγ, dβ, dW), float32; one launch.

    Parts are `scale` times too large. dW has the strides of W. Empty tensors for a product that is None.
    """
    results = [*_norm_results(project, scale), *_plain_results(out, scale), *_norm_results(ista, scale)]
    rows = [n for n in (results[0].shape[0], results[4].shape[0], results[5].shape[0]) if n]  # a product's, of its vectors
    if rows:
        # Few rows a program where there are many, and 16 KB a program in flight at width 384. Without a limit of registers
        # some of these shapes take 56 and spill 8 or 16 bytes, on sm_100, and on sm_80 under triton 3.6.
        block_k, block_n = (4, 128) if min(rows) >= 256 else (8, 32)
        programs = sum([blocks(n, block_k) for n in rows])
        launch(
            _finish_kernel, programs, scale, _norm_arguments(project, results[:3]), _norm_arguments(ista, results[5:]),
            _plain_arguments(out, results[3:5]), BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_S=8, num_warps=4, num_stages=1,
            maxnreg=128,
        )  # fmt: skip
    if project is not None:
        results[2] = results[2].t()
    return results


def _norm_results(product: NormProduct | None, like: Tensor) -> list[Tensor]:
    if product is None:
        return [like.new_empty(0), like.new_empty(0), like.new_empty(0)]
    rows = product.weight.shape[0]
    return [like.new_empty(rows), like.new_empty(rows), torch.empty_like(product.weight, dtype=torch.float32)]


def _plain_results(parts: Parts | None, like: Tensor) -> list[Tensor]:
    shapes = (parts.product.shape[1:], parts.total.shape[1]) if parts else (0, 0)
    return [like.new_empty(shapes[0]), like.new_empty(shapes[1])]


def _norm_arguments(product: NormProduct | None, results: list[Tensor]) -> tuple | None:
    if product is None:
        return None
    splits, rows, columns = product.parts.product.shape
    sums = splits * product.parts.sums.shape[1]
    strides = (*product.weight.stride(), *results[2].stride())
    (matrix, total, parts), (_, *weights) = product.parts, product
    return rows, columns, splits, sums, *strides, matrix, total, parts, *weights, *results


def _plain_arguments(parts: Parts | None, results: list[Tensor]) -> tuple | None:
    if parts is None:
        return None
    splits, rows, columns = parts.product.shape
    return rows, columns, splits, parts.product, parts.total, *results
