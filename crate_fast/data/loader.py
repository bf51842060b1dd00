"""From stored photographs to normalised batches on the device: processes make the samples, bytes travel."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data_sets import DATA_SETS
from ..errors import UnreadableError
from ..eval_transform import MEAN, STD
from ..files import PAUSES, as_bytes
from ..locks import unlock
from ..processes import Ranks
from ..settings import DataSettings
from ..signals import hear_of_no_process, leave_signals_to_the_run
from .order import Plan, epoch_order, indices_of_part, share_of
from .pictures import READER, READER_ENTRY
from .samples import Problem, Reduced, Sample, Some, Store, TestSamples, TrainSamples

PREFETCH = 4  # batches that a worker is ahead
FOR_KEPT = (
    "a smaller --image-size or --keep-short-side, or --augment none (images are kept in memory, where one process changes them)"
)


class Photos:
    """Training and test images of a `Store` each, in batches on `device`; what is `quicker` is for advice.

    Test images are of `evaluated_size`, (height, width) in pixels; None: squares of the training images' side. `held_out`
    are their names, where they were taken from among the training images.

    Raises (while it is iterated):
        UnreadableError: more than `settings.max_unreadable` images are damaged, or the system does not give one.
    """

    channels = 3

    def __init__(
        self,
        name: str,
        train: Store,
        test: Store,
        classes: int,
        settings: DataSettings,
        device: torch.device,
        ranks: Ranks,
        quicker: str,
        class_names: list[str] | None = None,
        evaluated_size: tuple[int, int] | None = None,
        held_out: list[str] | None = None,
    ) -> None:
        self.name, self.classes, self._settings, self._device = name, classes, settings, device
        if settings.train_part < 1:
            train = Some(train, indices_of_part(map(train.label, range(len(train))), settings.train_part).tolist())
        self._train, self._test, self.class_names, self.held_out = train, test, class_names, held_out
        self._workers = workers_of(settings.workers, ranks)
        self._seen: dict[int, Sample] | None = None
        self.advice = more_workers(min(settings.workers, cores()), quicker)
        if settings.keep_short_side:  # in this process, which keeps them; others would read them anew in every epoch
            self._train, self._workers, self._seen = Reduced(train, settings.keep_short_side), 0, {}
            self.advice = FOR_KEPT
        self._unreadable: set[str] = set()
        self._normalise = Normalise(device)
        self._evaluated_size = evaluated_size or (settings.image_size, settings.image_size)
        self.train_count, self.test_count = len(train), len(test)

    def train_batches(self, plan: Plan, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the steps of `epoch` from step `first` on, as `plan` cuts them: float32 images and int64 labels."""
        order = epoch_order(plan.seed, epoch, self.train_count)
        parts = (part for step in range(first, plan.steps) for part in plan.parts(step))
        keys = ([(epoch, index) for index in order[part].tolist()] for part in parts)
        yield from self._load(TrainSamples(self._train, self._settings), list(keys))

    def test_batches(self, batch_size: int, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images, in order."""
        share = share_of(self.test_count, ranks)
        keys = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
        yield from self._load(TestSamples(self._test, self._evaluated_size, self._settings.eval_crop, self._seen), keys)

    def describe(self) -> dict:
        """What config.json says of them."""
        held_out = {} if self.held_out is None else {"held_out": digest(self.held_out)}
        return describe(self) | held_out | {READER_ENTRY: READER}

    def _load(self, samples: Dataset, keys: list[list]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            samples,
            batch_sampler=keys,
            num_workers=self._workers,
            collate_fn=partial(_collate, self._evaluated_size),
            pin_memory=self._device.type == "cuda",
            prefetch_factor=PREFETCH if self._workers else None,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(0),  # else it would draw from the global one, which the model draws from
        )
        for pixels, labels in ahead(self._arrive(loader), self._device):
            yield self._normalise(pixels), labels

    def _arrive(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels, problems in from_workers(loader):
            for problem in problems:
                self._report(problem)
            yield pixels.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def _report(self, problem: Problem) -> None:
        if problem.text in self._unreadable:
            return
        if not problem.is_damage:
            raise UnreadableError(
                f"{problem.text} ({1 + len(PAUSES)} times); what cannot be read just now is not left out; once it can, "
                "a run goes on with --resume"
            )
        self._unreadable.add(problem.text)
        print(f"crate-fast: warning: unreadable, skipped: {problem.text}", file=sys.stderr, flush=True)
        if len(self._unreadable) > self._settings.max_unreadable:
            raise UnreadableError(
                f"{len(self._unreadable)} images cannot be read, and --max-unreadable is {self._settings.max_unreadable}; "
                f"the last is {problem.text}"
            )


class Normalise:
    """From pixels, (n, height, width, 3) uint8, to what a model takes, (n, 3, height, width) float32, by `MEAN` and `STD`."""

    def __init__(self, device: torch.device) -> None:
        # Computed here and copied, which is over when it returns: they are read on another stream, that waits for nothing.
        self._mean, self._std = (torch.tensor(values).mul(255).to(device) for values in (MEAN, STD))

    def __call__(self, pixels: Tensor) -> Tensor:
        n, height, width, _ = pixels.shape
        rows = pixels.flatten(2).float()  # in rows, along which a processor is quick
        rows = rows.sub_(self._mean.repeat(width)).div_(self._std.repeat(width))
        return rows.view(n, height, width, 3).permute(0, 3, 1, 2)


def _collate(size: tuple[int, int], samples: list[Sample]) -> tuple[Tensor, Tensor, list[Problem]]:
    pixels = np.stack([sample.pixels for sample in samples]) if samples else np.empty((0, *size, 3), np.uint8)
    problems = [sample.problem for sample in samples if sample.problem]
    return torch.from_numpy(pixels), torch.tensor([sample.label for sample in samples], dtype=torch.int64), problems


def start_worker(_: int) -> None:
    """Makes a process one that only reads images."""
    leave_signals_to_the_run()
    torch.set_num_threads(1)
    unlock()  # a worker outlives a killed run for seconds, and must not keep its lock


def from_workers(loader: DataLoader) -> Iterator:
    """What the processes of a loader read, in order. They are started before this returns.

    That one of them is gone is told where its batch is wanted, as a RuntimeError, and nowhere else: PyTorch's handler of
    SIGCHLD would raise it within whatever the run does then, such as writing a checkpoint. Without it PyTorch looks after
    its processes every 5 seconds that it waits.
    """
    batches = iter(loader)
    if not loader.num_workers:
        return batches
    hear_of_no_process()
    return _received(batches)


def _received(batches: Iterator) -> Iterator:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:  # it was gone before its tensors were fetched from it
            raise RuntimeError(f"a DataLoader worker has exited ({type(error).__name__})") from error
        yield batch


def ahead(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, on a GPU each copied on a stream of its own while the one before it is computed with."""
    if device.type != "cuda":
        yield from batches
        return
    stream, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    batches, ready = iter(batches), None
    while True:
        with torch.cuda.stream(stream):
            following = next(batches, None)
        if ready is not None:
            yield ready
        if following is None:
            return
        computing.wait_stream(stream)
        for tensor in following:
            tensor.record_stream(computing)
        ready = following


def describe(data) -> dict:
    """Name, classes, counts of images and how they are normalised, of data normalised by `Normalise`."""
    counts = {"train_images": data.train_count, "test_images": data.test_count}
    own = None if data.name in DATA_SETS else data.class_names  # what a package calls classes moves no label
    names = {} if own is None else {"class_names": digest(own)}
    return {"name": data.name, "classes": data.classes, **names, **counts, "mean": MEAN, "std": STD}


def digest(class_names: list[str]) -> str:
    """What tells the classes of folders apart, names and order: the start of a SHA-256 of their names by lines."""
    lines = "\n".join(name.replace("\n", "\0") for name in class_names)  # which no name of a folder has
    return hashlib.sha256(as_bytes(lines)).hexdigest()[:16]


def more_workers(workers: int, otherwise: str) -> str:
    """Advice where `workers` processes read, and what `otherwise` helps."""
    return otherwise if workers >= cores() else f"more --workers (now {workers}; {cores()} cores are here), or {otherwise}"


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_of(workers: int, ranks: Ranks) -> int:
    """How many processes read for one of the run's, of `workers` on this machine: no more than there are cores."""
    return -(-min(workers, cores()) // ranks.local_count)
