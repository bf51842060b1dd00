"""Where what was measured or compiled for this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "CRATE_FAST_CACHE"


def cache_folder() -> Path:
    """$CRATE_FAST_CACHE, else crate_fast under the user's cache directory; it need not be there."""
    directory = os.environ.get(CACHE_VARIABLE)
    return Path(directory) if directory else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate_fast"
