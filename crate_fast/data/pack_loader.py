"""From packs to normalised batches on the device: workers cut and resize, bytes travel, the device does the rest."""

from __future__ import annotations

import atexit
import math
import mmap
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..processes import Ranks
from ..settings import DataSettings
from .augment import central_crop
from .augment_batch import Changes
from .loader import PREFETCH, Normalise, ahead, cores, describe, from_workers, more_workers, start_worker, workers_of
from .order import Plan, epoch_order, indices_of_part, share_of
from .pack_file import PackError
from .pack_folder import Packs, Split
from .philox import CROP, CROP_UNIFORMS, crop_boxes, uniforms
from .samples import COLOUR

CHUNK = 128  # images that a worker fills at a time, where they are not so large
LARGEST = 20 << 20  # bytes that it fills at a time, unless one image has more


class Task(NamedTuple):
    """What a worker is to do: fill `slot` with the images `indices` (n,) of one split; `epoch` 0: as evaluation sees them."""

    slot: int
    train: bool
    epoch: int
    indices: np.ndarray


class Tasks(Sampler):
    """The tasks of an epoch, which a `DataLoader` hands to its workers; there are others for the next."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


class Slots:
    """Memory for `count` times `images` images of `size`, (height, width), shared with processes that are forked later.

    It is no file in /dev/shm, which is small in many containers.
    """

    def __init__(self, count: int, images: int, size: tuple[int, int], device: torch.device) -> None:
        shape = (count, images, *size, 3)
        self.arrays = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        self._tensors, self._device = torch.from_numpy(self.arrays), device
        self._copied: dict[int, torch.cuda.Event] = {}
        self._pinned = device.type != "cuda"

    def __len__(self) -> int:
        return len(self.arrays)

    def copy(self, slot: int, target: Tensor) -> None:
        """Begins to copy the first images of a slot to `target`, (n, size, size, 3) uint8 on the device."""
        target.copy_(self._tensors[slot, : len(target)], non_blocking=True)
        if self._device.type == "cuda":
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record()

    def view(self, slot: int, count: int) -> Tensor:
        """The first images of a slot themselves, on the CPU."""
        return self._tensors[slot, :count]

    def free(self, *slots: int) -> None:
        """Waits until what was begun to be copied from `slots` is copied."""
        for slot in slots:
            if slot in self._copied:
                self._copied.pop(slot).synchronize()

    def pin(self) -> None:
        """Has the memory pinned, which copies beside computing need; once, and after processes were forked."""
        if self._pinned:
            return
        self._pinned = True
        runtime: Any = torch.cuda.cudart()
        place = self._tensors.data_ptr()
        if int(runtime.cudaHostRegister(place, self._tensors.numel(), 0)):
            print("crate-fast: warning: memory for images cannot be pinned; they are copied more slowly", file=sys.stderr)
            return
        weakref.finalize(self, runtime.cudaHostUnregister, place)


class Reader(Dataset):
    """What a worker does: fills a slot, and says what is wrong with the pack, if anything."""

    def __init__(self, packs: Packs, settings: DataSettings, slots: Slots) -> None:
        self._packs, self._settings, self._slots = packs, settings, slots

    def __getitem__(self, task: Task) -> str | None:
        out = self._slots.arrays[task.slot]
        try:
            if task.train:
                self._fill_training(out, task.epoch, task.indices)
            else:
                self._fill_test(out, task.indices)
        except PackError as error:
            return str(error)
        return None

    def _fill_training(self, out: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        split, settings = self._packs.train, self._settings
        uniform = uniforms(settings.seed, epoch, indices, CROP, CROP_UNIFORMS)
        boxes = crop_boxes(uniform, split.heights[indices], split.widths[indices], settings.crop_least)
        split.want(indices)
        for place, (index, box) in enumerate(zip(indices.tolist(), boxes.tolist(), strict=True)):
            read_crop(split, index, box, out[place])

    def _fill_test(self, out: np.ndarray, indices: np.ndarray) -> None:
        size, part = out.shape[1:3], self._settings.eval_crop
        self._packs.val.want(indices)
        for place, index in enumerate(indices.tolist()):
            image = Image.fromarray(self._packs.val.pixels(index))
            try:
                out[place] = np.asarray(central_crop(image, size, part))
            except ValueError as error:
                raise self._packs.val.damaged_image(index, str(error)) from error


def read_crop(split: Split, index: int, box: list[int], out: np.ndarray) -> None:
    """Cuts `box` (top, left, height, width) out of an image and resizes it into `out`, (size, size, 3) uint8.

    Bilinearly, and where both sides shrink, by the mean over a pixel's area. A JPEG of which more than twice the pixels
    would be decoded than are needed, each way, is decoded smaller.
    """
    import cv2

    size, (top, left, height, width) = len(out), box
    if min(height, width) < 2 * size:
        pixels, top = split.pixels(index, rows=(top, top + height)), 0
    else:
        full = int(split.heights[index]), int(split.widths[index])
        pixels = split.pixels(index, (math.ceil(full[0] * size / height), math.ceil(full[1] * size / width)))
        down, right = pixels.shape[0] / full[0], pixels.shape[1] / full[1]
        top, height, left, width = int(top * down), int(height * down), int(left * right), int(width * right)
    how = cv2.INTER_AREA if height > size < width else cv2.INTER_LINEAR
    cv2.resize(pixels[top : top + height, left : left + width], (size, size), dst=out, interpolation=how)


class Packed:
    """Training and validation images of packs, in batches on `device`; the interface is `open.Data`.

    `size`, (height, width), is that of validation images; None: that of training images.

    Raises (while it is iterated):
        PackError: an image is not what was written.
    """

    name, channels = "packs", 3

    def __init__(
        self, packs: Packs, settings: DataSettings, device: torch.device, ranks: Ranks, size: tuple[int, int] | None = None
    ) -> None:
        self._size = size = size or (settings.image_size, settings.image_size)
        self._packs, self._settings, self._device = packs, settings, device
        self.class_names = packs.classes
        self._used = np.arange(len(packs.train))
        if settings.train_part < 1:
            self._used = indices_of_part(packs.train.labels.tolist(), settings.train_part).numpy()
        self.classes, self.train_count, self.test_count = len(packs.classes), len(self._used), len(packs.val)
        workers = workers_of(settings.workers, ranks)
        part = -(-settings.batch_size // (settings.accumulate * ranks.count))
        self._chunk = max(1, min(CHUNK, LARGEST // (3 * math.prod(size))))
        # Two parts ahead at least, else workers that are fast enough would still be waited for.
        prefetch = max(PREFETCH, -(-2 * part // (self._chunk * max(1, workers))))
        self._slots = Slots(workers * prefetch + 2, self._chunk, size, device)
        self._tasks = Tasks()
        self._loader: Any = DataLoader(
            Reader(packs, settings, self._slots),
            batch_size=None,
            sampler=self._tasks,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator().manual_seed(0),
        )
        atexit.register(_close, weakref.ref(self))  # before the workers are ended with the process, and complained of
        quicker = (
            "a quicker disk, or more memory to keep packs in" if packs.train.is_raw else "raw packs: crate-fast prepare --raw"
        )
        self.advice = more_workers(min(settings.workers, cores()), quicker)
        self._normalise, self._changes = Normalise(device), Changes(settings, device, COLOUR)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps of `epoch` from step `first` on, as `plan` cuts them: float32 images and int64 labels."""
        finished = map(partial(self._finish, epoch), self.read_epoch(plan, epoch, first))
        return ahead(finished, self._device)

    def read_epoch(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """As `train_batches`, but as read: cropped uint8 images, and their indices besides; see `read`."""
        order = self._used[epoch_order(plan.seed, epoch, self.train_count).numpy()]
        return self.read(True, epoch, [order[part] for step in range(first, plan.steps) for part in plan.parts(step)])

    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images, in order."""
        share = np.asarray(share_of(self.test_count, ranks))
        parts = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        batches = ((self._normalise(pixels), labels) for pixels, labels, _ in self.read(False, 0, parts))
        return ahead(batches, self._device)

    def describe(self) -> dict:
        """What config.json says of them."""
        return describe(self)

    def read(self, train: bool, epoch: int, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Of each part, the indices (n,) of images: (n, size, size, 3) uint8 and (n,) int64 on the device, and the indices.

        On the CPU the images lie where workers fill in others after the next batch but one was asked for.
        """
        split = self._packs.train if train else self._packs.val
        cuts = [np.split(part, range(self._chunk, len(part), self._chunk)) for part in parts]
        chunks = [chunk for cut in cuts for chunk in cut]
        self._tasks.tasks = [Task(number % len(self._slots), train, epoch, chunk) for number, chunk in enumerate(chunks)]
        self._slots.free(*range(len(self._slots)))
        arriving, number = from_workers(self._loader), 0
        self._slots.pin()
        for part, cut in zip(parts, cuts, strict=True):
            labels = torch.from_numpy(split.labels[part])
            labels = (labels.pin_memory() if self._device.type == "cuda" else labels).to(self._device, non_blocking=True)
            slots = range(number, number + len(cut))
            number += len(cut)
            yield self._collect(arriving, slots, len(part)), labels, part

    def _collect(self, arriving: Iterator[str | None], numbers: range, count: int) -> Tensor:
        """The chunks `numbers` as one part of `count` images on the device."""
        whole = self._device.type == "cpu" and len(numbers) == 1
        pixels: Any = None if whole else torch.empty(count, *self._size, 3, dtype=torch.uint8, device=self._device)
        for place, number in enumerate(numbers):
            # With the chunk that arrives now a task is given out for the slot of the chunk two before.
            self._slots.free((number - 2) % len(self._slots))
            problem = next(arriving)
            if problem is not None:
                raise PackError(problem)
            slot = number % len(self._slots)
            if whole:
                return self._slots.view(slot, count)
            self._slots.copy(slot, pixels[place * self._chunk : (place + 1) * self._chunk])
        return pixels

    def _finish(self, epoch: int, part: tuple[Tensor, Tensor, np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels, labels, indices = part
        return self._normalise(self._changes(pixels, epoch, indices)), labels


def _close(packed: weakref.ref) -> None:
    if (alive := packed()) is not None:
        alive.close()


def _as_it_is(problem: Any) -> Any:
    return problem


def _start_worker(number: int) -> None:
    start_worker(number)
    import cv2

    cv2.setNumThreads(0)
