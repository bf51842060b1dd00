"""The checkpoints of a run: the newest few and the best, and which of them to go on from."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.read import CheckpointError, DamagedError, read_checkpoint
from ..checkpoint.save_load import save_checkpoint
from ..errors import SavingError
from ..files import first_line, remove
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from .checkpoint_contents import WEIGHTS_ALONE, check_values

NAME = "step-{:08d}"
ASIDE = 3  # files of a kind that are set aside and not deleted: the newest


def _reason(error: BaseException) -> str:
    """Why a file was not written, as the system says it: PyTorch's own error comes after that."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__context__
    return first_line(error)


class Checkpoints:
    """The folder of a run's checkpoints: `step-N.pt`, the newest of them also as `last.pt`, the best as `best.pt`.

    A file is written aside, flushed to the disk and renamed, so one that has its name is whole, whenever the run is killed.
    """

    suffix = ".pt"

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def numbered(self) -> list[Path]:
        """The checkpoints by number, the newest first.

        Raises:
            OSError: the folder cannot be listed. (A glob would find nothing there, as in a folder without checkpoints.)
        """
        names = sorted(os.listdir(self.folder), reverse=True)
        return [self.folder / name for name in names if name.startswith("step-") and name.endswith(self.suffix)]

    def newest_before(self, step: int) -> Path | None:
        """The newest checkpoint that was written after an earlier step than `step`, by its name."""
        return next((path for path in self.numbered() if int(re.findall(r"step-(\d+)", path.name)[0]) < step), None)

    def save(self, model: CRATE | CRATEMAE, step: int, best: bool, state: dict) -> Path:
        """Writes a checkpoint, and removes those that are no longer to be kept.

        Raises:
            SavingError: the disk is full or not to be written to; what was there before is still there.
        """
        path = self.folder / f"{NAME.format(step)}{self.suffix}"
        with self.explained(path):
            save_checkpoint(model, path, **state)
            self.name(path, best)
        return path

    @contextmanager
    def explained(self, path: Path) -> Iterator[None]:
        """Makes a SavingError of what goes wrong while `path` is written."""
        before = next(iter(self.numbered()), None)
        try:
            yield
        except (OSError, RuntimeError) as error:  # PyTorch's writer makes RuntimeErrors of the system's
            kept = f"{before} is kept" if before else "there was none before it"
            raise SavingError(f"{path} cannot be written ({_reason(error)}); {kept}") from error

    def name(self, path: Path, best: bool) -> None:
        """Makes `path` the last checkpoint, and the best if it is that, and removes those that are no longer to be kept."""
        for link in ("last", "best") if best else ("last",):
            self._link(path, self.folder / f"{link}{self.suffix}")
        for old in self.numbered()[self._keep :]:
            self._remove(old)

    def read(self, path: Path, whole: bool = True) -> dict:
        """The checkpoint `path`, and its "path"; `whole`: after a look at all of it, which another process may have had.

        Raises CheckpointError where it is damaged, or no run can go on from it.
        """
        return check_values(path, self._content(path, whole)) | {"path": str(path)}

    def _content(self, path: Path, whole: bool) -> dict:
        return read_checkpoint(path)  # which looks at all of it in any case

    def load_newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that is whole, or None in a folder that has had none.

        Damaged ones are set aside, with a warning, once an older one is found whole; otherwise nothing is touched.

        Raises:
            CheckpointError: the newest that is not damaged cannot be read or used, or all of them are damaged.
            OSError: the folder cannot be listed.
        """
        damaged: list[tuple[Path, DamagedError]] = []
        for path in self.numbered():
            try:
                content = self.read(path)
            except DamagedError as error:
                damaged.append((path, error))
                continue
            for other, error in damaged:
                aside = self._set_aside(other, "damaged")
                print(f"crate-fast: warning: {error}; set aside as {aside.name}", file=sys.stderr, flush=True)
            return path, content
        if damaged:
            raise CheckpointError(f"{damaged[0][1]}; no checkpoint in {self.folder} is whole, so the run cannot go on")
        left = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        if left:
            raise CheckpointError(
                f"{self.folder}: no checkpoint step-*{self.suffix} to go on from, but {left[-1]}; {WEIGHTS_ALONE}"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps than `step`, from which the run goes on again."""
        for path in self.numbered():
            if path.name > f"{NAME.format(step)}{self.suffix}":
                self._set_aside(path, "left")

    def _set_aside(self, path: Path, why: str) -> Path:
        """Renames `path`, so that it is no checkpoint of the run any more; of those that lie so, the oldest are removed."""
        aside = path.with_suffix(f".{why}-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        others = sorted(self.folder.glob(f"step-*.{why}-*"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in others[ASIDE:]:
            remove(old)
        return aside

    def _remove(self, old: Path) -> None:
        old.unlink(missing_ok=True)

    def _link(self, path: Path, name: Path) -> None:
        """Makes `name` another name of the file `path`, at once: it is the old file or the new one."""
        aside = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        aside.unlink(missing_ok=True)
        self._name_too(path, aside)
        os.replace(aside, name)

    def _name_too(self, path: Path, name: Path) -> None:
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, name)
