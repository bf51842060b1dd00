"""How processes share a model: all of it in each (DDP), or a part of it (FSDP2)."""

from __future__ import annotations

from ...device import Compute
from ...settings import ConfigError, MachineSettings
from .ddp import Replicated


def parallel_kind(settings: MachineSettings) -> type:
    """How processes share the work: `Replicated`, or `fsdp.Sharded`, imported where it is asked for."""
    if settings.strategy == "ddp":
        return Replicated
    from .fsdp import Sharded

    return Sharded


def check_strategy(settings: MachineSettings, compute: Compute) -> None:
    """Raises ConfigError where --strategy is "fsdp" and `compute` is on no device that FSDP2 knows."""
    if settings.strategy == "fsdp" and compute.device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"--strategy is 'fsdp', for CPUs and CUDA GPUs; --device is {settings.device!r}, here {compute.device}"
        )
