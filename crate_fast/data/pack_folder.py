"""The images of a folder of packs: which packs belong to it, its two splits, and an image as pixels."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import first_line, parse_json
from .pack_file import RAW, Pack, PackError

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MANIFEST, SETTINGS = "packs.json", "prepare.json"
SPARE_FILES = 512  # that a run has open besides its packs


class Split:
    """The training or the validation images of a folder of packs, in order.

    Attributes:
        labels, heights, widths: (n,) int64.
    """

    def __init__(self, packs: list[Pack]) -> None:
        index = np.concatenate([pack.index for pack in packs])
        self.labels, self.heights, self.widths = (index[name].astype(np.int64) for name in ("label", "height", "width"))
        self._offsets, self._sizes, self._kinds = (np.ascontiguousarray(index[name]) for name in ("offset", "size", "kind"))
        self._packs, starts = packs, np.cumsum([0, *map(len, packs)])
        self._pack = np.repeat(np.arange(len(packs)), np.diff(starts))  # in which each lies, and as which of it
        self._number = np.arange(len(index)) - starts[self._pack]
        # Shared with the workers, which are forked: an image is checked once, by whichever comes to it first.
        self._checked = np.frombuffer(mmap.mmap(-1, max(1, len(index))), np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_raw(self) -> bool:
        """Whether all images are RGB bytes."""
        return bool((self._kinds == RAW).all())

    def want(self, indices: np.ndarray) -> None:
        """Has the system read these images ahead from the disk."""
        columns = (column[indices].tolist() for column in (self._pack, self._offsets, self._sizes))
        for pack, offset, size in zip(*columns, strict=True):
            self._packs[pack].want(offset, size)

    def pixels(self, index: int, least: tuple[int, int] = (0, 0), rows: tuple[int, int] | None = None) -> np.ndarray:
        """An image, (height, width, 3) uint8; a JPEG may be decoded smaller, to no less than `least` (height, width).

        rows: from the first of them up to the last but one is all that is wanted of it, where it is not decoded smaller.

        Raises:
            PackError: it is not what was written, or cannot be decoded.
        """
        pack, number = self._packs[self._pack[index]], int(self._number[index])
        height, width = int(self.heights[index]), int(self.widths[index])
        raw, (first, last) = self._kinds[index] == RAW, rows or (0, height)
        if not self._checked[index]:
            content = pack.content(number)
            self._checked[index] = 1
        elif raw:
            return pack.read(int(self._offsets[index]) + 3 * width * first, 3 * width * (last - first)).reshape(-1, width, 3)
        else:
            content = pack.read(int(self._offsets[index]), int(self._sizes[index]))
        if raw:
            return content.reshape(height, width, 3)[first:last]
        try:
            pixels = decode_jpeg(content, (height, width), least)
        except ValueError as error:
            raise pack.damaged_image(number, f"cannot be decoded ({first_line(error)})") from error
        return pixels if rows is None else pixels[first:last]

    def damaged_image(self, index: int, why: str) -> PackError:
        """The error that an image is damaged, to be raised."""
        return self._packs[self._pack[index]].damaged_image(int(self._number[index]), why)


def decode_jpeg(content: bytes | np.ndarray, size: tuple[int, int], least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A JPEG of `size` as (height, width, 3) uint8, RGB; decoded smaller, to no less than `least`, if that is not 0.

    Raises:
        ValueError: it is damaged, of another size, or in another colour space than RGB or grey may have.
    """
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    if (height, width) != size:  # before memory is taken for it
        raise ValueError(f"it is {height}×{width}; {size[0]}×{size[1]} was written of it")
    return simplejpeg.decode_jpeg(content, "RGB", min_height=least[0], min_width=least[1])


class Packs(NamedTuple):
    """What a folder of packs holds: its splits and the names of the classes, sorted; a label is a name's place."""

    train: Split
    val: Split
    classes: list[str]


def open_listed(path: Path, checksum: int) -> Pack:
    """The pack at `path`, which must be the one with this checksum.

    Raises:
        PackError: it is another, or missing or damaged.
    """
    pack = Pack(path)
    if pack.checksum != checksum:
        raise PackError(f"{path}: a pack, but not the one that {MANIFEST} lists; `crate-fast prepare` writes that anew")
    return pack


def is_packed(path: str | Path) -> bool:
    """Whether `path` is a folder that `crate-fast prepare` has filled, or begun to fill."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, SETTINGS))


def open_packs(path: str | Path) -> Packs:
    """The packs of a folder.

    Raises:
        PackError: `crate-fast prepare` has not come to its end there, or a file is missing or damaged.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise PackError(f"{path}: `crate-fast prepare` has not come to its end there; the same command goes on with it")
    try:
        classes, counts, names = _listed(parse_json((path / MANIFEST).read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackError(f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})") from error
    empty = next((split for split in names if not names[split]), None)
    if empty is not None:
        raise PackError(f"{path / MANIFEST}: it lists no packs of {empty}")
    _allow_open_files(sum(map(len, names.values())))
    splits = [Split([open_listed(path / name, checksum) for name, checksum in names[split].items()]) for split in names]
    for split, name in zip(splits, names, strict=True):
        if len(split) != counts[name] or not len(split) or split.labels.max() >= len(classes):
            raise PackError(f"{path / MANIFEST}: its {name} packs do not hold what it says")
    train, val = splits
    return Packs(train, val, classes)


def _listed(manifest: dict) -> tuple[list[str], dict[str, int], dict[str, dict[str, int]]]:
    """The classes, and by their split how many images there are and the packs' checksums by name.

    Raises:
        ValueError, or another that a list in a number's place makes: it is not what is written.
    """
    classes = manifest["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    names = {split: manifest[split]["packs"] for split in ("train", "val")}
    counts = {split: manifest[split]["images"] for split in names}
    for split, packs in names.items():
        odd = [name for name in packs if not re.fullmatch(rf"{split}-[0-9]+\.pack", name) or type(packs[name]) is not int]
        if odd or type(counts[split]) is not int:
            raise ValueError(f"of {split}: {odd[0]!r} is no name of a pack with a number" if odd else f"{split} has no count")
    return classes, counts, names


def _allow_open_files(packs: int) -> None:
    """Raises the number of files that a process may have open, where the system lets it, to what so many packs need."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = packs + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))


def verify(target: Path) -> int:
    """Compares all images of all packs with their checksums; how many there are.

    Raises:
        PackError: one is not what was written, or the packs are not complete.
    """
    packs = open_packs(target)
    for split in (packs.train, packs.val):
        for index in range(len(split)):
            split.pixels(index)
    return len(packs.train) + len(packs.val)
