"""Photographs as files, for every command alike: which of a folder's are taken, and how one becomes RGB."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from ..files import check_regular, is_of_system, patiently

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
READER_ENTRY = "reader"  # of what a run or a folder of packs says of its images
READER = 3  # of `find_pictures` and `read_picture`: what a run or pack was made with, where they changed what is read
ORIENTATION = 0x0112  # of EXIF: how a camera was held
SIXTEEN_BITS = 65535
BITS, PHOTOMETRIC, SAMPLES = 258, 262, 339  # tags of TIFF: bits of a value, what zero is, kind of values
WHITE_IS_ZERO, SIGNED = 0, 2  # in the latter two
MOST_PIXELS = 89_478_485  # of an image: from there on Pillow warns of a bomb; a quarter of a GiB of colours
KINDS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # none starts a program
TILE = (322, 323)  # of TIFF: width and height of the parts that are unpacked at a time
LARGEST_FILE = 1 << 30  # bytes, that are read a second time
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def read_picture(source: str | Path | BinaryIO) -> Image:
    """The image in `source` as RGB, turned as its camera says, transparent parts on white; of an animation the first.

    Grey of 12 and 16 bits is white at 4095 and 65535, at 32767 with a sign; of 32 bits at 255 if its values fit in 8, at 65535
    if they fit in 16; of floating point, 0 to 1, at 1; all the other way round where a TIFF says that 0 is white. What its
    header says of its size is looked at before anything is decoded.

    Raises:
        ValueError: it has more than `MOST_PIXELS`, or its numbers have no known white.
        Exception: whatever Pillow makes of a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is odd in a file that can be read
        if not isinstance(source, str | Path):
            return _read(source)
        check_regular(source)
        with open(source, "rb") as file:  # of which Pillow maps no part, as it does by a name: see `packfile.Pack`
            return _read(file)


def read_or_stop(path: str | Path) -> Image:
    """`read_picture` of a file, which is tried again where the system fails it for a moment.

    Raises:
        OSError, MemoryError: so that `is_of_system` says yes, where the system goes on failing; nothing tells of the image.
        Exception: whatever Pillow makes of a damaged file, all of which could be read.
    """
    try:
        return read_picture(path)
    except Exception as error:
        patiently(partial(check_regular, path))
        if os.stat(path).st_size > LARGEST_FILE:
            raise
        # Pillow's decoders do not tell that a disk failed from that a file is damaged.
        content = patiently(Path(path).read_bytes)
        try:
            return read_picture(io.BytesIO(content))
        except MemoryError:
            raise
        except Exception as damage:
            raise (damage if is_of_system(error) else error) from None


def check_pixels(*sides: int) -> None:
    """Raises ValueError where an image of these sides is larger than any that is read."""
    pixels = math.prod(sides)
    if pixels > MOST_PIXELS:
        raise ValueError(f"it has {pixels:,} pixels; at most {MOST_PIXELS:,} are read")


def _open(source: BinaryIO) -> Image:
    """The image, its header read and nothing decoded."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        file = Image.open(source, formats=[kind for kind in KINDS if kind in Image.OPEN])
    except UnidentifiedImageError as error:  # whose own words name an object of Python's
        raise UnidentifiedImageError("no image that can be read") from error
    except Image.DecompressionBombError as error:  # Pillow's own bound, twice ours
        check_pixels(int(re.findall(r"\d+", str(error))[0]))
        raise
    try:
        check_pixels(*file.size)
        check_pixels(*(int(getattr(file, "tag_v2", {}).get(tag, 1)) for tag in TILE))
    except BaseException:
        file.close()
        raise
    return file


def _read(source: BinaryIO) -> Image:
    from PIL import Image

    with _open(source) as file:
        clear = _clear_grey(file)
        file.load()
        if clear is not None:
            file.info["transparency"] = clear
        image = _turned(_in_bytes(file), _orientation(file))
        if image.mode in PREMULTIPLIED:
            image = image.convert(PREMULTIPLIED[image.mode])
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _clear_grey(file: Image) -> int | None:
    """Which grey of 8 bits a PNG of 2 or 4 bits calls transparent, where it calls one so: Pillow scales the pixels alone."""
    tiles = getattr(file, "tile", ())
    packed = tiles[0].args if file.format == "PNG" and file.mode == "L" and tiles else None
    value = file.info.get("transparency")
    if packed not in ("L;2", "L;4") or not isinstance(value, int):
        return None
    return value * (85 if packed == "L;2" else 17)


def _orientation(file: Image) -> int:
    """How the file says that it was held, 1 to 8: upright where it does not, or where its EXIF cannot be read."""
    try:
        return file.getexif().get(ORIENTATION, 1)
    except Exception:  # ImageNet has images with damaged EXIF, whose pixels are whole
        return 1


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _in_bytes(image: Image) -> Image:
    """`image` itself, or, where its grey has more than 8 bits, that in 8 (mode "L", or "LA" where one value is transparent)."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image if image.mode in ("F", "I") else image.convert("I"))
    white = _white(image, values.max())
    if not (values.min() >= 0 and values.max() <= white):  # not: NaN is neither
        raise ValueError(f"its grey is {values.min()} to {values.max()}; what is white is known of 0 to {white}")
    scaled = values.astype(np.float32)  # exact enough: scaled, no value of 16 bits is near the middle between two of 8
    scaled *= 255 / white
    if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow turns round in 8 bits and fewer
        np.subtract(255, scaled, out=scaled)
    grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _white(image: Image, most: float) -> int:
    """The number that is white in an image of grey with more than 8 bits, whose largest is `most`."""
    if image.mode == "F":
        return 1
    if image.mode == "I" and image.format == "TIFF" and most <= 255:  # more bits that hold what 8 do
        return 255
    bits = _tag(image, BITS)
    if bits == 12:
        return 4095
    return SIXTEEN_BITS // 2 if bits == 16 and _tag(image, SAMPLES) == SIGNED else SIXTEEN_BITS


def _tag(image: Image, tag: int) -> int | None:
    """The (first) value of a tag of a TIFF, else None."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    value = tags.get(tag)
    first: Any = value[0] if isinstance(value, tuple) and value else value
    return first


def find_pictures(folder: Path, left_out: Counter) -> list[str]:
    """The paths of the images in `folder` and the folders in it, sorted; links are followed, hidden names ignored.

    `left_out` counts what is not taken, by the reason in words.

    Raises:
        OSError: a folder cannot be listed.
    """
    return sorted(_walk(str(folder), (os.path.realpath(folder),), left_out))


def _walk(folder: str, above: tuple[str, ...], left_out: Counter) -> list[str]:
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif not os.path.exists(entry.path):
            left_out["links to nothing"] += 1
        elif entry.is_dir():
            place = os.path.realpath(entry.path)
            if place in above:
                left_out["links to a folder that they lie in"] += 1
            else:
                found += _walk(entry.path, (*above, place), left_out)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
            found.append(entry.path)
        else:
            left_out["no images by their names"] += 1
    return found


def tell_left_out(folder: Path, left_out: Counter, where: TextIO) -> None:
    """Says `where` what of `folder` was not taken, if anything; under torchrun once."""
    if left_out.total() and os.environ.get("RANK", "0") == "0":
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()) if count)
        print(f"crate-fast: {folder}: left out: {counts}", file=where, flush=True)
