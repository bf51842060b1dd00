# PyTorch's own `backward` takes any gradients, one's own those of its results.
# pyright: reportIncompatibleMethodOverride=false
# Types tell neither how long a shape or a list of tensors is, nor which of them are there.
# pyright: reportCallIssue=false
"""The overcomplete step of CRATE-α: two ISTA steps on a dictionary D that is wider than a token, and back by another, D₁.

    forward     ζ₁ = relu(h D − λ)                 the threshold and the relu in the product's epilogue
                r  = h + ζ₁ Bᵀ                     B = −ηD; the residual in the epilogue
                ζ₂ = relu(ζ₁ + r D − λ)            residual, threshold and relu
                y  = ζ₂ Cᵀ                         C = ηD₁
    backward    g₂ = (dy C) ∘ (ζ₂ > 0)             the mask in the epilogue, read off the saved ζ₂
                dr = g₂ Dᵀ
                g₁ = (g₂ + dr B) ∘ (ζ₁ > 0)        residual and mask
                dh = dr + g₁ Dᵀ
                dD = rᵀ g₂ + hᵀ g₁ − η drᵀ ζ₁,     dD₁ = η dyᵀ ζ₂

ζ is the formula's z divided by η, so that a step size is in the weights alone: it is taken there once a step instead of once a
token, and codes are of the size of h, whatever η is. A relu lies between the two products with D, so they are no one product
as in ISTA's step. What is kept for backward is h, r, ζ₁ and ζ₂ in the operands' dtype, 10 dim values a token: r takes a tenth
of that and spares a product of twelve. Every data product is `linear`, every weight's `weight_gradient`, without atomics: the
same bits from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crate_fast.operators import operator

from .linear import linear
from .runtime import readable
from .weight_gradients import weight_gradient


class Saved(NamedTuple):
    """What the step keeps for backward, all in the operands' dtype."""

    h: Tensor  # (rows, dim)
    r: Tensor  # (rows, dim)
    z1: Tensor  # (rows, wide), ζ₁; wide: 4 dim in the published model
    z2: Tensor  # (rows, wide), ζ₂
    d: Tensor  # (dim, wide), D
    b: Tensor  # (dim, wide), −ηD
    c: Tensor  # (dim, wide), ηD₁


def _fake_forward(h, operand, d, b, c, lambd):
    codes = [operand.new_empty(h.shape[0], d.shape[1]) for _ in range(2)]
    return operand.new_empty(h.shape), operand.new_empty(h.shape), *codes


@operator(fake=_fake_forward, flops=lambda h, operand, d, *_: 8 * h.numel() * d.shape[1])
def odl_step(
    h: Tensor, operand: Tensor, d: Tensor, b: Tensor, c: Tensor, lambd: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, r, ζ₁, ζ₂). h: (rows, dim), contiguous, in any dtype; operand: h in that of d, b and c, (dim, wide), see `Saved`."""
    offset = torch.full((d.shape[1],), -lambd, dtype=torch.float32, device=d.device)
    z1 = linear(operand, d, d.dtype, offset=offset, rectify=True, name="odl")
    r = linear(z1, b.t(), d.dtype, residual=h, name="odl_back")  # of h as it came, not as it was rounded for the product
    z2 = linear(r, d, d.dtype, offset=offset, residual=z1, rectify=True, name="odl")
    return linear(z2, c.t(), d.dtype, name="odl_back"), r, z1, z2


def _fake_backward(dy, saved, step_size, dtype, wanted):
    s = Saved(*saved)
    dh = s.h.new_empty(s.h.shape if wanted[0] else (0,), dtype=dtype)
    return [dh, *(s.d.new_empty(s.d.shape if want else (0,), dtype=torch.float32) for want in wanted[1:])]


def _backward_flops(dy, saved, step_size, dtype, wanted) -> int:
    dh, dd, dd1 = wanted
    return 2 * saved[0].numel() * saved[4].shape[1] * (3 * (dh or dd) + dh + 3 * dd + dd1)


@operator(fake=_fake_backward, flops=_backward_flops)
def odl_step_backward(
    dy: Tensor, saved: list[Tensor], step_size: float, dtype: torch.dtype, wanted: list[bool]
) -> list[Tensor]:
    """[dh in `dtype`, dD, dD₁ in float32], empty where not wanted. dy: (rows, dim) in the operands' dtype; saved: `Saved`."""
    s, dy = Saved(*saved), readable(dy)
    operand, results = s.d.dtype, [dy.new_empty(0, dtype=kind) for kind in (dtype, torch.float32, torch.float32)]
    if wanted[2]:
        results[2] = weight_gradient(dy, s.z2, operand, name="odl_gradient").product.sum(0).mul_(step_size)
    if not (wanted[0] or wanted[1]):
        return results
    g2 = linear(dy, s.c, operand, mask=s.z2, name="odl")
    dr = linear(g2, s.d.t(), operand, name="odl_back")
    if wanted[1]:
        results[1] = weight_gradient(dr, s.z1, operand, name="odl_gradient").product.sum(0).mul_(-step_size)
        results[1] += weight_gradient(s.r, g2, operand, name="odl_gradient").product.sum(0)
    g1 = linear(dr, s.b, operand, residual=g2, mask=s.z1, name="odl")
    if wanted[1]:
        results[1] += weight_gradient(s.h, g1, operand, name="odl_gradient").product.sum(0)
    if wanted[0]:
        results[0] = linear(g1, s.d.t(), dtype, residual=dr, name="odl_back")
    return results


class ODL(torch.autograd.Function):
    """The step by the kernels; `ODL.apply(h, D, D1, step_size, lambd, operand)`, differentiable once in h, D and D₁.

    h: (..., dim); D, D1: (dim, wide), float16, bfloat16 or float32; step_size: η; lambd: λ; operand: dtype the products are
    taken in, which the result has.
    """

    @staticmethod
    def forward(ctx, h: Tensor, d: Tensor, d1: Tensor, step_size: float, lambd: float, operand: torch.dtype) -> Tensor:
        rows = h.reshape(-1, h.shape[-1]).contiguous()
        rounded = rows.to(operand)
        weights = d.to(operand), torch.mul(d, -step_size).to(operand), torch.mul(d1, step_size).to(operand)
        y, *codes = odl_step(rows, rounded, *weights, lambd)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*Saved(rounded, *codes, *weights))
        ctx.step_size, ctx.dtype = step_size, h.dtype
        return torch.ops.aten._unsafe_view(y, h.shape)  # no view to autograd, see layer.py

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        saved, wanted = list(ctx.saved_tensors), list(ctx.needs_input_grad[:3])
        results = odl_step_backward(dy.reshape(saved[0].shape), saved, ctx.step_size, ctx.dtype, wanted)
        dh, dd, dd1 = (result if want else None for result, want in zip(results, wanted, strict=True))
        return None if dh is None else dh.view(dy.shape), dd, dd1, None, None, None
