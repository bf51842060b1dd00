"""A stored photograph as one sample: read, changed at random or cut for evaluation, and what is wrong with it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..eval_transform import MEAN
from ..files import is_of_system
from ..settings import DataSettings
from .augment import central_crop, erase, flip, randaugment, random_crop, trivialaugment
from .philox import image_generator

COLOUR = np.rint(np.array(MEAN) * 255).astype(np.uint8)  # of what is erased
IGNORED = -100  # label of an image that could not be read: it counts nowhere


class Store(Protocol):
    """Stored images, as `folder.Photographs` and `device_loader.Pictures` are."""

    def __len__(self) -> int: ...
    def label(self, index: int) -> int: ...
    def place(self, index: int) -> str: ...
    def read(self, index: int) -> Image.Image: ...


class Problem(NamedTuple):
    """Why an image is not there, in words that name it; whether it is damaged, or the system does not give it just now."""

    text: str
    is_damage: bool


class Reduced:
    """The photographs of a store, each read once, reduced to `side` pixels on its short side if it has more, and kept."""

    def __init__(self, store: Store, side: int) -> None:
        self._store, self._side, self._kept = store, side, dict[int, Image.Image]()

    def __len__(self) -> int:
        return len(self._store)

    def label(self, index: int) -> int:
        return self._store.label(index)

    def place(self, index: int) -> str:
        return self._store.place(index)

    def read(self, index: int) -> Image.Image:
        """As of the store; what is damaged is read, and refused, every time."""
        if index not in self._kept:
            image = self._store.read(index)
            short = min(image.size)
            if short > self._side:
                size = [max(1, round(length * self._side / short)) for length in image.size]
                image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=3)
            self._kept[index] = image
        return self._kept[index]


class Some:
    """The photographs of a store that have these `indices`, in their order."""

    def __init__(self, store: Store, indices: list[int]) -> None:
        self._store, self._indices = store, indices

    def __len__(self) -> int:
        return len(self._indices)

    def label(self, index: int) -> int:
        return self._store.label(self._indices[index])

    def place(self, index: int) -> str:
        return self._store.place(self._indices[index])

    def read(self, index: int) -> Image.Image:
        return self._store.read(self._indices[index])


class Sample(NamedTuple):
    """One image: (height, width, 3) uint8, its label, and what is wrong with it, if anything."""

    pixels: np.ndarray
    label: int
    problem: Problem | None = None


class TrainSamples(Dataset):
    """Training images by (epoch, index), each changed as drawn from (seed, epoch, index) and from nothing else."""

    def __init__(self, store: Store, settings: DataSettings) -> None:
        self._store, self._settings = store, settings

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        size = (self._settings.image_size, self._settings.image_size)
        return _read(self._store, index, size, lambda image: self._change(image, epoch, index))

    def _change(self, image: Image.Image, epoch: int, index: int) -> np.ndarray:
        settings, rng = self._settings, image_generator(self._settings.seed, epoch, index)
        image = flip(random_crop(image, settings.image_size, settings.crop_least, rng), rng)
        if settings.augment == "randaugment":
            image = randaugment(image, settings.randaugment_ops, settings.randaugment_magnitude, rng)
        elif settings.augment == "trivial":
            image = trivialaugment(image, rng)
        return erase(np.asarray(image), settings.erase, COLOUR, rng)


class TestSamples(Dataset):
    """Images by their index, as evaluation sees them; those that were `seen` are kept there, if that is not None."""

    def __init__(self, store: Store, size: tuple[int, int], part: float, seen: dict[int, Sample] | None = None) -> None:
        self._store, self._size, self._part, self._seen = store, size, part, seen

    def __getitem__(self, index: int) -> Sample:
        if self._seen is None:
            return self._make(index)
        if index not in self._seen:
            self._seen[index] = self._make(index)
        return self._seen[index]

    def _make(self, index: int) -> Sample:
        return _read(self._store, index, self._size, lambda image: np.asarray(central_crop(image, self._size, self._part)))


def _read(store: Store, index: int, size: tuple[int, int], change) -> Sample:
    try:
        return Sample(change(store.read(index)), store.label(index))
    except Exception as error:  # whatever a damaged file makes of the decoder
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        problem = Problem(f"{store.place(index)}: {reason}", not is_of_system(error))
        return Sample(np.zeros((*size, 3), np.uint8), IGNORED, problem)
