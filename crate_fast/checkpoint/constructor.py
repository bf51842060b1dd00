"""The arguments of `CRATE` that build a model like the one at hand, and the model that arguments and weights build."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import first_line, shown
from ..model.alpha import CRATEAlpha
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..model.transformer import layers_of
from ..modules.step import PUBLISHED_STEP, SparseStep
from .layouts import rewritten
from .mae import LAYERS, MAE_ARGUMENTS, depth_of

# What makes the model. `backend` and `stream`, how it is computed, are for who loads it to say.
SIZES = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool", "channels", "dim_head")
ARGUMENTS = (*SIZES, "dropout", "emb_dropout", "ista", "lambd", "step")
OF_MODELS = ("model", *ARGUMENTS, "init_values")
"""Those of a CRATE's and of other members of the family: which of them it is, and what they alone take."""
NOT_OF_ALPHA = ("pool", "step", "stream")  # keywords of CRATE that CRATEAlpha has not
MODELS: dict[str, type[CRATE]] = {"CRATE": CRATE, "CRATEAlpha": CRATEAlpha}
PUBLISHED_MODEL = "CRATE"  # what files mean that name none
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHANGED = "the model was changed after it was built"
OF_CRATE = CRATE.__name__, OF_MODELS, {"depth": "transformer.layers."}
OF_MAE = CRATEMAE.__name__, MAE_ARGUMENTS, LAYERS
Built = TypeVar("Built", CRATE, CRATEMAE)


def constructor_arguments(model: CRATE) -> dict:
    """The arguments of `CRATE` that build a model like this one, as plain numbers, strings and lists; of another member of the
    family those of its class, and as "model" which it is.

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
    arguments |= of_layers[0] if of_layers else {}
    return _of_alpha(model, arguments) if isinstance(model, CRATEAlpha) else arguments


def _of_alpha(model: CRATEAlpha, arguments: dict) -> dict:
    """Those that a CRATEAlpha takes, of those that CRATE does."""
    arguments = {name: value for name, value in arguments.items() if name not in NOT_OF_ALPHA}
    scale = {} if model.init_values is None else {"init_values": model.init_values}
    return {"model": "CRATEAlpha"} | arguments | scale


def class_of(arguments: dict, kind: type[Built]) -> type:
    """The class that `arguments` name, or `kind` where that is one of it; raises ValueError where it is another's. A CRATEMAE's
    name none."""
    if issubclass(kind, CRATEMAE):
        return kind
    name = arguments.get("model", PUBLISHED_MODEL)
    if name not in MODELS:
        raise ValueError(f"model is {shown(name)}; allowed are {', '.join(map(repr, MODELS))}")
    named = MODELS[name]
    if kind is CRATE or kind is named:
        return named
    family = next(each for each in reversed(MODELS.values()) if issubclass(kind, each))
    if family is not named:
        raise ValueError(f"it is a {name}, and no {kind.__name__}")
    return kind


def _layer_arguments(attention, step) -> dict:
    if not isinstance(step, SparseStep):
        raise TypeError(rewritten(f"fn.{name}" for name in step.state_dict()) or f"a {type(step).__name__} is no step of CRATE")
    return {
        "dim_head": attention.qkv.out_features // attention.heads,
        "dropout": float(attention.dropout.p),
        "ista": float(step.step_size),
        "lambd": float(step.lambd),
    } | ({} if step.name == PUBLISHED_STEP else {"step": step.name})


def build(path: Path, arguments: object, weights: dict[str, Tensor], overrides: dict, kind: type[Built] = CRATE) -> Built:
    """The model of what was read from `path`, in evaluation mode; raises CheckpointError where that makes none."""
    name, taken, layers = OF_MAE if issubclass(kind, CRATEMAE) else OF_CRATE
    if not isinstance(arguments, dict) or not set(arguments) <= set(taken):
        raise CheckpointError(f"{path}: its metadata does not hold arguments of {name}: {shown(arguments)}")
    check_floating(path, weights)
    arguments = arguments | overrides
    number = next((each for each in ("ista", "lambd") if not _is_size(arguments.get(each, 0.0))), None)
    if number is not None:
        words = f"its argument {number} is {shown(arguments[number])}; it must be a finite number, at least 0"
        raise CheckpointError(f"{path}: {words}")
    # Before anything is built: a false depth could keep the constructor busy for ever.
    for depth, prefix in layers.items():
        count = depth_of(weights, prefix)
        if arguments.get(depth) != count:
            raise CheckpointError(f"{path}: it has the weights of {count} layers; {depth} is {shown(arguments.get(depth))}")
    try:
        wrong = sorted(untaken(class_of(arguments, kind), arguments) - {"model"})
        if wrong:
            raise CheckpointError(f"{path}: it holds a {arguments.get('model', name)}, which has no {wrong[0]}")
        model = skeleton(arguments, kind)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        asked = "".join(f", with {each}={shown(value)}," for each, value in list(overrides.items())[:1])
        raise CheckpointError(f"{path}: its arguments{asked} build no {name} ({first_line(error)})") from error
    difference = difference_of(model, weights)
    if difference:
        raise CheckpointError(f"{path}: {difference}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def untaken(kind: type, arguments: dict) -> set[str]:
    """Which of the keywords the class does not take."""
    taken = inspect.signature(kind).parameters
    return set() if any(each.kind is each.VAR_KEYWORD for each in taken.values()) else set(arguments) - set(taken)


def check_floating(path: Path, weights: dict) -> None:
    """Raises CheckpointError where one of the weights is no tensor that a model computes with, such as a quantised one."""
    wrong = next((k for k, v in weights.items() if not isinstance(v, Tensor) or v.dtype not in FLOATING), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong!r} is no tensor of real floating point")


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def skeleton(arguments: dict, kind: type[Built] = CRATE) -> Built:
    """The model without memory for its weights, and without drawing them."""
    named = class_of(arguments, kind)
    with torch.device("meta"):
        return named(**{name: value for name, value in arguments.items() if name != "model"})


def difference_of(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
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
