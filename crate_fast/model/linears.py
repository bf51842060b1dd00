"""A model whose products are all of nn.Linear, for tools that look for those: quantisation above all."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..modules.step import SparseStep

Model = TypeVar("Model", bound=nn.Module)


class LinearStep(nn.Module):
    """A step of sparsification as relu(h + h M − ηλ) with h M as an nn.Linear, called `product`, whose weight is Mᵀ.

    Args:
        step: what it stands for, with the weights that it has now.
    """

    def __init__(self, step: SparseStep) -> None:
        super().__init__()
        weights = [getattr(step, name).detach() for name in step.weight_names]
        matrix = step.fold(weights, step.step_size)
        with torch.device("meta"):
            self.product = nn.Linear(*matrix.shape, bias=False)
        self.product.weight = nn.Parameter(matrix.t().contiguous().to(weights[0].dtype), requires_grad=False)
        self.threshold = step.step_size * step.lambd

    def forward(self, h: Tensor) -> Tensor:
        """(..., dim) to the same."""
        return torch.relu(h + self.product(h) - self.threshold)


def as_linears(model: Model) -> Model:
    """A copy of `model` as it is now, for inference, in which every step of sparsification's product is an nn.Linear.

    The dictionary D of a step is a parameter of the step itself, which tools that replace or quantise each nn.Linear pass by.
    In the copy M = η(D − DᵀD) is the weight of one, a third of a layer's weights in CRATE-tiny. What it computes is the same
    but for rounding; its layers run by their modules, not fused, and it is not saved as a CRATE.

    Args:
        model: a `CRATE`, or a module around one, in evaluation mode.

    Raises:
        TypeError: `model` is no module, or has no step of sparsification that has an M.
        ValueError: the model is in training mode.
    """
    if not isinstance(model, nn.Module) or not any(map(_is_folded, model.modules())):
        raise TypeError(f"as_linears takes a CRATE or a module around one, not a {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("as_linears is for inference, and the model is in training mode; call model.eval() first")
    with torch.inference_mode(False), torch.no_grad():
        changed = copy.deepcopy(model).requires_grad_(False)
        for module in list(changed.modules()):
            for name, child in module.named_children():
                if _is_folded(child):
                    setattr(module, name, LinearStep(child).eval())  # pyright: ignore[reportArgumentType] (it is a SparseStep)
    return changed


def _is_folded(module: nn.Module) -> bool:
    return isinstance(module, SparseStep) and module.folds
