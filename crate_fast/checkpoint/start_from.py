"""Weights to start from: published checkpoints and ours, whatever their shape and from whatever device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.crate import CRATE
from ..model.positions import resample_positions
from ..modules.step import PUBLISHED_STEP
from ..settings import flag
from .constructor import body_arguments, build, check_floating, constructor_arguments
from .read import CheckpointError, Model, model_file, read_model
from .resize import HEAD, grid_of

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


def start_from(
    model: CRATE,
    source: Model,
    path: str | os.PathLike,
    new: Collection[str] | None = None,
    say: Callable[[dict[str, Any]], str] | None = None,
) -> str:
    """Gives `model` the weights read from `path`; says in a line what was loaded, replaced and missing.

    Position embeddings of another image size are resampled, bicubically.

    Args:
        new: names of weights that stay as they are; None: those of the head.
        say: how whoever made the model says arguments; None: by flags of `crate-fast train`.

    Raises:
        CheckpointError: nothing fits, a weight has another shape, or the file says that they are of a model that computes
            something else with them.
    """
    weights, own, stated = dict(source.weights), model.state_dict(), source.arguments or {}
    _check_same(body_arguments(model), stated or source.inferred, path, say or _flags)
    head = [key for key in own if (key.startswith(HEAD) if new is None else key in new)]
    wanted = [key for key in own if key not in head]
    missing = [key for key in wanted if key not in weights]
    surplus = [key for key in weights if key not in own]
    if len(missing) == len(wanted):
        raise CheckpointError(f"{path}: none of its {len(weights)} weights belongs to this model")
    resampled = ""
    if "pos_embedding" in weights:
        embedding, grid = weights["pos_embedding"], grid_of(model.image_size, model.patch_size)
        there = _grid_there(embedding, stated, grid, path)
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
    line = f"{path}: {len(loaded)} weights loaded{resampled}"
    line += f"; new: the head ({len(head)})" if head else ""
    if stated.get("pool", model.pool) != model.pool:
        line += f", which reads by pool {model.pool!r}, not {stated['pool']!r} as there"
    line += f"; {source.note}" if source.note else ""
    line += f"; missing there, and random: {', '.join(missing)}" if missing else ""
    return line + (f"; not of this model, and left out: {', '.join(map(str, surplus))}" if surplus else "")


def _check_same(own: dict, stated: Mapping, path: str | os.PathLike, say: Callable[[dict[str, Any]], str]) -> None:
    """Raises CheckpointError where the file says of its weights what makes something else of them than the model does."""
    here = "this run" if say is _flags else "this model"
    for name in SAME:
        if name in stated and own.get(name, stated[name]) != stated[name]:
            try:
                words = say({name: stated[name] for name in SAME if name in stated and name != "channels"})
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            raise CheckpointError(
                f"{path}: {name} is {stated[name]} in it and {own[name]} in {here}, which may start from it with {words}"
            )
    there, mine = (arguments.get("step", PUBLISHED_STEP) for arguments in (stated, own))
    if stated and there != mine:
        raise CheckpointError(f"{path}: step is {there!r} in it and {mine!r} in {here}, for which its weights mean nothing")


def _flags(values: dict[str, Any]) -> str:
    """The flags that say what the file does; raises ValueError where none do."""
    height, width = values.get("patch_size", (0, 0))
    if height != width:
        raise ValueError(f"its patches are {height}×{width}, and those of a run are squares")
    return " ".join(f"{flag(name)} {height if name == 'patch_size' else value}" for name, value in values.items())


def _grid_there(embedding: Tensor, stated: dict, own: tuple[int, int], path: str | os.PathLike) -> tuple[int, int]:
    """(rows, columns) of the patches of `embedding`, (1, 1 + patches, dim): as the file says, else of a square."""
    if stated:
        return grid_of(stated["image_size"], stated["patch_size"])
    patches = embedding.shape[1] - 1 if embedding.dim() == 3 else 0
    side = math.isqrt(max(0, patches))
    if patches > 0 and side**2 == patches:
        return side, side
    if patches != own[0] * own[1]:
        raise CheckpointError(f"{path}: its position embeddings, {tuple(embedding.shape)}, are of no square image")
    return own
