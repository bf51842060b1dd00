"""The newest checkpoint of a run that has not ended, for commands that only look."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files import tell

NUMBERED = re.compile(r"step-[0-9]{8,}(_[0-9]{3})?\.(pt|dcp)")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of the run in the directory `run`, which a line on stderr names; None where there is none.

    Raises:
        OSError: the folder of checkpoints cannot be listed.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    names = [name for name in os.listdir(folder) if NUMBERED.fullmatch(name)]
    if not names:
        return None
    newest = folder / max(names, key=_place)
    tell(f"{run}: the run has not ended; taken: {newest}")
    return newest


def _place(name: str) -> tuple[int, str]:
    """Where a checkpoint's name stands among others."""
    stem = name.partition(".")[0]
    return int(stem.removeprefix("step-").partition("_")[0]), stem
