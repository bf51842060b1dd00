"""Matrix products of float32 on a CPU: by oneDNN, which uses what an x86 processor has, where PyTorch's own do not.

PyTorch's own are MKL's, which keeps from AVX-512 on processors that are not Intel's. CRATE-tiny's of 8 images, 1,576 tokens by
384 × 384, on one core, in ms (torch 2.14; with 2.11 the same on AMD's):

    forward, data gradient, weight gradient      MKL's               oneDNN's
    AMD EPYC, AVX-512                            4.1, 4.2, 4.2       1.9, 1.8, 2.1
    the same, as if it had AVX2 alone            4.3, 4.1, 4.2       3.7, 3.5, 3.8
    Intel Xeon, AVX-512                          2.9, 2.9, 3.1       3.1, 2.9, 3.7

Evaluation and training take the same, so that they agree to the bit.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import autocasts, computes_now, without_autocast

LEAST = 1 << 20
"""Multiplications of a product from which on it is oneDNN's: its call takes 20 µs, PyTorch's of a small product 3."""


def _has_makers_own(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether PyTorch's own products are those of the processor's maker: off x86, and MKL's on Intel's, under every system."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if not torch.backends.mkl.is_available():
        return False
    if cpuinfo.exists():
        return "GenuineIntel" in cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return sys.platform == "darwin" or "GenuineIntel" in platform.processor()  # which Windows names so; Apple's were Intel's


_IS_TAKEN = not _has_makers_own()


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether x Wᵀ + b is oneDNN's: of float32 on a CPU whose maker's products PyTorch has not, large enough, of shapes that
    fit, where nobody casts, records, batches or transforms operators."""
    if not _IS_TAKEN or x.device.type != "cpu" or x.dtype != torch.float32:
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
