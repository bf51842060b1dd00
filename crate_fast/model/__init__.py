"""The CRATE classifier and its published sizes."""

from typing import TYPE_CHECKING

from ..sizes import SIZES
from .crate import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny, build, constructor
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

if not TYPE_CHECKING:  # to a type checker there are the published sizes only, and no name that is misspelt

    def __getattr__(name: str):
        return constructor(name, __name__)
