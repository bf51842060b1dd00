"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from ..optimizers import OPTIMIZERS
from ..settings import ConfigError, OptimisationSettings, listed

MAIN_WARMUP = 20  # epochs, in the published main.py


def build_optimizer(model: nn.Module, settings: OptimisationSettings) -> Optimizer:
    """The optimizer that `settings` ask for, on all parameters that learn; every step moves all tensors together.

    Raises:
        ConfigError: it cannot move parameters in parts, with --strategy fsdp, in this version of PyTorch.
        MissingPackageError: a package that it needs is not installed.
    """
    known = OPTIMIZERS[settings.optimizer]
    if known.needs is not None:
        _check_operation(settings.optimizer, known.needs, next(model.parameters()))
    options = {name: getattr(settings, name) for name in ("lr", "weight_decay", *known.takes)}
    return known.build(_groups(model, settings.decay), **options)


def _check_operation(name: str, operation: str, parameter: nn.Parameter) -> None:
    """Whether an operation is there for parameters like this one: of those in parts PyTorch 2.11 takes no signs, 2.14 does."""
    try:
        getattr(torch, operation)([torch.zeros_like(parameter.detach())])
    except NotImplementedError as error:
        others = listed(other for other, known in OPTIMIZERS.items() if known.needs is None)
        raise ConfigError(
            f"--optimizer is {name!r} and --strategy is 'fsdp', which PyTorch {torch.__version__} cannot run together; "
            f"a newer one can, and here {others} can"
        ) from error


def _groups(model: nn.Module, decay: str) -> list[dict]:
    """All parameters that learn in one group that decays; with decay="matrices" vectors and embeddings in another, that does
    not, and with "kernels" the weights of the steps of sparsification too."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay == "all":
        return [{"params": learning}]
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    decaying, other = [], []
    for parameter in learning:
        decays = id(parameter) in kernels or (decay == "matrices" and parameter.dim() == 2)
        (decaying if decays else other).append(parameter)
    return [{"params": decaying}, {"params": other, "weight_decay": 0.0}]


def learning_rate_at(step: int, steps_per_epoch: int, settings: OptimisationSettings) -> float:
    """The learning rate of `step`, counted from 1 over all epochs, by the schedule that `settings` ask for."""
    epoch = (step - 1) // steps_per_epoch
    if settings.schedule == "main-epoch":
        return settings.lr * main_factor(epoch, settings.epochs)
    if settings.schedule == "finetune-epoch":
        return settings.lr * finetune_factor(epoch, settings.epochs)
    end = settings.lr if settings.schedule == "constant" else settings.min_lr
    return learning_rate(step, steps_per_epoch * settings.epochs, settings.lr, settings.warmup, end)


def learning_rate(step: int, steps: int, peak: float, warmup: float, end: float = 0.0) -> float:
    """The learning rate of `step` of `steps` (counted from 1): up to `peak` in a line, then towards `end` in half a cosine.

    `warmup` is the rise's part of all steps.
    """
    rise = warmup_steps(steps, warmup)
    if step <= rise:
        return peak * step / rise
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - 1 - rise) / (steps - rise)))


def warmup_steps(steps: int, warmup: float) -> int:
    """Steps of the rise, of `steps` in all; at least one is left to fall in."""
    return min(round(warmup * steps), steps - 1)


def main_factor(epoch: int, epochs: int) -> float:
    """main.py's learning rate in `epoch` (counted from 0), as a part of --lr: 20 epochs of warmup capped by half a cosine."""
    return min((epoch + 1) / (MAIN_WARMUP + 1e-8), 0.5 * (math.cos(epoch / epochs * math.pi) + 1))


def finetune_factor(epoch: int, epochs: int) -> float:
    """finetune.py's, likewise: half a cosine that lags two epochs, since it steps to `epoch - 1` after an epoch."""
    return 1.0 if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 2) / epochs))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Gives all groups of parameters the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
