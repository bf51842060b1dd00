"""A model run layer by layer, each layer's tensors handed out as the modules make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..model.crate import CRATE
from ..model.positions import resample_positions
from ..model.transformer import layers_of
from ..modules.layer import Layer, ScaledPreNorm


class LayerView(NamedTuple):
    """What one layer makes of its tokens; the class token is the first of them.

    Attributes:
        layer: the layer itself, its `[0]` the MSSA step and its `[1]` the step of sparsification.
        projection: w = U LN(Z^ℓ), (batch, tokens, heads × head width): query, key and value in one, as a hook on `qkv` sees.
        compressed: Z^{ℓ+1/2} = Z^ℓ + MSSA, (batch, tokens, dim).
        tokens: Z^{ℓ+1} = ISTA, (batch, tokens, dim), as a hook on the layer's second module sees; of a step with a residual
            what the layer gives.
    """

    layer: Layer
    projection: Tensor
    compressed: Tensor
    tokens: Tensor

    @property
    def heads(self) -> int:
        return self.layer[0].fn.heads

    @property
    def code(self) -> Tensor:
        """What the step of sparsification makes sparse: of ISTA `tokens`, of CRATE-α z₂, (batch, tokens, 4 dim)."""
        sparse = self.layer[1]
        return sparse.fn.code(sparse.norm(self.compressed)) if self.layer.residual else self.tokens

    @property
    def scale(self) -> float:
        return self.layer[0].fn.scale


@torch.no_grad()
def layer_views(model: CRATE, images: Tensor) -> Iterator[LayerView]:
    """Runs `images` through `model` and gives the view of each layer in turn; nothing is kept of the layers before.

    The model computes as in evaluation, on its own backend, and is in its own mode again when the iteration ends.

    Args:
        model: on any device, in any mode.
        images: (batch, channels, height, width), floating point, normalised as in training. Any size that patches divide:
            for another than the model's, position embeddings are resampled bicubically.

    Raises:
        TypeError: `model` is no CRATE, or the images are not floating point.
        ValueError: the images have another number of channels, or patches do not divide them.
    """
    if not isinstance(model, CRATE):
        raise TypeError(f"the model is a {type(model).__name__}; it must be a crate_fast.CRATE")
    grid = patch_grid(model, images)
    with _evaluating(model):
        x = _embed(model, images, grid)
        for layer in layers_of(model.transformer):
            mssa, ista = layer
            attention = mssa.fn
            w = project(layer, x)
            out = functional.mssa(w, attention.heads, attention.scale, attention.backend)
            step = attention.to_out(out)
            z = (step * mssa.scale if isinstance(mssa, ScaledPreNorm) else step) + x
            x = ista(z) + z if layer.residual else ista(z)
            yield LayerView(layer, w, z, x)


def project(layer: Layer, tokens: Tensor) -> Tensor:
    """U LN(tokens): what `layer`'s subspaces see of (batch, tokens, dim); (batch, tokens, heads × head width)."""
    return layer[0].fn.qkv(layer[0].norm(tokens))


def patch_grid(model: CRATE, images: Tensor) -> tuple[int, int]:
    """(rows, columns) of the patches that `model` cuts `images` into; raises as `layer_views`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"the images are a {type(images).__name__}; they must be a tensor")
    if not images.is_floating_point():
        raise TypeError(f"the images are {images.dtype}; they must be real floating point")
    if images.dim() != 4 or images.shape[1] != model.channels:
        raise ValueError(f"the images have shape {tuple(images.shape)}; it must be (batch, {model.channels}, height, width)")
    height, width = images.shape[2:]
    if any(side == 0 or side % patch for side, patch in zip((height, width), model.patch_size, strict=True)):
        raise ValueError(
            f"the images are {height}×{width}, which patches of {'×'.join(map(str, model.patch_size))} do not divide"
        )
    return height // model.patch_size[0], width // model.patch_size[1]


def _embed(model: CRATE, images: Tensor, grid: tuple[int, int]) -> Tensor:
    own = model.image_size[0] // model.patch_size[0], model.image_size[1] // model.patch_size[1]
    x = model.embed_patches(images)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
    return x + resample_positions(model.pos_embedding, own, grid)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every module of it in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
