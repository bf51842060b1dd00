"""What all readers and writers of files share."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


def parse_json(text: str | bytes):
    """What JSON says.

    Raises:
        ValueError: it is no JSON, or nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def as_bytes(text: str) -> bytes:
    """UTF-8 of text with names of files in it, which may be no UTF-8 themselves: their bytes as they are on the disk.

    Half a surrogate pair, which JSON can hold and no name of a file, is written as if it were a character.
    """
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def is_text(name: str) -> bool:
    """Whether the name of a file is UTF-8."""
    return as_bytes(name) == name.encode(errors="replace")


def names_something(word: str) -> bool:
    """Whether a file can have this name: it is not blank, as a variable that was not set, and the system can say it."""
    try:
        return bool(word.strip()) and b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def drawable(name: str) -> str:
    """The name of a file as a figure can show it: what is no UTF-8 in escapes, dollars as themselves and not as formulas."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def open_own(path: Path, mode: str) -> IO:
    """Opens a file of a run's own directory, which may come from elsewhere: no link out of it is followed.

    Raises:
        OSError: as `open`; also where `path` is a link.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=_open_no_link)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def digest_of(values: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of plain values and of tensors, by their names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(as_bytes(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n"))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
