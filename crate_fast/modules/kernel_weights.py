"""What the kernels need of layers' weights, made anew in three launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plain import keeps_nothing
from .step import STEPS, SparseStep

if TYPE_CHECKING:
    from typing import TypeAlias

    from ..kernels import LayerWeights, PreparedWeights
    from .layer import Layer

    Weights: TypeAlias = tuple[LayerWeights, PreparedWeights]


def make_weights(layers: list[Layer], operand_dtype: torch.dtype) -> list[Weights]:
    """(`kernels.LayerWeights`, `kernels.PreparedWeights`) of every layer; of layers that are alike in three launches together:
    their weights copied side by side, M made of them, the norms folded in."""
    from ..kernels import LayerWeights, prepare_layers, stack_weights

    own = [layer.weights() for layer in layers]
    kinds = [_weights_kind(layer, weights) for layer, weights in zip(layers, own, strict=True)]
    if any(kind != kinds[0] for kind in kinds):
        return [pair for layer in layers for pair in make_weights([layer], operand_dtype)]
    step: SparseStep = layers[0].parts()[1]["fn"]
    stacked, at = stack_weights(own), LayerWeights._fields.index("matrix")  # from where on weights are the step's
    matrices = step.fold(stacked[at:], step.step_size)
    each: Sequence[Any] = matrices.unbind()
    if torch.is_grad_enabled():
        each = [_Folded.apply(step.name, step.step_size, m, *w[at:]) for m, w in zip(each, own, strict=True)]
    prepared = prepare_layers(LayerWeights._make([*stacked[:at], matrices]), layers[0].settings().shrinkage, operand_dtype)
    return [(LayerWeights._make([*w[:at], m]), p) for w, m, p in zip(own, each, prepared, strict=True)]


class _Folded(torch.autograd.Function):
    """M, at hand, as a function of the weights of the step called `name`."""

    @staticmethod
    def forward(ctx, name: str, step_size: float, matrix: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        ctx.name, ctx.step_size = name, step_size
        return matrix.view_as(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx, dm: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None, *STEPS[ctx.name].fold_gradient(dm, ctx.saved_tensors, ctx.step_size)


def kernel_weights(layers: list[Layer], operand_dtype: torch.dtype) -> list[Weights]:
    """`make_weights` of all layers together; of frozen layers what it gave first, in a call that no CUDA graph recorded: what
    a graph makes has no values before the first replay."""
    if any(layer.frozen is None for layer in layers):
        return make_weights(layers, operand_dtype)
    stores: list[Any] = [layer.frozen for layer in layers]
    kept = [pairs.get(operand_dtype) for pairs in stores]
    if None in kept:
        kept = make_weights(layers, operand_dtype)
        if not (keeps_nothing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())):
            place = kept[0][0].matrix.device
            if place.type == "cuda":
                torch.cuda.current_stream(place).synchronize()  # once: later calls may be on other streams
            for pairs, pair in zip(stores, kept, strict=True):
                pairs[operand_dtype] = pair
    return kept


def _weights_kind(layer: Layer, weights: tuple[Tensor, ...]) -> tuple:
    step = layer.parts()[1]["fn"]
    return [w.shape for w in weights], weights[0].dtype, step.name, step.step_size, step.lambd
