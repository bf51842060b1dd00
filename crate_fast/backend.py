"""Which implementation computes: one choice, made in one place, that can say why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
HEAD_WIDTHS = (16, 128)  # the narrowest and the widest head that the Triton kernels take


class Choice(NamedTuple):
    """A backend's name ("triton", "torch" or "reference") and the reason it was taken."""

    name: str
    reason: str


class BackendError(RuntimeError):
    """The backend asked for cannot run on what it was given."""


def check_backend(backend: str) -> str:
    """`backend` itself; raises ValueError if it is not one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    return backend


def choose_backend(backend: str, x: Tensor, head_width: int | None = None) -> Choice:
    """Decides what computes on `x`.

    Args:
        backend: "triton" (the fused kernels, or an error), "torch" (the same algebra in PyTorch), "reference" (the published
            mathematics, literally) or "auto" (the kernels on a GPU that runs them, else "torch").
        x: the tensor to compute on; its device and dtype count.
        head_width: width of an attention head, where there is one.

    Raises:
        ValueError: unknown backend.
        BackendError: "triton" where the kernels cannot run; the message names the obstacle and what is allowed.
    """
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
