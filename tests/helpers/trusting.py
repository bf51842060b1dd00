"""crate-fast where the data sets made in FOLDER are the published ones, to be had at URL: trusting.py FOLDER URL WORDS..."""

import sys
from pathlib import Path

import pytest

from crate_fast.commands.main import main
from pictures import trust

if __name__ == "__main__":
    trust(pytest.MonkeyPatch(), Path(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
