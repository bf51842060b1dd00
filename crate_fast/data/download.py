"""Published files, brought to a folder: downloaded and unpacked aside, so that what has its name is whole."""

from __future__ import annotations

import io
import os
import socket
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from ..files import flush_folder, remove
from ..settings import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows, where processes that download the same are not kept apart
    fcntl = None

TIMEOUT = 30  # seconds without a byte
ASIDE = ".download-{}.tmp"


class Source(NamedTuple):
    """A published file by its address and MD5, and its place in --data-dir: `made` is the file itself, or out of it if it is an
    archive, which then lies beside `made`."""

    url: str
    md5: str
    made: str


def bring(source: Source, directory: Path) -> None:
    """Makes `source.made` in `directory` where it is not there, downloading what it is made of if that is not there either.

    Raises:
        ConfigError: it is neither there nor to be had, its MD5 is another, or it cannot be unpacked.
    """
    made = directory / source.made
    file = made.with_name(source.url.rsplit("/", 1)[-1])
    try:
        if made.exists():
            _tidy(made.parent)
            return
        made.parent.mkdir(parents=True, exist_ok=True)
        with _aside(made.parent) as aside:
            if made.exists():  # another process has made it
                return
            if not file.is_file():
                _download(source, directory, aside / file.name)
                _give_place(aside / file.name, file)
            elif not is_published(file, source.md5):
                raise ConfigError(f"{file}: not the published file (its MD5 is another); remove it to download it again")
            if file != made:
                _unpack(file, aside)
                _give_place(aside / made.name, made)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--data-dir is {directory}, and {made} cannot be made there ({reason})") from error


def is_published(file: Path, md5: str) -> bool:
    """Whether a file has this MD5; raises OSError where it cannot be read."""
    from torchvision.datasets.utils import check_integrity

    return check_integrity(file, md5)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, removed at the end; one process at a time has one, and removes those of killed ones."""
    with _locked(folder) as locked:
        if locked:
            _remove_left(folder)
        aside = folder.absolute() / ASIDE.format(os.getpid())
        aside.mkdir()
        try:
            yield aside
        finally:
            remove(aside)


def _tidy(folder: Path) -> None:
    """Removes what killed processes have left in `folder`, where that can be done and no process is at work there."""
    if any(folder.glob(ASIDE.format("*"))):
        with suppress(OSError), _locked(folder, wait=False) as locked:
            if locked:
                _remove_left(folder)


def _remove_left(folder: Path) -> None:
    for left in folder.glob(ASIDE.format("*")):
        remove(left)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes that download out of `folder`; gives whether it does, which not every file system can.

    Raises:
        BlockingIOError: another process does, and `wait` is false.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            print(f"waiting for another process, which downloads to {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _download(source: Source, directory: Path, file: Path) -> None:
    """Downloads and checks `source` as `file`; a bar on stderr shows how far it is, if that is a terminal."""
    from torchvision.datasets.utils import download_url

    print(f"downloading {source.url}", flush=True)
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)  # torchvision has none
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            download_url(source.url, file.parent, file.name, source.md5)
    except (OSError, HTTPException, RuntimeError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        if type(error) is RuntimeError:  # which says that it is "not found or corrupted"
            reason = "what comes is not the published file: its MD5 is another"
        words = f"--data-dir is {directory}, which has no {source.made}, and {source.url} cannot be downloaded ({reason})"
        raise ConfigError(words) from error
    finally:
        socket.setdefaulttimeout(before)


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")


def _give_place(made: Path, place: Path) -> None:
    """Renames what is whole to where it is looked for, once the disk has it."""
    if hasattr(os, "sync"):
        os.sync()
    os.replace(made, place)
    flush_folder(place.parent)
