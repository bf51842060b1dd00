"""Weights to start from: published checkpoints and ours, whatever their shape and from whatever device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..model.crate import CRATE
from ..model.positions import resample_positions
from ..settings import flag
from .read import CheckpointError, Model, model_file, read_model
from .resize import HEAD, grid_of
from .save_load import build, check_floating, constructor_arguments

SAME = ("dim", "depth", "heads", "dim_head", "channels", "patch_size", "ista", "lambd")  # what a weight means hangs on these


def read_weights(path: str | Path) -> Model:
    """The weights in `path`, on the CPU, by the names of `CRATE`; whatever `crate_fast.load_checkpoint` reads.

    Raises:
        CheckpointError: the file is missing, damaged, or has no weights of a CRATE.
    """
    file = model_file(path)
    source = read_model(file)
    if source.arguments is None:
        check_floating(file, source.weights)
        return source
    model = build(file, source.arguments, source.weights, {})  # which checks both
    return source._replace(arguments=constructor_arguments(model), weights=model.state_dict())


def start_from(model: CRATE, source: Model, path: str | Path) -> str:
    """Gives `model` the weights read from `path`, all but the head's; says in a line what was loaded, replaced and missing.

    Position embeddings of another image size are resampled, bicubically.

    Raises:
        CheckpointError: nothing fits, a weight has another shape, or the file says that they are of a model that computes
            something else with them.
    """
    weights, own, told = dict(source.weights), model.state_dict(), source.arguments or {}
    _check_same(constructor_arguments(model), told or source.told, path)
    fresh = [key for key in own if key.startswith(HEAD)]
    wanted = [key for key in own if not key.startswith(HEAD)]
    missing = [key for key in wanted if key not in weights]
    surplus = [key for key in weights if key not in own]
    if len(missing) == len(wanted):
        raise CheckpointError(f"{path}: none of its {len(weights)} weights belongs to this model")
    resampled = ""
    if "pos_embedding" in weights:
        embedding, grid = weights["pos_embedding"], grid_of(model.image_size, model.patch_size)
        there = _grid_there(embedding, told, grid, path)
        if there != grid:
            resampled = ", position embeddings resampled"
            weights["pos_embedding"] = resample_positions(embedding.float(), there, grid)
    for key in wanted:
        if key in weights and weights[key].shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {tuple(weights[key].shape)}; this model's is {tuple(own[key].shape)}, another size"
            )
    loaded = {key: weights[key] for key in wanted if key in weights}
    model.load_state_dict(loaded, strict=False)
    line = f"{path}: {len(loaded)} weights loaded{resampled}; new: the head ({len(fresh)})"
    if told.get("pool", model.pool) != model.pool:
        line += f", which reads by pool {model.pool!r}, not {told['pool']!r} as there"
    line += f"; {source.note}" if source.note else ""
    line += f"; missing there, and random: {', '.join(missing)}" if missing else ""
    return line + (f"; not of this model, and left out: {', '.join(map(str, surplus))}" if surplus else "")


def _check_same(own: dict, told: Mapping, path: str | Path) -> None:
    """Raises CheckpointError where the file says of its weights what makes something else of them than the model does."""
    for name in SAME:
        if name in told and own.get(name, told[name]) != told[name]:
            raise CheckpointError(
                f"{path}: {name} is {told[name]} in it and {own[name]} in this run, which may start from it with "
                f"{_flags(told, path)}"
            )


def _flags(told: Mapping, path: str | Path) -> str:
    """The flags that say what the file does."""
    values = {name: told[name] for name in SAME if name in told and name != "channels"}
    if "patch_size" in told:
        height, width = told["patch_size"]
        if height != width:
            raise CheckpointError(f"{path}: its patches are {height}×{width}, and those of a run are squares")
        values["patch_size"] = height
    return " ".join(f"{flag(name)} {value}" for name, value in values.items())


def _grid_there(embedding: Tensor, told: dict, own: tuple[int, int], path: str | Path) -> tuple[int, int]:
    """(rows, columns) of the patches of `embedding`, (1, 1 + patches, dim): as the file says, else of a square."""
    if told:
        return grid_of(told["image_size"], told["patch_size"])
    patches = embedding.shape[1] - 1 if embedding.dim() == 3 else 0
    side = math.isqrt(max(0, patches))
    if patches > 0 and side**2 == patches:
        return side, side
    if patches != own[0] * own[1]:
        raise CheckpointError(f"{path}: its position embeddings, {tuple(embedding.shape)}, are of no square image")
    return own
