"""Which images a process takes at a step: a function of seed, epoch and step alone, so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..processes import ALONE, Ranks
from ..settings import ConfigError, StepSettings


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order, and of what is drawn for its places in that order."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of `count` images in an epoch, (count,) int64."""
    return torch.randperm(count, generator=epoch_generator(seed, epoch))


def indices_of_part(labels: Iterable[int], part: float) -> Tensor:
    """Indices, rising, of `part` of the images of each class, one of each at least: always the same for the same labels."""
    known = torch.tensor(list(labels), dtype=torch.int64)
    places = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    chosen = [own[: max(1, round(part * len(own)))] for own in (places[known[places] == label] for label in known.unique())]
    return torch.cat(chosen).sort().values


@dataclass(frozen=True)
class Plan:
    """How an epoch of `count` images is cut into steps, and a step into parts: `accumulate` for each of the processes.

    The parts of a step differ by one image at most; where a step has fewer images than parts, some are empty.
    """

    count: int
    batch_size: int
    seed: int = 0
    accumulate: int = 1
    drop_last: bool = False
    ranks: Ranks = ALONE

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def largest_part(self) -> int:
        """Images of each part of a whole step."""
        return -(-self.batch_size // (self.accumulate * self.ranks.count))

    def images(self, step: int) -> int:
        """Images of a step (counted from 0 in its epoch), over all processes."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def parts(self, step: int) -> list[slice]:
        """This process's parts of a step, as slices of the epoch's order."""
        start, images, parts = step * self.batch_size, self.images(step), self.accumulate * self.ranks.count
        first = self.ranks.rank * self.accumulate
        cuts = [start + images * part // parts for part in range(first, first + self.accumulate + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]


def check_parts(settings: StepSettings, ranks: Ranks) -> None:
    """Raises ConfigError unless the batch size divides by processes times parts."""
    parts = settings.accumulate * ranks.count
    if settings.batch_size % parts:
        raise ConfigError(
            f"--batch-size is {settings.batch_size}, over all processes; it must divide by {parts}: {ranks.count} processes × "
            f"--accumulate {settings.accumulate}"
        )


def make_plan(settings: StepSettings, count: int, ranks: Ranks) -> Plan:
    """The plan for `count` training images.

    Raises:
        ConfigError: as `check_parts`, or no step would be full where it must.
    """
    check_parts(settings, ranks)
    plan = Plan(count, settings.batch_size, settings.seed, settings.accumulate, settings.last_batch == "drop", ranks)
    if not plan.steps:
        raise ConfigError(f"--batch-size is {settings.batch_size}; there are {count} training images")
    return plan


def most_batches(count: int, size: int, ranks: Ranks) -> int:
    """Batches of `size` images at most in the largest share that a process has of `count` images."""
    return max(-(-len(share_of(count, ranks._replace(rank=rank))) // size) for rank in range(ranks.count))


def share_of(count: int, ranks: Ranks) -> range:
    """The images of 0 .. count - 1 that a process evaluates: each image is in one process's share."""
    return range(count * ranks.rank // ranks.count, count * (ranks.rank + 1) // ranks.count)
