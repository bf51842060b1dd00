"""What a run's checkpoint must hold for the run to go on from it: its checksums tell that it was written, not by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint.read import CheckpointError
from ..optimizers import OPTIMIZERS


def is_count(value: object) -> bool:
    """Whether it is a whole number that counts something."""
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**1000  # which NaN and the infinite are not


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


def _is_score(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 4 and type(value[0]) in (int, float)  # a loss may be infinite
    return value is None or (whole and all(map(is_count, value[1:])))


PLAIN = {
    **dict.fromkeys(("step", "epoch", "logged"), is_count),
    **{"best": _is_number, "meter": lambda value: _are_numbers(value, 4), "score": _is_score},
    **dict.fromkeys(("scaler", "circumstances"), lambda value: isinstance(value, dict)),
}
"""The plain values of a checkpoint by name, and what they must be."""

WEIGHTS_ALONE = "a new run may start from its weights with --init"


def check_values(path: Path, checkpoint: dict) -> dict:
    """The `checkpoint` read from `path`, whose plain values are what the loop will take them for.

    Raises:
        CheckpointError: one is missing or something else.
    """
    for name, is_right in PLAIN.items():
        if name not in checkpoint or not is_right(checkpoint[name]):
            found = str(checkpoint[name])[:100] if name in checkpoint else "missing"
            raise CheckpointError(f"{path}: no checkpoint of a run that can go on: its {name!r} is {found}; {WEIGHTS_ALONE}")
    if not isinstance(checkpoint.get("settings", {}), dict):
        raise CheckpointError(f"{path}: no checkpoint of a run that can go on: its 'settings' are none")
    return checkpoint


def check_place(checkpoint: dict, where: Path, *, epochs: int, steps: int, scaling: dict) -> None:
    """Raises CheckpointError unless step and epoch are of `epochs` of `steps`, and the scaler's state like `scaling`."""
    step, epoch = checkpoint["step"], checkpoint["epoch"]
    if epoch > epochs or not 0 <= step - epoch * steps <= (steps if epoch < epochs else 0):
        has = f"{epochs} of {steps} steps"
        raise CheckpointError(f"{where}: the checkpoint is of step {step} after {epoch} epochs; the run has {has}")
    own, found = scaling, checkpoint["scaler"]
    if own and not all(_is_number(found.get(name)) and found[name] > 0 for name in own if name != "_growth_tracker"):
        raise CheckpointError(f"{where}: the checkpoint's scaling of the loss is {str(found)[:100]}, not that of float16")
    if own and not is_count(found.get("_growth_tracker")):
        raise CheckpointError(f"{where}: the checkpoint's scaling of the loss has not counted its steps")


def check_whole(model: nn.Module, optimizer: Optimizer, checkpoint: dict, wants_mean: bool, where: Path) -> None:
    """Raises CheckpointError unless the tensors of a checkpoint in one file are those of `model` and of its `optimizer`."""
    kind = type(optimizer).__name__
    for part in ("model", "ema") if wants_mean else ("model",):
        _check_like(model.state_dict(), checkpoint.get(part), part, where)
    found = checkpoint.get("optimizer")
    state = found.get("state") if isinstance(found, dict) else None
    parameters = [each for group in optimizer.param_groups for each in group["params"]]  # which its state is numbered by
    if not isinstance(state, dict) or (state and set(state) != set(range(len(parameters)))):
        raise CheckpointError(f"{where}: the checkpoint has no state of {kind} for each of {len(parameters)} parameters")
    for number, moments in state.items():
        if not isinstance(moments, dict) or set(moments) != OPTIMIZERS[kind].keeps:
            raise CheckpointError(f"{where}: the checkpoint's state of the optimizer is none of {kind}")
        for name, value in moments.items():
            if value is None and name in OPTIMIZERS[kind].may_lack:
                continue
            expected = () if name == "step" else parameters[number].shape
            if not isinstance(value, Tensor) or value.shape != expected or not value.is_floating_point():
                raise CheckpointError(f"{where}: the checkpoint's {name!r} of parameter {number} is none of {kind}")


def _check_like(own: dict[str, Tensor], found: object, part: str, where: Path) -> None:
    if not isinstance(found, dict) or set(found) != set(own):
        raise CheckpointError(f"{where}: the checkpoint's {part!r} has not the weights of this run's model")
    for name, value in own.items():
        like = found[name]
        if not isinstance(like, Tensor) or like.shape != value.shape or not like.is_floating_point():
            raise CheckpointError(f"{where}: the checkpoint's {name!r} of {part!r} is none of this run's model")
