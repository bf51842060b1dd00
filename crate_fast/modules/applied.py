"""What modules with products make of a tensor: on a CPU the same product whether evaluation or training asks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import cpu_products
from .plain import has_global_hooks, is_plain


def applied(module: nn.Module, x: Tensor, backend: str) -> Tensor:
    """`module(x)`; of a plain nn.Linear, also within a plain nn.Sequential, by `cpu_products` where nobody watches modules."""
    if x.device.type != "cpu" or backend == "reference" or torch.compiler.is_compiling() or has_global_hooks():
        return module(x)
    if is_plain(module, nn.Linear):
        return cpu_products.linear(x, module.weight, module.bias)
    if is_plain(module, nn.Sequential):
        for part in module:
            x = applied(part, x, backend)
        return x
    return module(x)
