"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from ..optional import require
from ..settings import ConfigError, TrainConfig

MAIN_WARMUP = 20  # epochs, in the published main.py


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer that `config` asks for, on all parameters; every step moves all tensors together.

    Raises:
        ConfigError: it cannot move parameters in parts, with --strategy fsdp, in this version of PyTorch.
        MissingPackageError: lion-pytorch is not installed.
    """
    groups = _groups(model, config)
    if config.optimizer == "Lion":
        require("lion_pytorch")
        from lion_pytorch.foreach import Lion

        _check_signs(next(model.parameters()))
        return Lion(groups, lr=config.lr, weight_decay=config.weight_decay)
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "foreach": True}
    if config.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    return {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.optimizer](groups, betas=(0.9, 0.999), **options)


def _check_signs(parameter: nn.Parameter) -> None:
    """Whether Lion's step is there for parameters like this one: of those in parts PyTorch 2.11 takes no signs, 2.14 does."""
    try:
        torch._foreach_sign_([torch.zeros_like(parameter.detach())])
    except NotImplementedError as error:
        raise ConfigError(
            f"--optimizer is 'Lion' and --strategy is 'fsdp', which PyTorch {torch.__version__} cannot run together; "
            "a newer one can, and here AdamW, Adam and SGD can"
        ) from error


def _groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """All parameters in one group that decays; with decay="matrices" vectors and embeddings in another, that does not."""
    if config.decay == "all":
        return [{"params": list(model.parameters())}]
    decaying, other = [], []
    for parameter in model.parameters():
        (decaying if parameter.dim() == 2 else other).append(parameter)
    return [{"params": decaying}, {"params": other, "weight_decay": 0.0}]


def learning_rate_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of `step`, counted from 1 over all epochs, by the schedule that `config` asks for."""
    epoch = (step - 1) // steps_per_epoch
    if config.schedule == "main-epoch":
        return config.lr * main_factor(epoch, config.epochs)
    if config.schedule == "finetune-epoch":
        return config.lr * finetune_factor(epoch, config.epochs)
    return learning_rate(step, steps_per_epoch * config.epochs, config.lr, config.warmup)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of `step` of `steps` (counted from 1): up to `peak` in a line, then down towards 0 in half a cosine.

    `warmup` is the rise's part of all steps.
    """
    rise = warmup_steps(steps, warmup)
    if step <= rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - rise) / (steps - rise)))


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
