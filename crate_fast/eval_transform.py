"""How a model's images are made of photographs, and what its answers are called: it belongs to the weights and is stored with
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_NAMES = 1_000_000
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, red, green, blue, in 0..1
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, as Pillow converts
LEAST_CROP = 0.05  # of a smaller part an image would be enlarged more than twenty times


class Transform(NamedTuple):
    """What is done to an image in evaluation, and what the model's answer to it is called.

    crop: part of its largest rectangle of the model's shape that the model sees, the middle; 0: all of it, squeezed.
    mean, std: by channel, of pixels of 0..1, by which they are normalised; None: not known.
    names: of the classes, in the order of the logits; None: not known.
    """

    crop: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None


MAIN = Transform(0.875)  # main.py's: 256 pixels on the short side, of which the middle 224
FINETUNE = Transform(0.0)  # finetune.py's: squeezed to 224×224


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of ImageNet's training images by channel: of three, or of their grey."""
    if channels == len(MEAN):
        return MEAN, STD
    mean, std = ((sum(w * v for w, v in zip(LUMA, values, strict=True)),) for values in (MEAN, STD))
    return mean, std


def read_transform(value: object) -> Transform:
    """The transform that stands in a file as `Transform._asdict` gives it.

    Raises:
        ValueError: it is none.
    """
    found = _read(value)
    if found is None:
        raise ValueError(f"its evaluation is {str(value)[:200]}; it must have crop, mean and std, and names that are words")
    return found


def _read(value: Any) -> Transform | None:
    try:
        crop = value["crop"]
        mean, std = (None if value[name] is None else tuple(map(float, value[name])) for name in ("mean", "std"))
        numbers = (crop, *(mean or ()), *(std or ()))
        sound = allowed_crop(crop) and all(math.isfinite(number) for number in numbers) and all(s > 0 for s in std or ())
        fits = (mean is None) == (std is None) and len(mean or ()) == len(std or ())
        names = _read_names(value.get("names"))
        return Transform(float(crop), mean, std, names) if sound and fits else None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _read_names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_NAMES or not all(type(name) is str for name in value):
        raise ValueError
    return tuple(value)


def allowed_crop(crop: float) -> bool:
    """Whether a part is 0, or from `LEAST_CROP` to 1."""
    return not isinstance(crop, bool) and (crop == 0 or LEAST_CROP <= crop <= 1)


def transform_of(crop: float, described: dict, names: Sequence[str] | None = None) -> Transform:
    """The transform of a run on data that describe themselves so, their mean and std a number or by channel, and `names` of
    their classes."""
    values = [described.get(name) for name in ("mean", "std")]
    mean, std = ((value,) if isinstance(value, float) else value and tuple(value) for value in values)
    return Transform(crop, mean, std, None if names is None else tuple(names))
