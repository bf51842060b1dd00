"""CRATE, the white-box vision transformer, at the hardware's speed."""

from . import functional
from .backend import BackendError, choose_backend
from .checkpoint import load_checkpoint
from .frozen import freeze
from .model import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny
from .reading import CheckpointError
from .replay import graphed

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
    "load_checkpoint",
]
