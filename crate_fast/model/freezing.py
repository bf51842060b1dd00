"""A model that nobody writes to any more, so that what is made of its weights alone may be kept without proof."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.layer import Layer

_REFUSED = "this model was frozen for inference and {}; change the model that it was made from, then freeze that again"


def freeze(model: nn.Module) -> Frozen:
    """A copy of `model` as it is now, for inference alone; what happens to `model` later does not change it.

    Nobody else holds its weights, so the fused kernels' M and folded norms are made once and kept, where every other call of a
    model makes them. It takes the memory of the weights twice more, or once more when `model` is let go.

    Args:
        model: a `CRATE`, a `CRATEMAE`, or a module around one, in evaluation mode.

    Raises:
        TypeError: `model` is no module, or has no layer of this library.
        ValueError: the model is in training mode.
    """
    if not isinstance(model, nn.Module) or not any(isinstance(module, Layer) for module in model.modules()):
        raise TypeError(f"freeze takes a CRATE or a module around one, not a {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("freeze is for inference, and the model is in training mode; call model.eval() first")
    return Frozen(model)


class Frozen(nn.Module):
    """What `freeze` returns: called as the model is, without gradients. It shows no parameters, so that no optimizer, mean of
    weights or checkpoint reaches them; to train, move or load it is refused with a RuntimeError."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        with torch.inference_mode(False), torch.no_grad():
            self._copy = (copy.deepcopy(model),)  # in a tuple, where modules and their weights are not registered
        for module in self._copy[0].modules():
            if isinstance(module, Layer):
                module.frozen = {}
        self.training = False

    def forward(self, images: Tensor, *arguments, **keywords) -> Any:
        """(batch, channels, height, width) to what the model makes of them, and of what else it takes, such as a CRATEMAE's
        `mask_ratio`; it cannot be differentiated."""
        with torch.no_grad():
            return self._copy[0](images, *arguments, **keywords)

    def train(self, mode: bool = True) -> Frozen:
        return self._refuse("does not train") if mode else self

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        return self._refuse("does not train") if requires_grad else self

    def load_state_dict(self, *arguments, **options):
        self._refuse("loads no other weights")

    def _apply(self, fn, recurse: bool = True):
        self._refuse("stays on its device and in its dtype")

    def _refuse(self, what: str):
        raise RuntimeError(_REFUSED.format(what))
