"""One model in parts, one on each process (FSDP2): weights are gathered layer by layer, as they are computed with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import get_total_norm

from ...checkpoint import distributed
from ...checkpoint.constructor import constructor_arguments, skeleton
from ...checkpoint.read import CheckpointError
from ...data.order import Plan
from ...device import Compute
from ...model.crate import CRATE
from ...settings import MachineSettings
from .collectives import Together
from .sharded_checkpoints import ShardedCheckpoints


class Shards:
    """This process's parts of the parameters of `model`, and of their gradients: `Flat`'s methods, tensor by tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[Any] = list(model.parameters())  # with a DTensor's methods
        self.weights = [parameter.to_local() for parameter in self._parameters]
        self._before: list[Tensor] = []

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def norm(self) -> Tensor:
        norm: Any = get_total_norm([parameter.grad for parameter in self._parameters], foreach=True)
        return norm.full_tensor()

    def clip(self, norm: Tensor, most: float) -> None:
        gradients = [parameter.grad.to_local() for parameter in self._parameters]
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))

    def remember(self) -> None:
        self._before = [weight.clone() for weight in self.weights]

    def keep_where(self, good: Tensor) -> None:
        for weight, before in zip(self.weights, self._before, strict=True):
            torch.where(good, weight, before, out=weight)

    def follow(self, other: Shards, part: float) -> None:
        torch._foreach_lerp_(self.weights, other.weights, part)


class Sharded(Together):
    """What the loop asks of the processes, see `ddp.Replicated`, where each has a part of the model.

    All of them compute, evaluate and save together.
    """

    checkpoints = ShardedCheckpoints

    def __init__(self, model: CRATE, average: CRATE | None, settings: MachineSettings, plan: Plan, compute: Compute) -> None:
        super().__init__(plan.ranks)
        self._model: Any = model  # an FSDPModule too, below
        self._average = average
        for whole in (model, average) if average is not None else (model,):
            shard(whole, compute, plan.ranks.count)
        self.flat = Shards(model)
        self.flat_average = None if average is None else Shards(average)
        self.net = model

    def summing(self, last: bool) -> AbstractContextManager:
        self._model.set_requires_gradient_sync(last)
        return nullcontext()

    def saves(self) -> bool:
        return True

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict:
        """Those of the optimizer, the mean of the weights and the model, each process's part."""
        found = {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, optimizer)["state"],
            "ema": {} if self._average is None else get_model_state_dict(self._average),
        }
        return {"tensors": {name: part for name, part in found.items() if part}}  # of an empty part DCP makes a pickle

    def load(self, checkpoint: dict, optimizer: torch.optim.Optimizer) -> None:
        """Takes model, optimizer and mean from a checkpoint of any number of processes."""
        parts = self.tensors(optimizer)["tensors"]
        try:
            distributed.load_parts(Path(checkpoint["path"]), parts)
        except distributed.DamagedError as error:
            raise CheckpointError(f"{checkpoint['path']}: damaged, or of another run: {error}") from error
        set_model_state_dict(self._model, parts["model"])
        groups = get_optimizer_state_dict(self._model, optimizer)["param_groups"]
        state = {"state": parts.get("optimizer", {}), "param_groups": groups}
        set_optimizer_state_dict(self._model, optimizer, state)
        if self._average is not None:
            set_model_state_dict(self._average, parts["ema"])

    def whole(self, model: CRATE) -> CRATE | None:
        """`model` with all of its weights, on the CPU, in the first process; all must ask for it."""
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self._ranks.first:
            return None
        gathered = skeleton(constructor_arguments(model))
        gathered.load_state_dict(weights, assign=True)
        gathered.transform = model.transform
        return gathered


def shard(model: CRATE, compute: Compute, count: int) -> None:
    """Divides `model`, which is the same in all `count` processes, among them: a layer at a time, and the rest.

    Weights are given up after every use, those of the rest too: what would stay whole is not what the optimizer moves.
    """
    mesh = init_device_mesh(compute.device.type, (count,))
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
