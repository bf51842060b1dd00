"""Matrix products of float32 on a CPU: by oneDNN, which uses what an x86 processor has, whoever made it.

PyTorch's own are MKL's, which keeps from AVX-512 on processors that are not Intel's. CRATE-tiny's of 8 images, 1,576 tokens by
384 × 384, on one core of an AMD EPYC with AVX-512, in ms, and as if it had AVX2 alone (torch 2.14; the same with 2.11):

    forward, data gradient, weight gradient      MKL's               oneDNN's
    AVX-512                                      4.1, 4.2, 4.2       1.9, 1.8, 2.1
    AVX2                                         4.3, 4.1, 4.2       3.7, 3.5, 3.8

Evaluation and training take the same, so that they agree to the bit.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import autocasts, computes_now, without_autocast

LEAST = 1 << 20
"""Multiplications of a product from which on it is oneDNN's: its call takes 20 µs, PyTorch's of a small product 3."""

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere PyTorch has the makers' own


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether x Wᵀ + b is oneDNN's: of float32 on a CPU, large enough, of shapes that fit, where nobody casts, records, batches
    or transforms operators."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _IS_X86:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # No sizes are asked for of what is recorded for any. Who watches operators, as PyTorch's counter of flops does, knows
    # PyTorch's own alone.
    if not computes_now(*tensors) or is_in_torch_dispatch_mode() or autocasts("cpu"):
        return False
    if any(t.dtype != torch.float32 or t.device != x.device or t.layout is not torch.strided for t in tensors):
        return False
    if not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.numel() * weight.shape[0] < LEAST:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as `torch.nn.functional.linear`: (..., in), (out, in) and (out,) to (..., out); differentiable, as often as
    that."""
    if not takes(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of what `takes` has taken, by oneDNN."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # it is read as if it were, whatever its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        with without_autocast("cpu"):
            dx = None if weight is None else linear(gradient, weight.t())
            dweight = None if x is None else linear(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None
