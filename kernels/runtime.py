"""How kernels are launched: the one place that knows the device and the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton


@triton.jit
def _probe_kernel():
    pass


INTERPRETED = not isinstance(_probe_kernel, triton.JITFunction)
"""True when TRITON_INTERPRET=1 was set before triton was imported: kernels then run in Python, on CPU tensors."""

_observers: list[Callable] = []


@contextmanager
def observed(observer: Callable) -> Iterator[None]:
    """While open, `observer(kernel, programs, arguments, constants)` is told of every launch before it happens."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Runs `programs` programs of `kernel` on the device of the first argument, or first of a tuple, whichever is current.

    `constants` are the kernel's compile-time arguments and its num_warps and num_stages. On meta tensors nothing runs.
    """
    for observer in _observers:
        observer(kernel, programs, arguments, constants)
    first = arguments[0]
    device = (first[0] if isinstance(first, tuple) else first).device
    if programs == 0 or device.type == "meta":
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*arguments, grid=(programs,), warmup=False, **constants)
    else:
        kernel.run(*arguments, grid=(programs,), warmup=False, **constants)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy, as kernels read it: its sign in memory, and columns that 32 bits address, however far rows are apart."""
    x = x.resolve_neg()
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x


def float32_precision() -> str:
    """What a kernel may do with float32 operands: "ieee", or "tf32" where torch's own switch allows torch the same."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product_precision(operand: torch.dtype) -> str:
    """`float32_precision` for float32 operands; others have but one, "ieee"."""
    return float32_precision() if operand is torch.float32 else "ieee"
