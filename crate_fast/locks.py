"""Folders that one process at a time may write to."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where processes are not kept apart
    fcntl = None

held: int | None = None
"""The descriptor that holds this process's lock, for processes forked from it to close."""


def lock(folder: Path) -> bool:
    """Keeps other processes out of `folder` until this one ends, however it ends; False: another is in it.

    Raises:
        OSError: the folder is not there.
    """
    global held
    if fcntl is None:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    held = descriptor
    return True


def unlock() -> None:
    """Lets others into the folder that this process has locked, if any."""
    global held
    if held is not None:
        os.close(held)
        held = None
