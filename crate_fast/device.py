"""Where and how exactly a run computes: device and precision, each decided once and recorded by name."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu_kernels
from .backend import BackendError, choose_backend
from .processes import Ranks
from .settings import ConfigError


class Compute(NamedTuple):
    """A device and the name of a dtype: "float32" (no autocast), "bfloat16" or "float16" (autocast to it)."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """The context to compute in."""
        if self.precision == "float32":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def describe(self) -> str:
        """The device in words: a GPU's model, or the number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} CPU threads" if self.device.type == "cpu" else self.device.type


def choose_compute(device: str, precision: str, ranks: Ranks | None = None) -> Compute:
    """The device called `device` ("auto": a GPU where there is one) and the precision meant by `precision` on it.

    Of several processes each takes the GPU of its own number.

    "auto" is bfloat16 on a CUDA GPU that has it and float32 everywhere else.

    Raises:
        ConfigError: there is no such device.
        BackendError: the environment asks for kernels for CPUs, on one, and they cannot be built.
    """
    place = _find_device(device)
    if place.type == "cpu":
        cpu_kernels.digest()  # refused now, before a command makes anything
    if place.type == "cuda" and ranks is not None and ranks.count > 1:
        if place.index is not None or ranks.local_count > torch.cuda.device_count():
            raise ConfigError(
                f"--device is {device!r} with {ranks.local_count} processes on this machine, which takes as many GPUs; it has "
                f"{torch.cuda.device_count()}, and each process takes one by itself (--device auto)"
            )
        place = torch.device("cuda", ranks.local_rank)
    if precision == "auto":
        precision = "bfloat16" if place.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return Compute(place, precision)


def check_kernels(backend: str, device: str, compute: Compute, head_width: int | None = None) -> None:
    """Raises BackendError, in the words of the flags, where --backend is "triton" and its kernels do not run on `compute`."""
    if backend != "triton":
        return
    try:
        choose_backend(backend, torch.empty(0, device=compute.device), head_width)
    except BackendError as error:
        if compute.device.type == "cuda" or "head width" in str(error):
            raise BackendError(f"--backend is 'triton': {error}") from error
        raise BackendError(
            f"--backend is 'triton', whose kernels need a CUDA GPU; --device is {device!r}, here {compute.device.type}"
        ) from error


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device is {name!r}; allowed are auto, cpu, cuda, cuda:N and mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device is {name!r}; PyTorch finds {torch.cuda.device_count() or 'no'} CUDA GPUs here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device is {name!r}; PyTorch finds no Metal GPU here")
    return device
