"""MSSA on a CPU: batched products of one tensor with itself, in blocks whose scores stay in the cache.

PyTorch's own attention for CPUs reads query, key and value as if they were three and keeps 16-bit numbers away from the
processor's matrix instructions. 8 images of CRATE-tiny on two cores of an EPYC with AVX-512 and bfloat16, in ms (float32 as in
benchmarks/results, 16 bit measured once):

    forward, backward      PyTorch's       here
    float32                3.0, 7.8        3.4, 7.5
    bfloat16               4.0, 10.1       1.5, 2.8
    float16                9.3, 57         3.4, 6.8
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .backend import cpu_product_dtype, is_batched, is_transformed, without_autocast
from .operators import operator

BLOCK = 2 << 20
"""Bytes of scores at a time, if an image and head have fewer. Half as much costs bfloat16 a tenth; what is much larger, the C
library gives back after each call, and taking it again costs as much as a product."""


def attend_on_cpu(w: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(w wᵀ · scale) w for each head: (batch, tokens, heads × head width) to the same, contiguous.

    Differentiable; twice, and batched by torch.func, by the reference's mathematics. For backward it keeps w alone.
    """
    if w.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(w, heads, scale)
    return _tied_attention(w, heads, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, heads: int, scale: float) -> Tensor:
        ctx.save_for_backward(w)
        ctx.heads, ctx.scale = heads, scale
        return _tied_attention(w, heads, scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (w,) = ctx.saved_tensors
        compiled = torch.compiler.is_compiling()
        again = not compiled and torch.is_grad_enabled()
        if again or is_transformed() or (not compiled and is_batched(gradient)):
            with torch.enable_grad(), without_autocast("cpu"):
                out = reference.mssa(w, ctx.heads, ctx.scale)
                return *torch.autograd.grad(out, w, gradient, create_graph=again), None, None
        return _tied_attention_gradient(w, gradient, ctx.heads, ctx.scale), None, None


def _like(w: Tensor, *_) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _attention_flops(w: Tensor, heads: int, scale: float) -> int:
    return 4 * w.numel() * w.shape[1]


def _gradient_flops(w: Tensor, gradient: Tensor, heads: int, scale: float) -> int:
    """Of five products, the scores again among them, or four where the scores' gradient and its transpose are added first."""
    dtype, size = cpu_product_dtype(w.dtype), w.shape[1]
    whole = w.numel() == 0 or 4 * BLOCK // dtype.itemsize // size >= size
    return 2 * (4 if whole and dtype.itemsize > 2 else 5) * w.numel() * size


@operator(fake=_like, flops=_attention_flops)
def _tied_attention(w: Tensor, heads: int, scale: float) -> Tensor:
    with without_autocast("cpu"):
        x = _by_heads(w, heads)
        out = torch.empty_like(x)
        (scratch,) = _scratch(x, 1)
        for some, rows in _blocks(x):
            torch.bmm(_probabilities(x[some], rows, scale, scratch), x[some], out=out[some, rows])
        return _by_tokens(out, w, heads)


@operator(fake=_like, flops=_gradient_flops)
def _tied_attention_gradient(w: Tensor, gradient: Tensor, heads: int, scale: float) -> Tensor:
    """With P the probabilities and g the gradient: dw = Pᵀg + scale · (dS + dSᵀ) w, where dS is the scores' through softmax."""
    with without_autocast("cpu"):
        x, g = _by_heads(w, heads), _by_heads(gradient, heads)
        p_scratch, s_scratch = _scratch(x, 2)
        whole = _rows_at_once(x) == x.shape[1]
        # What rows of a long image give is added up in float32 or better, whatever their products are taken in.
        dx = torch.empty_like(x) if whole else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for some, rows in _blocks(x):
            keys, queries, of_rows = x[some], x[some, rows], g[some, rows]
            probabilities = _probabilities(keys, rows, scale, p_scratch)
            scores = torch.bmm(of_rows, keys.mT, out=_like_block(s_scratch, queries, keys))
            torch._softmax_backward_data(scores, probabilities, -1, scores.dtype, grad_input=scores)
            if whole:
                torch.bmm(probabilities.mT, of_rows, out=dx[some])
                _add_both_ways(dx[some], scores, keys, scale, probabilities)
            else:
                dx[some] += torch.bmm(probabilities.mT, of_rows).baddbmm_(scores.mT, queries, alpha=scale)
                dx[some, rows] += torch.bmm(scores, keys).mul_(scale)
        return _by_tokens(dx, w, heads)


def _probabilities(x: Tensor, rows: slice, scale: float, scratch: Tensor) -> Tensor:
    """softmax(x xᵀ · scale) of some rows: of (heads, tokens, head width), (heads, rows, tokens)."""
    queries = x[:, rows]
    scores = _like_block(scratch, queries, x)
    torch.baddbmm(scores, queries, x.mT, beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=scores)


def _add_both_ways(dx: Tensor, scores: Tensor, x: Tensor, scale: float, scratch: Tensor) -> None:
    """Adds scale · (scores + scoresᵀ) x to dx: for 16 bit a product is cheaper than a transposed sum, 0.4 and 0.8 ms of 8
    images of CRATE-tiny, for others dearer, 1.3 and 0.4."""
    if scores.element_size() > 2:
        dx.baddbmm_(torch.add(scores, scores.mT, out=scratch), x, alpha=scale)
    else:
        dx.baddbmm_(scores, x, alpha=scale).baddbmm_(scores.mT, x, alpha=scale)


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which images and heads of (images × heads, tokens, head width), and which of their rows, are computed at once."""
    together, height = _heads_at_once(x), _rows_at_once(x)
    for image in range(0, len(x), together):
        for row in range(0, x.shape[1], height):
            yield slice(image, image + together), slice(row, row + height)


def _heads_at_once(x: Tensor) -> int:
    return max(1, min(len(x), BLOCK // x.element_size() // x.shape[1] ** 2))


def _rows_at_once(x: Tensor) -> int:
    return max(1, min(x.shape[1], 4 * BLOCK // x.element_size() // x.shape[1]))


def _scratch(x: Tensor, count: int) -> list[Tensor]:
    """Room for the scores of a block, `count` times."""
    size = _heads_at_once(x) * _rows_at_once(x) * x.shape[1]
    return [x.new_empty(size) for _ in range(count)]


def _like_block(scratch: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The front of `scratch` as (heads, rows, tokens)."""
    shape = (*queries.shape[:2], keys.shape[1])
    return scratch[: shape[0] * shape[1] * shape[2]].view(shape)


def _by_heads(w: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads × head width) as (batch × heads, tokens, head width), contiguous, in the dtype of the products."""
    turned = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    return turned.to(cpu_product_dtype(w.dtype), memory_format=torch.contiguous_format).flatten(0, 1)


def _by_tokens(x: Tensor, like: Tensor, heads: int) -> Tensor:
    """Back to the shape and dtype of `like`, contiguous."""
    turned = x.unflatten(0, (like.shape[0], heads)).transpose(1, 2)
    return turned.to(like.dtype, memory_format=torch.contiguous_format).flatten(2)
