"""Published files, brought to a folder and checked."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.request
from pathlib import Path

from ..checkpoint import write_atomically
from .config import ConfigError
from .saving import remove

TIMEOUT = 30  # seconds without a byte


def published(url: str, md5: str, directory: Path, wanted: str) -> Path:
    """The file of `url` in `directory`, downloaded if it is not there.

    Args:
        wanted: what is looked for there, in words for the error.

    Raises:
        ConfigError: it is neither there nor to be had, or its MD5 is another.
    """
    file = directory / url.rsplit("/", 1)[-1]
    if not file.is_file():
        print(f"downloading {url}", flush=True)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                write_atomically(file, lambda content: shutil.copyfileobj(answer, content, 1 << 20))
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or error
            raise ConfigError(
                f"--data-dir is {directory}, which has no {wanted}, and {url} cannot be downloaded ({reason})"
            ) from error
    if _md5(file) != md5:
        raise ConfigError(f"{file}: not the published archive (its MD5 is another); remove it to download it again")
    return file


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks a tar archive in `directory`, beside it first: what is at the top of it is there whole or not at all.

    Raises:
        ConfigError: it cannot be unpacked.
    """
    aside = directory / f".{archive.name}.tmp"
    try:
        remove(aside)  # of a process that was killed
        with tarfile.open(archive) as content:
            content.extractall(aside, filter="data")
        for entry in sorted(aside.iterdir()):
            remove(directory / entry.name)
            entry.rename(directory / entry.name)
        aside.rmdir()
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{archive}: cannot be unpacked in {directory} ({error})") from error


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
