"""Checkpoints that all processes write together, each its part: directories that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ...checkpoint.distributed import STATE, SUFFIX, TABLE, checksum
from ...checkpoint.read import read_state
from ...checkpoint.save_load import write_state
from ...files import first_line, flush_folder, reason_of, remove
from ...model.crate import CRATE
from ...model.mae import CRATEMAE
from ...processes import read_ranks
from ..checkpoints import NAME, Checkpoints


class ShardedCheckpoints(Checkpoints):
    """A run's checkpoints in parts, `step-N.dcp` (checkpoint/distributed.py); `last.dcp` and `best.dcp` are links.

    A directory is filled beside its place by all processes, then looked over and renamed by the first, so that one that has
    its name is whole, whenever the run is killed.
    """

    suffix = SUFFIX

    def save(self, model: CRATE | CRATEMAE, step: int, best: bool, state: dict) -> Path:
        """As `Checkpoints.save`; all processes call it. "tensors" of `state` is each one's part, the rest is the first's.

        Raises:
            SavingError: in the first process; the others end.
        """
        ranks, tensors = read_ranks(), state.pop("tensors")
        path = Path(ranks.share(lambda: str(self._place(step))))
        aside = path.with_name(f".{path.name}.tmp")
        with self.explained(path):
            ranks.share(lambda: self._make(aside))
            own = _write(tensors, aside, ranks.rank)
            sums: list = [None] * ranks.count
            dist.all_gather_object(sums, own)
            ranks.share(lambda: self._finish(model, aside, path, best, sums, state))
        return path

    def _content(self, path: Path, whole: bool) -> dict:
        return read_state(path, whole)

    def _place(self, step: int) -> Path:
        """Where the checkpoint of `step` goes: after an evaluation there may be one of the same step before it."""
        names = (NAME.format(step), *(f"{NAME.format(step)}_{again:03d}" for again in range(1, 1000)))
        return next(path for path in (self.folder / f"{name}{self.suffix}" for name in names) if not path.exists())

    @staticmethod
    def _make(aside: Path) -> None:
        remove(aside)
        aside.mkdir()

    def _finish(self, model: CRATE | CRATEMAE, aside: Path, path: Path, best: bool, sums: list, state: dict) -> None:
        """Makes `aside`, in which all processes have written, the checkpoint `path`."""
        failed = next((outcome for outcome in sums if isinstance(outcome, str)), None)
        if failed is not None:
            remove(aside)
            raise RuntimeError(failed)
        parts = {name: total for own in sums for name, total in own.items()} | {TABLE: checksum(aside / TABLE)}
        absent = sorted(name for name in parts if not (aside / name).is_file())
        if absent:
            raise RuntimeError(f"{absent[0]} is not here: the processes do not share a disk")
        write_state(model, aside / STATE, parts=parts, **state)
        os.rename(aside, path)
        flush_folder(path.parent)
        self.name(path, best)

    def _remove(self, old: Path) -> None:
        best = self.folder / f"best{self.suffix}"
        if not (best.exists() and best.samefile(old)):
            aside = old.with_name(f".{old.name}.tmp")
            os.rename(old, aside)  # at once: half a checkpoint must not have its name
            remove(aside)

    def _name_too(self, path: Path, name: Path) -> None:
        os.symlink(path.name, name, target_is_directory=True)


def _write(tensors: dict, aside: Path, rank: int) -> dict[str, list[int]] | str:
    """Writes this process's part of `tensors`: the checksums of its files, or what went wrong."""
    try:
        dcp.save(tensors, checkpoint_id=aside)
        return {file.name: checksum(file) for file in aside.glob(f"__{rank}_*")}
    except CheckpointException as error:  # in all processes, whichever failed
        return first_line(next(iter(error.failures.values()))[0])
    except OSError as error:
        return reason_of(error)
