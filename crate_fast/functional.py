"""The two operations of a CRATE layer as functions of tensors, on any backend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cpu_products, reference
from .backend import (
    FAST_ON_CPU,
    autocasts,
    check_tensor,
    choose_backend,
    computes_now,
    cpu_product_dtype,
    is_transformed,
    without_autocast,
)
from .cpu_attention import attend_on_cpu
from .files import shown
from .operators import operator

__all__ = ["ista", "ista_matrix", "mssa"]


def mssa(w: Tensor, heads: int, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Multi-head subspace self-attention: softmax(w wᵀ · scale) w for each head (arXiv:2306.01129, equation 12).

    One tensor is query, key and value. Differentiable once on every backend; twice, in forward mode and under the transforms of
    torch.func on "reference" and, eagerly on a CPU, on "torch".

    Args:
        w: (batch, tokens, heads × head width), any strides, floating point. Under autocast it is cast as a product's
            operand would be.
        heads: number of heads.
        scale: factor on the scores, finite; 1/sqrt(head width) when None.
        backend: "auto", "triton", "torch" or "reference" (see `crate_fast.choose_backend`).

    Returns:
        (batch, tokens, heads × head width) in the dtype computed in.

    Raises:
        TypeError: `w` is no dense tensor of real floating point, `heads` no integer, or `scale` no number.
        ValueError: `w` is not three-dimensional, its width is no multiple of `heads`, `scale` is not finite, or the backend
            is unknown.
        BackendError: backend="triton" where the kernels cannot run.
    """
    check_tensor("w", w)
    if w.dim() != 3:
        raise ValueError(f"w has shape {tuple(w.shape)}; it must be (batch, tokens, heads × head width)")
    _, tokens, width = w.shape
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads is {shown(heads)}; it must be an integer")
    if heads < 1 or width % heads or width == 0:
        raise ValueError(f"w has width {width}, which {shown(heads)} heads do not divide")
    dtype = operand_dtype(w)
    w = w if w.dtype == dtype else w.to(dtype)
    head_width = width // heads
    factor = head_width**-0.5 if scale is None else check_number("scale", scale)
    choice = choose_backend(backend, w, head_width)
    if choice.name == "reference" or tokens == 0:
        return reference.mssa(w, heads, factor)
    if choice.name == "triton":
        from .kernels import MSSA

        return MSSA.apply(w, heads, factor)
    return attend(w, heads, factor)


def class_token_mssa(h: Tensor, project: Tensor, heads: int, scale: float) -> Tensor:
    """The first token's row of `mssa(h Uᵀ, heads, scale)`, (batch, 1, heads × head width), without projecting the others.

    With q the first token's projection, its score with token j is q·U hⱼ = (Uᵀq)·hⱼ, and Σ pⱼ U hⱼ = U Σ pⱼ hⱼ: per head two
    vectors pass through U, not all tokens.

    Args:
        h: (batch, tokens, dim).
        project: U, (heads × head width, dim).
        heads: number of heads.
        scale: factor on the scores.
    """
    q = cpu_products.linear(h[:, 0], project).unflatten(-1, (heads, -1))
    h, u = h.to(q.dtype), project.to(q.dtype).unflatten(0, (heads, -1))  # which autocast does not reach under a dispatch mode
    probabilities = torch.softmax(torch.einsum("bhp,hpd,bnd->bhn", q, u, h) * scale, dim=-1)
    return torch.einsum("bhn,bnd,hpd->bhp", probabilities, h, u).flatten(1)[:, None]


def attend(w: Tensor, heads: int, scale: float) -> Tensor:
    """`mssa` on "torch"."""
    if is_transformed():
        return reference.mssa(w, heads, scale)  # neither of the others has a forward mode
    if w.device.type == "cpu" and computes_now(w):
        return attend_on_cpu(w, heads, scale)
    turned = w.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(turned, turned, turned, scale=scale).transpose(1, 2)
    if w.device.type == "cpu":
        # A query of NaN, which it answers with zeros there. The sum in float32, where no finite float16 overflows. Of w itself:
        # of the tensor turned twice, code that torch.compile 2.14 makes for CPUs writes past its memory ("malloc(): unaligned
        # tcache chunk detected").
        total = w.unflatten(-1, (heads, -1)).sum(-1, keepdim=True, dtype=torch.promote_types(w.dtype, torch.float32))
        out = out + (0 * total).to(out.dtype)
    return out.flatten(2)


def ista(h: Tensor, weight: Tensor, step_size: float = 0.1, lambd: float = 0.1, backend: str = "auto") -> Tensor:
    """One ISTA step: relu(h + η(h D − h Dᵀ D) − ηλ) for tokens in rows (arXiv:2306.01129, equation 17).

    "triton" and "torch" form M = η(D − DᵀD) first, in float32 or better, so that tokens cost one product instead of three.

    Args:
        h: (..., dim) tokens, floating point. Under autocast the product is taken in the autocast dtype and the result has
            h's, as with the published module.
        weight: (dim, dim), the dictionary D, of h's dtype outside autocast.
        step_size: η.
        lambd: λ, the price of a non-zero entry; both at least 0 and finite.
        backend: "auto", "triton", "torch" or "reference" (see `crate_fast.choose_backend`).

    Returns:
        (..., dim), with exact zeros where the step shrank an entry away.

    Raises:
        TypeError: a tensor is not dense and of real floating point, the two differ in dtype outside autocast, or η or λ is no
            number.
        ValueError: `weight` is not square or does not fit `h`, the two are on different devices, η or λ is negative or not
            finite, or the backend is unknown.
        BackendError: backend="triton" where the kernels cannot run.
    """
    step_size, lambd = check_positive("step_size", step_size), check_positive("lambd", lambd)
    check_tensor("h", h)
    choice = choose_backend(backend, h)
    check_ista(h, weight)
    if choice.name == "reference" or 0 in h.shape[-1:]:
        return reference.ista(h, weight, step_size, lambd)
    return ista_step(h, weight, step_size, lambd, choice.name)


def ista_step(h: Tensor, weight: Tensor, step_size: float, lambd: float, backend: str) -> Tensor:
    """`ista` of what fits, on "triton" or "torch", forming what it needs of D."""
    if backend == "torch" and _is_short(h, weight):
        return _ista_of_few(h, weight, step_size, lambd, operand_dtype(weight))
    return rectified_product(h, ista_matrix(weight, step_size), step_size * lambd, backend)


def _is_short(h: Tensor, weight: Tensor) -> bool:
    """Whether tokens are so few that M is not worth forming, where it is formed for this step alone and float32 need not agree
    with evaluation to the bit: where a CPU trains in 16 bit that it has products of. M and its gradient are two products of
    dim³, those of n tokens with it three of n dim²; (h − h Dᵀ) D takes six of these: 0.8 ms for 1.3, for an image of
    CRATE-tiny."""
    if not (weight.device.type == "cpu" and weight.requires_grad and torch.is_grad_enabled()):
        return False
    return FAST_ON_CPU.get(operand_dtype(weight), False) and computes_now(h, weight) and h.numel() < weight.numel()


def _ista_of_few(h: Tensor, weight: Tensor, step_size: float, lambd: float, dtype: torch.dtype) -> Tensor:
    """The step as relu(h + η(h − h Dᵀ) D − ηλ), the products taken in `dtype`."""
    with without_autocast(h.device.type):
        # Cast twice: what the two give D's gradient is added up in its own dtype.
        rest = torch.sub(h, F.linear(h.to(dtype), weight.to(dtype))).to(dtype)
        product = F.linear(rest, weight.to(dtype).t())
        if product.dtype == h.dtype:  # as in `_rectified_product_torch`
            return torch.add(h, product.sub_(lambd), alpha=step_size).relu_()
        return _added(product, h, step_size).sub_(step_size * lambd).relu_()


def ista_matrix(weight: Tensor, step_size: float) -> Tensor:
    """M = η(D − DᵀD) of a dictionary D, (dim, dim), or of several, (layers, dim, dim) in one batched product; in float32 or
    better whatever autocast says, but for the product where 16 bit is trained on a CPU; differentiable."""
    narrow = _training_product_dtype(weight)
    with without_autocast(weight.device.type):
        d = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # A trace knows PyTorch's own operators alone, and a graph for any sizes no function with numbers.
        if d.requires_grad and torch.is_grad_enabled() and computes_now(d):
            return _Matrix.apply(d, step_size, narrow)
        return _matrix(d, step_size, narrow)


def _matrix(d: Tensor, step_size: float, narrow: torch.dtype) -> Tensor:
    if narrow != d.dtype:
        operand = d.to(narrow)
        return torch.sub(d, operand.mT @ operand).mul_(step_size)
    if d.dim() == 2 and cpu_products.takes(d, d):
        return torch.sub(d, cpu_products.linear(d.t(), d.t())).mul_(step_size)
    product = torch.addmm if d.dim() == 2 else torch.baddbmm
    return product(d, d.transpose(-2, -1), d, beta=step_size, alpha=-step_size)  # mT, PyTorch's older ONNX export does not know


class _Matrix(torch.autograd.Function):
    """M of D, whose gradient η(dM − D(dM + dMᵀ)) is one product, where autograd would take two."""

    @staticmethod
    def forward(ctx, d: Tensor, step_size: float, narrow: torch.dtype) -> Tensor:
        ctx.save_for_backward(d)
        ctx.step_size, ctx.narrow = step_size, narrow
        return _matrix(d, step_size, narrow)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (d,) = ctx.saved_tensors
        with without_autocast(d.device.type):
            both = gradient.mT.clone(memory_format=torch.contiguous_format).add_(gradient)  # 69 µs, their sum as it is 119
            operand, both = d.to(ctx.narrow), both.to(ctx.narrow)  # symmetric
            product = cpu_products.linear(operand, both) if d.dim() == 2 else operand @ both
            return (gradient - product) * ctx.step_size, None, None


def _training_product_dtype(weight: Tensor) -> torch.dtype:
    """In which DᵀD is taken: float32 or better, but bfloat16 where a CPU trains in it. Each step forms M anew there, and in
    float32 that and its gradient are three products of five times the time, 24 of 78 ms of an image of CRATE-tiny."""
    dtype = operand_dtype(weight)
    if weight.device.type == "cpu" and dtype == torch.bfloat16 and weight.requires_grad and torch.is_grad_enabled():
        return cpu_product_dtype(dtype)
    return torch.promote_types(weight.dtype, torch.float32)


def rectified_product(h: Tensor, matrix: Tensor, shrinkage: float, backend: str) -> Tensor:
    """relu(h + h M − ηλ) on "triton" or "torch"; h: (..., dim), matrix: M, (dim, dim), float32 or better or, on "torch", in the
    dtype of the product; shrinkage: ηλ."""
    operand = operand_dtype(h)
    if backend == "torch":
        return _rectified_product_torch(h, matrix, shrinkage, operand)
    from .kernels import ISTA

    return ISTA.apply(h.to(torch.promote_types(h.dtype, operand)), matrix, shrinkage, operand)


def _rectified_product_torch(h: Tensor, matrix: Tensor, shrinkage: float, operand: torch.dtype) -> Tensor:
    """relu(h + h M − ηλ) in plain PyTorch, the product taken in dtype `operand`."""
    wide = operand.itemsize > 2 and operand == h.dtype == matrix.dtype
    if wide and not is_transformed():  # vmap knows no product in place with a batch of M
        # The residual goes in as the product's addend: I + M would save its copy, but rounds M to the precision of I.
        rows = h.reshape(-1, h.shape[-1])
        shrunk, compiled = _shrunk(rows, matrix, shrinkage), torch.compiler.is_compiling()
        # As F.linear shapes its own: no view to autograd, which FSDP2 warns of where a module returns one. In a trace the shape
        # of another image has to go in.
        shrunk = shrunk.view(h.shape) if torch.jit.is_tracing() else torch.ops.aten._unsafe_view(shrunk, h.shape)
        return (
            _CompiledRelu.apply(shrunk) if compiled and h.device.type == "cpu" and torch.is_grad_enabled() else shrunk.relu_()
        )
    product = F.linear(h.to(operand), matrix.t().to(operand))
    if operand == h.dtype:  # 16 bit: the threshold is taken off what is small, so that one sum alone is rounded as h is
        return product.sub_(shrinkage).add_(h).relu_()
    return _added(product, h).sub_(shrinkage).relu_()


def _added(product: Tensor, h: Tensor, factor: float = 1.0) -> Tensor:
    """h + factor · product, of two dtypes: their sum takes a CPU longer than a cast and the sum."""
    if h.device.type != "cpu":
        return torch.add(h, product, alpha=factor)
    wide = product.to(torch.promote_types(h.dtype, product.dtype))
    return wide.add_(h) if factor == 1 else torch.add(h, wide, alpha=factor)


def _shrunk(rows: Tensor, matrix: Tensor, shrinkage: float) -> Tensor:
    """h + h M − ηλ of h, `rows`, all of one dtype."""
    if cpu_products.takes(rows, matrix):
        return cpu_products.linear(rows, matrix.t(), rows.new_full(matrix.shape[1:], -shrinkage)).add_(rows)
    shrunk = torch.sub(rows, shrinkage)
    # PyTorch's counter of flops knows no product in place.
    watched = not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()
    return shrunk.addmm(rows, matrix) if watched else shrunk.addmm_(rows, matrix)


class _CompiledRelu(torch.autograd.Function):
    """relu for torch.compile on a CPU, whose own keeps a mask of bools for backward and writes it entry by entry: 3.5 ms of
    the 20 that a layer of CRATE-tiny takes forward for 8 images. This keeps the result, as the next layer does.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _relu_gradient(gradient, *ctx.saved_tensors)


@operator(fake=lambda gradient, result: torch.empty_like(gradient, memory_format=torch.contiguous_format))
def _relu_gradient(gradient: Tensor, result: Tensor) -> Tensor:
    """`gradient` where relu's `result` is not zero: an operator that the compiler cannot take apart and move to the forward."""
    return torch.ops.aten.threshold_backward(gradient.contiguous(), result, 0)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes `x`: the autocast dtype where autocast applies, else x's own."""
    if x.dtype != torch.float64 and autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_number(name: str, value: float) -> float:
    """`value` as a float; raises TypeError if it is no number, ValueError if it is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {shown(value)}; it must be a number") from None
    except OverflowError:
        raise ValueError(f"{name} is larger than any float; it must be finite") from None
    if not abs(number) < math.inf:  # as PyTorch traces it, of a symbolic number too
        raise ValueError(f"{name} is {number}; it must be finite")
    return number


def check_positive(name: str, value: float) -> float:
    """`check_number`, of what is at least 0."""
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be at least 0")
    return number


def check_ista(h: Tensor, weight: Tensor) -> None:
    """Raises TypeError or ValueError, as `ista`, where `weight` is no dictionary that fits `h`."""
    check_tensor("h", h)
    check_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be square, (dim, dim)")
    if h.dim() == 0 or h.shape[-1] != weight.shape[0]:
        raise ValueError(f"h has shape {tuple(h.shape)}; its last axis must be {weight.shape[0]}, the size of weight")
    if h.device != weight.device:
        raise ValueError(f"h is on {h.device} and weight on {weight.device}; they must be on the same device")
    if h.dtype != weight.dtype and operand_dtype(h) == h.dtype:
        raise TypeError(f"h is {h.dtype} and weight {weight.dtype}; outside autocast they must be the same")
