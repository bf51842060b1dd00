"""A model run layer by layer, each layer's tensors handed out as the modules make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..model.crate import CRATE
from ..model.encoder import Encoder
from ..model.mae import CRATEMAE
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


def encoder_of(model: CRATE | CRATEMAE) -> Encoder:
    """What the views look at: of a CRATE all but its head, of a CRATE-MAE the encoder, no patch masked.

    Raises:
        TypeError: `model` is neither.
    """
    if not isinstance(model, CRATE | CRATEMAE):
        raise TypeError(f"the model is a {type(model).__name__}; it must be a crate_fast.CRATE or CRATEMAE")
    return model.encoder()


@torch.no_grad()
def layer_views(model: CRATE | CRATEMAE, images: Tensor) -> Iterator[LayerView]:
    """Runs `images` through `model` and gives the view of each layer in turn; nothing is kept of the layers before.

    The model computes as in evaluation, on its own backend, and is in its own mode again when the iteration ends.

    Args:
        model: on any device, in any mode; of a CRATEMAE its encoder is run, no patch masked.
        images: (batch, channels, height, width), floating point, normalised as in training. Any size that patches divide:
            for another than the model's, position embeddings are resampled bicubically.

    Raises:
        TypeError: `model` is no CRATE and no CRATEMAE, or the images are not floating point or, outside autocast, not of the
            model's dtype.
        ValueError: the images have another number of channels or are on another device, or patches do not divide them.
    """
    encoder = encoder_of(model)
    with _evaluating(model):
        x = encoder.tokens(images)
        for layer in encoder.layers:
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
