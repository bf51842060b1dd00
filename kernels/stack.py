# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportOptionalIterable=false
"""What strings fused layers together: where their stack is entered and left, and what goes beside the activations.

A layer's backward pass needs more of the layer above than y's gradient. It comes as the gradients of small tensors that the
layers hand on beside them and whose values nobody reads, so it stays on the device, every backward pass has its own,
and autograd orders the uses:

- With float16 operands gradients are float16 too, multiplied by one power of two: `leave_stack` sets it from the gradient
  that enters, every layer divides it out of its weights' gradients in float32, `enter_stack` out of the gradient that leaves.
- LayerNorm's backward pass needs two row sums of the ISTA step's masked gradient, the weights' its column sums
  (gradients.py). The layer above, or `leave_stack`, has y and its gradient at hand, masks the gradient and sums it, and y is
  not read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .gradients import Rectified
from .linear import _merge
from .runtime import launch, readable
from .shapes import blocks

SCALE_EXPONENT = 4
"""The largest gradient that enters the stack is scaled to [2^3, 2^4): a factor 4,096 of room above, 10^8 below."""


class StackState(NamedTuple):
    """What fused layers hand on. Values of the second and fourth are never read; their gradients come from the layer above."""

    x: Tensor  # (batch, tokens, dim), contiguous
    gradient_scale: Tensor  # (): its gradient is the factor on all gradients
    moments: Tensor  # (2, parts, batch * tokens) float32, of x (linear.py): its gradient are the row sums of x's
    totals: Tensor | None = None  # (1, parts, dim): its gradient are the column sums of x's
    writer: Rectified | None = None  # of the ISTA step that wrote x; None where none did


class _EnterStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, activation_dtype: torch.dtype):
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)  # else the moments get a gradient of zeros
        result, moments = enter_forward(x, activation_dtype)
        return result, x.new_empty((), dtype=torch.float32), moments

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor, gradient_scale: Tensor, _):
        return (dx.float() / gradient_scale).to(ctx.dtype), None


@triton.jit
def _enter_kernel(
    p_x,  # (batch, tokens, dim), any strides
    p_out,  # (batch * tokens, dim), contiguous
    p_moments,  # (2, 1, batch * tokens) float32
    rows,
    tokens,
    dim,
    stride_b,
    stride_n,
    stride_d,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = row < rows
    p_rows = p_x + row // tokens * stride_b + row % tokens * stride_n
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    b_square = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        m_tile = m_row[:, None] & (column < dim)[None, :]
        b_x = tl.load(p_rows[:, None] + column[None, :] * stride_d, mask=m_tile, other=0.0).to(p_out.dtype.element_ty)
        tl.store(p_out + row[:, None] * dim + column[None, :], b_x, mask=m_tile)
        b_x = b_x.to(tl.float32)  # as stored
        more = tl.minimum(dim - start, BLOCK_D)
        b_block_mean = tl.sum(b_x, 1) / more
        b_x = tl.where(m_tile, b_x - b_block_mean[:, None], 0.0)
        b_mean, b_square = _merge(start, b_mean, b_square, more, b_block_mean, tl.sum(b_x * b_x, 1))
    tl.store(p_moments + row, b_mean, mask=m_row)
    tl.store(p_moments + rows + row, b_square, mask=m_row)


def _enter_shapes(x: Tensor, activation_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(x, dtype=activation_dtype, memory_format=torch.contiguous_format)
    return result, x.new_empty(2, 1, x.shape[0] * x.shape[1], dtype=torch.float32)


@operator(fake=_enter_shapes)
def enter_forward(x: Tensor, activation_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in `activation_dtype`, contiguous; its moments in one part); x: (batch, tokens, dim)."""
    x, results, block = readable(x), _enter_shapes(x, activation_dtype), 16
    batch, tokens, dim = x.shape
    launch(
        _enter_kernel, blocks(batch * tokens, block), x, *results, batch * tokens, tokens, dim, *x.stride(), BLOCK_M=block,
        BLOCK_D=128, num_warps=4, num_stages=1,
    )  # fmt: skip
    return results


@triton.jit
def _leave_kernel(
    p_dy,  # (batch, tokens, dim), any strides
    p_scale,  # ()
    writer,  # y, (batch * tokens, dim), contiguous, and of the ISTA step that wrote it, float32: its gain and offset, (dim,),
    # and the rstd of its input, (batch * tokens,)
    results,  # g like y; float32: its row sums, (2, 1, batch * tokens), and column sums, (row blocks, dim)
    layout,  # rows, tokens, dim and dy's strides
    factor,
    FIRST: tl.constexpr,  # only the first token of an image has a gradient
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p_y, p_gain, p_offset, p_rstd = writer
    p_g, p_sums, p_totals = results
    rows, tokens, dim, stride_b, stride_n, stride_d = layout
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = row < rows
    m_taken = m_row
    if FIRST:
        m_taken = m_row & (row % tokens == 0)
    p_rows = p_dy + row // tokens * stride_b + row % tokens * stride_n
    scale = tl.load(p_scale) * factor
    b_rstd = tl.load(p_rstd + row, mask=m_row, other=0.0)
    p_totals += tl.program_id(0).to(tl.int64) * dim
    b_c1 = tl.zeros([BLOCK_M], tl.float32)
    b_c2 = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        m_column = column < dim
        m_tile = m_taken[:, None] & m_column[None, :]
        p_tile = row[:, None] * dim + column[None, :]
        b_dy = tl.load(p_rows[:, None] + column[None, :] * stride_d, mask=m_tile, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_g = tl.where(b_y <= 0.0, 0.0, b_dy * scale)
        tl.store(p_totals + column, tl.sum(b_g, 0), mask=m_column)
        b_g = (b_g * b_rstd[:, None]).to(p_g.dtype.element_ty)
        tl.store(p_g + p_tile, b_g, mask=m_row[:, None] & m_column[None, :])
        b_g = b_g.to(tl.float32)
        b_c1 += tl.sum(b_g * (b_y - tl.load(p_offset + column, mask=m_column, other=0.0)[None, :]), 1)
        b_c2 += tl.sum(b_g * tl.load(p_gain + column, mask=m_column, other=0.0)[None, :], 1)
    tl.store(p_sums + row, b_c1, mask=m_row)
    tl.store(p_sums + rows + row, b_c2, mask=m_row)


LEAVE_BLOCK = 128  # rows, as many as most data gradients have, so that their placeholder fits


def _leave_shapes(dy, scale, y, gain, offset, rstd, factor, first):
    rows, dim = y.shape[0] * y.shape[1], y.shape[2]
    return torch.empty_like(y), scale.new_empty(2, 1, rows), scale.new_empty(1, blocks(rows, LEAVE_BLOCK), dim)


@operator(fake=_leave_shapes)
def leave_backward(
    dy: Tensor, scale: Tensor, y: Tensor, gain: Tensor, offset: Tensor, rstd: Tensor, factor: float, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, its row sums, its column sums): dy · scale · factor, masked where y is 0, like y; of the first token alone if
    `first`. gain, offset, rstd: `Rectified` of the step that wrote y; g is stored rstd times."""
    dy = readable(dy)
    results = _leave_shapes(dy, scale, y, gain, offset, rstd, factor, first)
    batch, tokens, dim = y.shape
    launch(
        _leave_kernel, blocks(batch * tokens, LEAVE_BLOCK), dy, scale, (y, gain, offset, rstd), results,
        (batch * tokens, tokens, dim, *dy.stride()), factor, FIRST=first, BLOCK_M=LEAVE_BLOCK, BLOCK_D=32, num_warps=8,
        num_stages=1, maxnreg=248,
    )  # fmt: skip
    return results


class _LeaveStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient_scale, moments, totals, gain, offset, rstd, out: torch.dtype, pool: str | None, scaled: bool):
        ctx.save_for_backward(x, gain, offset, rstd)
        ctx.shapes, ctx.pool, ctx.scaled = (moments.shape, totals.shape), pool, scaled
        if pool == "cls":
            return x[:, 0].to(out, copy=True)
        return x.mean(1, dtype=torch.float32).to(out) if pool == "mean" else x.to(out, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, *writer = ctx.saved_tensors
        factor = 1 / x.shape[1] if ctx.pool == "mean" else 1.0
        largest = dy.abs().amax().float() * factor
        scale = power_of_two_scale(largest) if ctx.scaled else torch.ones_like(largest)
        dy = dy if ctx.pool is None else dy[:, None].expand(x.shape)
        dx, *sums = leave_backward(dy, scale, x, *writer, factor, ctx.pool == "cls")
        return dx, scale, *map(fit_sums, sums, ctx.shapes), *[None] * 6


def fit_sums(sums: Tensor, shape: torch.Size) -> Tensor:
    """Sums in the number of parts that the layer below has put in its placeholder, the second axis: almost always their own."""
    if sums.shape == shape:
        return sums
    fitted = sums.new_zeros(shape)
    fitted[:, 0] = sums.sum(1)
    return fitted


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The power of two that brings the largest |gradient| just under 2^SCALE_EXPONENT; 1 where that is 0 or not finite."""
    _, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), (SCALE_EXPONENT - exponent).clamp(-100, 100))
    return torch.where(torch.isfinite(largest) & (largest > 0), scale, 1.0)


def enter_stack(x: Tensor, activation_dtype: torch.dtype) -> StackState:
    """What the first layer takes of x: (batch, tokens, dim), any strides."""
    return StackState(*_EnterStack.apply(x, activation_dtype))


def leave_stack(state: StackState, out: torch.dtype, pool: str | None, scaled: bool) -> Tensor:
    """All tokens in dtype `out`, or their pooling ("cls", "mean") as (batch, dim); `scaled` where operands are float16.

    state: what `fused_layer` returned.
    """
    x, gradient_scale, moments, totals, writer = state
    return _LeaveStack.apply(x, gradient_scale, moments, totals, *writer, out, pool, scaled)
