"""How kernels are launched and registered: the one place that knows the device, the interpreter and who is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

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
    """Runs `programs` programs of `kernel` on the device of the first argument, whichever is current.

    `constants` are the kernel's compile-time arguments and its num_warps and num_stages. On meta tensors nothing runs.
    """
    for observer in _observers:
        observer(kernel, programs, arguments, constants)
    device = arguments[0].device
    if programs == 0 or device.type == "meta":
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, **constants)


def float32_precision() -> str:
    """What a kernel may do with float32 operands: "ieee", or "tf32" where torch's own switch allows torch the same."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def operator(fake: Callable):
    """Registers a function as `torch.ops.crate_fast.<name>`, so that torch.compile takes it whole.

    `fake` takes the same arguments and returns empty tensors of the results' shapes. The function itself stays at hand as
    `.body`.
    """

    def register(function: Callable):
        name = function.__name__.lstrip("_")
        registered = torch.library.custom_op(f"crate_fast::{name}", function, mutates_args=())
        registered.register_fake(fake)
        registered.body = function
        return registered

    return register
