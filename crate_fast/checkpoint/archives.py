"""PyTorch's archives: read by its reader of weights alone, after a look at their checksums, and nothing in them is called."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import check_regular, first_line, reason_of
from .marks import Mark, Table, marked, names_of_objects

ZIP_SIGNATURE = b"PK\x03\x04"
SIGNATURE_LENGTH = 9  # safetensors begins with 8 bytes of length and the brace of its JSON


class DamagedError(CheckpointError):
    """A file was read whole, and is not what was written to it. What could not be read is no such file: it may be healthy."""


def read_archive(path: Path, otherwise: str) -> Any:
    """What `torch.save` wrote to `path`, on the CPU: tensors and plain values, or a CheckpointError that says `otherwise`."""
    return _read(path, otherwise, lambda checked: _load(path, checked))


def read_beside_others(path: Path, otherwise: str) -> tuple[Any, set[str]]:
    """`read_archive` of a file that may have other packages' objects: marks in their place, and the names of their classes."""

    def load(checked: bool) -> tuple[Any, set[str]]:
        with _Bounded(io.FileIO(path)) as file:
            names = names_of_objects(path, file, checked)
        try:
            return _load_marked(path, checked, names), names
        except (RuntimeError, TypeError, ValueError) as error:
            if "Tensor subclass" not in str(error):
                raise
            kind = min(names, key=lambda name: ("tensor" not in name.lower(), name), default="a class of another package")[:200]
            words = f"its tensors are of {kind}, as quantised ones are, and plain ones alone are read"
            raise CheckpointError(f"{path}: {words}: save the model that they were made of") from error

    return _read(path, otherwise, load)


def _load_marked(path: Path, checked: bool, names: set[str]) -> object:
    with marked(names, Mark):
        try:
            return _load(path, checked)
        except pickle.UnpicklingError:
            if not names:
                raise
    with marked(names, Table):
        return _load(path, checked)


def _load(path: Path, checked: bool) -> object:
    if checked:
        return torch.load(path, map_location="cpu", weights_only=True)
    with _Bounded(io.FileIO(path)) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _read(path: Path, otherwise: str, load: Callable[[bool], Any]) -> Any:
    """What `load` makes of an archive whose checksums, where it has some, were found right; the errors of `read_archive`."""
    checked = signature_of(path).startswith(ZIP_SIGNATURE)
    if checked:
        _check_sums(path)
    try:
        with warnings.catch_warnings():  # what is refused is refused in one line, without PyTorch's advice on it
            warnings.simplefilter("ignore")
            return load(checked)
    except (OSError, MemoryError) as error:
        raise unread(path, error) from error
    except CheckpointError:
        raise
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
        raise unread(path, error) from error
    except DamagedError:
        raise
    except (ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f"{path}: damaged ({first_line(error)})") from error
    if damaged is not None:
        raise DamagedError(f"{path}: damaged: {damaged} is not what was written")


def unread(path: Path, error: OSError | MemoryError) -> CheckpointError:
    """What to raise where reading failed, for a cause that may pass: nothing is known of the file."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: {error.strerror}")
    reason = "not enough memory" if isinstance(error, MemoryError) else reason_of(error)
    return CheckpointError(f"{path}: cannot be read ({reason})")


def signature_of(path: Path) -> bytes:
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return file.read(SIGNATURE_LENGTH)
    except OSError as error:
        raise unread(path, error) from error
