"""Inference as a CUDA graph: one launch for a batch so small that the launches of its kernels would take the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import BackendError, check_tensor

WARMUP = 3  # runs before recording, in which kernels are compiled and libraries set up


def record(call: Any, images: Tensor) -> Any:
    """`call`, a module or a function of images like these, as CUDA graphs: replayed forward, and backward where it has one."""
    with torch.cuda.device(images.device):  # whose streams are recorded from
        return torch.cuda.make_graphed_callables(call, (images,), num_warmup_iters=WARMUP)


def graphed(model: nn.Module, images: Tensor) -> Graphed:
    """`model` for inference on batches like `images`, recorded as a CUDA graph now and replayed by every call.

    Recorded under the autocast that is on now, by `torch.cuda.make_graphed_callables`. A replay reads the weights as they are,
    whoever wrote them, and makes of them what the kernels need (M, the folded norms); that is made once of
    `crate_fast.freeze(model)`. After weights, modules or numbers such as a step size were replaced, the next call records anew.

    Args:
        model: a `CRATE` in evaluation mode, or what `crate_fast.freeze` makes of one.
        images: (batch, channels, height, width) on a CUDA GPU; their values do not matter.

    Raises:
        TypeError: `images` is no tensor of floating point, or the model makes something else than one of them, as a `CRATEMAE`.
        ValueError: the model is in training mode.
        BackendError: the images are not on a CUDA GPU.
    """
    check_tensor("images", images)
    if images.device.type != "cuda":
        raise BackendError(f"graphed records CUDA graphs, and the images are on {images.device}; they must be on a CUDA GPU")
    return Graphed(model, images)


class Graphed:
    """What `graphed` returns. A call takes images and returns logits that are the caller's; images of another shape, dtype or
    device go through the model itself. Nothing is differentiated; hooks set later are not seen."""

    _replay: Callable[..., Any]
    _autocast: dict[str, Any]

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            self._model, self._images = model, images.detach().clone()
        device = images.device.type
        enabled = torch.is_autocast_enabled(device)
        self._autocast = dict(device_type=device, dtype=torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False)
        self._record()

    def __call__(self, images: Tensor) -> Tensor:
        like = self._images
        if images.shape != like.shape or images.dtype != like.dtype or images.device != like.device:
            return self._run(images)
        if not self._is_current():
            self._record()
        with torch.no_grad():
            return self._replay(images).clone()

    def _run(self, images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(**self._autocast):
            result = self._model(images)
        if not isinstance(result, Tensor):
            name = type(self._model).__name__
            raise TypeError(
                f"graphed takes a model that makes one tensor of images; this {name} makes a {type(result).__name__}"
            )
        return result

    def _record(self) -> None:
        if self._model.training:
            raise ValueError("graphed records inference, and the model is in training mode; call model.eval() first")
        with torch.inference_mode(False), torch.autocast(self._images.device.type, enabled=False):
            self._replay = record(self._run, self._images)
        self._facts = [fact for module in self._model.modules() for fact in _facts(module)]
        self._places = [(p, _place(p)) for p in (*self._model.parameters(), *self._model.buffers())]

    def _is_current(self) -> bool:
        """Whether everything is where it was when it was recorded. What the weights hold does not matter: a replay reads it."""
        same = all(len(owner) == size and owner.get(name) is value for owner, size, name, value in self._facts)
        return same and all(_place(p) == place for p, place in self._places)


def _place(tensor: Tensor) -> tuple:
    """Where the values of a tensor lie and how they are read, which `tensor.data = other` changes: a transpose lies there."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _facts(module: nn.Module) -> list[tuple]:
    """(dictionary, its size, name, value) of the parameters, buffers and modules of `module`, and of its settings, which have
    names without an underscore and `training` among them."""
    owners = module._parameters, module._buffers, module._modules
    facts = [(owner, len(owner), name, value) for owner in owners for name, value in owner.items()]
    own = vars(module)
    return facts + [(own, len(own), name, value) for name, value in own.items() if not name.startswith("_")]
