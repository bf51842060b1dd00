"""Packs: many images in one file, read by memory map, every byte under a checksum.

    header   64 bytes: magic, version, how many images, where index and notes lie, how large the file is, checksums
    images   one behind the other, as RGB bytes or as JPEG
    index    32 bytes an image: place, size, checksum, height, width, label, encoding
    notes    JSON: the images' names, and the images that could not be read, each with the reason

Numbers are little-endian, checksums are CRC-32. Header, index and notes are checked when a pack is opened, an image the first
time that a process or one of its workers reads it.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint import write_atomically
from ..files import parse_json
from ..reading import first_line
from .config import ConfigError

MANIFEST, SETTINGS = "packs.json", "prepare.json"
MAGIC, VERSION = b"CRATEPK\n", 1
HEADER = struct.Struct("<8sIIQQQII12x")  # magic, version, images, index and notes at, size of the file, their checksums
HEADER_SIZE = HEADER.size + 4  # and its own checksum
INDEX = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("height", "<u4"), ("width", "<u4"), ("label", "<u4"), ("kind", "<u4")]
)
RAW, JPEG = 0, 1


class PackError(ConfigError):
    """A pack is damaged, or not all of a folder's packs are there; the message names the file, and where it is damaged."""


class Encoded(NamedTuple):
    """An image as it lies in a pack: its bytes, what they are (`RAW` or `JPEG`), its size in pixels, its label and name."""

    content: bytes
    kind: int
    height: int
    width: int
    label: int
    name: str


class Unreadable(NamedTuple):
    """An image that is left out, and why."""

    name: str
    reason: str


def write_pack(path: Path, images: Iterable[Encoded | Unreadable]) -> None:
    """Writes a pack to `path`, all of it or nothing; equal images give equal files."""
    write_atomically(path, lambda file: _write(file, images))


def _write(file, images: Iterable[Encoded | Unreadable]) -> None:
    file.write(bytes(HEADER_SIZE))
    rows, notes, place = [], {"names": [], "unreadable": []}, HEADER_SIZE
    for image in images:
        if isinstance(image, Unreadable):
            notes["unreadable"].append(list(image))
            continue
        file.write(image.content)
        crc = zlib.crc32(image.content)
        rows.append((place, len(image.content), crc, image.height, image.width, image.label, image.kind))
        notes["names"].append(image.name)
        place += len(image.content)
    index, text = np.array(rows, INDEX).tobytes(), json.dumps(notes).encode()
    file.write(index + text)
    notes_at = place + len(index)
    checksums = zlib.crc32(index), zlib.crc32(text)
    header = HEADER.pack(MAGIC, VERSION, len(rows), place, notes_at, notes_at + len(text), *checksums)
    file.seek(0)
    file.write(header + struct.pack("<I", zlib.crc32(header)))


class Pack:
    """A pack, mapped as `bytes`; `index` has a row of `INDEX` for each image. `checksum` is of the
    header, which has those of index and notes, which have those of the images.

    Raises:
        PackError: the file is missing, no pack, or damaged; the message says at which byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PackError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise self._damaged(0, "it is empty") from error
        self.bytes = np.frombuffer(self._map, np.uint8)
        count, index_at, notes_at, *checksums = self._read_header()
        for place, end, crc, part in ((index_at, notes_at, checksums[0], "index"), (notes_at, None, checksums[1], "notes")):
            if zlib.crc32(self.bytes[place:end]) != crc:
                raise self._damaged(place, f"its {part} is not what was written")
        self.index = np.frombuffer(self._map, INDEX, count, index_at)
        self._notes_at = notes_at

    @cached_property
    def _notes(self) -> dict:
        return parse_json(self._map[self._notes_at :])

    @property
    def names(self) -> list[str]:
        """The images' names."""
        return self._notes["names"]

    @property
    def unreadable(self) -> list[Unreadable]:
        """The images that were left out."""
        return [Unreadable(*entry) for entry in self._notes["unreadable"]]

    def __len__(self) -> int:
        return len(self.index)

    def content(self, number: int) -> np.ndarray:
        """The bytes of an image, (size,) uint8, nothing copied, compared with their checksum.

        Raises:
            PackError: they are not what was written.
        """
        row = self.index[number]
        place, size = int(row["offset"]), int(row["size"])
        content = self.bytes[place : place + size]
        if zlib.crc32(content) != row["crc"]:
            raise self.damaged_image(number, "is not what was written")
        return content

    def damaged_image(self, number: int, why: str) -> PackError:
        """The error that an image is damaged, to be raised."""
        row = self.index[number]
        what = f"image {number}, {self.names[number]}, its {row['size']} bytes from there on"
        return self._damaged(int(row["offset"]), f"{what}, {why}")

    def want(self, start: int, size: int) -> None:
        """Has the system read some bytes ahead from the disk, if they are not in memory."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, start + size - first)

    def _read_header(self) -> tuple[int, ...]:
        """(images, index at, notes at, checksum of the index, of the notes)."""
        if len(self.bytes) < HEADER_SIZE:
            raise self._damaged(0, f"it has {len(self.bytes)} bytes, fewer than a header")
        header = self._map[: HEADER.size]
        magic, version, count, index_at, notes_at, size, *checksums = HEADER.unpack(header)
        if magic != MAGIC:
            raise self._damaged(0, "it is no pack")
        if zlib.crc32(header).to_bytes(4, "little") != self._map[HEADER.size : HEADER_SIZE]:
            raise self._damaged(0, "its header is not what was written")
        self.checksum = zlib.crc32(header)
        if version != VERSION:
            raise PackError(f"{self.path}: a pack of version {version}; this reads version {VERSION}")
        if size != len(self.bytes):
            raise self._damaged(min(size, len(self.bytes)), f"it has {len(self.bytes)} bytes and was written with {size}")
        return count, index_at, notes_at, *checksums

    def _damaged(self, place: int, what: str) -> PackError:
        return PackError(f"{self.path}: damaged at byte {place}: {what}")


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

    def pixels(self, index: int, least: tuple[int, int] = (0, 0)) -> np.ndarray:
        """An image, (height, width, 3) uint8, read-only where it lies raw; a JPEG may be decoded smaller, to no less than
        `least` (height, width).

        Raises:
            PackError: it is not what was written, or cannot be decoded.
        """
        pack = self._packs[self._pack[index]]
        if self._checked[index]:
            offset = int(self._offsets[index])
            content = pack.bytes[offset : offset + int(self._sizes[index])]
        else:
            content = pack.content(int(self._number[index]))
            self._checked[index] = 1
        if self._kinds[index] == RAW:
            return content.reshape(self.heights[index], self.widths[index], 3)
        try:
            return decode_jpeg(content, least)
        except ValueError as error:
            raise pack.damaged_image(int(self._number[index]), f"cannot be decoded ({first_line(error)})") from error


def decode_jpeg(content: bytes | np.ndarray, least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A JPEG as (height, width, 3) uint8, RGB; decoded smaller, to no less than `least` (height, width), if that is not 0.

    Raises:
        ValueError: it is damaged, or in another colour space than RGB or grey may have.
    """
    import simplejpeg

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
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        classes = manifest["classes"]
        names = {split: list(manifest[split]["packs"].items()) for split in ("train", "val")}
        counts = {split: int(manifest[split]["images"]) for split in names}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackError(f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})") from error
    splits = [Split([open_listed(path / name, checksum) for name, checksum in names[split]]) for split in names]
    for split, name in zip(splits, names, strict=True):
        if len(split) != counts[name] or not len(split) or split.labels.max() >= len(classes):
            raise PackError(f"{path / MANIFEST}: its {name} packs do not hold what it says")
    return Packs(*splits, classes)
