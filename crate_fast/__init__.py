"""CRATE, the white-box vision transformer, at the hardware's speed."""

from typing import TYPE_CHECKING

from . import functional
from .backend import BackendError, choose_backend
from .checkpoint.read import CheckpointError
from .checkpoint.save_load import load_checkpoint
from .model.crate import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny, constructor, pair
from .model.cuda_graph import graphed
from .model.freezing import freeze
from .model.transformer import Transformer
from .modules import Attention, FeedForward, PreNorm

__version__ = "0.1.0"
__all__ = [
    "CRATE",
    "Attention",
    "BackendError",
    "CRATE_base",
    "CRATE_large",
    "CRATE_small",
    "CRATE_tiny",
    "CheckpointError",
    "FeedForward",
    "PreNorm",
    "Transformer",
    "__version__",
    "choose_backend",
    "freeze",
    "functional",
    "graphed",
    "load_checkpoint",
    "pair",
]

if not TYPE_CHECKING:  # to a type checker there are the published sizes only, and no name that is misspelt

    def __getattr__(name: str):
        return constructor(name, __name__)
