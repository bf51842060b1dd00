"""The data of a run, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..called import called
from ..optional import require
from ..processes import Ranks
from ..settings import ConfigError, TrainConfig
from .device_loader import Pictures, Resident
from .digits import Digits
from .folder import divide_folder, is_undivided, open_folder
from .loader import Photos, Synthetic
from .order import Plan
from .pack_folder import is_packed, open_packs
from .pack_loader import Packed
from .published_sets import SETS, open_published


class Data(Protocol):
    """What training needs of its data; batches are float32 images, normalised, and int64 labels, on the device."""

    name: str
    classes: int
    channels: int

    @property
    def train_count(self) -> int: ...
    @property
    def test_count(self) -> int: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...  # in the order of the labels, where they are known
    @property
    def advice(self) -> str | None: ...  # where it is late

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...
    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]: ...
    def describe(self) -> dict: ...


def open_data(config: TrainConfig, device: torch.device, ranks: Ranks, size: tuple[int, int] | None = None) -> Data:
    """The data that `config` asks for; test images of `size`, (height, width), or None: of --image-size.

    Raises:
        ConfigError: it is not there or damaged, or --classes is another number than it has.
    """
    data = _open(config, device, ranks, size or (config.image_size, config.image_size))
    if config.classes is not None and config.classes != data.classes:
        raise ConfigError(f"--classes is {config.classes}; {data.name} has {data.classes}")
    return data


def _open(config: TrainConfig, device: torch.device, ranks: Ranks, size: tuple[int, int]) -> Data:
    if config.data == "digits":
        return Digits(size, device, rotate=config.rotate, zoom=config.zoom, shift=config.shift)
    if config.data == "synthetic":
        return Synthetic(config, size, device)
    require("PIL")
    if config.data in SETS:
        train, test, classes = _open_published(config, ranks)
        if not isinstance(train, Pictures):
            return Photos(config.data, train, test, classes, config, device, ranks, "a smaller --image-size", None, size)
        require("cv2")
        return Resident(config.data, train, test, classes, config, device, size)
    if is_packed(config.data):
        require("cv2", "simplejpeg")
        return Packed(open_packs(config.data), config, device, ranks, size)
    held_out = None
    if is_undivided(config.data):
        train, test, names, held_out = divide_folder(config.data, config.val_split)
    else:
        train, test, names = open_folder(config.data)
    packs = f"packs: {called('prepare', 'imagenet', config.data)} DST, then train --data DST"
    return Photos("folder", train, test, len(names), config, device, ranks, packs, names, size, held_out)


def _open_published(config: TrainConfig, ranks: Ranks) -> tuple:
    """The data set, opened by the first process before all others, so that it alone downloads, and says what is wrong."""
    opened: list = []
    ranks.share(lambda: opened.append(open_published(config.data, config.data_dir)))
    return opened[0] if opened else open_published(config.data, config.data_dir)
