"""The handwritten digits that scikit-learn carries: 1,797 scans of 8×8 pixels, 16 grey levels, from the UCI repository."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optional import require
from ..processes import Ranks
from ..settings import DataSettings
from .order import Plan, epoch_generator, indices_of_part, share_of

CLASSES = 10
CHANNELS = 1
SCAN_SIZE = 8  # pixels to a side
GREY_LEVELS = 16
TEST_IMAGES = 360
SPLIT_SEED = 0  # the same split in every run: --seed does not move it


def load_scans() -> tuple[Tensor, Tensor]:
    """All scans, (1797, 1, 8, 8) float32 in 0..1 with 0 for paper, and labels, (1797,) int64; both on the CPU."""
    require("sklearn")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / GREY_LEVELS, torch.from_numpy(digits.target).long()


def split_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(training, test) indices: a random test split of 360 with every digit's share as in the whole, always the same."""
    require("sklearn")
    from sklearn.model_selection import train_test_split

    indices = range(len(labels))
    train, test = train_test_split(indices, test_size=TEST_IMAGES, stratify=labels.numpy(), random_state=SPLIT_SEED)
    return torch.tensor(train), torch.tensor(test)


class Digits:
    """The digits on a device, enlarged: augmented batches to train on, and the test split.

    Args:
        image_size: (height, width) in pixels to which the scans are enlarged.
        device: where the images live and are augmented.
        rotate, zoom, shift: how far training images are moved; see `transforms`.
        part: of each digit's training images that is used.
    """

    name = "digits"
    classes = CLASSES
    channels = CHANNELS
    class_names = tuple(map(str, range(CLASSES)))
    advice = None

    def __init__(
        self,
        image_size: tuple[int, int],
        device: torch.device,
        *,
        rotate: float = 0.0,
        zoom: float = 0.0,
        shift: float = 0.0,
        part: float = 1.0,
    ) -> None:
        scans, labels = load_scans()
        train, test = split_indices(labels)
        images = F.interpolate(scans, size=image_size, mode="bicubic", align_corners=False)
        self.mean, self.std = images[train].mean().item(), images[train].std().item()
        if part < 1:  # of which mean and deviation are not those of so few
            train = train[indices_of_part(labels[train].tolist(), part)]
        self.train_images, self.train_labels = images[train].to(device), labels[train].to(device)
        self.test_images, self.test_labels = images[test].to(device), labels[test].to(device)
        self._moves = {"rotate": rotate, "zoom": zoom, "shift": shift}

    @property
    def train_count(self) -> int:
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        return len(self.test_labels)

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps of `epoch` from step `first` (counted from 0) on, as `plan` cuts them.

        A part is (batch, 1, height, width) float32 and (batch,) int64, shuffled and augmented. The images depend on the
        plan's seed and `epoch` alone, on every device.
        """
        generator = epoch_generator(plan.seed, epoch)
        count = self.train_count
        order = torch.randperm(count, generator=generator).to(self.train_labels.device)
        moves = transforms(count, generator, **self._moves).to(self.train_images.device)
        for step in range(first, plan.steps):
            for part in plan.parts(step):
                chosen = order[part]
                yield self._normalise(transform(self.train_images[chosen], moves[part])), self.train_labels[chosen]

    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test split in order, as `train_batches` gives parts, but as scanned."""
        share = share_of(self.test_count, ranks)
        for start in range(share.start, share.stop, batch_size):
            chosen = slice(start, min(start + batch_size, share.stop))
            yield self._normalise(self.test_images[chosen]), self.test_labels[chosen]

    def describe(self) -> dict:
        """What config.json says of them."""
        return {
            "name": self.name,
            "split_seed": SPLIT_SEED,
            "train_images": self.train_count,
            "test_images": self.test_count,
            "mean": self.mean,
            "std": self.std,
        }

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def open_set(settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int]) -> Digits:
    """The digits as `settings` ask for them, of `size`, (height, width)."""
    moves = {"rotate": settings.rotate, "zoom": settings.zoom, "shift": settings.shift}
    return Digits(size, device, **moves, part=settings.train_part)


def transforms(count: int, generator: torch.Generator, *, rotate: float, zoom: float, shift: float) -> Tensor:
    """(count, 2, 3) random affine maps from places in the new image to places in the old, on the CPU.

    Args:
        count: number of maps.
        generator: what they are drawn from.
        rotate: largest rotation to either side, in degrees.
        zoom: largest change of size, as a part.
        shift: largest shift along each axis, in pixels of the scan.
    """
    angle, size, right, down = torch.rand(4, count, generator=generator).mul_(2).sub_(1)
    angle, size = angle * math.radians(rotate), 1 + size * zoom
    right, down = (move * shift * 2 / SCAN_SIZE for move in (right, down))  # the image reaches from -1 to 1
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.stack((cos, -sin, right, sin, cos, down), dim=1).view(count, 2, 3)


def transform(images: Tensor, maps: Tensor) -> Tensor:
    """`images` (batch, 1, height, width) moved by `maps` (batch, 2, 3), bilinearly; paper comes in from outside."""
    if not len(images):
        return images
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
