"""The arguments of `CRATE` that build a model like the one at hand."""

from __future__ import annotations

from ..files import first_line
from ..model.crate import CRATE
from ..model.transformer import layers_of
from ..modules.step import PUBLISHED_STEP

# What makes the model. `backend` and `stream`, how it is computed, are for who loads it to say.
SIZES = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool", "channels", "dim_head")
ARGUMENTS = (*SIZES, "dropout", "emb_dropout", "ista", "lambd", "step")
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
    return {
        "dim_head": attention.qkv.out_features // attention.heads,
        "dropout": float(attention.dropout.p),
        "ista": float(step.step_size),
        "lambd": float(step.lambd),
    } | ({} if step.name == PUBLISHED_STEP else {"step": step.name})
