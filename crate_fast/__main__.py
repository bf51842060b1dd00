"""`python -m crate_fast` is `crate-fast`."""

import sys

from .commands.main import main

sys.exit(main())
