"""A layer of CRATE as modules, with the published names, and what runs in their place."""

from .decoder import DecoderLayer
from .dictionary import Dictionary
from .ista import FeedForward
from .layer import Attention, Layer, PreNorm, ScaledPreNorm
from .odl import OvercompleteISTABlock
from .step import STEPS, SparseStep

__all__ = [
    "STEPS",
    "Attention",
    "DecoderLayer",
    "Dictionary",
    "FeedForward",
    "Layer",
    "OvercompleteISTABlock",
    "PreNorm",
    "ScaledPreNorm",
    "SparseStep",
]
