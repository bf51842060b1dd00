"""`python -m crate_fast.timm train.py ...`: a script of timm's, which then knows CRATE's names."""

import runpy
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    """Runs a script as `python` does; returns 2 where there is none.

    Args:
        words: its path, then its arguments.
    """
    if not words or not Path(words[0]).is_file():
        found = f"{words[0]}: no such file" if words else "nothing to run"
        print(f"{found}; it must be a script of timm's: python -m crate_fast.timm train.py ARGUMENTS", file=sys.stderr)
        return 2
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
