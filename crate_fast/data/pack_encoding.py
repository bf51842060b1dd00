"""Any file of an image as it shall lie in a pack: read as RGB whatever it is, reduced, raw or as JPEG."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import first_line, patiently
from .augment import cover
from .pack_file import JPEG, RAW, Encoded, Unreadable
from .pack_folder import decode_jpeg
from .pictures import read_picture

JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Settings:
    """How images lie in packs.

    short_side: pixels to which an image's short side is reduced; a smaller one stays as it is. 0: none is changed.
    raw: RGB bytes, not JPEG. Validation images that are reduced are raw in any case, and so lose nothing.
    quality: of JPEGs that are made, 1 to 100. A JPEG that is not reduced is kept as it is.
    pack_images: images of a pack.
    """

    short_side: int = 256
    raw: bool = False
    quality: int = 90
    pack_images: int = 8192


def encode(path: str, name: str, label: int, lossless: bool, settings: Settings) -> Encoded | Unreadable:
    """A file as it will lie in a pack.

    Raises:
        OSError, MemoryError: it cannot be read just now, which says nothing of the image.
    """
    content = patiently(Path(path).read_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd in a file that can be read
            return _encode(content, name, label, lossless, settings)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes of the decoder
        return Unreadable(name, re.sub(r" at 0x[0-9a-f]+", "", first_line(error)))


def _encode(content: bytes, name: str, label: int, lossless: bool, settings: Settings) -> Encoded:
    if not content:
        raise ValueError("the file is empty")
    image = read_picture(io.BytesIO(content))
    reduced = 0 < settings.short_side < min(image.size)
    image = cover(image, settings.short_side, settings.short_side) if reduced else image
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    size = (height, width, label, name)
    if settings.raw or (lossless and reduced):
        return Encoded(pixels.tobytes(), RAW, *size)
    if content.startswith(JPEG_START) and not reduced and _decodes_to(content, pixels):
        return Encoded(content, JPEG, *size)
    if lossless:
        return Encoded(pixels.tobytes(), RAW, *size)
    import simplejpeg

    return Encoded(simplejpeg.encode_jpeg(pixels, settings.quality, "RGB", "420"), JPEG, *size)


def _decodes_to(content: bytes, pixels: np.ndarray) -> bool:
    """Whether the loader's decoder makes these pixels of a JPEG; not where its colours are CMYK, for one."""
    try:
        return np.array_equal(decode_jpeg(content, pixels.shape[:2]), pixels)
    except ValueError:
        return False
