"""A layer of CRATE as modules, with the published names, and what runs in their place."""

from .layer import Attention, FeedForward, Layer, PreNorm

__all__ = ["Attention", "FeedForward", "Layer", "PreNorm"]
