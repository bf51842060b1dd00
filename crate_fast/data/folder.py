"""Photographs in folders: train/ and val/, in each a folder per class."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from ..files import as_bytes
from ..settings import ConfigError
from .pictures import SUFFIXES, find_pictures, read_or_stop, tell_left_out


class Photographs:
    """Files and their labels: `read(i)` opens the i-th, `label(i)` tells its class, `place(i)` its path."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def label(self, index: int) -> int:
        return self._files[index][1]

    def place(self, index: int) -> str:
        return self._files[index][0]

    def read(self, index: int) -> Image.Image:
        """The image, as RGB; raises as `read_or_stop`."""
        return read_or_stop(self._files[index][0])


def open_folder(path: str | Path, word: str = "--data", labelled: bool = True) -> tuple[Photographs, Photographs, list[str]]:
    """Training and validation images of a folder, and the names of its classes, sorted; a label is a name's place.

    Args:
        path: the folder.
        word: what the command line calls it.
        labelled: whether labels are learned; if not, images may lie in no folder of a class, and all are then of one.

    Raises:
        ConfigError: train/ or val/ is missing, has no classes or no images, or their classes differ.
    """
    path = Path(path)
    if not path.is_dir():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"  # a run remembers its data as they were given
        raise ConfigError(f"{word} is {path}, which is no directory{where}")
    left_out: Counter = Counter()
    names = {split: _classes(path / split, word, left_out, labelled) for split in ("train", "val")}
    train, val = (set(names[split]) for split in ("train", "val"))
    if train != val:
        only, where = (sorted(train - val), "train") if train - val else (sorted(val - train), "val")
        raise ConfigError(f"{word} is {path}: the classes of train and val differ; only {where} has {', '.join(only[:3])}")
    splits = [Photographs(_scan(path / split, names[split], word, left_out)) for split in ("train", "val")]
    tell_left_out(path, left_out, sys.stderr)
    return splits[0], splits[1], names["train"]


def is_undivided(path: str | Path) -> bool:
    """Whether `path` is a folder without train/ and val/, so that the folders in it may be classes."""
    path = Path(path)
    return path.is_dir() and not any((path / split).is_dir() for split in ("train", "val"))


def divide_folder(
    path: str | Path, share: float, labelled: bool = True
) -> tuple[Photographs, Photographs, list[str], list[str]]:
    """Training and validation images of a folder of classes, the names of the classes, and the validation images' own.

    Of each class `share`, but at least one image, is held out: the same ones in every run, which the names alone decide, so
    that no model is evaluated on what another one, from which it starts, was trained on. `labelled`: as of `open_folder`.

    Raises:
        ConfigError: it has no folders of classes, images in no class, or a class of less than two images.
    """
    path, left_out = Path(path), Counter()
    names = _classes(path, "--data", left_out, labelled)
    found: tuple[list, list] = [], []
    for label, name in enumerate(names):
        files = [file for file, _ in _scan(path, [name], "--data", left_out)]
        if len(files) < 2:
            raise ConfigError(f"--data: {path / name} has 1 image; a class needs 2, of which one is held out for evaluation")
        held = set(sorted(files, key=lambda file: _place(file, path))[: min(len(files) - 1, max(1, round(share * len(files))))])
        for file in files:
            found[file in held].append((file, label))
    tell_left_out(path, left_out, sys.stderr)
    return Photographs(found[0]), Photographs(found[1]), names, [os.path.relpath(file, path) for file, _ in found[1]]


def _place(file: str, folder: Path) -> bytes:
    """Where a file stands in an order that is as good as random and hangs on its name in `folder` alone."""
    return hashlib.sha256(as_bytes(os.path.relpath(file, folder))).digest()


def _classes(path: Path, word: str, left_out: Counter, labelled: bool) -> list[str]:
    """The names of the folders in `path`, sorted; hidden ones are none, and what else lies there is counted. The folder itself
    where images lie in it and need not be `labelled`."""
    if not path.is_dir():
        raise ConfigError(f"{word}: {path} is no directory; a data set has train/ and val/, with a folder per class in each")
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    loose = next((entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()), None)
    if loose is not None and not labelled:
        return ["."]
    left_out["hidden"] += sum(1 for _ in path.iterdir()) - len(entries)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    dead = next((entry for entry in entries if not entry.exists()), None)
    if dead is not None:
        raise ConfigError(f"{word}: {dead} is a link to nothing, which may have been a class")
    if loose is not None:
        raise ConfigError(f"{word}: {loose} lies in no folder of a class, so nothing tells its label")
    if not classes:
        raise ConfigError(f"{word}: {path} has no folders of classes")
    left_out["no images by their names"] += len(entries) - len(classes)
    return classes


def _scan(path: Path, classes: list[str], word: str, left_out: Counter) -> list[tuple[str, int]]:
    found = []
    for label, name in enumerate(classes):
        files = find_pictures(path / name, left_out)
        if not files:
            raise ConfigError(f"{word}: {path / name} has no images ({', '.join(SUFFIXES)})")
        found += [(file, label) for file in files]
    return found
