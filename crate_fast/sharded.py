"""Checkpoints in parts: a directory in which every process of a run wrote its own, by `torch.distributed.checkpoint`.

It holds tensors alone, under "model", "optimizer" and "ema"; beside them lies `state.pt`, an archive of plain values with the
constructor's arguments, and the length and CRC-32 of every other file, which PyTorch looks at no more than it keeps them.
PyTorch's table of the parts is a pickle. It is read here first, by a reader that admits what such a table is made of.
"""

from __future__ import annotations

import pickle
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = ".dcp"
STATE, TABLE = "state.pt", ".metadata"
BLOCK = 1 << 24
_RECORDS = ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
ADMITTED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (*_RECORDS, "_MEM_FORMAT_ENCODING")),
    *(("torch", name) for name in ("Size", "float64", "float32", "bfloat16", "float16", "int64")),
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}


class DamagedError(ValueError):
    """A checkpoint in parts is not what was written; the message names the file."""


def is_in_parts(path: Path) -> bool:
    """Whether `path` is a checkpoint in parts."""
    return path.is_dir() and (path / TABLE).is_file()


def checksum(file: Path) -> list[int]:
    """[length, CRC-32] of a file."""
    length = crc = 0
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return [length, crc]


def check_parts(path: Path, sums: dict[str, list[int]]) -> None:
    """Raises DamagedError unless all files of `path` named in `sums` have the length and CRC-32 given there.

    Raises:
        OSError: a file cannot be read, which is no fault of the file's.
    """
    for name, expected in sums.items():
        try:
            found = checksum(path / name)
        except FileNotFoundError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if found != list(expected):
            raise DamagedError(f"{name} is not what was written")


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors under "model", "optimizer" or "ema", whole and on the CPU, by their names; none where there is no such part.

    Raises:
        DamagedError: the table is damaged, asks for something else, or tells of something else than tensors.
        OSError, MemoryError: it cannot be read now.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_table(path / TABLE).state_dict_metadata
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
        raise DamagedError(f"{TABLE} tells of something else than tensors")
    own = {name.partition(".")[2]: entry for name, entry in entries.items() if name.startswith(f"{part}.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in own.items()}
    if tensors:
        with warnings.catch_warnings():  # that one process reads is what is wanted
            warnings.simplefilter("ignore")
            checkpoint.load({part: tensors}, checkpoint_id=path, no_dist=True)
    return tensors


def read_table(file: Path):
    """The `torch.distributed.checkpoint.metadata.Metadata` in `file`.

    Raises:
        DamagedError: as `read_tensors`.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with open(file, "rb") as content:
            table = _Unpickler(content).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything; nothing in it has been executed
        raise DamagedError(f"{file.name} cannot be read ({str(error).strip() or type(error).__name__})") from error
    if not isinstance(table, Metadata):
        raise DamagedError(f"{file.name} holds a {type(table).__name__}")
    return table


class _Unpickler(pickle.Unpickler):
    """Admits the classes of PyTorch's table, which hold values and do nothing."""

    def find_class(self, module: str, name: str):
        if (module, name) in ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only tensors are read")
