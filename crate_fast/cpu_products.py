"""Matrix products of float32 on a CPU, without gradients: by oneDNN, whose AVX-512 runs on processors of every make.

PyTorch's own are MKL's, which keeps from AVX-512 on an AMD processor: 2.1 ms for 1,576 tokens by 384 × 384 on two cores of an
EPYC, where oneDNN takes 0.93.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import is_transformed


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether products of the two may be oneDNN's: of float32 on a CPU, plain, not empty, nobody differentiates or records."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or x.numel() == 0 or weight.numel() == 0:
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    return type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and not is_transformed()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: (..., in), (out, in) and (out,) to (..., out)."""
    if takes(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_added(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor) -> Tensor:
    """x Wᵀ + b + `addend`, of what `takes` takes: (rows, in), (out, in), (out,) and (rows, out) to (rows, out)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, weight, bias, "add")
