"""CRATE-α's step of sparsification: two ISTA steps on an overcomplete dictionary, and back by another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference_alpha
from ..backend import computes_now, cpu_product_dtype, is_batched, without_autocast
from ..cpu_products import linear
from ..functional import operand_dtype
from .plain import is_exported
from .step import SparseStep


class OvercompleteISTABlock(SparseStep, name="odl"):
    """Overcomplete dictionary learning (arXiv:2405.20299): z₁ = relu(η h D − ηλ), r = h − z₁ Dᵀ, z₂ = relu(z₁ + η r D − ηλ),
    and z₂ D₁ᵀ, which the layer adds to what entered; arguments as of `SparseStep`, the dictionaries `D` and `D1` (dim, 4 dim).

    A relu lies between the two products with D, so there is no M as of ISTA: a step is four products, and eight backward. For
    these it keeps 10 dim values a token: h, r, z₁ and z₂. Keeping r takes a tenth of that and spares a product of twelve. On
    "triton" each product is a kernel with what follows it (kernels/odl.py).
    """

    residual = True
    D: Tensor
    D1: Tensor

    @staticmethod
    def shapes(dim: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("D", "D1"), (dim, reference_alpha.WIDENING * dim))

    @staticmethod
    def reference(h: Tensor, weights: Sequence[Tensor], step_size: float, lambd: float) -> Tensor:
        d, d1 = weights
        return reference_alpha.odl(h, d, d1, step_size, lambd)

    @classmethod
    def sparsify(
        cls, h: Tensor, weights: Sequence[Tensor], matrix: Tensor | None, step_size: float, lambd: float, backend: str
    ) -> Tensor:
        """The step of h, (..., dim), in the dtype of its products."""
        cls.check(h, weights)
        if h.numel() == 0:
            return cls.reference(h, weights, step_size, lambd)
        if backend == "triton":
            from ..kernels import ODL

            return ODL.apply(h, *weights, step_size, lambd, operand_dtype(h))
        if not _is_plain(h, *weights):
            return cls.reference(h, weights, step_size, lambd)
        return _ODL.apply(h, *weights, step_size, lambd, _product_dtype(h))

    def code(self, h: Tensor) -> Tensor:
        """z₂ of h, (..., dim): (..., 4 dim), at least 0; what the step makes sparse. Not differentiable."""
        weights: list[Any] = [self.D, self.D1]
        self.check(h, weights)
        with torch.no_grad():
            if h.numel() == 0 or not _is_plain(h, *weights):
                return reference_alpha.sparse_code(h, weights[0], self.step_size, self.lambd)
            dtype = _product_dtype(h)
            *_, z2 = _code(h.flatten(0, -2), weights[0].to(dtype), self.step_size, self.step_size * self.lambd, keep=False)
        return z2.view(*h.shape[:-1], -1)

    @classmethod
    def check(cls, h: Tensor, weights: Sequence[Tensor]) -> None:
        super().check(h, weights)
        for name, weight in zip(cls.weight_names, weights, strict=True):
            if h.device != weight.device:
                raise ValueError(f"h is on {h.device} and {name} on {weight.device}; they must be on the same device")
            if h.dtype != weight.dtype and operand_dtype(h) == h.dtype:
                raise TypeError(f"h is {h.dtype} and {name} {weight.dtype}; outside autocast they must be the same")

    @staticmethod
    def flops(dim: int) -> int:
        return 4 * reference_alpha.WIDENING * dim * dim


class _ODL(torch.autograd.Function):
    """z₂ D₁ᵀ of h by D and D₁; thresholds, masks and residuals are taken in place, in what the products have written."""

    @staticmethod
    def forward(ctx, h: Tensor, d: Tensor, d1: Tensor, step_size: float, lambd: float, dtype: torch.dtype) -> Tensor:
        ctx.step_size, ctx.lambd, ctx.dtype = step_size, lambd, h.dtype
        keep = any(ctx.needs_input_grad[:3])
        d, d1 = d.to(dtype), d1.to(dtype)
        rows, r, z1, z2 = _code(h.flatten(0, -2), d, step_size, step_size * lambd, keep)
        if keep:  # what came in itself where it can, by which the gradient may be differentiated again
            ctx.save_for_backward(h if dtype == h.dtype else rows.view(h.shape), r, z1, z2, d, d1)
        return _product(z2, d1.t()).view(h.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled() or is_batched(gradient):
            return _openly_differentiated(ctx, gradient)
        h, r, z1, z2, d, d1 = ctx.saved_tensors
        rows = h.flatten(0, -2)
        needs_h, needs_d, needs_d1 = ctx.needs_input_grad[:3]
        step_size, dy = ctx.step_size, gradient.reshape(rows.shape)
        dd = dd1 = dh = None
        wide = torch.promote_types(d.dtype, torch.float32)  # in which three products with 16-bit results are summed
        if needs_d1:
            dd1 = _product(dy.t(), z2).to(wide)
        if not (needs_h or needs_d):
            return None, None, dd1, None, None, None
        g = _masked(_product(dy, d1), z2)  # of z₂ before its relu
        dr = _product(g, d.t()).mul_(step_size)
        if needs_d:
            dd = _product(r.t(), g).to(wide).mul_(step_size)
            _add_product(dd, dr.t(), z1, alpha=-1)
        g = _masked(_add_product(g, dr, d, alpha=-step_size, beta=step_size), z1)  # of h D: η times that of z₁ before its relu
        if dd is not None:
            _add_product(dd, rows.t(), g)
        if needs_h:
            dh = _add_product(dr.to(ctx.dtype), g, d.t()).view(h.shape)
        return dh, dd, dd1, None, None, None


def _openly_differentiated(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """What `_ODL.backward` gives, by PyTorch's own operators: of a gradient that stands for several, or to go on from."""
    again, leaves = torch.is_grad_enabled(), [ctx.saved_tensors[index] for index in (0, 4, 5)]
    if again and leaves[0].dtype != ctx.dtype:
        raise RuntimeError("the step of CRATE-α is differentiated twice without autocast alone, or with backend='reference'")
    needed = ctx.needs_input_grad[:3]
    if not again:
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needed, strict=True)]
    with torch.enable_grad(), without_autocast(gradient.device.type):
        h, d, d1 = leaves
        out = reference_alpha.odl(h, d, d1, ctx.step_size, ctx.lambd)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=again))
    return *(next(found) if need else None for need in needed), None, None, None


def _code(h: Tensor, d: Tensor, step_size: float, shrinkage: float, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, r, z₁, z₂) of h, (tokens, dim), all but the residual's h in D's dtype; z₁ is lost in z₂ unless it is to be kept."""
    rows = h.to(d.dtype)
    z1 = _add_product(rows.new_full((len(rows), d.shape[1]), -shrinkage), rows, d, alpha=step_size).relu_()
    r = torch.sub(h, _product(z1, d.t())).to(d.dtype)  # of h as it came, not as it was rounded for the product
    z2 = torch.sub(z1, shrinkage) if keep else z1.sub_(shrinkage)
    return rows, r, z1, _add_product(z2, r, d, alpha=step_size).relu_()


def _masked(gradient: Tensor, result: Tensor) -> Tensor:
    """`gradient`, in place, where relu's `result` is not zero."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, result, 0, grad_input=gradient)


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x w of matrices of one dtype, in that dtype."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        with without_autocast("cpu"):
            return linear(x, w.t())
    return torch.mm(x, w)


def _add_product(onto: Tensor, x: Tensor, w: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """beta `onto` + alpha x w, in place of `onto`, which may be of a wider dtype."""
    if onto.dtype == x.dtype and not (onto.dtype == torch.float32 and onto.device.type == "cpu"):
        return onto.addmm_(x, w, beta=beta, alpha=alpha)
    onto = onto if beta == 1 else onto.mul_(beta)
    return onto.add_(_product(x, w), alpha=alpha)


def _product_dtype(h: Tensor) -> torch.dtype:
    dtype = operand_dtype(h)
    return cpu_product_dtype(dtype) if h.device.type == "cpu" and dtype != h.dtype else dtype


def _is_plain(*tensors: Tensor) -> bool:
    """Whether `_ODL` may compute: no transform, compiler, export or tensor of another class sees what is done to them. What is
    compiled takes as long by the formula, and keeps any sizes and numbers open."""
    return computes_now(*tensors) and not is_exported()
