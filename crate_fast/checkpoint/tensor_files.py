"""Files of safetensors: one, or the several that an index names, as the Hub's libraries split large models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files import check_regular, digest_of, first_line, is_text, parse_json, shown, write_atomically
from ..optional import require

METADATA_KEY = "crate_fast"
DIGEST = "digest"  # of all weights in a file of safetensors and of what is said of them, which has no checksums of its own
MODEL_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")


def is_of_hub(path: Path) -> bool:
    """Whether a file is called as the Hub's libraries call weights, beside which their config.json tells of the model."""
    return path.name in (MODEL_NAME, INDEX_NAME) or SHARD.fullmatch(path.name) is not None


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors on the CPU) of a file of safetensors.

    Raises:
        CheckpointError: it is missing, damaged, or something else.
        MissingPackageError: safetensors is not installed.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with _named_in_text(path) as name, safe_open(name, framework="pt") as file:
            # Copies, since what safetensors gives may lie in the file's own pages, at any alignment.
            return file.metadata() or {}, {key: file.get_tensor(key).clone() for key in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not safetensors ({first_line(error)})") from error


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors, on the CPU, of all files that an index of the Hub's kind names, each from the file that it names for it.

    Raises:
        CheckpointError: the index, or a file that it names, is missing or damaged, or a file has not what the index says.
    """
    places = _places(index)
    tensors = {}
    for name in sorted(set(places.values())):
        _, found = read_tensors(index.with_name(name))
        wanted = [key for key, place in places.items() if place == name]
        missing = next((key for key in wanted if key not in found), None)
        if missing is not None:
            raise CheckpointError(f"{index.with_name(name)}: it has no {shown(missing)}, which {index.name} says is in it")
        tensors |= {key: found[key] for key in wanted}
    return tensors


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index names; raises as `read_shards`."""
    return sorted(set(_places(index).values()))


def _places(index: Path) -> dict[str, str]:
    """By the name of a tensor the name of its file, which lies beside the index."""
    try:
        check_regular(index)
        places = parse_json(index.read_bytes())["weight_map"]
        names = set(places.values())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({first_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no index of weights: it must have a weight_map, names of files by names") from error
    wrong = next((name for name in names if not isinstance(name, str) or not SHARD.fullmatch(name)), None)
    if wrong is not None or not names:
        words = f"it names {shown(wrong)}" if names else "it names no file"
        raise CheckpointError(f"{index}: {words}; files of weights are called model-00001-of-00002.safetensors and so on")
    return places


@contextmanager
def _named_in_text(path: Path) -> Iterator[str | Path]:
    """A name of the file in UTF-8, which is all that safetensors takes: where it has none, that of an open file."""
    if is_text(str(path)):
        yield path
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def write_tensors(path: Path, weights: dict[str, Tensor], values: dict) -> None:
    """Writes a file of safetensors, with plain `values` in its metadata and a digest of both; of equal ones the same bytes.

    Raises:
        OSError: `path` cannot be written.
        MissingPackageError: safetensors is not installed.
    """
    require("safetensors")
    from safetensors.torch import save

    tensors = _apart(weights)
    values = values | {DIGEST: digest_of(values, {key: value.cpu() for key, value in tensors.items()})}
    # "format" is what other libraries look for.
    data = memoryview(save(tensors, metadata={METADATA_KEY: json.dumps(values), "format": "pt"}))
    length = 8 + int.from_bytes(data[:8], "little")
    header = _in_order(bytes(data[8:length]))

    def write(file) -> None:
        file.write(header)
        file.write(data[length:])

    write_atomically(path, write)


def _in_order(header: bytes) -> bytes:
    """What a file of safetensors begins with, its metadata in order, as safetensors does not keep it: its length and itself."""
    entries = json.loads(header)
    entries = {"__metadata__": dict(sorted(entries.pop("__metadata__").items())), **entries}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return len(text).to_bytes(8, "little") + text


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, contiguous and each in memory of its own, as safetensors wants them; layers may share theirs."""
    apart, places = {}, set()
    for key, value in weights.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in places or storage.nbytes() != value.nbytes:
            value = value.clone()
        places.add(storage.data_ptr())
        apart[key] = value
    return apart
