"""How the command was called, for commands that are suggested: they can be pasted."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "crate-fast"


def called(*words: str | Path) -> str:
    """The command line of `words` after the program, quoted for a shell, by the path that this process was called by."""
    program = sys.argv[0] if sys.argv else ""
    folder, name = os.path.split(program)
    if name == "__main__.py" and os.path.basename(folder) == "crate_fast":
        start = [sys.executable, "-m", "crate_fast"]
    elif name == NAME and not _is_found(program):
        start = [program]
    else:
        start = [NAME]
    return shlex.join([*start, *map(str, words)])


def _is_found(program: str) -> bool:
    """Whether a shell finds this program by its name."""
    found = shutil.which(NAME)
    return found is not None and os.path.exists(program) and os.path.samefile(found, program)
