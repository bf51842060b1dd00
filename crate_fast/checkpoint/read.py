"""Reading what files hold: safetensors and PyTorch's archives, checked, never executed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..eval_transform import FINETUNE, MAIN, Transform, read_transform
from ..files import digest_of, first_line, parse_json, shown
from ..optional import MissingPackageError, require
from . import distributed
from .archives import ZIP_SIGNATURE, DamagedError, read_archive, read_beside_others, signature_of, unread
from .hub_config import settled
from .layouts import Found, choose, find_weights, is_name, joined, rewritten
from .published import model_of, without_unused
from .tensor_files import DIGEST, INDEX_NAME, METADATA_KEY, MODEL_NAME, read_shards, read_tensors
from .unfinished import newest_checkpoint

TRANSFORM = "evaluation"  # beside the constructor's arguments in safetensors, and a checkpoint's own entry
# By where main.py and finetune.py put their weights.
PUBLISHED: dict[str | None, Transform] = {"state_dict": MAIN, "model": FINETUNE}
SUFFIXES = (".pt", ".pth", ".tar", ".safetensors", ".bin", ".ckpt", ".t7")  # of files, and of no model on the Hub
OLD_NAME, ADAPTER_NAME = "pytorch_model.bin", "adapter_config.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_file(source: str | os.PathLike) -> Path:
    """The file that `source` means: itself, the model of the directory it is, or that of a Hub's model, brought here.

    Of a run that has not ended it is the newest checkpoint, which a line on stderr names.

    Raises:
        CheckpointError: the directory has no model in it, or the Hub has none.
        MissingPackageError: huggingface-hub is not installed, and there is no such file.
    """
    path = Path(source)
    if path.is_dir() and not distributed.is_in_parts(path):
        return in_directory(path) or _of_unfinished(path)
    name = str(source)
    if path.exists() or path.parent.is_dir() or path.suffix in SUFFIXES or not HUB_NAME.fullmatch(name):
        return path
    try:
        require("huggingface_hub")
    except MissingPackageError as error:
        raise MissingPackageError(f"{name}: no such file; to look for it on the Hugging Face Hub, {error}") from error
    from .hub import download

    return download(name)


def in_directory(folder: Path) -> Path | None:
    """The model of a directory, or the index of the files it is split into, or what timm's `save_for_hf` and older versions of
    transformers write; None where it has none of them."""
    return next((folder / name for name in (MODEL_NAME, INDEX_NAME, OLD_NAME) if (folder / name).is_file()), None)


def _of_unfinished(run: Path) -> Path:
    """The newest checkpoint of a directory that has no model; raises CheckpointError where it has none."""
    try:
        newest = newest_checkpoint(run)
    except OSError as error:
        raise unread(run, error) from error
    if newest is None and (run / ADAPTER_NAME).is_file():
        raise CheckpointError(f"{run}: an adapter of PEFT's without the model it is for: save what merge_and_unload() gives")
    if newest is None:
        raise CheckpointError(f"{run}: a directory with no {MODEL_NAME} in it, and with no checkpoints of a run")
    return newest


class Model(NamedTuple):
    """What a file tells of a model.

    arguments: the constructor's, where the file has them.
    weights: on the CPU, by the names of `CRATE`.
    transform: how its images are evaluated, where the file, or its kind, says it.
    note: a line on what else is in the file, if anything.
    inferred: of the constructor's arguments, where the file has none, those that names in it tell and shapes do not.
    """

    arguments: dict | None
    weights: dict[str, Tensor]
    transform: Transform | None
    note: str | None = None
    inferred: Mapping[str, Any] = MappingProxyType({})


def read_model(path: Path, wanted: str | None = None) -> Model:
    """The model in any file; of its weights and their mean over the steps the one that is `wanted`, see `find_weights`.

    Raises:
        CheckpointError: the file is missing or damaged, asks for code to be run, has no weights of a CRATE, or not those.
    """
    try:
        if path.is_dir():
            return _read_parts_of_others(path, wanted) if distributed.is_of_others(path) else _read_parts(path, wanted)
        return _read_file(path, wanted)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def _read_file(path: Path, wanted: str | None) -> Model:
    if path.name == INDEX_NAME:
        return _without_metadata(path, find_weights(read_shards(path), wanted))
    start = signature_of(path)
    if start[8:] == b"{" and not start.startswith(ZIP_SIGNATURE):
        return _read_safetensors(path, wanted)
    content, objects = read_beside_others(path, "damaged, or neither safetensors nor a checkpoint")
    found = find_weights(content, wanted)
    if not found.weights:
        asked = f" (it asks for {min(objects)}, and only tensors and plain values are read)" if objects else ""
        raise CheckpointError(f"{path}: no weights of a CRATE in it{asked}")
    weights = _stored(path, found.weights)
    if isinstance(content.get("arguments"), dict):
        return Model(content["arguments"], weights, _transform_of(content), found.note)
    if path.name == OLD_NAME:
        return _without_metadata(path, found._replace(weights=weights))
    return _foreign(found._replace(weights=weights), None if found.note else PUBLISHED.get(found.key))


def _foreign(found: Found, transform: Transform | None = None) -> Model:
    """The model of weights beside which no arguments stand; raises ValueError where they are no model's own."""
    reason = rewritten(found.weights)
    if reason is not None:
        raise ValueError(reason)
    weights, inferred, note = without_unused(found.weights)
    if model_of(weights):
        transform = MAIN  # as the published eval_in1k_cls.py, wherever they lie
    return Model(None, weights, None if note else transform, joined(found.note, note), model_of(weights) | inferred)


def _stored(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `weights`; raises CheckpointError where one is no plain tensor, or has more bytes than were read for it."""
    for name, value in weights.items():
        _check_plain(path, name, value)
    return {name: value.resolve_neg() if isinstance(value, Tensor) else value for name, value in weights.items()}


def _check_plain(path: Path, name: object, value: object) -> None:
    """Raises CheckpointError where `value` is a tensor that is sparse, nested, quantized, nowhere, expanded or has hooks."""
    if not isinstance(value, Tensor):
        return
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise CheckpointError(f"{path}: {str(name)[:200]!r} is no plain tensor: it is sparse, nested, quantized or nowhere")
    hooks = value._backward_hooks
    if hooks is not None and (not isinstance(hooks, dict) or hooks):
        raise CheckpointError(f"{path}: {str(name)[:200]!r} is no plain tensor: something hangs on its gradient")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {str(name)[:200]!r} says it has {value.numel()} values, and fewer are stored")


def check_all_plain(path: Path, content: dict) -> None:
    """Raises CheckpointError as `_check_plain` for anything in nested `content`, which may lead back to itself."""
    left: list[tuple[object, object]] = [("it", content)]
    seen = set()
    while left:
        name, value = left.pop()
        _check_plain(path, name, value)
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.items() if isinstance(value, dict) else ((name, inner) for inner in value)


def _transform_of(content: dict) -> Transform | None:
    """How a checkpoint of ours is evaluated; those of before have it in the run's settings."""
    if TRANSFORM in content:
        return read_transform(content[TRANSFORM])
    settings = content.get("settings")
    crop = settings.get("eval_crop") if isinstance(settings, dict) else None
    return None if crop is None else read_transform({"crop": crop, "mean": None, "std": None})


def _read_parts(path: Path, wanted: str | None) -> Model:
    """`read_model` of a checkpoint in parts."""
    content = read_state(path)
    try:
        parts, kinds = distributed.find_parts(path), {"last": "model", "mean": "ema"}
        chosen = choose({kind: Found({}, part) for kind, part in kinds.items() if part in parts}, wanted)
        weights = distributed.read_tensors(path, chosen.key or kinds["last"])
    except distributed.DamagedError as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint of crate-fast: {error}") from error
    except (OSError, MemoryError) as error:
        raise unread(path, error) from error
    return Model(content["arguments"], weights, _transform_of(content), chosen.note)


def _read_parts_of_others(path: Path, wanted: str | None) -> Model:
    """`read_model` of a folder that `torch.distributed.checkpoint.save` wrote for somebody else."""
    try:
        content, names = distributed.tensors_of_others(path)
        found = find_weights(content, wanted)
        if not found.weights:
            raise CheckpointError(f"{path}: no weights of a CRATE in it")
        weights = distributed.read_named(path, {own: names[id(tensor)] for own, tensor in found.weights.items()})
    except distributed.DamagedError as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint of torch.distributed: {error}") from error
    except (OSError, MemoryError) as error:
        raise unread(path, error) from error
    return _foreign(found._replace(weights=weights))


def read_state(path: Path, whole: bool = True) -> dict:
    """The plain values of a checkpoint in parts; `whole`: after a look at all of its bytes.

    Raises:
        CheckpointError: a part of it is missing or damaged, or it is something else.
    """
    file = path / distributed.STATE
    if path.is_dir() and not file.exists():
        raise DamagedError(f"{path}: damaged: it has no {distributed.STATE}")
    content = _read_state(file, "parts")
    try:
        distributed.read_table(path / distributed.TABLE)  # before PyTorch does, which runs what a table asks for
        if whole:
            distributed.check_parts(path, content["parts"])
    except distributed.DamagedError as error:
        raise DamagedError(f"{path}: damaged: {error}") from error
    except OSError as error:
        raise unread(path, error) from error
    return content


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` wrote: "arguments", "model" and its `state`, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    return _read_state(Path(path), "model")


def _read_state(file: Path, what: str) -> dict:
    """An archive of `save_load.write_state` in which there is `what`, a dictionary."""
    content = read_archive(file, "damaged, or no checkpoint of crate-fast")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("arguments", what)):
        raise CheckpointError(f"{file}: no checkpoint of crate-fast: it has no 'arguments' and {what!r}")
    check_all_plain(file, content)
    return content


def _read_safetensors(path: Path, wanted: str | None) -> Model:
    metadata, weights = read_tensors(path)
    if METADATA_KEY not in metadata:
        return _without_metadata(path, find_weights(weights, wanted))
    if is_name(wanted):
        raise CheckpointError(f"{path}: --weights is {shown(wanted)}; there is one model in it, which has no name")
    try:
        arguments = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {METADATA_KEY!r} is not JSON ({error})") from error
    transform = None
    if isinstance(arguments, dict) and DIGEST in arguments and arguments.pop(DIGEST) != digest_of(arguments, weights):
        raise DamagedError(f"{path}: damaged: its weights or their description are not what was written")
    if isinstance(arguments, dict) and TRANSFORM in arguments:
        transform = read_transform(arguments.pop(TRANSFORM))
    return Model(settled(path, arguments)[0], weights, transform)


def _without_metadata(path: Path, found: Found) -> Model:
    """The model of weights that another tool wrote, whose config.json tells of it if one of the Hub's kind is beside it."""
    if not found.weights:
        raise CheckpointError(f"{path}: no weights of a CRATE in it")
    arguments, config = settled(path, None)
    if arguments is None or config is None:
        return _foreign(found)
    transform = read_transform(config[TRANSFORM]) if TRANSFORM in config else None
    return Model(arguments, found.weights, transform, found.note)
