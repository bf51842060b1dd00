"""Random numbers by place: what is drawn for an image is a function of seed, epoch, image and purpose, for many at once.

The generator is Philox4x32-10 (Salmon et al., 2011), whose output is its counter, mixed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CROP, CHANGES, MASK = 0, 1, 2  # purposes
CROP_TRIES = 10
CROP_UNIFORMS = 2 * CROP_TRIES + 2
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four arrays of 32 random bits in uint64, of four that broadcast, 32 bits each in uint64, and a key of two numbers."""
    a, b, c, d = counter
    for number in range(ROUNDS):
        first, second = (np.uint64(k + number * step & 0xFFFFFFFF) for k, step in zip(key, STEPS, strict=True))
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (q >> HALF) ^ b ^ first, q & LOW, (p >> HALF) ^ d ^ second, p & LOW
    return a, b, c, d


def image_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one image that a worker changes by itself: a function of seed, epoch and image, as `uniforms` are
    for many at once, but others."""
    return np.random.default_rng((seed, epoch, index))


def uniforms(seed: int, epoch: int, indices: np.ndarray, purpose: int, count: int) -> np.ndarray:
    """(n, count) float64 in [0, 1): `count` numbers for each of the n images called `indices`, (n,), all below 2³²."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    images = np.asarray(indices, np.uint64)[:, None]
    bits = philox((images, blocks, np.uint64(epoch), np.uint64(purpose)), (seed, 0))
    return np.stack(np.broadcast_arrays(*bits), axis=2).reshape(len(images), 4 * len(blocks))[:, :count] * 2.0**-32


def crop_boxes(
    uniform: np.ndarray, heights: np.ndarray, widths: np.ndarray, least: float, aspects=(3 / 4, 4 / 3)
) -> np.ndarray:
    """(n, 4) int64, top, left, height and width of a random crop of each image, distributed as `augment.random_crop`'s.

    Args:
        uniform: (n, `CROP_UNIFORMS`) in [0, 1).
        heights, widths: (n,) of the images.
        least: the smallest part of an image's area that a crop takes.
        aspects: its least and its largest width over height.
    """
    heights, widths = heights[:, None], widths[:, None]
    areas = heights * widths * (least + (1 - least) * uniform[:, :CROP_TRIES])
    low, high = map(math.log, aspects)
    ratios = np.exp(low + (high - low) * uniform[:, CROP_TRIES : 2 * CROP_TRIES])
    w, h = (np.rint(np.sqrt(area)).astype(np.int64) for area in (areas * ratios, areas / ratios))
    # As much of the middle as a crop may have, where no try fits.
    w = np.concatenate([w, np.minimum(widths, np.maximum(1, np.rint(heights * aspects[1]).astype(np.int64)))], axis=1)
    h = np.concatenate([h, np.minimum(heights, np.maximum(1, np.rint(widths / aspects[0]).astype(np.int64)))], axis=1)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = fits.argmax(axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    room = np.stack([heights[:, 0] - h, widths[:, 0] - w], axis=1)
    places = np.where(first < CROP_TRIES, ((room + 1) * uniform[:, -2:]).astype(np.int64), room // 2)
    return np.concatenate([places, h[:, None], w[:, None]], axis=1)
