"""What the kernels need of layers' weights, made anew in three launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .plain import keeps_nothing

if TYPE_CHECKING:
    from typing import TypeAlias

    from ..kernels import LayerWeights, PreparedWeights
    from .layer import Layer

    Weights: TypeAlias = tuple[LayerWeights, PreparedWeights]


def fresh_weights(layers: list[Layer], operand: torch.dtype) -> list[Weights]:
    """(`kernels.LayerWeights`, `kernels.PreparedWeights`) of every layer; of layers that are alike in three launches together:
    their weights copied side by side, M made of them, the norms folded in."""
    from ..kernels import LayerWeights, prepare_layers, stack_weights

    own = [LayerWeights(*layer.weights()) for layer in layers]
    kinds = [_weights_kind(layer, weights) for layer, weights in zip(layers, own, strict=True)]
    if any(kind != kinds[0] for kind in kinds):
        return [pair for layer in layers for pair in fresh_weights([layer], operand)]
    stacked = stack_weights(own)
    step_size, shrinkage = layers[0][1].fn.step_size, layers[0].settings().shrinkage
    operators, each = functional.ista_operators([w.operator for w in own], stacked.operator, step_size)
    prepared = prepare_layers(stacked._replace(operator=operators), shrinkage, operand)
    return [(w._replace(operator=m), p) for w, m, p in zip(own, each, prepared, strict=True)]


def fused_weights(layers: list[Layer], operand: torch.dtype) -> list[Weights]:
    """`fresh_weights` of all layers together; of frozen layers what it gave first, in a call that no CUDA graph recorded: what
    a graph makes has no values before the first replay."""
    if any(layer.frozen is None for layer in layers):
        return fresh_weights(layers, operand)
    stores: list[Any] = [layer.frozen for layer in layers]
    kept = [pairs.get(operand) for pairs in stores]
    if None in kept:
        kept = fresh_weights(layers, operand)
        if not (keeps_nothing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())):
            place = kept[0][0].operator.device
            if place.type == "cuda":
                torch.cuda.current_stream(place).synchronize()  # once: later calls may be on other streams
            for pairs, pair in zip(stores, kept, strict=True):
                pairs[operand] = pair
    return kept


def _weights_kind(layer: Layer, weights: tuple[Tensor, ...]) -> tuple:
    feed_forward = layer[1].fn
    return [w.shape for w in weights], weights[0].dtype, feed_forward.step_size, feed_forward.lambd
