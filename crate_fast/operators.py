# A function may have attributes, of which its type does not know.
# pyright: reportAttributeAccessIssue=false
"""How a function becomes an operator of PyTorch's, which compilers take whole: the one place that registers any."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

FORMULAS: dict[Any, Callable[..., int]] = {}
"""Of operators with products, how many flops those are, as `torch.utils.flop_counter.register_flop_formula` takes it."""


def operator(fake: Callable, flops: Callable[..., int] | None = None):
    """Registers a function as `torch.ops.crate_fast.<name>`, so that torch.compile takes it whole.

    `fake` takes the same arguments, the first a tensor, and returns empty tensors of the results' shapes. What is returned
    calls the function itself where nobody would see the operator: PyTorch's dispatch of one takes as long as three launches.
    `flops` takes the same arguments too, and returns the flops of the products that are made, two a multiplication, as
    PyTorch's own formulas do; None: there are no products.
    """

    def register(function: Callable):
        name = function.__name__.lstrip("_")
        registered = torch.library.custom_op(f"crate_fast::{name}", function, mutates_args=())
        registered.register_fake(fake)
        if flops is not None:
            count = flops  # which is not None, as the type of a variable that a function closes over does not know
            FORMULAS[getattr(torch.ops.crate_fast, name)] = lambda *given, out_val=None, **named: count(*given, **named)
            _tell_counters()

        @wraps(function)
        def call(*arguments):
            if not _is_seen(arguments[0]):
                return function(*arguments)
            if not torch.compiler.is_compiling():
                _tell_counters()
            return registered(*arguments)

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


def _tell_counters() -> None:
    """Gives the formulas to `torch.utils.flop_counter`, and to those of its counters that are at work, which have copied the
    formulas there were. Nobody counts where that module, which takes 80 ms to import, is not there yet."""
    module = cast("Any", sys.modules.get("torch.utils.flop_counter"))
    if module is None:
        return
    counters: list[Any] = [getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack()]
    copies = [counter.flop_registry for counter in counters if isinstance(counter, module.FlopCounterMode)]
    for operator_, formula in FORMULAS.items():
        if operator_ not in module.flop_registry:
            module.register_flop_formula(operator_, get_raw=True)(formula)
        for copy in copies:
            copy.setdefault(operator_, formula)
