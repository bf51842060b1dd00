"""The CRATE classifier and its published sizes."""

from ..sizes import SIZES
from .crate import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny, build
from .cuda_graph import graphed
from .freezing import freeze
from .transformer import Transformer

__all__ = [
    "CRATE",
    "SIZES",
    "CRATE_base",
    "CRATE_large",
    "CRATE_small",
    "CRATE_tiny",
    "Transformer",
    "build",
    "freeze",
    "graphed",
]
