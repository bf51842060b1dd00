"""The handwritten digits that scikit-learn carries: 1,797 scans of 8×8 pixels, 16 grey levels, from the UCI repository."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require

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

    digits = load_digits()
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
    """

    name = "digits"

    def __init__(self, image_size: tuple[int, int], device: torch.device) -> None:
        scans, labels = load_scans()
        train, test = split_indices(labels)
        images = F.interpolate(scans, size=image_size, mode="bicubic", align_corners=False)
        self.mean, self.std = images[train].mean().item(), images[train].std().item()
        self.train_images, self.train_labels = images[train].to(device), labels[train].to(device)
        self.test_images, self.test_labels = images[test].to(device), labels[test].to(device)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, *, rotate: float, zoom: float, shift: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, (batch, 1, height, width) float32 and (batch,) int64, shuffled and augmented.

        They depend on `seed` and `epoch` alone, on every device. A last batch that would not be full is left out: Lion's
        steps are of one length, whatever few images they come from. For `rotate`, `zoom` and `shift` see `transforms`.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count = len(self.train_labels)
        order = torch.randperm(count, generator=generator).to(self.train_labels.device)
        moves = transforms(count, generator, rotate=rotate, zoom=zoom, shift=shift).to(self.train_images.device)
        for start in range(0, count - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            images = transform(self.train_images[chosen], moves[start : start + batch_size])
            yield self._normalise(images), self.train_labels[chosen]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test split in order, as `train_batches` gives batches, but as scanned."""
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size), strict=True):
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


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
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
