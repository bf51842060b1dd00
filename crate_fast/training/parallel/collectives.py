"""What the processes of a run tell each other beside their sums, so that all do the same things after the same step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ...data.order import most_batches
from ...model.crate import CRATE
from ...model.mae import CRATEMAE
from ...processes import Ranks


class Together:
    """Processes that stop, and save, after the same step, and evaluate as many batches as each other.

    They talk by gloo, whatever they sum by: a process that waits for one that is gone gets an error instead.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._hosts: Any = dist.new_group(backend="gloo") if ranks.count > 1 else None
        self._asked: tuple | None = None

    def agree(self, number: int | None, due: bool) -> tuple[int | None, bool]:
        """(signal to stop for, whether to save now), the same in all processes: what any of them said a step ago.

        The answer comes a step late so that no process waits for the others to come to theirs. The first alone says when
        saving is due.
        """
        if self._hosts is None:
            return number, due
        flags = torch.tensor([number or 0, int(due and self._ranks.first)])
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._hosts, async_op=True)
        before, self._asked = self._asked, (work, flags)
        if before is None:
            return None, False
        before[0].wait()
        signal, saving = before[1].tolist()
        return signal or None, bool(saving)

    def wait_for_first(self) -> None:
        """Returns when the first process has come here too, or is gone: torchrun ends all once one has ended."""
        if self._hosts is not None:
            try:
                dist.barrier(group=self._hosts)
            except RuntimeError:  # it is gone, and has said why
                return

    def fill_up(self, batches: Iterator, size: int, count: int, model: CRATE | CRATEMAE, device: torch.device) -> Iterator:
        """The `batches` of this process's share of `count` images, then empty ones up to the largest number that a process
        has."""
        made = 0
        for batch in batches:
            made += 1
            yield batch
        for _ in range(made, most_batches(count, size, self._ranks)):
            images = torch.empty(0, model.channels, *model.image_size, device=device)
            yield images, torch.empty(0, dtype=torch.int64, device=device)
