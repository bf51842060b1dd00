"""What all readers and writers of files share."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PAUSES = (0.1, 0.4, 1.5)  # seconds, after each of which what the system could not read is asked for once more


def is_of_system(error: BaseException) -> bool:
    """Whether it tells of the system (a disk, a server, memory, permissions) and nothing of what is in a file.

    Decoders raise OSError too, of no number, and EINVAL where damage sends them to a place before a file's begin.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError)


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives, asked again after each of `PAUSES` where the system fails it; then raises what it raises."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if not is_of_system(error):
                raise
        time.sleep(pause)
    return read()


def shown(value: object) -> str:
    """`value` as a line says it, cut where it is long; Python writes no whole number of more than 4,300 digits."""
    try:
        text = " ".join(repr(value).split())
    except RecursionError:
        return "nested too deeply to be shown"
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


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


def printable(name: str) -> str:
    """A name as a line on a terminal can show it: what would move the cursor or change colours in escapes, as line breaks."""
    return "".join(letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1] for letter in name)


def drawable(name: str) -> str:
    """The name of a file as a figure can show it: what is no UTF-8 in escapes, dollars as themselves and not as formulas."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def tell(line: str) -> None:
    """Says it on stderr, once where torchrun started many processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"crate-fast: {line}", file=sys.stderr, flush=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of the system name the file, which they do not where it is written to, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_own(path: Path, mode: str) -> IO:
    """Opens a file of a run's own directory, which may come from elsewhere: no link out of it is followed.

    Raises:
        OSError: as `open`; also where `path` is a link, or no regular file: reading a pipe could wait for ever.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=_open_no_link)


def _open_no_link(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | Path, mode: int | None = None) -> None:
    """Raises OSError where `path`, of the system's `mode`, is a pipe, a device or the like, which may have no end.

    A folder passes: what opens it says what is wrong.
    """
    mode = os.stat(path).st_mode if mode is None else mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "no regular file", str(path))


def digest_of(values: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of plain values and of tensors, by their names, dtypes, shapes and bytes, whatever their order."""
    import torch

    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(as_bytes(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n"))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a file beside `path`, flushes it to the disk and renames it: `path` is the old file or all of the new.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open_own(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Flushes to the disk which names a folder has: a rename lives in it."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def first_line(error: BaseException) -> str:
    """An error's message, cut off at its first line; the name of its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """What the system says of an error, where it is the system's; else `first_line`."""
    return getattr(error, "strerror", None) or first_line(error)


def remove(path: Path) -> None:
    """Removes a file, or a directory with all that is in it, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
