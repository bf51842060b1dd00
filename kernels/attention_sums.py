# A kernel is read by Triton: its ranges can be looped over.
# pyright: reportGeneralTypeIssues=false
"""The sums around tied attention's backward: δ before it, by a kernel of its own or (`store_head_sums`) in the epilogue of the
product that makes do, and after it the row and column sums of dw that the projection's gradients want."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .attention import padded_tokens
from .linear import Folded
from .runtime import launch

SUM_ROWS, SUM_COLUMNS, SUM_PARTS = 16, 128, 256


def gradient_sums(dw: Tensor, w: Tensor, folded: Folded, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums, totals) of `mssa_backward`, from what it took and the dw that it made."""
    batch, tokens, width = w.shape
    rows, columns = batch * tokens, shapes.blocks(width, SUM_COLUMNS)
    chunk = shapes.blocks(shapes.blocks(rows, SUM_PARTS), SUM_ROWS) * SUM_ROWS
    parts = shapes.blocks(rows, chunk)
    sums = w.new_empty(2, columns, rows, dtype=torch.float32)
    totals = w.new_empty(1, parts, width, dtype=torch.float32)
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
    padded = padded_tokens(tokens)
    block = 32 if o.element_size() == 2 else 16  # 32 rows of float32: triton 3.6 spills 16 bytes on sm_100
    delta = o.new_empty(heads, 1, batch, padded, dtype=torch.float32)
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


@triton.jit
def store_head_sums(
    p_parts, b_product, block_n, row, m_row, rows, inputs, images, HEAD_WIDTH: tl.constexpr, PIECES: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """scale times the row sums over every head that this block of columns touches, and zeros after an image's last token. A
    head over several blocks is written in pieces, and the block with its last column writes zeros for those that it lacks."""
    BLOCK_N: tl.constexpr = b_product.shape[1]
    tokens, scale = images
    image = row // tokens
    plane = tl.cast(rows // tokens, tl.int64) * (tokens + PADDING)
    p_number = p_parts + row + image * PADDING
    m_last = row - image * tokens == tokens - 1
    start = block_n * BLOCK_N
    head_of_column = (start + tl.arange(0, BLOCK_N)) // HEAD_WIDTH
    HEADS: tl.constexpr = BLOCK_N // HEAD_WIDTH if BLOCK_N % HEAD_WIDTH == 0 else (BLOCK_N - 2) // HEAD_WIDTH + 2
    for index in tl.static_range(0, HEADS):
        head = start // HEAD_WIDTH + index
        first = head * HEAD_WIDTH
        piece = block_n - first // BLOCK_N
        m_head = m_row & (first < inputs) & (first < start + BLOCK_N)
        p_piece = p_number + (head * PIECES + piece).to(tl.int64) * plane
        b_sum = tl.sum(tl.where((head_of_column == head)[None, :], b_product, 0.0), 1) * scale
        _store_padded(p_piece, b_sum, m_head, m_last, PADDING)
        ends = first + HEAD_WIDTH <= start + BLOCK_N
        for missing in tl.static_range(1, PIECES):
            _store_padded(
                p_piece + missing * plane, tl.zeros_like(b_sum), m_head & ends & (piece + missing < PIECES), m_last, PADDING
            )


@triton.jit
def _store_padded(p_piece, b_sum, m_head, m_last, PADDING: tl.constexpr):
    """Row sums, and zeros behind those of an image's last token."""
    tl.store(p_piece, b_sum, mask=m_head)
    for past in tl.static_range(1, PADDING + 1):
        tl.store(p_piece + past, 0.0, mask=m_head & m_last)
