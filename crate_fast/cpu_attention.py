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

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from . import reference
from .backend import cpu_product_dtype, is_batched, is_transformed, without_autocast
from .cpu_products import LEAST, product, takes
from .operators import operator

LOG2_E = math.log2(math.e)

LARGEST = 96
"""Of bounded scores in units of ln 2, which gives float32, of 2⁻¹²⁶ to 2¹²⁸, sums of 2³⁰ tokens."""

FEWEST = 100
"""Tokens from which on the proof that scores are bounded costs less than it saves."""

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
        out, scratch, room = torch.empty_like(x), _Scratch(), _Scratch()
        for some, rows, bounded in _blocks(x, scale):
            queries, keys = x[some, rows], x[some]
            if bounded:
                powers, sums = _powers(queries, keys, scale, scratch)
                torch.div(_product(powers, keys, 1, room), sums, out=out[some, rows])
            else:
                _add_product(out[some, rows], _probabilities(queries, keys, scale, bounded, scratch), keys, beta=0)
        return _by_tokens(out, w, heads)


@operator(fake=_like, flops=_gradient_flops)
def _tied_attention_gradient(w: Tensor, gradient: Tensor, heads: int, scale: float) -> Tensor:
    """With P the probabilities and g the gradient: dw = Pᵀg + scale · (dS + dSᵀ) w, where dS is the scores' through softmax."""
    with without_autocast("cpu"):
        x, g = _by_heads(w, heads), _by_heads(gradient, heads)
        p_scratch, s_scratch, whole = _Scratch(), _Scratch(), _rows_at_once(x) == x.shape[1]
        # What rows of a long image give is added up in float32 or better, whatever their products are taken in.
        dx = torch.empty_like(x) if whole else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for some, rows, bounded in _blocks(x, scale):
            queries, keys, of_rows = x[some, rows], x[some], g[some, rows]
            probabilities = _probabilities(queries, keys, scale, bounded, p_scratch)
            scores = _product(of_rows, keys.mT, 1, s_scratch)
            torch._softmax_backward_data(scores, probabilities, -1, scores.dtype, grad_input=scores)
            _add_product(dx[some], probabilities.mT, of_rows, beta=0 if whole else 1)
            if whole and x.element_size() > 2:
                _add_product(dx[some], torch.add(scores, scores.mT, out=probabilities), keys, scale)
            else:  # in 16 bit a product is cheaper than a transposed sum, 0.4 and 0.8 ms of 8 images of CRATE-tiny
                _add_product(dx[some, rows], scores, keys, scale)
                _add_product(dx[some], scores.mT, queries, scale)
        return _by_tokens(dx, w, heads)


def _probabilities(queries: Tensor, keys: Tensor, scale: float, bounded: bool, scratch: _Scratch) -> Tensor:
    """softmax(queries keysᵀ · scale), (..., rows, tokens), of (..., rows, head width) and (..., tokens, head width)."""
    if bounded:
        powers, sums = _powers(queries, keys, scale, scratch)
        return powers.div_(sums)
    scores = _product(queries, keys.mT, scale, scratch)
    return torch.softmax(scores, -1, out=scores)


def _powers(queries: Tensor, keys: Tensor, scale: float, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """exp(queries keysᵀ · scale) of bounded scores, (..., rows, tokens), and the sums of its rows, (..., rows, 1).

    As powers of two, whose exponents are scores in units of ln 2.
    """
    powers = _product(queries, keys.mT, scale * LOG2_E, scratch).exp2_()
    return powers, powers.sum(-1, keepdim=True)


def _product(a: Tensor, b: Tensor, factor: float, scratch: _Scratch) -> Tensor:
    """a b · factor: of two matrices by oneDNN, of batches of them in `scratch`."""
    if a.dim() == 2:
        return _by_onednn(a, b if factor == 1 else b * factor)
    out = scratch.take((*a.shape[:2], b.shape[2]), a)
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0, beta: int = 1) -> None:
    """total ← beta · total + a b · factor, beta being 1, or 0 with a factor of 1."""
    if a.dim() == 3 and total.dtype == a.dtype:
        total.baddbmm_(a, b, beta=beta, alpha=factor)
        return
    added = _by_onednn(a, b) if a.dim() == 2 else torch.bmm(a, b)
    if beta:
        total.add_(added, alpha=factor)
    else:
        total.copy_(added)


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices; where a is a transposed one, which oneDNN would copy, as (bᵀ aᵀ)ᵀ."""
    return product(a, b.t()) if a.is_contiguous() else product(b.t().contiguous(), a).t()


class _Scratch:
    """Room for what is computed of one block after the other, the first of which is the largest."""

    room: Tensor | None = None

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        size = math.prod(shape)
        if self.room is None or len(self.room) < size:
            self.room = like.new_empty(size)
        return self.room[:size].view(shape)


def _blocks(x: Tensor, scale: float) -> Iterator[tuple[slice | int, slice, bool]]:
    """Which images and heads of (images × heads, tokens, head width), and which of their rows, are computed at once, and
    whether their scores are bounded; where oneDNN takes the products it is one head, given as a number."""
    tokens, height, singly = x.shape[1], _rows_at_once(x), _is_taken_singly(x)
    together = 1 if singly else max(1, BLOCK // x.element_size() // tokens**2)
    for bounded, run in groupby(enumerate(_are_bounded(x, scale)), key=itemgetter(1)):
        heads = [head for head, _ in run]
        for head in range(heads[0], heads[-1] + 1, together):
            some = head if singly else slice(head, min(head + together, heads[-1] + 1))
            for row in range(0, tokens, height):
                yield some, slice(row, row + height), bounded


def _is_taken_singly(x: Tensor) -> bool:
    """Whether products of (images × heads, tokens, head width) are oneDNN's, one by one: all threads share each of them,
    where of a batch each thread has its own."""
    tokens, width = x.shape[1:]
    return len(x) > 0 and tokens**2 * width >= LEAST * torch.get_num_threads() and takes(x[0], x[0])


def _are_bounded(x: Tensor, scale: float) -> list[bool]:
    """Of each head, whether its scores are proven to be so small that powers of them, and their sums, stay far from float32's
    range: by Cauchy and Schwarz no score is larger than the longest token's with itself. NaN and infinity are not.

    False for other dtypes, and where there is little to gain, too.
    """
    if x.dtype != torch.float32 or x.shape[1] < FEWEST:
        return [False] * len(x)
    norms = torch.linalg.vector_norm(x, dim=-1).amax(-1).tolist()
    return [norm * norm * abs(scale) * LOG2_E <= LARGEST for norm in norms]


def _rows_at_once(x: Tensor) -> int:
    return max(1, min(x.shape[1], 4 * BLOCK // x.element_size() // x.shape[1]))


def _by_heads(w: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads × head width) as (batch × heads, tokens, head width), contiguous, in the dtype of the products."""
    turned = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    cast = turned.to(cpu_product_dtype(w.dtype), memory_format=torch.contiguous_format)
    return cast.flatten(0, 1).contiguous()  # an image of its own is contiguous to PyTorch in either order


def _by_tokens(x: Tensor, like: Tensor, heads: int) -> Tensor:
    """Back to the shape and dtype of `like`, contiguous."""
    turned = x.unflatten(0, (like.shape[0], heads)).transpose(1, 2)
    return turned.to(like.dtype, memory_format=torch.contiguous_format).flatten(2)
