"""The optimizers: one table; imports nothing but what it builds, when it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .optional import require

if TYPE_CHECKING:
    from torch.optim import Optimizer

Build = Callable[..., "Optimizer"]  # of groups of parameters and, by keyword, lr, weight_decay and what `takes` has


class OptimizerEntry(NamedTuple):
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


def _lion(groups: list[dict], *, lr: float, weight_decay: float, beta1: float | None, beta2: float | None) -> Optimizer:
    require("lion_pytorch")
    from lion_pytorch.foreach import Lion

    return Lion(groups, lr=lr, betas=_betas(beta1, beta2, 0.99), weight_decay=weight_decay)


def _adamw(groups: list[dict], *, lr: float, weight_decay: float, beta1: float | None, beta2: float | None) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr, _betas(beta1, beta2, 0.999), weight_decay=weight_decay, foreach=True)


def _adam(groups: list[dict], *, lr: float, weight_decay: float, beta1: float | None, beta2: float | None) -> Optimizer:
    from torch.optim import Adam

    return Adam(groups, lr, _betas(beta1, beta2, 0.999), weight_decay=weight_decay, foreach=True)


def _betas(beta1: float | None, beta2: float | None, second: float) -> tuple[float, float]:
    """The decays of both means, those of the published scripts where none is asked for."""
    return 0.9 if beta1 is None else beta1, second if beta2 is None else beta2


def _sgd(groups: list[dict], *, lr: float, weight_decay: float, momentum: float) -> Optimizer:
    from torch.optim import SGD

    return SGD(groups, lr, momentum, weight_decay=weight_decay, foreach=True)


MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})
BETAS = ("beta1", "beta2")

OPTIMIZERS = {
    "Lion": OptimizerEntry("arXiv:2302.06675", _lion, frozenset({"exp_avg"}), BETAS, main="Lion", needs="_foreach_sign_"),
    "AdamW": OptimizerEntry("arXiv:1711.05101", _adamw, MOMENTS, BETAS, main="AdamW", finetune="adamW"),
    "Adam": OptimizerEntry("arXiv:1412.6980", _adam, MOMENTS, BETAS, finetune="adam"),
    "SGD": OptimizerEntry(
        "with momentum",
        _sgd,
        frozenset({"momentum_buffer"}),
        takes=("momentum",),
        may_lack=frozenset({"momentum_buffer"}),
        finetune="sgd",
    ),
}
"""By name, as `--optimizer` takes it."""
