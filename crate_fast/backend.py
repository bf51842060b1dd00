"""Which implementation computes: one choice, made in one place, that can say why."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .errors import BackendError
from .files import shown
from .reference import constant_to_compile, has_autocast
from .sizes import BACKENDS

HEAD_WIDTHS = (16, 128)  # the narrowest and the widest head that the Triton kernels take


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What can be computed on at all; the kernels take all but float64."""


class Choice(NamedTuple):
    """A backend's name ("triton", "torch" or "reference") and the reason it was taken."""

    name: str
    reason: str


def check_tensor(name: str, x: Tensor) -> None:
    """Raises TypeError if `x`, which a message calls `name`, is no dense tensor of one of `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        what = x.dtype if x.layout is torch.strided else x.layout
        raise TypeError(f"{name} is {what}; it must be a dense tensor of real floating point with 16, 32 or 64 bits")


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; False for one that has none, such as "meta"."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast switched off for a type of device, which need not have it."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def _has_products(name: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and supported()


# Asked at once, since `torch.jit.trace` records no operator that gives a truth.
FAST_ON_CPU = {torch.bfloat16: _has_products("bf16"), torch.float16: _has_products("fp16")}
"""Whether this CPU has instructions for products of 16 bit: emulated they take ten times as long."""


def cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU takes products of `dtype` best: float32 where it has none of bfloat16, and for float16, where
    scores overflow that float32 holds."""
    return dtype if dtype == torch.bfloat16 and FAST_ON_CPU[dtype] else torch.promote_types(dtype, torch.float32)


def is_transformed() -> bool:
    """True inside a transform of `torch.func` (vmap, jvp, grad and the like) and in a level of forward-mode AD, whatever is
    transformed: only PyTorch's own operators know then how to be batched or differentiated."""
    return forward_ad._current_level >= 0 or _is_in_functorch()


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several at once, as in `torch.autograd.grad(is_grads_batched=True)`: no transform tells of that."""
    return "Batched" in torch._C._dispatch_key_set(gradient)


def computes_now(*tensors: Tensor) -> bool:
    """Whether functions that no compiler, tracer or transform knows may compute with tensors: none is at work, so that PyTorch
    computes as it is called, and all are plain tensors, each standing for itself."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    return all(type(x) in (Tensor, nn.Parameter) and not is_batched(x) for x in tensors)


# Constant to torch.compile, which takes what peek gives for an object even where that is None, and guards transforms itself.
@constant_to_compile
def _is_in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue] (no stub)


def check_backend(backend: str) -> str:
    """`backend` itself; raises ValueError if it is not one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {shown(backend)}; allowed are {', '.join(map(repr, BACKENDS))}")
    return backend


def choose_backend(backend: str, x: Tensor, head_width: int | None = None) -> Choice:
    """Decides what computes on `x`.

    Args:
        backend: "triton" (the fused kernels, or an error), "torch" (the same algebra in PyTorch), "reference" (the published
            mathematics, literally) or "auto" (the kernels on a GPU that runs them, else "torch").
        x: the tensor to compute on; its device and dtype count.
        head_width: width of an attention head, where there is one.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: unknown backend.
        BackendError: "triton" where the kernels cannot run; the message names the obstacle and what is allowed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
    if check_backend(backend) in ("torch", "reference"):
        return Choice(backend, "asked for")
    obstacle = _triton_obstacle(x, head_width)
    if backend == "triton":
        if obstacle:
            raise BackendError(f"backend='triton' cannot run here: {obstacle}")
        return Choice("triton", "asked for")
    if obstacle is None and x.device.type == "cpu":
        obstacle = "on a CPU the kernels only run in Triton's interpreter, which is for tests"
    return Choice("torch", obstacle) if obstacle else Choice("triton", f"{x.dtype} on {x.device}")


def _triton_obstacle(x: Tensor, head_width: int | None) -> str | None:
    """What keeps the kernels from running on `x`, in words; None if nothing does."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype is {x.dtype}; the kernels take float16, bfloat16 and float32"
    if is_transformed():
        return "vmap, jvp and other transforms of torch.func, and forward-mode AD, know PyTorch's operators alone"
    if head_width is not None and not HEAD_WIDTHS[0] <= head_width <= HEAD_WIDTHS[1]:
        return f"head width is {head_width}; the kernels take {HEAD_WIDTHS[0]} to {HEAD_WIDTHS[1]}"
    try:
        from .kernels import INTERPRETED
    except ImportError as error:
        return f"triton does not import ({error})"
    if x.device.type == "cpu":
        return None if INTERPRETED else "the tensor is on the CPU; the kernels take CUDA tensors"
    if x.device.type != "cuda":
        return f"the tensor is on {x.device}; the kernels take CUDA tensors"
    if torch.version.cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    return None
