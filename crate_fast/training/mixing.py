"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899): images of a batch mixed in pairs, and their loss with them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..settings import OptimisationSettings


class Mixed(NamedTuple):
    """A batch: `images`, their `labels` and those of what is mixed into them, and the part that is theirs, 1 for no mixing."""

    images: Tensor
    labels: Tensor
    others: Tensor
    part: float

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """The sum of the images' cross-entropies, as a scalar; images with label -100 count nothing."""
        options = {"label_smoothing": label_smoothing, "reduction": "sum"}
        own = F.cross_entropy(logits, self.labels, **options)
        if self.part == 1:
            return own
        return self.part * own + (1 - self.part) * F.cross_entropy(logits, self.others, **options)


def mix(images: Tensor, labels: Tensor, settings: OptimisationSettings, key: tuple[int, ...]) -> Mixed:
    """The batch (images, labels), mixed with itself backwards as `settings` ask; what is drawn depends on `key` alone.

    The draws are made on the host, so the device is not waited for.
    """
    if not (settings.mixup or settings.cutmix) or len(labels) < 2:
        return Mixed(images, labels, labels, 1.0)
    rng = np.random.default_rng(key)
    cut = settings.cutmix > 0 and (settings.mixup == 0 or rng.random() < 0.5)
    alpha = settings.cutmix if cut else settings.mixup
    part = float(rng.beta(alpha, alpha))
    others = images.flip(0)
    if not cut:
        return Mixed(images.lerp(others, 1 - part), labels, labels.flip(0), part)
    height, width = images.shape[-2:]
    top, bottom = _side(height, part, rng)
    left, right = _side(width, part, rng)
    images = images.clone()
    images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return Mixed(images, labels, labels.flip(0), 1 - (bottom - top) * (right - left) / (height * width))


def _side(length: int, part: float, rng: np.random.Generator) -> tuple[int, int]:
    """One side of the rectangle that replaces 1 - `part` of the area: centred anywhere, cut off at the edges."""
    centre, half = int(rng.integers(length)), int(length * math.sqrt(1 - part)) // 2
    return max(0, centre - half), min(length, centre + half)
