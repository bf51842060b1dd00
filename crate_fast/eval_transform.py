"""How a model's images are made of photographs where it is evaluated: it belongs to the weights and is stored with them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

LEAST_CROP = 0.05  # of a smaller part an image would be enlarged more than twenty times


class Transform(NamedTuple):
    """What is done to an image in evaluation.

    crop: part of its largest rectangle of the model's shape that the model sees, the middle; 0: all of it, squeezed.
    mean, std: by channel, of pixels of 0..1, by which they are normalised; None: not known.
    """

    crop: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


MAIN = Transform(0.875)  # main.py's: 256 pixels on the short side, of which the middle 224
FINETUNE = Transform(0.0)  # finetune.py's: squeezed to 224×224


def read_transform(value: object) -> Transform:
    """The transform that stands in a file as `Transform._asdict` gives it.

    Raises:
        ValueError: it is none.
    """
    found = _read(value)
    if found is None:
        raise ValueError(f"its evaluation is {str(value)[:200]}; it must have crop, mean and std")
    return found


def _read(value: Any) -> Transform | None:
    try:
        crop = value["crop"]
        mean, std = (None if value[name] is None else tuple(map(float, value[name])) for name in ("mean", "std"))
        numbers = (crop, *(mean or ()), *(std or ()))
        sound = allowed_crop(crop) and all(math.isfinite(number) for number in numbers) and all(s > 0 for s in std or ())
        fits = (mean is None) == (std is None) and len(mean or ()) == len(std or ())
        return Transform(float(crop), mean, std) if sound and fits else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def allowed_crop(crop: float) -> bool:
    """Whether a part is 0, or from `LEAST_CROP` to 1."""
    return not isinstance(crop, bool) and (crop == 0 or LEAST_CROP <= crop <= 1)


def transform_of(crop: float, described: dict) -> Transform:
    """The transform of a run on data that describe themselves so, their mean and std a number or by channel."""
    values = [described.get(name) for name in ("mean", "std")]
    return Transform(crop, *((value,) if isinstance(value, float) else value and tuple(value) for value in values))
