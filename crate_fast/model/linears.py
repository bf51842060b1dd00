"""A model whose products are all of nn.Linear, for tools that look for those: quantisation above all."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..modules.odl import OvercompleteISTABlock
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


class LinearOvercompleteStep(nn.Module):
    """CRATE-α's step with three nn.Linear: `expand`, of weight Dᵀ, which is called twice, `reduce`, D, and `decode`, D₁.

    Args:
        step: what it stands for, with the weights that it has now.
    """

    def __init__(self, step: OvercompleteISTABlock) -> None:
        super().__init__()
        self.expand, self.reduce, self.decode = (_linear(each) for each in (step.D.t(), step.D, step.D1))
        self.step_size, self.threshold = step.step_size, step.step_size * step.lambd

    def forward(self, h: Tensor) -> Tensor:
        """(..., dim) to the same."""
        z1 = torch.relu(self.step_size * self.expand(h) - self.threshold)
        r = h - self.reduce(z1)
        return self.decode(torch.relu(z1 + self.step_size * self.expand(r) - self.threshold))


def _linear(weight: Tensor) -> nn.Linear:
    """The nn.Linear, without bias, of a copy of `weight`."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    return made


def as_linears(model: Model) -> Model:
    """A copy of `model` as it is now, for inference, in which every step of sparsification's product is an nn.Linear.

    The dictionary D of a step is a parameter of the step itself, which tools that replace or quantise each nn.Linear pass by.
    In the copy M = η(D − DᵀD) is the weight of one, a third of a layer's weights in CRATE-tiny. What it computes is the same
    but for rounding; its layers run by their modules, not fused, and it is not saved as a CRATE. CRATE-α's dictionaries are the
    weights of three, of which one is called twice.

    Args:
        model: a `CRATE`, or a module around one, in evaluation mode.

    Raises:
        TypeError: `model` is no module, or has no step of sparsification that has an M, nor CRATE-α's.
        ValueError: the model is in training mode.
    """
    if not isinstance(model, nn.Module) or not any(map(_has_linears, model.modules())):
        raise TypeError(f"as_linears takes a CRATE or a module around one, not a {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("as_linears is for inference, and the model is in training mode; call model.eval() first")
    with torch.inference_mode(False), torch.no_grad():
        changed = copy.deepcopy(model).requires_grad_(False)
        for module in list(changed.modules()):
            for name, child in module.named_children():
                if _has_linears(child):
                    kind: Any = LinearOvercompleteStep if isinstance(child, OvercompleteISTABlock) else LinearStep
                    setattr(module, name, kind(child).eval())
    return changed


def _has_linears(module: nn.Module) -> bool:
    return isinstance(module, SparseStep) and (module.folds or isinstance(module, OvercompleteISTABlock))
