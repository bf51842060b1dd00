"""One model on several processes: all of it in each, gradients averaged (DDP)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...data.order import Plan
from ...device import Compute
from ...model.crate import CRATE
from ...model.mae import CRATEMAE
from ...settings import MachineSettings
from ..checkpoint_contents import check_whole
from ..checkpoints import Checkpoints
from ..cuda_graphs import Graphed
from .collectives import Together


class Replicated(Together):
    """What the loop asks of the processes where each has the whole model; `fsdp.Sharded` answers where it has a part."""

    checkpoints = Checkpoints

    def __init__(
        self,
        model: CRATE | CRATEMAE,
        average: CRATE | CRATEMAE | None,
        settings: MachineSettings,
        plan: Plan,
        compute: Compute,
    ) -> None:
        super().__init__(plan.ranks)
        self._model, self._average = model, average
        self.flat = Flat(model)
        self.flat_average = None if average is None else Flat(average, gradients=False)
        if settings.compile:
            model.compile()
        part = (plan.largest_part, model.channels, *model.image_size)
        net = Graphed(model, part, compute) if settings.cuda_graphs else model
        self.net: Any = replicate(net, compute) if plan.ranks.count > 1 else net

    def summing(self, last: bool) -> AbstractContextManager:
        """In which a part of a step is computed; gradients are summed over processes with the `last` one."""
        return nullcontext() if last or self._ranks.count == 1 else self.net.no_sync()

    def saves(self) -> bool:
        """Whether this process takes part in saving."""
        return self._ranks.first

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict:
        """What a checkpoint keeps of the optimizer and the mean of the weights."""
        return {
            "optimizer": optimizer.state_dict(),
            "ema": None if self._average is None else self._average.state_dict(),
        }

    def load(self, checkpoint: dict, optimizer: torch.optim.Optimizer) -> None:
        """Takes model, optimizer and mean from a checkpoint."""
        check_whole(self._model, optimizer, checkpoint, self._average is not None, Path(checkpoint["path"]))
        self._model.load_state_dict(checkpoint["model"])
        # The groups are of this run's settings, which the checkpoint's were found to be.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        if self._average is not None:
            self._average.load_state_dict(checkpoint["ema"])

    def whole(self, model: CRATE | CRATEMAE) -> CRATE | CRATEMAE | None:
        """`model` with all of its weights, in the first process."""
        return model if self._ranks.first else None


def replicate(model: nn.Module, compute: Compute) -> DistributedDataParallel:
    """`model` with gradients averaged over processes.

    PyTorch rearranges its buckets after the first step, so that a resumed process would add in another order than one that
    never stopped; not where it looks for unused parameters.
    """
    device_ids = [compute.device] if compute.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=True)


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
