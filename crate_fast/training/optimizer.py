"""The optimizer and its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer

from ..extras import require


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """Lion on all parameters, as CRATE was published; every step moves all tensors together."""
    require("lion_pytorch")
    from lion_pytorch.foreach import Lion

    return Lion(model.parameters(), lr=lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of `step` of `steps` (counted from 1): up to `peak` in a line, then down towards 0 in half a cosine.

    `warmup` is the rise's part of all steps.
    """
    rise = int(warmup * steps)
    if step <= rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - rise) / (steps - rise)))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Gives all groups of parameters the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
