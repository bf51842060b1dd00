"""All parameters as one tensor, and all gradients as one: what is done to every weight is then one kernel, not hundreds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # numbers: every parameter starts on 256 bytes, as the allocator would have it


class Flat:
    """Moves the parameters of `model` into one tensor, `weights`, and their gradients, if wanted, into `gradients`.

    The padding between parameters is zero in both. The parameters stay what they were to their module and to an optimizer.
    """

    def __init__(self, model: nn.Module, *, gradients: bool = True) -> None:
        parameters = list(model.parameters())
        lengths = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self.weights = torch.zeros(sum(lengths), device=parameters[0].device, dtype=parameters[0].dtype)
        if gradients:
            self.gradients, self._before = torch.zeros_like(self.weights), torch.empty_like(self.weights)
        start = 0
        for parameter, length in zip(parameters, lengths, strict=True):
            place = slice(start, start + parameter.numel())
            self.weights[place].copy_(parameter.detach().flatten())
            parameter.data = self.weights[place].view_as(parameter)
            if gradients:
                parameter.grad = self.gradients[place].view_as(parameter)
            start += length

    def zero(self) -> None:
        """Sets the gradients to 0."""
        self.gradients.zero_()

    def norm(self) -> Tensor:
        """The norm of all gradients, a scalar on the device."""
        return self.gradients.norm()

    def clip(self, norm: Tensor, most: float) -> None:
        """Scales the gradients, whose norm is `norm`, to a norm of at most `most`."""
        self.gradients.mul_((most / (norm + 1e-6)).clamp(max=1.0))

    def remember(self) -> None:
        """Keeps a copy of the weights for `keep_where`."""
        self._before.copy_(self.weights)

    def keep_where(self, good: Tensor) -> None:
        """Sets the weights back to what they were at `remember` unless `good`, a scalar on the device, is true."""
        torch.where(good, self.weights, self._before, out=self.weights)

    def follow(self, other: Flat, part: float) -> None:
        """Moves the weights by `part` of their way to the `other` ones."""
        self.weights.lerp_(other.weights, part)
