"""A layer of CRATE-MAE's decoder as modules, with the published names: the encoder's two steps, undone in reverse order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dictionary import Dictionary
from .layer import Attention, PreNorm, attention_places, fuses_attention
from .plain import Place, PlainTree, has_weights, is_plain, keeps_forwards, norm_at


class DecoderLayer(nn.Sequential):
    """x̂ = LN(x) Wᵀ, then x ← x̂ − MSSA(LN(x̂)) (arXiv:2404.02446); (batch, tokens, dim) to the same.

    Indexed like the published list of the two.
    """

    _modules: dict[str, Any]

    if TYPE_CHECKING:  # as of `Layer`

        def __getitem__(self, idx: int | slice) -> Any: ...
        def __iter__(self) -> Iterator[PreNorm]: ...

    def __init__(self, sparse: PreNorm, mssa: PreNorm) -> None:
        super().__init__(sparse, mssa)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self[0](x)
        return x - self[1](x)

    def is_fusable(self) -> bool:
        """Whether fused kernels may stand for all modules of this layer: none is hooked, changed or dropping out, and their
        backends allow it."""
        if not is_plain(self, DecoderLayer) or not _PLAIN.holds(self):
            return False
        if torch.compiler.is_compiling() and not keeps_forwards(*self.modules()):
            return False
        step, attention = (part._modules["fn"] for part in self._modules.values())
        backends = ("auto", "triton")
        return step.backend in backends and has_weights(step, "weight") and fuses_attention(attention, backends)

    def fits(self, weights: tuple[Tensor, ...], dim: int) -> bool:
        """Whether the sizes of its `weights` are those of a layer of width `dim`, and vectors in one piece."""
        attention = self[1].fn
        inner = weights[5].shape[0]
        if type(attention.heads) is not int or attention.heads < 1 or inner % attention.heads:
            return False
        shapes = [(dim,), (dim,), (dim, dim), (dim,), (dim,), (inner, dim), (dim, inner), (dim,)]
        return [w.shape for w in weights] == shapes and all(w.is_contiguous() for w in weights if w.dim() == 1)

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, `kernels.DecoderWeights` in order."""
        sparse, mssa = self
        attention = mssa.fn
        out = attention.to_out[0]
        norms = (sparse.norm.weight, sparse.norm.bias), (mssa.norm.weight, mssa.norm.bias)
        return *norms[0], sparse.fn.weight, *norms[1], attention.qkv.weight, out.weight, out.bias

    def settings(self):
        """The numbers that are not learned, as `kernels.DecoderSettings`."""
        from ..kernels import DecoderSettings

        sparse, mssa = self
        return DecoderSettings(mssa.fn.heads, mssa.fn.scale, sparse.norm.eps, mssa.norm.eps)

    def flops(self, tokens: int) -> int:
        """Multiplications of the products of `tokens` tokens, forward."""
        inner, dim = self[1].fn.qkv.weight.shape
        return tokens * (2 * inner * (dim + tokens) + self[0].fn.flops(dim))


_PLAIN = PlainTree(
    Place("0", (PreNorm,)),
    norm_at("0.norm"),
    Place("0.fn", (Dictionary,)),
    Place("1", (PreNorm,)),
    norm_at("1.norm"),
    Place("1.fn", (Attention,)),
    *attention_places("1.fn"),
)
