"""MSSA on a CPU: batched products of one tensor with itself, in blocks whose scores stay in the cache.

PyTorch's own attention for CPUs reads query, key and value as if they were three and keeps 16-bit numbers away from the
processor's matrix instructions; `cpu_kernels` does the same as here faster, where somebody has them compiled. 8 images of
CRATE-tiny on two cores of an EPYC with AVX-512 and bfloat16, in ms (float32 as in benchmarks/results, 16 bit measured once):

    forward, backward      PyTorch's       here
    float32                3.0, 7.8        3.4, 7.5
    bfloat16               4.0, 10.1       1.5, 2.8
    float16                9.3, 57         3.4, 6.8
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from . import cpu_kernels, reference
from .backend import cpu_product_dtype, is_batched, is_transformed, without_autocast
from .cpu_products import LEAST, product, takes
from .operators import operator

LOG2_E = math.log2(math.e)

LARGEST = 96
"""Of low scores in units of ln 2: float32, of 2⁻¹²⁶ to 2¹²⁸, has room for sums of 2³⁰ such tokens."""

FEWEST = 100
"""Tokens from which on the proof that scores are low costs less than it saves."""

PART = 128
"""How many numbers at most oneDNN adds up one after the other: the error of 197 is 1.2 to 1.8 times PyTorch's, and two parts of
them save nothing."""

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
    if cpu_kernels.take(w):
        return 2 * cpu_kernels.products_of_backward(w.shape[1]) * w.numel() * w.shape[1]
    dtype, size = cpu_product_dtype(w.dtype), w.shape[1]
    whole = w.numel() == 0 or 4 * BLOCK // dtype.itemsize // size >= size
    return 2 * (4 if whole and dtype.itemsize > 2 else 5) * w.numel() * size


@operator(fake=_like, flops=_attention_flops)
def _tied_attention(w: Tensor, heads: int, scale: float) -> Tensor:
    if cpu_kernels.take(w):
        return cpu_kernels.mssa_forward(w, heads, scale)
    with without_autocast("cpu"):
        x = _by_heads(w, heads)
        out, singly, (scratch,) = torch.empty_like(x), _is_taken_singly(x), _scratch(x, 1)
        for some, rows, low in _blocks(x, scale):
            probabilities = _probabilities(x[some, rows], x[some], low, scale, scratch, singly)
            _multiply(probabilities, x[some], out[some, rows], singly)
        return _by_tokens(out, w, heads)


@operator(fake=_like, flops=_gradient_flops)
def _tied_attention_gradient(w: Tensor, gradient: Tensor, heads: int, scale: float) -> Tensor:
    """With P the probabilities and g the gradient: dw = Pᵀg + scale · (dS + dSᵀ) w, where dS is the scores' through softmax."""
    if cpu_kernels.take(w):
        return cpu_kernels.mssa_backward(w, gradient, heads, scale)
    with without_autocast("cpu"):
        x, g = _by_heads(w, heads), _by_heads(gradient, heads)
        singly, (p_scratch, s_scratch) = _is_taken_singly(x), _scratch(x, 2)
        whole = _rows_at_once(x) == x.shape[1]
        # What rows of a long image give is added up in float32 or better, whatever their products are taken in.
        dx = torch.empty_like(x) if whole else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for some, rows, low in _blocks(x, scale):
            keys, queries, of_rows = x[some], x[some, rows], g[some, rows]
            probabilities = _probabilities(queries, keys, low, scale, p_scratch, singly)
            scores = _like_block(s_scratch, queries, keys)
            _multiply(of_rows, keys.mT, scores, singly)
            torch._softmax_backward_data(scores, probabilities, -1, scores.dtype, grad_input=scores)
            if whole:
                _multiply(probabilities.mT, of_rows, dx[some], singly)
                _add_both_ways(dx[some], scores, keys, scale, probabilities)
            else:
                dx[some] += torch.bmm(probabilities.mT, of_rows).baddbmm_(scores.mT, queries, alpha=scale)
                dx[some, rows] += torch.bmm(scores, keys).mul_(scale)
        return _by_tokens(dx, w, heads)


def _probabilities(queries: Tensor, keys: Tensor, low: bool, scale: float, scratch: Tensor, singly: bool) -> Tensor:
    """softmax(queries keysᵀ · scale), (heads, rows, tokens), of (heads, rows, head width) and (heads, tokens, head width).

    Of low scores, of powers of two of scores in units of ln 2, unshifted: PyTorch's softmax and exp of float32 take a CPU four
    times as long. Divided before they are multiplied, since a probability of 1 then is 1.
    """
    scores, factor = _like_block(scratch, queries, keys), scale * LOG2_E if low else scale
    if singly:
        for head, one, scaled in zip(scores.unbind(), queries.unbind(), (keys * factor).unbind(), strict=True):
            head.copy_(product(one, scaled))
    else:
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=factor, out=scores)
    if not low:
        return torch.softmax(scores, -1, out=scores)
    powers = scores.exp2_()
    return powers.div_(powers.sum(-1, keepdim=True))


def _multiply(a: Tensor, b: Tensor, out: Tensor, singly: bool) -> None:
    """out ← a b, of batches of matrices; where they are taken `singly`, by oneDNN if that is faster and no less exact.

    Its sums are of one number after the other, PyTorch's of parts: more than `PART` are given to it in parts too.
    """
    inner = a.shape[2]
    if not singly or PART < inner < 4 * PART:
        torch.bmm(a, b, out=out)
        return
    count = -(-inner // PART)
    for head, left, right in zip(out.unbind(), a.unbind(), b.unbind(), strict=True):
        pairs = zip(left.tensor_split(count, 1), right.tensor_split(count), strict=True) if count > 1 else [(left, right)]
        for index, pair in enumerate(pairs):
            (head.add_ if index else head.copy_)(_by_onednn(*pair))


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices; of a transposed a, which would be copied, by (bᵀ aᵀ)ᵀ."""
    return product(a, b.t()) if a.stride(1) == 1 else product(b.t().contiguous(), a).t()


def _add_both_ways(dx: Tensor, scores: Tensor, x: Tensor, scale: float, scratch: Tensor) -> None:
    """Adds scale · (scores + scoresᵀ) x to dx: for 16 bit a product is cheaper than a transposed sum, 0.4 and 0.8 ms of 8
    images of CRATE-tiny, for others dearer, 1.3 and 0.4."""
    if scores.element_size() > 2:
        dx.baddbmm_(torch.add(scores, scores.mT, out=scratch), x, alpha=scale)
    else:
        dx.baddbmm_(scores, x, alpha=scale).baddbmm_(scores.mT, x, alpha=scale)


def _is_taken_singly(x: Tensor) -> bool:
    """Whether oneDNN takes products of (images × heads, tokens, head width), one by one: all threads share each of them, where
    of a batch each thread has its own."""
    tokens, width = x.shape[1:]
    if tokens**2 * width < 2 * LEAST * torch.get_num_threads() or width > PART or not len(x):
        return False
    return takes(x[0], x[0])


def _blocks(x: Tensor, scale: float) -> Iterator[tuple[slice, slice, bool]]:
    """Which images and heads of (images × heads, tokens, head width), and which of their rows, are computed at once, and
    whether their scores are low."""
    together, height = _heads_at_once(x), _rows_at_once(x)
    for low, run in groupby(enumerate(_are_low(x, scale)), key=itemgetter(1)):
        heads = [head for head, _ in run]
        for head in heads[::together]:
            for row in range(0, x.shape[1], height):
                yield slice(head, min(head + together, heads[-1] + 1)), slice(row, row + height), low


def _are_low(x: Tensor, scale: float) -> list[bool]:
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


def _heads_at_once(x: Tensor) -> int:
    return max(1, min(len(x), BLOCK // x.element_size() // x.shape[1] ** 2))


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
    cast = turned.to(cpu_product_dtype(w.dtype), memory_format=torch.contiguous_format)
    return cast.flatten(0, 1).contiguous()  # an image of its own is contiguous to PyTorch in either order


def _by_tokens(x: Tensor, like: Tensor, heads: int) -> Tensor:
    """Back to the shape and dtype of `like`, contiguous."""
    turned = x.unflatten(0, (like.shape[0], heads)).transpose(1, 2)
    return turned.to(like.dtype, memory_format=torch.contiguous_format).flatten(2)
