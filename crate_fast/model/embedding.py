"""Whether one computation may stand for the modules that make tokens of patches."""

from __future__ import annotations

from einops.layers.torch import Rearrange
from torch import nn

from ..modules.plain import Place, PlainTree, drops_nothing, is_plain, keeps_forwards, linear_at, norm_at

_PLAIN = PlainTree(Place("0", (Rearrange,)), norm_at("1"), linear_at("2"), norm_at("3"))


def is_plain_embedding(modules: nn.Module, dropout: nn.Module) -> bool:
    """Whether `modules` are a CRATE's `to_patch_embedding`, with a bias, and nobody watches or changes them or drops tokens."""
    if not is_plain(modules, nn.Sequential) or not _PLAIN.holds(modules):
        return False
    plain = modules[2].bias is not None and drops_nothing(dropout)
    return plain and keeps_forwards(modules, *modules, dropout)
