"""Checkpoints in parts: a directory in which every process of a run wrote its own, by `torch.distributed.checkpoint`.

It holds tensors alone, under "model", "optimizer" and "ema"; beside them lies `state.pt`, an archive of plain values with the
constructor's arguments, and the length and CRC-32 of every other file, which PyTorch looks at no more than it keeps them.
PyTorch's table of the parts is a pickle. It is read here first, by a reader that admits what such a table is made of. Folders
that others wrote by `torch.distributed.checkpoint.save` have no `state.pt`; of them the weights alone are read.
"""

from __future__ import annotations

import math
import pickle
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..files import check_regular, first_line
from .pickles import AdmittingUnpickler
from .unfinished import NUMBERED

SUFFIX = ".dcp"
STATE, TABLE = "state.pt", ".metadata"
BLOCK = 1 << 24
_RECORDS = ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
_DTYPES = sorted({str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype)})
ADMITTED = (
    *(("torch.distributed.checkpoint.metadata", name) for name in (*_RECORDS, "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *(("torch", name) for name in ("Size", *_DTYPES)),
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
)
"""What PyTorch's table of the parts is made of: (module, name)."""


class DamagedError(ValueError):
    """A checkpoint in parts is not what was written; the message names the file."""


def is_in_parts(path: Path) -> bool:
    """Whether `path` is a checkpoint in parts."""
    return path.is_dir() and (path / TABLE).is_file()


def checksum(file: Path) -> list[int]:
    """[length, CRC-32] of a file."""
    length = crc = 0
    check_regular(file)
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


def find_parts(path: Path) -> set[str]:
    """Which of "model", "optimizer" and "ema" a checkpoint has; raises as `read_tensors`."""
    return {name.partition(".")[0] for name in read_table(path / TABLE).state_dict_metadata}


def is_of_others(path: Path) -> bool:
    """Whether the checkpoint in parts `path` is none of ours: it has no `state.pt`, nor a name of those that have one."""
    return not (path / STATE).exists() and not NUMBERED.fullmatch(path.resolve().name)


def tensors_of_others(path: Path) -> tuple[dict, dict[int, str]]:
    """(what was saved in a folder that others wrote, dictionaries in one another, with its tensors alone and without their
    values; by the id of each its name in the folder); raises as `read_tensors`."""
    table, content, names = read_table(path / TABLE, others=True), {}, {}
    places = table.__dict__.get("planner_data")
    for name, entry in table.state_dict_metadata.items():
        if not _is_entry(name, entry):
            continue  # a pickle of something else
        try:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # pyright: ignore[reportAttributeAccessIssue]
        except (RuntimeError, TypeError) as error:
            raise DamagedError(f"{TABLE} tells of something else than tensors ({_reason(error)})") from error
        names[id(tensor)] = name
        *outer, last = _keys(places, name)
        inner = content
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return content, names


def _keys(places: Any, name: str) -> list:
    """The keys under which the tensor `name` was saved: its name where the table does not tell them."""
    keys = places.get(name) if isinstance(places, dict) else None
    if isinstance(keys, tuple) and keys and all(type(key) in (str, int) for key in keys) and ".".join(map(str, keys)) == name:
        return list(keys)
    return [name]


def read_named(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of a folder, whole and on the CPU, by other names: `names` has those in the folder by them; raises as
    `read_tensors`."""
    table = read_table(path / TABLE, others=True)
    _check_tensors(path, table, names.values())
    entries: dict[str, Any] = {name: table.state_dict_metadata[name] for name in names.values()}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    _load(path, table, tensors, no_dist=True)
    return {own: tensors[name] for own, name in names.items()}


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors under "model", "optimizer" or "ema", whole and on the CPU, by their names; none where there is no such part.

    Raises:
        DamagedError: the table is damaged, asks for something else, or tells of something else than tensors.
        OSError, MemoryError: it cannot be read now.
    """
    own: dict[str, Any] = {n: e for n, e in read_table(path / TABLE).state_dict_metadata.items() if n.startswith(f"{part}.")}
    try:
        tensors = {n.partition(".")[2]: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for n, e in own.items()}
    except (RuntimeError, TypeError) as error:
        raise DamagedError(f"{TABLE} tells of something else than tensors ({_reason(error)})") from error
    return load_parts(path, {part: tensors}, no_dist=True)[part] if tensors else {}


def load_parts(path: Path, parts: dict[str, dict], **options) -> dict[str, dict]:
    """`parts`, whose tensors are filled with those of a checkpoint; those without memory are made, on the CPU.

    Nothing is read before the table's word on every tensor of these parts was compared with the files that there are.

    Raises: as `read_tensors`.
    """
    table = read_table(path / TABLE)
    _check_tensors(path, table, [name for name in table.state_dict_metadata if name.partition(".")[0] in parts])
    for tensors in parts.values():
        tensors |= {n: torch.empty_like(t, device="cpu") for n, t in tensors.items() if isinstance(t, Tensor) and t.is_meta}
    _load(path, table, parts, **options)
    return parts


def _load(path: Path, table, state: dict, **options) -> None:
    """Fills the tensors of `state` with those of a folder whose `table` was checked."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # that one process reads is what is wanted
            warnings.simplefilter("ignore")
            checkpoint.load(state, storage_reader=_reader(path, table), **options)
    except CheckpointException as error:  # no Exception, in PyTorch
        reasons = [failure[0] for failure in error.failures.values()]
        passing = next((reason for reason in reasons if isinstance(reason, OSError | MemoryError)), None)
        raise passing or DamagedError(f"{', '.join(list(state)[:3])} cannot be read ({_reason(reasons[0])})") from error


def _reader(path: Path, table):
    """PyTorch's reader of a checkpoint, which takes `table` for its table and reads none itself: its unpickler runs what is in
    a pickle, and may find in the same bytes something else than was checked."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            table.storage_meta = StorageMeta(checkpoint_id=str(path), load_id=self.load_id)
            return table

    return Reader(path)


def _reason(error: BaseException) -> str:
    """An error in a line; of a part that is no tensor without PyTorch's advice to read it all the same."""
    if isinstance(error, pickle.UnpicklingError):
        return "a part of it holds something else than a tensor"
    return first_line(error)


def _check_tensors(path: Path, table, names: Iterable[str]) -> None:
    """Raises DamagedError where the table's word on tensors is not what the files that there are can hold."""
    try:
        for name in names:
            _check_chunks(path, name, table.state_dict_metadata[name], table.storage_data)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedError(f"{TABLE} tells of something else than tensors ({_reason(error)})") from error


def _check_chunks(path: Path, name: str, entry, places: dict) -> None:
    """Raises ValueError, or what else odd values raise, unless the chunks of a tensor cover it, each once, and lie in files of
    this folder that are long enough: what no chunk covers would be memory as it was found."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    size = torch.tensor(entry.size, dtype=torch.int64)
    first = torch.tensor([tuple(chunk.offsets) for chunk in entry.chunks], dtype=torch.int64).view(len(entry.chunks), len(size))
    last = first + torch.tensor([tuple(chunk.sizes) for chunk in entry.chunks], dtype=torch.int64).view(first.shape)
    volumes = [math.prod(chunk.sizes) for chunk in entry.chunks]
    inside = (first >= 0).all() and (last <= size).all() and (last >= first).all()
    meet = (torch.maximum(first[:, None], first) < torch.minimum(last[:, None], last)).all(2)
    if not inside or sum(volumes) != math.prod(entry.size) or meet.sum() > len(first):
        raise ValueError(f"the parts of {name} do not make it up")
    for chunk, volume in zip(entry.chunks, volumes, strict=True):
        place = places[MetadataIndex(name, chunk.offsets)]
        file = path / place.relative_path
        if file.parent != path or file.is_symlink() or not file.is_file() or place.transform_descriptors:
            raise ValueError(f"{place.relative_path!r} is no file of the checkpoint")
        end = place.offset + place.length
        if volume * entry.properties.dtype.itemsize > place.length or place.offset < 0 or end > file.stat().st_size:
            raise ValueError(f"{name} does not fit {place.relative_path}")


def read_table(file: Path, others: bool = False):
    """The `torch.distributed.checkpoint.metadata.Metadata` in `file`; with `others` it may tell of something else than tensors.

    Raises:
        DamagedError: as `read_tensors`.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    check_regular(file)
    try:
        with open(file, "rb") as content:
            table = _Unpickler(content).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything; nothing in it has been executed
        raise DamagedError(f"{file.name} cannot be read ({str(error).strip() or type(error).__name__})") from error
    if not isinstance(table, Metadata):
        raise DamagedError(f"{file.name} holds a {type(table).__name__}")
    fields = vars(table)
    if not all(isinstance(fields.get(name), dict) for name in ("state_dict_metadata", "storage_data")):
        raise DamagedError(f"{file.name} has no tables of tensors and of files")
    odd = [(name, entry) for name, entry in table.state_dict_metadata.items() if not _is_entry(name, entry)]
    if odd and not others:
        raise DamagedError(f"{file.name} tells of {str(odd[0][0])[:200]!r}, which is no tensor")
    return table


def _is_entry(name: object, entry: Any) -> bool:
    """Whether the table's `entry` is of a tensor, so far as `read_tensors` needs it to tell the tensor's size."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    sized = isinstance(entry, TensorStorageMetadata) and isinstance(entry.__dict__.get("size"), torch.Size)
    typed = sized and isinstance(getattr(entry.__dict__.get("properties"), "dtype", None), torch.dtype)
    return isinstance(name, str) and typed and all(length >= 0 for length in entry.size)


class _Unpickler(AdmittingUnpickler):
    """Admits the classes of PyTorch's table, which hold values and do nothing."""

    contents = "tensors"
    admitted: ClassVar[dict[tuple[str, str], object]] = {
        (module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")
    }  # where the folder lay, which nobody asks

    def find_class(self, module: str, name: str):
        if (module, name) in ADMITTED:
            return pickle._Unpickler.find_class(self, module, name)
        return super().find_class(module, name)
