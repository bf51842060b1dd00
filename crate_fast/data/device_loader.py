"""Small images that lie on the device, all of them: cut, enlarged and changed there, no worker and no copy on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..processes import Ranks
from ..settings import DataSettings
from .augment_batch import Changes, send
from .loader import Normalise, describe
from .order import Plan, epoch_order, indices_of_part, share_of
from .philox import CROP, CROP_UNIFORMS, crop_boxes, uniforms
from .samples import COLOUR

BITS, HALF = 22, 11  # of Pillow's weights


class Pictures:
    """Images in memory: `pixels` (n, height, width, 3) uint8 and n `labels`; `read(i)` gives the i-th, `label(i)` its class."""

    def __init__(self, pixels: np.ndarray, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return self.labels[index]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class Resident:
    """Training and test images of `Pictures` on `device`, in batches; the interface is `open.Data`.

    `size`, (height, width), is that of test images; None: that of training images.
    """

    channels, advice = 3, None

    def __init__(
        self,
        name: str,
        train: Pictures,
        test: Pictures,
        classes: int,
        settings: DataSettings,
        device: torch.device,
        size: tuple[int, int] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.class_names = class_names
        self._size = size or (settings.image_size, settings.image_size)
        self.name, self.classes, self._settings, self._device = name, classes, settings, device
        if settings.train_part < 1:
            chosen = indices_of_part(train.labels, settings.train_part).numpy()
            train = Pictures(train.pixels[chosen], [train.labels[index] for index in chosen])
        self._train, self._test = ((_to(part.pixels, device), _to(part.labels, device)) for part in (train, test))
        self._normalise, self._changes = Normalise(device), Changes(settings, device, COLOUR)
        self.train_count, self.test_count = len(train), len(test)

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps of `epoch` from step `first` on, as `plan` cuts them: float32 images and int64 labels."""
        settings, order = self._settings, epoch_order(plan.seed, epoch, self.train_count)
        pixels, labels = self._train
        sides = np.full(self.train_count, pixels.shape[1])
        for step in range(first, plan.steps):
            for part in plan.parts(step):
                indices = order[part].numpy()
                uniform = uniforms(settings.seed, epoch, indices, CROP, CROP_UNIFORMS)
                boxes = crop_boxes(uniform, sides[indices], sides[indices], settings.crop_least)
                chosen = send(indices, self._device)
                images = resample(pixels[chosen], boxes, (settings.image_size, settings.image_size))
                yield self._normalise(self._changes(images, epoch, indices)), labels[chosen]

    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images, in order."""
        pixels, labels = self._test
        part, side = self._settings.eval_crop, pixels.shape[1]
        # As `augment.central_crop`: a square covers both sides of the model's image.
        square = max(max(length, round(length / part)) for length in self._size) if part else 0
        scaled = (square, square) if part else self._size
        windows = [(round((full - length) / 2), length) for full, length in zip(scaled, self._size, strict=True)]
        share = share_of(self.test_count, ranks)
        for start in range(share.start, share.stop, batch_size):
            chosen = slice(start, min(start + batch_size, share.stop))
            whole = np.tile([0, 0, side, side], (chosen.stop - start, 1))
            images = resample(pixels[chosen], whole, scaled, windows)
            yield self._normalise(images), labels[chosen]

    def describe(self) -> dict:
        """What config.json says of them."""
        return describe(self)


def resample(pixels: Tensor, boxes: np.ndarray, size: tuple[int, int], windows: list[tuple[int, int]] | None = None) -> Tensor:
    """(n, rows, columns, 3) uint8: a rectangle of each image, squeezed into another bilinearly with antialiasing.

    Enlarged it is what Pillow makes of it, to the bit: weights are rounded to 22 bits, and each of two passes to whole numbers.
    A pass is two products in float32, one for each half of the weights' bits, so that both are exact.

    Args:
        pixels: (n, height, width, 3) uint8.
        boxes: (n, 4) top, left, height, width.
        size: (height, width) of that.
        windows: (first, count) of the rows of it to be made, and of the columns; all if not given.
    """
    n, height, width, _ = pixels.shape
    edges = send(boxes, pixels.device)
    down, across = windows or [(0, length) for length in size]
    rows = _pass(_weights(edges[:, 1], edges[:, 3], width, size[1], across).unsqueeze(1), pixels)
    made = _pass(_weights(edges[:, 0], edges[:, 2], height, size[0], down), rows.flatten(2))
    return made.to(torch.uint8).view(n, down[1], across[1], 3)


def _pass(weights: Tensor, pixels: Tensor) -> Tensor:
    """int32, the product of `weights` (..., m, k) int32 and `pixels` (..., k, l), 0 to 255, divided by 2^`BITS` and rounded."""
    pixels = pixels.float()
    high, low = ((weights >> HALF).float() @ pixels, (weights & (1 << HALF) - 1).float() @ pixels)
    return ((high.int() << HALF) + low.int() + (1 << BITS - 1)) >> BITS


def _weights(start: Tensor, length: Tensor, full: int, size: int, window: tuple[int, int]) -> Tensor:
    """(n, count, full) int32, times 2^`BITS`: how much each of `full` pixels gives to each of `window` of `size`.

    start, length: (n,) int64, what is cut out of the `full` pixels.
    """
    wide = torch.float32 if start.device.type == "mps" else torch.float64  # which Metal does not have
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1).to(wide)
    ratio = length / size
    places = torch.arange(window[0], sum(window), device=start.device, dtype=wide)
    centre = (places.view(-1, 1) + 0.5) * ratio
    pixel = torch.arange(full, device=start.device) - start
    weights = (1 - ((pixel - centre + 0.5) / ratio.clamp(min=1)).abs()).clamp(min=0) * ((pixel >= 0) & (pixel < length))
    return (weights / weights.sum(dim=2, keepdim=True) * (1 << BITS) + 0.5).int()


def _to(values: np.ndarray | list[int], device: torch.device) -> Tensor:
    return torch.as_tensor(np.asarray(values)).to(device)
