"""Images by chance, to time the loop without its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..processes import Ranks
from ..settings import DataSettings
from .order import Plan, share_of


class Synthetic:
    """Random batches made on the device once, to time the loop alone: 1,281,167 images of 1,000 classes, as ImageNet has."""

    name, classes, channels = "synthetic", 1000, 3
    train_count, test_count = 1_281_167, 50_000
    advice = class_names = None

    def __init__(self, settings: DataSettings, size: tuple[int, int], device: torch.device) -> None:
        self._shape, self._device, self._seed = (3, *size), device, settings.seed
        self.classes = settings.classes or self.classes

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps of `epoch` from step `first` on: the same images in each."""
        images, labels = self._make(plan.largest_part)
        for step in range(first, plan.steps):
            for part in plan.parts(step):
                count = part.stop - part.start
                yield images[:count], labels[:count]

    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images."""
        share = share_of(self.test_count, ranks)
        images, labels = self._make(batch_size)
        for start in range(0, len(share), batch_size):
            count = min(batch_size, len(share) - start)
            yield images[:count], labels[:count]

    def describe(self) -> dict:
        """What config.json says of them."""
        return {"name": self.name, "train_images": self.train_count, "test_images": self.test_count}

    def _make(self, count: int) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator(self._device).manual_seed(self._seed)
        images = torch.randn(count, *self._shape, device=self._device, generator=numbers)
        return images, torch.randint(self.classes, (count,), device=self._device, generator=numbers)


def open_set(settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int]) -> Synthetic:
    """Images by chance of `size`, (height, width)."""
    return Synthetic(settings, size, device)
