"""Names for parts of a model in PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import record_function


def is_profiled() -> bool:
    """Whether a profiler is on, torch.profiler or emit_nvtx: else a range takes 5 µs for nobody. A compiler has ranges of its
    own."""
    return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()


def in_range(name: str, function: Callable, *arguments) -> Any:
    """`function` of `arguments`, as "crate_fast.<name>" to a profiler that is on."""
    if not is_profiled():
        return function(*arguments)
    with record_function(f"crate_fast.{name}"):
        return function(*arguments)
