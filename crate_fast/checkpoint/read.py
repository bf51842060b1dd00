"""Reading what files hold: safetensors and PyTorch's archives, checked, never executed."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..eval_transform import FINETUNE, MAIN, Transform, read_transform
from ..files import check_regular, digest_of, first_line, is_text, parse_json
from ..optional import MissingPackageError, require
from . import distributed
from .published import Found, choose, find_weights
from .unfinished import newest_checkpoint

METADATA_KEY = "crate_fast"
DIGEST = "digest"  # of all weights in a file of safetensors and of what is said of them, which has no checksums of its own
TRANSFORM = "evaluation"  # beside the constructor's arguments in safetensors, and a checkpoint's own entry
# By where main.py and finetune.py put their weights.
PUBLISHED: dict[str | None, Transform] = {"state_dict": MAIN, "model": FINETUNE}
ZIP_SIGNATURE = b"PK\x03\x04"
SIGNATURE_LENGTH = 9  # safetensors begins with 8 bytes of length and the brace of its JSON
MODEL_NAME = "model.safetensors"
SUFFIXES = (".pt", ".pth", ".tar", ".safetensors", ".bin", ".ckpt", ".t7")  # of files, and of no model on the Hub
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class DamagedError(CheckpointError):
    """A file was read whole, and is not what was written to it. What could not be read is no such file: it may be healthy."""


def model_file(source: str | os.PathLike) -> Path:
    """The file that `source` means: itself, the model of the directory it is, or that of a Hub's model, brought here.

    Of a run that has not ended it is the newest checkpoint, which a line on stderr names.

    Raises:
        CheckpointError: the directory has no model in it, or the Hub has none.
        MissingPackageError: huggingface-hub is not installed, and there is no such file.
    """
    path = Path(source)
    if path.is_dir() and not distributed.is_in_parts(path):
        if not (path / MODEL_NAME).is_file():
            return _of_unfinished(path)
        return path / MODEL_NAME
    name = str(source)
    if path.exists() or path.parent.is_dir() or path.suffix in SUFFIXES or not HUB_NAME.fullmatch(name):
        return path
    try:
        require("huggingface_hub")
    except MissingPackageError as error:
        raise MissingPackageError(f"{name}: no such file; to look for it on the Hugging Face Hub, {error}") from error
    from .hub import download

    return download(name)


def _of_unfinished(run: Path) -> Path:
    """The newest checkpoint of a directory that has no model; raises CheckpointError where it has none."""
    try:
        newest = newest_checkpoint(run)
    except OSError as error:
        raise _unread(run, error) from error
    if newest is None:
        raise CheckpointError(f"{run}: a directory with no {MODEL_NAME} in it, and with no checkpoints of a run")
    return newest


class Model(NamedTuple):
    """What a file tells of a model.

    arguments: the constructor's, where the file has them.
    weights: on the CPU, by the names of `CRATE`.
    transform: how its images are evaluated, where the file, or its kind, says it.
    note: a line on what else is in the file, if anything.
    """

    arguments: dict | None
    weights: dict[str, Tensor]
    transform: Transform | None
    note: str | None = None


def read_model(path: Path, wanted: str | None = None) -> Model:
    """The model in any file; of its weights and their mean over the steps the one that is `wanted`, see `find_weights`.

    Raises:
        CheckpointError: the file is missing or damaged, asks for code to be run, has no weights of a CRATE, or not those.
    """
    try:
        return _read_parts(path, wanted) if path.is_dir() else _read_file(path, wanted)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def _read_file(path: Path, wanted: str | None) -> Model:
    start = _signature(path)
    if start[8:] == b"{" and not start.startswith(ZIP_SIGNATURE):
        return _read_safetensors(path, wanted)
    content: Any = _read_archive(path, "damaged, or neither safetensors nor a checkpoint")
    found = find_weights(content, wanted)
    if not found.weights:
        raise CheckpointError(f"{path}: no weights of a CRATE in it")
    weights = _stored(path, found.weights)
    if isinstance(content.get("arguments"), dict):
        return Model(content["arguments"], weights, _transform_of(content), found.note)
    return Model(None, weights, None if found.note else PUBLISHED.get(found.shelf), found.note)


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


def _check_all_plain(path: Path, content: dict) -> None:
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
        weights = distributed.read_tensors(path, chosen.shelf or kinds["last"])
    except distributed.DamagedError as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint of crate-fast: {error}") from error
    except (OSError, MemoryError) as error:
        raise _unread(path, error) from error
    return Model(content["arguments"], weights, _transform_of(content), chosen.note)


def read_state(path: Path, whole: bool = True) -> dict:
    """The plain values of a checkpoint in parts; `whole`: after a look at all of its bytes.

    Raises:
        CheckpointError: a part of it is missing or damaged, or it is something else.
    """
    file = path / distributed.STATE
    if path.is_dir() and not file.exists():
        raise DamagedError(f"{path}: damaged: it has no {distributed.STATE}")
    content = _read_archive(file, "damaged, or no checkpoint of crate-fast")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("arguments", "parts")):
        raise CheckpointError(f"{path}: no checkpoint of crate-fast: its {distributed.STATE} has no 'arguments' and 'parts'")
    _check_all_plain(path, content)
    try:
        distributed.read_table(path / distributed.TABLE)  # before PyTorch does, which runs what a table asks for
        if whole:
            distributed.check_parts(path, content["parts"])
    except distributed.DamagedError as error:
        raise DamagedError(f"{path}: damaged: {error}") from error
    except OSError as error:
        raise _unread(path, error) from error
    return content


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` wrote: "arguments", "model" and its `state`, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    path = Path(path)
    content = _read_archive(path, "damaged, or no checkpoint of crate-fast")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("arguments", "model")):
        raise CheckpointError(f"{path}: no checkpoint of crate-fast: it has no 'arguments' and 'model'")
    _check_all_plain(path, content)
    return content


def _read_archive(path: Path, otherwise: str) -> object:
    """What `torch.save` wrote to `path`, on the CPU: tensors and plain values, or a CheckpointError that says `otherwise`."""
    checked = _signature(path).startswith(ZIP_SIGNATURE)
    if checked:
        _check_sums(path)
    try:
        with warnings.catch_warnings():  # what is refused is refused in one line, without PyTorch's advice on it
            warnings.simplefilter("ignore")
            if checked:
                return torch.load(path, map_location="cpu", weights_only=True)
            with _Bounded(io.FileIO(path)) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise _unread(path, error) from error
    except Exception as error:  # a damaged archive can raise anything; nothing in it has been executed
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None:
            reason = f"it asks for {asked[1]}, and only tensors and plain values are read"
        else:
            reason = "it is no file of torch.save" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        kind = CheckpointError if checked else DamagedError  # what has its checksums is what was written
        raise kind(f"{path}: {otherwise} ({reason})") from error


class _Bounded(io.BufferedReader):
    """A file of which no more is read than there is. Python makes room for all that is asked for, which a file of ten bytes
    can say is 4 GB."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= io.DEFAULT_BUFFER_SIZE:
            left = max(0, os.fstat(self.fileno()).st_size - self.tell())
            size = left if size is None or size < 0 else min(size, left)
        return super().read(size)


def _check_sums(path: Path) -> None:
    """Raises DamagedError unless all parts of the archive have the CRC-32 that was written; PyTorch looks at none.

    Nor may reading take more memory than the file has bytes: `torch.save` compresses nothing, and writes no part twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, length = archive.infolist(), path.stat().st_size
            packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise DamagedError(f"{path}: no checkpoint: {packed.filename[:100]} is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > length:
                raise DamagedError(f"{path}: no checkpoint: its parts are said to be longer than its {length} bytes")
            damaged = archive.testzip()
    except (OSError, MemoryError) as error:
        raise _unread(path, error) from error
    except DamagedError:
        raise
    except (ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f"{path}: damaged ({first_line(error)})") from error
    if damaged is not None:
        raise DamagedError(f"{path}: damaged: {damaged} is not what was written")


def _unread(path: Path, error: OSError | MemoryError) -> CheckpointError:
    """What to raise where reading failed, for a cause that may pass: nothing is known of the file."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: {error.strerror}")
    reason = "not enough memory" if isinstance(error, MemoryError) else error.strerror or first_line(error)
    return CheckpointError(f"{path}: cannot be read ({reason})")


def _signature(path: Path) -> bytes:
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return file.read(SIGNATURE_LENGTH)
    except OSError as error:
        raise _unread(path, error) from error


@contextmanager
def _named_in_text(path: Path) -> Iterator[str | Path]:
    """A name of the file in UTF-8, which is all that safetensors takes: where it has none, that of an open file."""
    if is_text(str(path)):
        yield path
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def _read_safetensors(path: Path, wanted: str | None) -> Model:
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with _named_in_text(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, since what safetensors gives may lie in the file's own pages, at any alignment.
            weights = {key: file.get_tensor(key).clone() for key in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not safetensors ({first_line(error)})") from error
    if METADATA_KEY not in metadata:
        found = find_weights(weights, wanted)
        if not found.weights:
            raise CheckpointError(f"{path}: no weights of a CRATE in it")
        return Model(None, found.weights, None, found.note)
    try:
        arguments = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {METADATA_KEY!r} is not JSON ({error})") from error
    transform = None
    if isinstance(arguments, dict) and DIGEST in arguments and arguments.pop(DIGEST) != digest_of(arguments, weights):
        raise DamagedError(f"{path}: damaged: its weights or their description are not what was written")
    if isinstance(arguments, dict) and TRANSFORM in arguments:
        transform = read_transform(arguments.pop(TRANSFORM))
    return Model(arguments, weights, transform)
