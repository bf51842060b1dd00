"""The arguments of `CRATE` that build a model like the one at hand, and the model that arguments and weights build."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import first_line, shown
from ..model.crate import CRATE
from ..model.transformer import layers_of
from ..modules.step import PUBLISHED_STEP, SparseStep
from .layouts import rewritten

# What makes the model. `backend` and `stream`, how it is computed, are for who loads it to say.
SIZES = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool", "channels", "dim_head")
ARGUMENTS = (*SIZES, "dropout", "emb_dropout", "ista", "lambd", "step")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHANGED = "the model was changed after it was built"


def constructor_arguments(model: CRATE) -> dict:
    """The arguments of `CRATE` that build a model like this one, as plain numbers, strings and lists.

    Raises:
        ValueError: no arguments do, since the model was changed after it was built.
    """
    try:
        return _arguments_of(model, model.mlp_head[1].out_features, model.pool)
    except (AttributeError, TypeError, IndexError) as error:  # a module in the place of another
        raise ValueError(f"{CHANGED}: {first_line(error)}") from error


def body_arguments(model: CRATE) -> dict:
    """Those of the arguments that say what is before the head, which may be another than the constructor's."""
    arguments = _arguments_of(model, None, None)
    return {name: value for name, value in arguments.items() if name not in ("num_classes", "pool")}


def _arguments_of(model: CRATE, num_classes: object, pool: object) -> dict:
    transformer = model.transformer
    arguments = {
        "image_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "num_classes": num_classes,
        "dim": transformer.dim,
        "depth": transformer.depth,
        "heads": transformer.heads,
        "pool": pool,
        "channels": model.channels,
        "emb_dropout": float(model.dropout.p),
    }
    of_layers = [_layer_arguments(mssa.fn, sparse.fn) for mssa, sparse in layers_of(transformer)]
    if any(layer != of_layers[0] for layer in of_layers):
        raise ValueError("the layers differ in dim_head, dropout, ista, lambd or step; the constructor gives all the same")
    return arguments | (of_layers[0] if of_layers else {})


def _layer_arguments(attention, step) -> dict:
    if not isinstance(step, SparseStep):
        raise TypeError(rewritten(f"fn.{name}" for name in step.state_dict()) or f"a {type(step).__name__} is no step of CRATE")
    return {
        "dim_head": attention.qkv.out_features // attention.heads,
        "dropout": float(attention.dropout.p),
        "ista": float(step.step_size),
        "lambd": float(step.lambd),
    } | ({} if step.name == PUBLISHED_STEP else {"step": step.name})


def build(path: Path, arguments: object, weights: dict[str, Tensor], overrides: dict, kind: type[CRATE] = CRATE) -> CRATE:
    """The model of what was read from `path`, in evaluation mode; raises CheckpointError where that makes none."""
    if not isinstance(arguments, dict) or not set(arguments) <= set(ARGUMENTS):
        raise CheckpointError(f"{path}: its metadata does not hold arguments of CRATE: {shown(arguments)}")
    check_floating(path, weights)
    arguments = arguments | overrides
    number = next((name for name in ("ista", "lambd") if not _is_size(arguments.get(name, 0.0))), None)
    if number is not None:
        words = f"its argument {number} is {shown(arguments[number])}; it must be a finite number, at least 0"
        raise CheckpointError(f"{path}: {words}")
    # Before anything is built: a false depth could keep the constructor busy for ever.
    layers = {key.split(".")[2] for key in weights if isinstance(key, str) and key.startswith("transformer.layers.")}
    if arguments.get("depth") != len(layers):
        raise CheckpointError(f"{path}: it has the weights of {len(layers)} layers; depth is {shown(arguments.get('depth'))}")
    try:
        model = skeleton(arguments, kind)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        asked = "".join(f", with {name}={shown(value)}," for name, value in list(overrides.items())[:1])
        raise CheckpointError(f"{path}: its arguments{asked} build no CRATE ({first_line(error)})") from error
    difference = difference_of(model, weights)
    if difference:
        raise CheckpointError(f"{path}: {difference}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def check_floating(path: Path, weights: dict) -> None:
    """Raises CheckpointError where one of the weights is no tensor that a model computes with, such as a quantised one."""
    wrong = next((k for k, v in weights.items() if not isinstance(v, Tensor) or v.dtype not in FLOATING), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong!r} is no tensor of real floating point")


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def skeleton(arguments: dict, kind: type[CRATE] = CRATE) -> CRATE:
    """The model without memory for its weights, and without drawing them."""
    with torch.device("meta"):
        return kind(**arguments)


def difference_of(model: CRATE, weights: dict[str, Tensor]) -> str | None:
    """The first thing in which names and shapes of `weights` are not those of `model`, in words; None if nothing."""
    expected = model.state_dict()
    missing = sorted(set(expected) - set(weights))
    surplus = sorted(set(weights) - set(expected), key=str)
    if missing:
        return rewritten(surplus) or f"{len(missing)} weights are missing, {missing[0]!r} first"
    if surplus:
        return f"{len(surplus)} weights do not belong to the model, {surplus[0]!r} first"
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            return f"{key!r} has shape {tuple(weights[key].shape)}; it must be {tuple(value.shape)}"
    return None
