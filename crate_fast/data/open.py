"""The data of a run, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from ..called import called
from ..data_sets import DATA_SETS
from ..optional import require
from ..processes import Ranks
from ..settings import ConfigError, DataSettings
from .folder import divide_folder, is_undivided, open_folder
from .loader import Photos
from .order import Plan
from .pack_folder import is_packed, open_packs
from .pack_loader import Packed


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


def open_data(
    settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int] | None = None, labelled: bool = True
) -> Data:
    """The data that `settings` ask for; test images of `size`, (height, width), or None: of --image-size.

    labelled: whether labels are learned; if not, a folder's images need not lie in folders of classes.

    Raises:
        ConfigError: it is not there or damaged, or --classes is another number than it has.
    """
    data = _open(settings, device, ranks, size or (settings.image_size, settings.image_size), labelled)
    if settings.classes is not None and settings.classes != data.classes:
        raise ConfigError(f"--classes is {settings.classes}; {data.name} has {data.classes}")
    return data


def _open(settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int], labelled: bool) -> Data:
    """Data by their name in `DATA_SETS`, else a folder of packs or of photographs."""
    if settings.data in DATA_SETS:
        module = import_module(f"{__package__}.{DATA_SETS[settings.data].module}")
        return module.open_set(settings, device, ranks, size)
    require("PIL")
    if is_packed(settings.data):
        require("cv2", "simplejpeg")
        return Packed(open_packs(settings.data), settings, device, ranks, size)
    held_out = None
    if is_undivided(settings.data):
        train, test, names, held_out = divide_folder(settings.data, settings.val_split, labelled)
    else:
        train, test, names = open_folder(settings.data, labelled=labelled)
    packs = f"packs: {called('prepare', 'imagenet', settings.data)} DST, then train --data DST"
    return Photos("folder", train, test, len(names), settings, device, ranks, packs, names, size, held_out)
