"""CRATE, the white-box vision transformer, at the hardware's speed."""

from typing import TYPE_CHECKING

from .lazy import lazily

if TYPE_CHECKING:  # what a type checker sees; the same is imported where it is used
    from . import functional
    from .backend import choose_backend
    from .checkpoint.save_load import load_checkpoint
    from .errors import BackendError, CheckpointError
    from .model.crate import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny
    from .model.cuda_graph import graphed
    from .model.freezing import freeze
    from .prediction import load
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "functional": (),
            "errors": ("BackendError", "CheckpointError"),
            "backend": ("choose_backend",),
            "checkpoint.save_load": ("load_checkpoint",),
            "model.crate": ("CRATE", "CRATE_base", "CRATE_large", "CRATE_small", "CRATE_tiny"),
            "model.cuda_graph": ("graphed",),
            "model.freezing": ("freeze",),
            "prediction": ("load",),
        },
    )

__version__ = "0.1.0"
__all__ = [
    "CRATE",
    "BackendError",
    "CRATE_base",
    "CRATE_large",
    "CRATE_small",
    "CRATE_tiny",
    "CheckpointError",
    "__version__",
    "choose_backend",
    "freeze",
    "functional",
    "graphed",
    "load",
    "load_checkpoint",
]
