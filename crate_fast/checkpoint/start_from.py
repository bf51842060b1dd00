"""Weights to start from: published checkpoints and ours, whatever their shape and from whatever device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..model.positions import resample_positions
from ..modules.step import PUBLISHED_STEP
from ..settings import flag
from .constructor import PUBLISHED_MODEL, body_arguments, build, check_floating, constructor_arguments, difference_of
from .layouts import joined
from .mae import MAE_ARGUMENTS, NOTE, as_crate, crate_arguments, infer_mae, is_mae, mae_arguments, mae_keywords
from .mae import OPEN as OPEN_OF_MAE
from .published import OPEN
from .read import CheckpointError, Model, model_file, read_model
from .resize import HEAD, grid_of

SAME_LAYERS = ("dim", "depth", "heads", "dim_head", "channels", "ista", "lambd")
SAME = (*SAME_LAYERS, "patch_size")  # what a weight means hangs on these
OF_SHAPES_ALIKE = {
    "num_heads": "heads",
    "decoder_num_heads": "heads",
    "lambd": "lambd",
}  # of a CRATE-MAE, and what a run calls it


def read_weights(path: str | Path) -> Model:
    """The weights in `path`, on the CPU, by the names of `CRATE`; whatever `crate_fast.load_checkpoint` reads, of a CRATE-MAE
    those of its encoder.

    Raises:
        CheckpointError: the file is missing, damaged, or has no weights of a CRATE.
    """
    file = model_file(path)
    source = read_model(file)
    if is_mae(source.weights):
        return _encoder(file, source)
    if source.arguments is None:
        check_floating(file, source.weights)
        return source
    model = build(file, source.arguments, source.weights, {})  # which checks both
    return source._replace(arguments=constructor_arguments(model), weights=model.state_dict())


def encoder_settings(path: str | Path, heads: int | None = None) -> dict:
    """What a run must be set to for a CRATE to start from the encoder of a CRATE-MAE, by setting: what the file states, else
    what its shapes tell and, as published, the threshold; {} for other weights.

    Args:
        heads: how many, where that was said; of a file that states no number they are these.

    Raises: as `read_weights`.
    """
    file = model_file(path)
    source = read_model(file)
    if not is_mae(source.weights):
        return {}
    arguments = source.arguments
    if arguments is None:
        try:
            arguments, _ = infer_mae(source.weights, mae_keywords({} if heads is None else {"heads": heads}))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    elif not isinstance(arguments, dict) or set(arguments) != set(MAE_ARGUMENTS):
        return {}  # which is told as it is built
    found = crate_arguments(arguments) | {"image_size": arguments["img_size"], "patch_size": arguments["patch_size"]}
    return {name: found[name] for name in ("image_size", *SAME) if name in found and name != "channels"}


def go_on_from(model: CRATEMAE, path: str | os.PathLike) -> str:
    """Gives `model` the weights of a CRATE-MAE of its own sizes in `path`; says in a line that it did.

    Raises:
        CheckpointError: they cannot be read, or are of something else, or the file says that they are of a model that computes
            something else with them.
    """
    file = model_file(path)
    source = read_model(file)
    if not is_mae(source.weights):
        raise CheckpointError(f"{file}: it holds no CRATE-MAE, and a run with --objective patches starts from nothing else")
    check_floating(file, source.weights)
    if source.arguments is not None:
        stated = mae_arguments(build(file, source.arguments, source.weights, {}, CRATEMAE))
        _check_stated(mae_arguments(model), stated, file)
    difference = difference_of(model, source.weights)
    if difference is not None:
        raise CheckpointError(f"{file}: {difference}, in this run")
    model.load_state_dict(source.weights)
    return f"{file}: {len(source.weights)} weights loaded"


def _check_stated(own: dict, stated: dict, file: Path) -> None:
    """Raises CheckpointError where a CRATE-MAE's file states what its shapes do not tell, and a run has it otherwise."""
    for name, setting in OF_SHAPES_ALIKE.items():
        if own[name] != stated[name]:
            words = f"{name} is {stated[name]} in it and {own[name]} in this run"
            raise CheckpointError(f"{file}: {words}, which may start from it with {_flags({setting: stated[name]})}")


def _encoder(file: Path, source: Model) -> Model:
    """The encoder of a CRATE-MAE as weights of a CRATE, of which the head is missing."""
    arguments, weights = None, source.weights
    check_floating(file, weights)
    if source.arguments is not None:
        model = build(file, source.arguments, weights, {}, CRATEMAE)
        arguments, weights = crate_arguments(mae_arguments(model)), model.state_dict()
    try:
        return Model(arguments, as_crate(weights), source.transform if arguments else None, joined(source.note, NOTE))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


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
    cut = _of_other_patches(own, weights)
    _check_same(body_arguments(model), stated or source.inferred, path, say or _flags, SAME if not cut else SAME_LAYERS)
    if source.arguments is None and NOTE in (source.note or ""):
        _check_threshold(model, path)
    head = [key for key in own if (key.startswith(HEAD) if new is None else key in new)]
    cut = [key for key in cut if key not in head]
    wanted = [key for key in own if key not in (*head, *cut)]
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
    line += "; new: the embedding of patches, which are of another size there" if cut else ""
    if stated.get("pool", model.pool) != model.pool:
        line += f", which reads by pool {model.pool!r}, not {stated['pool']!r} as there"
    line += f"; {source.note}" if source.note else ""
    line += f"; missing there, and random: {', '.join(missing)}" if missing else ""
    return line + (f"; not of this model, and left out: {', '.join(map(str, surplus))}" if surplus else "")


def _of_other_patches(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """The names of a CRATE-α's embedding of patches, where that of `weights` is of other patches: it then begins anew."""
    there, here = (of.get("conv1.weight") for of in (weights, own))
    if there is None or here is None or there.dim() != 4 or there.shape[:2] != here.shape[:2]:
        return []
    return [key for key in own if key.startswith("conv1.")] if there.shape != here.shape else []


def _check_same(
    own: dict, stated: Mapping, path: str | os.PathLike, say: Callable[[dict[str, Any]], str], names: tuple[str, ...]
) -> None:
    """Raises CheckpointError where the file says of its weights what makes something else of them than the model does."""
    there, mine = (arguments.get("model", PUBLISHED_MODEL) for arguments in (stated, own))
    here = "this run" if say is _flags else "this model"
    if there != mine:
        raise CheckpointError(f"{path}: it is a {there}, and {'the model of ' * (say is _flags)}{here} a {mine}")
    for name in names:
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


def _check_threshold(model: CRATE, path: str | os.PathLike) -> None:
    """Raises CheckpointError where `model` has a CRATE's own threshold and starts from a CRATE-MAE that does not say its."""
    if body_arguments(model).get("lambd") == OPEN["lambd"]:
        published = OPEN_OF_MAE["lambd"]
        raise CheckpointError(
            f"{path}: weights of a CRATE-MAE that do not say their threshold, and lambd is {OPEN['lambd']} in this run; it may "
            f"start from them with --lambd {published}, as published, or what they were trained with"
        )


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
