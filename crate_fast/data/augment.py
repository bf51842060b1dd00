"""Random changes of one photograph: crop, flip, RandAugment, TrivialAugment, erasing. Ranges are torchvision's.

Every change draws from the generator it is given and from nothing else.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from .pictures import MOST_PIXELS

CROP_TRIES = 10
ASPECTS = (3 / 4, 4 / 3)  # of a random crop
ERASED_AREAS, ERASED_ASPECTS = (0.02, 0.33), (0.3, 3.3)
LEVELS = 30  # of strength, above none
TRANSLATION = 150 / 331  # RandAugment's largest, as a part of the side
OPERATIONS = (
    "identity",
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
SIGNED = OPERATIONS[1:10]
TRIVIALAUGMENT_RANGES = {
    **{"shear_x": 0.99, "shear_y": 0.99, "translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0, "posterize": 6.0},
    **dict.fromkeys(SIGNED[5:], 0.99),
}


def random_crop(image: Image.Image, size: int, least: float, rng: np.random.Generator) -> Image.Image:
    """A rectangle of `least` to all of the image's area, squeezed into (size, size) pixels, bilinearly with antialiasing."""
    width, height = image.size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(least, 1.0)
        aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:  # a very long image: as much of its middle as a crop may have
        w, h = min(width, max(1, round(height * ASPECTS[1]))), min(height, max(1, round(width / ASPECTS[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)


def central_crop(image: Image.Image, size: tuple[int, int], part: float) -> Image.Image:
    """The middle of the image as (height, width) pixels: `part` of the largest rectangle of that shape; 0: all, squeezed."""
    height, width = size
    if part == 0:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    image = cover(image, *(max(side, round(side / part)) for side in size))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image as small as it covers (height, width) pixels, one side of it equal, bilinearly with antialiasing.

    Raises:
        ValueError: it is so long that it would have more than `MOST_PIXELS`.
    """
    own_width, own_height = image.size
    narrow = own_width * height <= own_height * width
    new = (width, int(width * own_height / own_width)) if narrow else (int(height * own_width / own_height), height)
    if math.prod(new) > MOST_PIXELS:
        raise ValueError(f"it is {own_height}×{own_width}, too long to be scaled to {new[1]}×{new[0]}")
    return image.resize(new, Image.Resampling.BILINEAR)


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image, or its mirror image as often."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def randaugment(image: Image.Image, count: int, level: int, rng: np.random.Generator) -> Image.Image:
    """`count` random operations one after the other, all of strength `level`, 0 to 30 (arXiv:1909.13719)."""
    for _ in range(count):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        value = strength(operation, level, randaugment_ranges(*image.size))
        image = change(image, operation, _signed(operation, value, rng))
    return image


def trivialaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One random operation of random strength, from wider ranges (arXiv:2103.10158)."""
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    value = strength(operation, int(rng.integers(LEVELS + 1)), TRIVIALAUGMENT_RANGES)
    return change(image, operation, _signed(operation, value, rng))


def randaugment_ranges(width: int, height: int) -> dict[str, float]:
    """The values of RandAugment's operations at level 30, of images of a size in pixels."""
    moves = {"translate_x": TRANSLATION * width, "translate_y": TRANSLATION * height}
    return {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0, "posterize": 4.0, **moves} | dict.fromkeys(SIGNED[5:], 0.9)


def strength(operation: str, level: int, ranges: dict[str, float]) -> float:
    """An operation's value at `level`, 0 to 30; `ranges` tells that at 30, of posterize how many bits are taken."""
    if operation == "posterize":
        return 8 - round(level * ranges[operation] / LEVELS)
    first, last = (255.0, 0.0) if operation == "solarize" else (0.0, ranges.get(operation, 0.0))
    return torch.linspace(first, last, LEVELS + 1)[level].item()  # in float32, as torchvision has it, to the last pixel


def change(image: Image.Image, operation: str, value: float) -> Image.Image:
    """The image after one operation; what comes in from outside is black, and pixels are the nearest ones."""
    if operation in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, operation.title())(image).enhance(1 + value)
    if operation == "posterize":
        return ImageOps.posterize(image, int(value))
    if operation == "solarize":
        return ImageOps.solarize(image, value)  # pyright: ignore[reportArgumentType] (any number will do)
    if operation in ("autocontrast", "equalize"):
        return getattr(ImageOps, operation)(image)
    if operation == "rotate":
        return image.rotate(value)
    maps = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, -int(value), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(value)),
    }
    return image.transform(image.size, Image.Transform.AFFINE, maps[operation])


def erase(pixels: np.ndarray, chance: float, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`pixels` (height, width, 3), with probability `chance` a rectangle of them set to `colour` (arXiv:1708.04896)."""
    if chance == 0 or rng.random() >= chance:
        return pixels
    height, width = pixels.shape[:2]
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*ERASED_AREAS)
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECTS[0]), math.log(ERASED_ASPECTS[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = colour
            break
    return pixels


def _signed(operation: str, value: float, rng: np.random.Generator) -> float:
    return -value if operation in SIGNED and rng.random() < 0.5 else value
