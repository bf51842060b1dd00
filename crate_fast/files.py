"""What all readers and writers of files share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO


def parse_json(text: str | bytes):
    """What JSON says.

    Raises:
        ValueError: it is no JSON, or nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def open_own(path: Path, mode: str) -> IO:
    """Opens a file of a run's own directory, which may come from elsewhere: no link out of it is followed.

    Raises:
        OSError: as `open`; also where `path` is a link.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=_open_no_link)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
