# A function may have attributes, of which its type does not know.
# pyright: reportAttributeAccessIssue=false
"""How a function becomes an operator of PyTorch's, which compilers take whole: the one place that registers any."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def operator(fake: Callable):
    """Registers a function as `torch.ops.crate_fast.<name>`, so that torch.compile takes it whole.

    `fake` takes the same arguments, the first a tensor, and returns empty tensors of the results' shapes. What is returned
    calls the function itself where nobody would see the operator: PyTorch's dispatch of one takes as long as three launches.
    """

    def register(function: Callable):
        name = function.__name__.lstrip("_")
        registered = torch.library.custom_op(f"crate_fast::{name}", function, mutates_args=())
        registered.register_fake(fake)

        @wraps(function)
        def call(*arguments):
            return (registered if _is_seen(arguments[0]) else function)(*arguments)

        call.body = function
        return call

    return register


def _is_seen(argument: torch.Tensor) -> bool:
    """Whether somebody records or replaces operators: a compiler, a tracer, a dispatch mode, a tensor of another class."""
    return (
        torch.compiler.is_compiling()
        or type(argument) not in (torch.Tensor, torch.nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
    )
