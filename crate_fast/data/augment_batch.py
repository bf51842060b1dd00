"""Random changes of a batch where it lies, each image by its own random numbers: flip, RandAugment, TrivialAugment, erasing.

The operations are those of `augment.change`, bit for bit: Pillow's arithmetic in whole numbers, in tables of 256 values, or in
float32 as Pillow has it. What is drawn is a function of seed, epoch and image, made on the host, so that nothing waits for
the device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..settings import DataSettings
from .augment import (
    CROP_TRIES,
    ERASED_AREAS,
    ERASED_ASPECTS,
    LEVELS,
    OPERATIONS,
    SIGNED,
    TRIVIALAUGMENT_RANGES,
    randaugment_ranges,
    strength,
)
from .philox import CHANGES, uniforms

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
TABLES = ("brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize")
ONE = 1 << 16  # Pillow moves images in fixed point, 16 bits of them behind the point
ERASING = 2 * CROP_TRIES + 3  # random numbers: whether, areas, aspects, place


class Changes:
    """What `settings` ask for beside the crop, for batches (n, height, width, 3) uint8 on `device`."""

    def __init__(self, settings: DataSettings, device: torch.device, colour: np.ndarray) -> None:
        self._settings, self._device = settings, device
        self._colour = torch.from_numpy(colour).to(device)
        self._operations = {"none": 0, "randaugment": settings.randaugment_ops, "trivial": 1}[settings.augment]

    def __call__(self, pixels: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        """The images called `indices`, (n,), changed as drawn for `epoch`; `pixels` are given up."""
        settings, count = self._settings, 1 + 3 * self._operations + ERASING
        uniform = uniforms(settings.seed, epoch, indices, CHANGES, count)
        pixels = mirror(pixels, uniform[:, 0] < 0.5)
        _, height, width, _ = pixels.shape
        for number in range(self._operations):
            names, values = self._choose(uniform[:, 1 + 3 * number :][:, :3], (height, width))
            pixels = change_each(pixels, names, values)
        if settings.erase:
            pixels = self._erase(pixels, uniform[:, -ERASING:])
        return pixels

    def _choose(self, uniform: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """An operation, as its place in OPERATIONS, and its value for each row of `uniform`: which, how strong, which sign."""
        chosen = (uniform[:, 0] * len(OPERATIONS)).astype(np.int64)
        fixed = self._settings.augment == "randaugment"
        level = self._settings.randaugment_magnitude if fixed else (uniform[:, 1] * (LEVELS + 1)).astype(np.int64)
        values, signed = _strengths(fixed, *size)[chosen, level], np.isin(np.array(OPERATIONS)[chosen], SIGNED)
        return chosen, np.where(signed & (uniform[:, 2] < 0.5), -values, values)

    def _erase(self, pixels: Tensor, uniform: np.ndarray) -> Tensor:
        _, height, width, _ = pixels.shape
        boxes = erased_boxes(uniform, height, width, self._settings.erase)
        return fill(pixels, boxes, self._colour)


@lru_cache(maxsize=8)
def _strengths(fixed: bool, height: int, width: int) -> np.ndarray:
    """(operations, levels) the value of every operation at every level, RandAugment's or TrivialAugment's."""
    ranges = randaugment_ranges(width, height) if fixed else TRIVIALAUGMENT_RANGES
    return np.array([[strength(name, level, ranges) for level in range(LEVELS + 1)] for name in OPERATIONS])


def mirror(pixels: Tensor, chosen: np.ndarray) -> Tensor:
    """`pixels`, the images `chosen` (n,) bool of them as in a mirror; on the CPU they are turned where they lie."""
    if pixels.device.type != "cpu":
        return torch.where(send(chosen, pixels.device).view(-1, 1, 1, 1), pixels.flip(2), pixels)
    import cv2  # PyTorch is slow at turning pixels of three bytes

    images = pixels.numpy()
    for index in np.flatnonzero(chosen):
        cv2.flip(images[index], 1, dst=images[index])
    return pixels


def change_each(pixels: Tensor, names: np.ndarray, values: np.ndarray) -> Tensor:
    """Each image after an operation of its own.

    Args:
        pixels: (n, height, width, 3) uint8, not changed.
        names: (n,) places in OPERATIONS.
        values: (n,) float64, as `augment.change` takes them.
    """
    order = np.argsort(names, kind="stable")
    sent, pixels = send(order, pixels.device), pixels.clone()
    for operation in np.unique(names):
        name = OPERATIONS[operation]
        if name == "identity":
            continue
        start, stop = np.searchsorted(names[order], [operation, operation + 1])
        which = sent[start:stop]
        pixels[which] = _change(pixels[which], name, values[order[start:stop]])
    return pixels


def _change(pixels: Tensor, name: str, values: np.ndarray) -> Tensor:
    """Images after one operation, each by its own value."""
    if name in MOVES:
        return move(pixels, np.stack([move_of(name, value, *pixels.shape[1:3]) for value in values]))
    strengths = send(values, pixels.device, torch.float32).view(-1, 1, 1)
    if name in TABLES:
        return look_up(pixels, _table(pixels, name, strengths))
    other = grey(pixels).unsqueeze(3) if name == "color" else smooth(pixels)
    return blend(other, pixels, 1 + strengths.unsqueeze(3))


def move_of(name: str, value: float, height: int, width: int) -> np.ndarray:
    """(6,) the map from a place in the new image to one in the old, as Pillow has it: x = a·x + b·y + c, y = d·x + e·y + f."""
    if name == "rotate":
        angle = -math.radians(value % 360)
        a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return np.array([a, b, a * -x + b * -y + x, -b, a, -b * -x + a * -y + y])
    maps = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, -int(value), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(value)),
    }
    return np.array(maps[name], np.float64)


def move(pixels: Tensor, maps: np.ndarray) -> Tensor:
    """Images moved by maps (n, 6): the nearest pixels, black from outside."""
    n, height, width, _ = pixels.shape
    maps = maps.copy()
    maps[:, 2] += 0.5 * (maps[:, 0] + maps[:, 1])  # from the middle of the first pixel
    maps[:, 5] += 0.5 * (maps[:, 3] + maps[:, 4])
    fixed = send(np.floor(maps * ONE + 0.5).astype(np.int64), pixels.device).view(n, 6, 1, 1)
    x = torch.arange(width, device=pixels.device)
    y = torch.arange(height, device=pixels.device).view(-1, 1)
    across = (fixed[:, 0] * x + fixed[:, 1] * y + fixed[:, 2]) >> 16
    down = (fixed[:, 3] * x + fixed[:, 4] * y + fixed[:, 5]) >> 16
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    places = (down * width + across).where(inside, 0).view(n, -1, 1).expand(-1, -1, 3)
    return pixels.view(n, -1, 3).gather(1, places).view_as(pixels) * inside.unsqueeze(3)


def _table(pixels: Tensor, name: str, values: Tensor) -> Tensor:
    """(n, 256, 3) or (n, 256, 1) uint8: what becomes of each value, by the image and its channel; values (n, 1, 1) float32."""
    each = torch.arange(256, device=pixels.device, dtype=torch.int32).view(1, 256, 1)
    if name == "brightness":
        return blend(torch.zeros_like(each), each, 1 + values)
    if name == "contrast":
        return blend(mean_grey(pixels).view(-1, 1, 1), each, 1 + values)
    if name == "posterize":
        return (each & (0xFF00 >> values.int())).to(torch.uint8)
    if name == "solarize":
        return torch.where(each < values, each, 255 - each).to(torch.uint8)
    return (stretched if name == "autocontrast" else equalised)(pixels, each)


def blend(first: Tensor, second: Tensor, part: Tensor) -> Tensor:
    """uint8 first + part · (second - first), cut off to whole numbers from 0 to 255, computed in float32."""
    first, second = first.int(), second.int()
    return (first + part * (second - first)).clamp(0, 255).to(torch.uint8)


def grey(pixels: Tensor) -> Tensor:
    """(n, height, width) int32 from 0 to 255, of ITU-R 601-2 in fixed point."""
    red, green, blue = pixels.int().unbind(3)
    return (red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16


def mean_grey(pixels: Tensor) -> Tensor:
    """(n,) int64: the mean of `grey`, rounded."""
    sums, count = grey(pixels).sum(dim=(1, 2)), pixels.shape[1] * pixels.shape[2]
    return (2 * sums + count) // (2 * count)


def smooth(pixels: Tensor) -> Tensor:
    """(n, height, width, 3) int32: the mean of a pixel, five times, and its eight neighbours; the edge as it is."""
    wide = pixels.int()
    if min(pixels.shape[1:3]) < 3:
        return wide
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    wide[:, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return wide


def stretched(pixels: Tensor, each: Tensor) -> Tensor:
    """The table of autocontrast: a channel's least value to 0 and its largest to 255."""
    values = pixels.flatten(1, 2)
    wide = torch.float32 if pixels.device.type == "mps" else torch.float64  # which Metal does not have
    low, high = (edge(dim=1, keepdim=True).to(wide) for edge in (values.amin, values.amax))
    scale = torch.full_like(low, 255.0) / (high - low)  # a number divided by a tensor is multiplied by its reciprocal
    table = (each * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, table, each.to(torch.uint8))


def equalised(pixels: Tensor, each: Tensor) -> Tensor:
    """The table of equalize: every value of a channel about as often."""
    n = len(pixels)
    values = pixels.reshape(n, -1, 3).transpose(1, 2).long()
    counts = torch.zeros(n, 3, 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last) // 255
    before = counts.cumsum(dim=2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, each.view(1, 1, 256)).transpose(1, 2).to(torch.uint8)


def look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Images with each value replaced by that in its image's and channel's table."""
    places = pixels.flatten(1, 2).long()
    return table.expand(-1, -1, 3).gather(1, places).view_as(pixels)


def erased_boxes(uniform: np.ndarray, height: int, width: int, chance: float) -> np.ndarray:
    """(n, 4) int64, top, bottom, left and right of what is erased, distributed as in `augment.erase`; all 0 for nothing."""
    tries = slice(1, 1 + CROP_TRIES), slice(1 + CROP_TRIES, 1 + 2 * CROP_TRIES)
    low, high = ERASED_AREAS
    areas = height * width * (low + (high - low) * uniform[:, tries[0]])
    low, high = map(math.log, ERASED_ASPECTS)
    ratios = np.exp(low + (high - low) * uniform[:, tries[1]])
    h, w = (np.rint(np.sqrt(area)).astype(np.int64) for area in (areas * ratios, areas / ratios))
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=1)[:, None]
    h, w = (np.take_along_axis(side, first, 1)[:, 0] for side in (h, w))
    top, left = ((uniform[:, -2] * (height - h + 1)).astype(np.int64), (uniform[:, -1] * (width - w + 1)).astype(np.int64))
    erased = (uniform[:, 0] < chance) & fits.any(axis=1)
    return np.stack([top, top + h, left, left + w], axis=1) * erased[:, None]


def fill(pixels: Tensor, boxes: np.ndarray, colour: Tensor) -> Tensor:
    """Images with `colour` (3,) uint8 in their boxes (n, 4): top, bottom, left, right."""
    edges = send(boxes, pixels.device).view(-1, 4, 1, 1)
    y = torch.arange(pixels.shape[1], device=pixels.device).view(-1, 1)
    x = torch.arange(pixels.shape[2], device=pixels.device)
    inside = (y >= edges[:, 0]) & (y < edges[:, 1]) & (x >= edges[:, 2]) & (x < edges[:, 3])
    return torch.where(inside.unsqueeze(3), colour, pixels)


def send(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array on the device, in its own dtype or another; nothing is waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
