"""Models and checkpoints as files: written whole or not at all, checked when read, never executed.

A model file is safetensors with the published state_dict keys; the constructor's arguments stand as JSON in its metadata.
A checkpoint is a `torch.save` archive of plain values and tensors, read with `weights_only=True`.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .extras import require
from .model import CRATE

METADATA_KEY = "crate_fast"
# What makes the model. `backend` and `stream`, how it is computed, are for who loads it to say.
SIZES = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool", "channels", "dim_head")
ARGUMENTS = (*SIZES, "dropout", "emb_dropout", "ista", "lambd")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ZIP_SIGNATURE = b"PK\x03\x04"


class CheckpointError(ValueError):
    """A file is missing, damaged, or does not hold what it should; the message names the file and what is wrong."""


def constructor_arguments(model: CRATE) -> dict:
    """The arguments of `CRATE` that build a model like this one, as plain numbers, strings and lists.

    Raises:
        ValueError: no arguments do, since the model was changed after it was built.
    """
    transformer = model.transformer
    arguments = {
        "image_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "num_classes": model.mlp_head[1].out_features,
        "dim": transformer.dim,
        "depth": transformer.depth,
        "heads": transformer.heads,
        "pool": model.pool,
        "channels": model.channels,
        "emb_dropout": model.dropout.p,
    }
    of_layers = [_layer_arguments(mssa.fn, ista.fn) for mssa, ista in transformer.layers]
    if any(layer != of_layers[0] for layer in of_layers):
        raise ValueError("the layers differ in dim_head, dropout, ista or lambd; the constructor gives all the same")
    return arguments | (of_layers[0] if of_layers else {})


def _layer_arguments(attention, feed_forward) -> dict:
    return {
        "dim_head": attention.qkv.out_features // attention.heads,
        "dropout": attention.dropout.p,
        "ista": feed_forward.step_size,
        "lambd": feed_forward.lambd,
    }


def save_model(model: CRATE, path: str | os.PathLike) -> None:
    """Writes weights (in their own dtypes) and constructor arguments of `model` to `path`, as safetensors.

    Raises:
        TypeError: `model` is not a CRATE.
        ValueError: it was changed after it was built, so that `load_model` could not build it again.
        OSError: `path` cannot be written.
    """
    require("safetensors")
    from safetensors.torch import save

    arguments, weights = _describe(model)
    tensors = {key: value.detach().contiguous() for key, value in weights.items()}
    # One entry: safetensors does not keep the order of several, and equal models should be equal files.
    data = save(tensors, metadata={METADATA_KEY: json.dumps(arguments)})
    write_atomically(path, lambda file: file.write(data))


def save_checkpoint(model: CRATE, path: str | os.PathLike, **state) -> None:
    """Writes `model` and `state` (tensors and plain values: optimizer state, counters) to `path`, for `load_checkpoint`.

    Raises: as `save_model`.
    """
    arguments, weights = _describe(model)
    content = {"arguments": arguments, "model": weights, **state}
    write_atomically(path, lambda file: torch.save(content, file))


def _describe(model: CRATE) -> tuple[dict, dict[str, Tensor]]:
    """(constructor arguments, state_dict), checked to fit each other."""
    if not isinstance(model, CRATE):
        raise TypeError(f"the model is a {type(model).__name__}; it must be a crate_fast.CRATE")
    arguments, weights = constructor_arguments(model), model.state_dict()
    difference = _difference(_skeleton(arguments), weights)
    if difference:
        raise ValueError(f"the model was changed after it was built: {difference}")
    return arguments, weights


def load_model(path: str | os.PathLike, **overrides) -> CRATE:
    """The model in `path`, a file of `save_model` or `save_checkpoint`: on the CPU, in evaluation mode, dtypes as saved.

    Args:
        path: the file.
        overrides: keywords of `CRATE` that replace the saved ones, such as `backend`.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no model, or one of other names or shapes.
        TypeError: `overrides` has a keyword that CRATE does not take.
    """
    unknown = sorted(set(overrides) - set(inspect.signature(CRATE).parameters))
    if unknown:
        raise TypeError(f"CRATE takes no {', '.join(unknown)}")
    path = Path(path)
    if _signature(path) == ZIP_SIGNATURE:
        checkpoint = load_checkpoint(path)
        arguments, weights = checkpoint["arguments"], checkpoint["model"]
    else:
        arguments, weights = _read_safetensors(path)
    return _build(path, arguments, weights, overrides)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` wrote: "arguments", "model" and its `state`, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    path = Path(path)
    if _signature(path) == ZIP_SIGNATURE:
        _check_sums(path)
    content = read_safely(path, "damaged, or no checkpoint of crate-fast")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("arguments", "model")):
        raise CheckpointError(f"{path}: no checkpoint of crate-fast: it has no 'arguments' and 'model'")
    return content


def read_safely(path: Path, otherwise: str) -> object:
    """What `torch.save` wrote to `path`, on the CPU: tensors and plain values, or a CheckpointError that says `otherwise`."""
    try:
        with warnings.catch_warnings():  # what is refused is refused in one line, without PyTorch's advice on it
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise anything; nothing in it has been executed
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None:
            reason = f"it asks for {asked[1]}, and only tensors and plain values are read"
        else:
            reason = "it is no file of torch.save" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(f"{path}: {otherwise} ({reason})") from error


def _check_sums(path: Path) -> None:
    """Raises CheckpointError unless all parts of the archive have the CRC-32 that was written; PyTorch looks at none."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: {damaged} is not what was written")


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a file beside `path`, flushes it to the disk and renames it: `path` is the old file or all of the new.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lives in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _signature(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(ZIP_SIGNATURE))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, since what safetensors gives may lie in the file's own pages, at any alignment.
            weights = {key: file.get_tensor(key).clone() for key in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not safetensors ({first_line(error)})") from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: no model of crate-fast: its metadata has no {METADATA_KEY!r}")
    try:
        return json.loads(metadata[METADATA_KEY]), weights
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {METADATA_KEY!r} is not JSON ({error})") from error


def _build(path: Path, arguments: object, weights: dict[str, Tensor], overrides: dict) -> CRATE:
    if not isinstance(arguments, dict) or not set(arguments) <= set(ARGUMENTS):
        raise CheckpointError(f"{path}: its metadata does not hold arguments of CRATE: {str(arguments)[:200]}")
    wrong = next((k for k, v in weights.items() if not isinstance(v, Tensor) or v.dtype not in FLOATING), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong!r} is no tensor of real floating point")
    number = next((name for name in ("ista", "lambd") if not _is_finite(arguments.get(name, 0.0))), None)
    if number is not None:
        raise CheckpointError(f"{path}: its argument {number} is {str(arguments[number])[:200]!r}; it must be a finite number")
    # Before anything is built: a false depth could keep the constructor busy for ever.
    layers = {key.split(".")[2] for key in weights if isinstance(key, str) and key.startswith("transformer.layers.")}
    arguments = arguments | overrides
    if arguments.get("depth") != len(layers):
        raise CheckpointError(f"{path}: it has the weights of {len(layers)} layers; depth is {arguments.get('depth')!r}")
    try:
        model = _skeleton(arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its arguments build no CRATE ({first_line(error)})") from error
    difference = _difference(model, weights)
    if difference:
        raise CheckpointError(f"{path}: {difference}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _skeleton(arguments: dict) -> CRATE:
    """The model without memory for its weights, and without drawing them."""
    with torch.device("meta"):
        return CRATE(**arguments)


def _difference(model: CRATE, weights: dict[str, Tensor]) -> str | None:
    """The first thing in which names and shapes of `weights` are not those of `model`, in words; None if nothing."""
    expected = model.state_dict()
    missing = sorted(set(expected) - set(weights))
    surplus = sorted(set(weights) - set(expected), key=str)
    if missing:
        return f"{len(missing)} weights are missing, {missing[0]!r} first"
    if surplus:
        return f"{len(surplus)} weights do not belong to the model, {surplus[0]!r} first"
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            return f"{key!r} has shape {tuple(weights[key].shape)}; it must be {tuple(value.shape)}"
    return None


def first_line(error: BaseException) -> str:
    """An error's message, cut off at its first line; the name of its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
