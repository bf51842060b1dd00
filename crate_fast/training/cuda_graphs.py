"""Forward and backward as CUDA graphs: recorded once, then launched in one piece each, where launches would take the time.

Not run on a GPU yet. What decides between graph and model runs everywhere and is under test.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..device import Compute
from ..model import cuda_graph
from ..settings import ConfigError, MachineSettings


class Graphed(nn.Module):
    """`model`, computed by CUDA graphs for images of `shape`, and by itself for others: a part of an epoch's last step.

    The graphs hold addresses: the weights may be written to, but must stay where they are (as `Flat` has them). Outside of the
    graphs are the loss, the sums over processes and the update, in all of which numbers change that only the host knows:
    what is mixed into what, the learning rate.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], compute: Compute) -> None:
        super().__init__()
        self.model, self._shape = model, shape
        self._graph = record(Autocast(model, compute), shape, compute.device)

    def forward(self, images: Tensor) -> Tensor:
        return self._graph(images) if images.shape == self._shape else self.model(images)


class Autocast(nn.Module):
    """`model` in the autocast of `compute`: entered by the forward alone, so that a backward recorded with it is not cast.

    Recording replaces the `forward` of what it is given: here this shell's, so that the model keeps its own.
    """

    def __init__(self, model: nn.Module, compute: Compute) -> None:
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, images: Tensor) -> Tensor:
        with self._compute.autocast():
            return self.model(images)


def record(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """`model` with its forward and backward recorded for images of `shape`; gradients and weights are left as they are.

    Dropout draws anew at every replay, from the seed that is set before it.
    """
    return cuda_graph.record(model.train(), torch.zeros(shape, device=device))


def check_graphs(settings: MachineSettings, compute: Compute) -> None:
    """Raises ConfigError where --cuda-graphs is "yes" and `compute` is no CUDA GPU."""
    if settings.cuda_graphs and compute.device.type != "cuda":
        raise ConfigError(
            f"--cuda-graphs is 'yes', which needs a CUDA GPU; --device is {settings.device!r}, here {compute.device.type}"
        )
