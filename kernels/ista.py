# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
"""The ISTA step on its own: relu(h + h M − ηλ) with M = η(D − DᵀD), one product forward and two backward.

    forward     y = relu(h + h M − ηλ)             the residual, the threshold and the relu in the product's epilogue
    backward    g = dy ∘ (y > 0)                   read off the saved result
                dh = g + g Mᵀ,   dM = hᵀ g

The gradient goes on from M to D by autograd: d³, independent of the number of tokens. The kernels are those of all products
(linear.py, gradients.py, weight_gradients.py), their block shapes "ista", "ista_gradient" and "weight_gradient" in tuning.py;
inside a layer the same take the LayerNorm in as well (layer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .gradients import data_gradient
from .linear import linear
from .runtime import readable
from .weight_gradients import weight_gradient


@operator(
    fake=lambda h, matrix, shrinkage: torch.empty_like(h, memory_format=torch.contiguous_format),
    flops=lambda h, matrix, shrinkage: 2 * h.numel() * len(matrix),
)
def ista_step(h: Tensor, matrix: Tensor, shrinkage: float) -> Tensor:
    """h: (rows, dim); matrix: M (dim, dim) in the operands' dtype. The result has h's dtype."""
    offset = torch.full((h.shape[1],), -shrinkage, dtype=torch.float32, device=h.device)
    return linear(readable(h), matrix, h.dtype, offset=offset, shrink=True)


def _fake_backward(dy, h, y, matrix):
    return torch.empty_like(h, memory_format=torch.contiguous_format), matrix.new_empty(matrix.shape, dtype=torch.float32)


@operator(fake=_fake_backward, flops=lambda dy, h, y, matrix: 4 * h.numel() * len(matrix))
def ista_step_backward(dy: Tensor, h: Tensor, y: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, dM): (rows, dim) in h's dtype and (dim, dim) in float32."""
    h, g = readable(h), readable(torch.ops.aten.threshold_backward(dy, y, 0))  # 0 where y <= 0; what relu's own backward is
    return data_gradient(g, matrix, h.dtype, shrink=True), weight_gradient(h, g, matrix.dtype).product.sum(0)


class ISTA(torch.autograd.Function):
    """relu(h + h M − ηλ) by the kernels; `ISTA.apply(h, M, shrinkage, operand)`, differentiable once in h and M.

    h: (..., dim) float16, bfloat16 or float32; M: (dim, dim) float32; shrinkage: ηλ; operand: dtype the product is taken in.
    """

    @staticmethod
    def forward(ctx, h: Tensor, m: Tensor, shrinkage: float, operand: torch.dtype) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        matrix = m.to(operand)
        y = torch.ops.aten._unsafe_view(ista_step(rows, matrix, shrinkage), h.shape)  # no view to autograd, see layer.py
        ctx.save_for_backward(rows, y, matrix)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, y, matrix = ctx.saved_tensors
        dh, dm = ista_step_backward(dy.reshape(rows.shape), rows, y.view(rows.shape), matrix)
        return dh.view(dy.shape), dm, None, None
