"""The rows of layers of CRATE-MAE, with the published names, run by the fused kernels where nobody could tell."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import autocasts, choose_backend
from ..modules.decoder import DecoderLayer
from ..modules.dictionary import Dictionary
from ..modules.ista import FeedForward
from ..modules.layer import Attention, Layer, PreNorm
from ..modules.plain import has_global_hooks, is_plain, keeps_forwards, same_place
from ..reference import attention_probabilities
from .transformer import Stack, stack_dtypes


class Block(nn.Module):
    """A layer under the published class's names, `layers.0.0` and `layers.0.1`."""

    def __init__(self, layer: nn.Module, dim: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.heads = heads
        self.dim = dim

    def forward(self, x: Tensor, return_attention: bool = False, return_key: bool = False) -> Tensor:
        """(batch, tokens, dim) to the same; of an encoder's block instead, with `return_key`, its tokens projected on all
        subspaces, (batch, tokens, heads × width), or with `return_attention` the probabilities, (batch, heads, tokens, tokens).
        """
        layer: Any = self.layers[0]
        if not (return_attention or return_key):
            return layer(x)
        mssa = layer[0]
        w = mssa.fn.qkv(mssa.norm(x))
        if not return_attention:
            return w
        return attention_probabilities(w.unflatten(-1, (mssa.fn.heads, -1)).transpose(1, 2), mssa.fn.scale)

    def inner(self) -> nn.Module:
        """The layer alone where nobody watches or changes what is around it, else this block."""
        plain = is_plain(self, Block) and is_plain(self.layers, nn.ModuleList) and len(self.layers) == 1
        return self.layers[0] if plain and keeps_forwards(self) else self


class Blocks(Stack, nn.ModuleList):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Blocks in a row, indexed like the published list.

    Args:
        blocks: of them.
        backend: see `crate_fast.choose_backend`.
        stream: dtype of the activations that fused layers keep under autocast; see `crate_fast.CRATE`.
    """

    def __init__(self, blocks: Iterable[nn.Module], backend: str = "auto", stream: str = "auto") -> None:
        super().__init__(blocks)
        self.backend, self.stream = backend, stream

    def __getitem__(self, idx):  # pyright: ignore[reportIncompatibleMethodOverride]
        found = super().__getitem__(idx)
        if isinstance(found, Blocks):  # a part of them
            found.backend, found.stream, found.grad_checkpointing = self.backend, self.stream, self.grad_checkpointing
        return found

    @property
    def layers(self) -> list[nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What `run` runs: of every block the layer alone, if it may."""
        return [block.inner() if isinstance(block, Block) else block for block in self]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same, through all of them."""
        return self.run(x, None)


class DecoderBlocks(Blocks):
    """`Blocks` of `DecoderLayer`s."""

    def forward(self, x: Tensor) -> Tensor:
        cast = autocasts(x.device.type)
        watched = x.dim() != 3 or x.numel() == 0 or has_global_hooks()
        for fused, run in groupby(self.layers, key=lambda layer: not watched and self._decodes(layer, x, cast)):
            if fused:
                layers: list[Any] = list(run)
                x = self._decode(layers, x)
                continue
            for layer in run:
                x = self._call(layer, layer, x)
        return x

    def _decodes(self, layer: nn.Module, x: Tensor, cast: bool) -> bool:
        """Whether kernels run `layer` on x, `cast` by autocast or not."""
        if not isinstance(layer, DecoderLayer) or not layer.is_fusable():
            return False
        weights = layer.weights()
        if not layer.fits(weights, x.shape[-1]) or not same_place(weights) or weights[0].device != x.device:
            return False  # the modules say what is wrong
        if not cast and weights[0].dtype != x.dtype:
            return False
        attention: Any = layer[1].fn
        return choose_backend(self.backend, x, weights[5].shape[0] // attention.heads).name == "triton"

    def _decode(self, layers: list[DecoderLayer], x: Tensor) -> Tensor:
        from ..kernels import DecoderWeights, enter_decoder, fused_decoder_layer, leave_decoder, prepare_decoder

        device, operand_dtype, activation_dtype, result = x.device.type, x.dtype, x.dtype, x.dtype
        if autocasts(device):
            activation_dtype, operand_dtype = stack_dtypes(self.stream, torch.get_autocast_dtype(device))
            result = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            weights = [DecoderWeights(*layer.weights()) for layer in layers]
            state = enter_decoder(x, activation_dtype)
            for layer, own, prepared in zip(layers, weights, prepare_decoder(weights, operand_dtype), strict=True):
                state = self._call(layer, fused_decoder_layer, state, own, prepared, layer.settings(), draws=False)
            return leave_decoder(state, result, scaled=operand_dtype == torch.float16)


def encoder_blocks(dim: int, depth: int, heads: int, lambd: float, backend: str, stream: str) -> Blocks:
    """The encoder's, drawn as published: x ← ISTA(x + MSSA(x))."""
    layers = []
    for _ in range(depth):
        mssa = PreNorm(dim, Attention(dim, heads=heads, dim_head=dim // heads, backend=backend))
        layers.append(Layer(mssa, PreNorm(dim, FeedForward(dim, dim, lambd=lambd, backend=backend))))
    return Blocks([Block(layer, dim, heads) for layer in layers], backend, stream)


def decoder_blocks(dim: int, depth: int, heads: int, backend: str, stream: str) -> DecoderBlocks:
    """The decoder's, drawn as published: x̂ = LN(x) Wᵀ, x ← x̂ − MSSA(x̂)."""
    layers = []
    for _ in range(depth):
        sparse = PreNorm(dim, Dictionary(dim, dim, backend=backend))
        mssa = PreNorm(dim, Attention(dim, heads=heads, dim_head=dim // heads, backend=backend))
        layers.append(DecoderLayer(sparse, mssa))
    return DecoderBlocks([Block(layer, dim, heads) for layer in layers], backend, stream)
