"""Packs: many images in one file, every byte under a checksum.

    header   64 bytes: magic, version, how many images, where index and notes lie, how large the file is, checksums
    images   one behind the other, as RGB bytes or as JPEG
    index    32 bytes an image: place, size, checksum, height, width, label, encoding
    notes    JSON: the images' names, and the images that could not be read, each with the reason

Numbers are little-endian, checksums are CRC-32. Header, index and notes are checked when a pack is opened, an image the first
time that a process or one of its workers reads it.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import weakref
import zlib
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import first_line, parse_json, patiently, write_atomically
from ..settings import ConfigError
from .pictures import MOST_PIXELS

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
    """A pack, open to be read; `index` has a row of `INDEX` for each image. `checksum` is of the header, which has those of
    index and notes, which have those of the images.

    It is read and not mapped: of a mapped file that is cut, or on a disk that fails, the system ends the process with SIGBUS.

    Raises:
        PackError: the file is missing, no pack, or damaged; the message says at which byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in a pack's place is not waited for
            weakref.finalize(self, os.close, self._file)
            status = os.fstat(self._file)
        except OSError as error:
            raise PackError(f"{path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise PackError(f"{path}: it is no file of its own but a folder, pipe or device")
        self._size = status.st_size
        count, index_at, self._notes_at, *checksums = self._read_header()
        index = self.read(index_at, self._notes_at - index_at)
        self._check(index, checksums[0], index_at, "index")
        self._check(self.read(self._notes_at, self._size - self._notes_at), checksums[1], self._notes_at, "notes")
        self.index = index.view(INDEX)
        self._check_index(count, index_at)

    @cached_property
    def _notes(self) -> dict:
        try:
            notes = parse_json(self.read(self._notes_at, self._size - self._notes_at).tobytes())
            names, unreadable = notes["names"], notes["unreadable"]
            if len(names) != len(self.index) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"they have not one name for each of {len(self.index)} images")
            if not all(isinstance(entry, list) and list(map(type, entry)) == [str, str] for entry in unreadable):
                raise ValueError("what could not be read is no list of names and reasons")
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(self._notes_at, f"its notes cannot be read ({first_line(error)})") from error
        return notes

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

    def read(self, place: int, size: int) -> np.ndarray:
        """`size` bytes from `place` on, (size,) uint8.

        Raises:
            PackError: the file ends before, as one that was cut after it was opened does, or cannot be read.
        """
        content = np.empty(size, np.uint8)
        got = 0
        while got < size:
            try:
                more = patiently(partial(os.preadv, self._file, [content[got:].data], place + got))
            except OSError as error:
                raise PackError(f"{self.path}: {error.strerror}") from error
            if not more:
                raise self._damaged(place + got, f"it ends there, and had {self._size} bytes when it was opened")
            got += more
        return content

    def content(self, number: int) -> np.ndarray:
        """The bytes of an image, (size,) uint8, compared with their checksum.

        Raises:
            PackError: they are not what was written.
        """
        row = self.index[number]
        content = self.read(int(row["offset"]), int(row["size"]))
        if zlib.crc32(content.data) != row["crc"]:
            raise self.damaged_image(number, "is not what was written")
        return content

    def damaged_image(self, number: int, why: str) -> PackError:
        """The error that an image is damaged, to be raised."""
        row = self.index[number]
        what = f"image {number}, {self.names[number]}, its {row['size']} bytes from there on"
        return self._damaged(int(row["offset"]), f"{what}, {why}")

    def want(self, start: int, size: int) -> None:
        """Has the system read some bytes ahead from the disk, if they are not in memory."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, start, size, os.POSIX_FADV_WILLNEED)

    def _read_header(self) -> tuple[int, ...]:
        """(images, index at, notes at, checksum of the index, of the notes)."""
        if self._size < HEADER_SIZE:
            what = f"it has {self._size} bytes, fewer than a header" if self._size else "it is empty"
            raise self._damaged(0, what)
        header, own = np.split(self.read(0, HEADER_SIZE), [HEADER.size])
        magic, version, count, index_at, notes_at, size, *checksums = HEADER.unpack(header.data)
        if magic != MAGIC:
            raise self._damaged(0, "it is no pack")
        self.checksum = zlib.crc32(header.data)
        if self.checksum.to_bytes(4, "little") != own.tobytes():
            raise self._damaged(0, "its header is not what was written")
        if version != VERSION:
            raise PackError(f"{self.path}: a pack of version {version}; this reads version {VERSION}")
        if size != self._size:
            raise self._damaged(min(size, self._size), f"it has {self._size} bytes and was written with {size}")
        if not HEADER_SIZE <= index_at <= notes_at <= size or notes_at - index_at != count * INDEX.itemsize:
            raise self._damaged(0, f"its header says that {count} images have their index from byte {index_at} to {notes_at}")
        return count, index_at, notes_at, *checksums

    def _check(self, content: np.ndarray, checksum: int, place: int, part: str) -> None:
        if zlib.crc32(content.data) != checksum:
            raise self._damaged(place, f"its {part} is not what was written")

    def _check_index(self, count: int, index_at: int) -> None:
        """Raises PackError unless images lie one behind the other up to the index, each with the bytes that it must have."""
        index = self.index
        ends = HEADER_SIZE + np.cumsum(index["size"], dtype=np.uint64)
        starts = np.concatenate([[HEADER_SIZE], ends]).astype(np.uint64)
        pixels = index["height"].astype(np.uint64) * index["width"].astype(np.uint64)
        raw = index["kind"] == RAW
        wrong = {
            "does not lie behind the one before": index["offset"] != starts[:-1],
            f"is of kind {{kind}}; there are {RAW} and {JPEG}": ~raw & (index["kind"] != JPEG),
            f"is {{height}}×{{width}}; it must have 1 to {MOST_PIXELS:,} pixels": (pixels == 0) | (pixels > MOST_PIXELS),
            "is {height}×{width}, which its {size} bytes are not": raw & (3 * pixels != index["size"]),
        }
        for words, found in wrong.items():
            if found.any():
                number = int(found.argmax())
                row = {name: int(index[number][name]) for name in INDEX.names or ()}
                place = index_at + number * INDEX.itemsize
                raise self._damaged(place, f"its index says that image {number} {words.format(**row)}")
        if int(starts[-1]) != index_at:
            raise self._damaged(index_at, f"its {count} images end at byte {int(starts[-1])} and not where the index begins")

    def _damaged(self, place: int, what: str) -> PackError:
        return PackError(f"{self.path}: damaged at byte {place}: {what}")
