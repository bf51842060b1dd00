"""`python -m crate_fast` is `crate-fast`."""

import sys

from .cli import main

sys.exit(main())
