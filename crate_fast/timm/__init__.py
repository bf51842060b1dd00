"""CRATE in timm: `import crate_fast.timm`, and `timm.create_model("crate_tiny_patch16_224")` builds one.

The models are `TimmCRATE`, or of CRATE-α `TimmCRATEAlpha`, a `crate_fast.CRATE` with timm's methods: the same weights by the
same names, the same numbers, the same fused kernels. `timm.list_models("crate_*")` has their names. docs/ecosystem.md has
timm's scripts, and which of timm's arguments mean what.

Raises:
    MissingPackageError: timm is not installed.
"""

from ..optional import require

require("timm")

from .crate import default_cfgs  # noqa: E402 (what it imports need not be there)
from .model import TimmCRATE, TimmCRATEAlpha  # noqa: E402

__all__ = ["TimmCRATE", "TimmCRATEAlpha", "default_cfgs"]
