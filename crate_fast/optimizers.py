"""The optimizers: one table; imports nothing but what it builds, when it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .optional import require

if TYPE_CHECKING:
    from torch.optim import Optimizer

Build = Callable[..., "Optimizer"]  # of groups of parameters and, by keyword, lr, weight_decay and what `takes` has


class Kind(NamedTuple):
    """An optimizer.

    text: what it is, for the help.
    build: makes it, such that a step moves all tensors together.
    keeps: what it keeps of a parameter, to which a checkpoint that is resumed is held: names in its state.
    takes: the settings that it has beside `lr` and `weight_decay`.
    may_lack: those of `keeps` that are None where the settings want none.
    main, finetune: its name in the published main.py and finetune.py, where it is there.
    needs: an operation of PyTorch that not every version has for parameters in parts, on a list of tensors.
    """

    text: str
    build: Build
    keeps: frozenset[str]
    takes: tuple[str, ...] = ()
    may_lack: frozenset[str] = frozenset()
    main: str | None = None
    finetune: str | None = None
    needs: str | None = None


def _lion(groups: list[dict], *, lr: float, weight_decay: float) -> Optimizer:
    require("lion_pytorch")
    from lion_pytorch.foreach import Lion

    return Lion(groups, lr=lr, weight_decay=weight_decay)


def _adamw(groups: list[dict], *, lr: float, weight_decay: float) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr, (0.9, 0.999), weight_decay=weight_decay, foreach=True)


def _adam(groups: list[dict], *, lr: float, weight_decay: float) -> Optimizer:
    from torch.optim import Adam

    return Adam(groups, lr, (0.9, 0.999), weight_decay=weight_decay, foreach=True)


def _sgd(groups: list[dict], *, lr: float, weight_decay: float, momentum: float) -> Optimizer:
    from torch.optim import SGD

    return SGD(groups, lr, momentum, weight_decay=weight_decay, foreach=True)


MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})

OPTIMIZERS = {
    "Lion": Kind("arXiv:2302.06675", _lion, frozenset({"exp_avg"}), main="Lion", needs="_foreach_sign_"),
    "AdamW": Kind("arXiv:1711.05101", _adamw, MOMENTS, main="AdamW", finetune="adamW"),
    "Adam": Kind("arXiv:1412.6980", _adam, MOMENTS, finetune="adam"),
    "SGD": Kind(
        "with momentum",
        _sgd,
        frozenset({"momentum_buffer"}),
        takes=("momentum",),
        may_lack=frozenset({"momentum_buffer"}),
        finetune="sgd",
    ),
}
"""By name, as `--optimizer` takes it."""
