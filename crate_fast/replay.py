"""Inference as a CUDA graph: one launch for a batch so small that the launches of its kernels would take the time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backend import BackendError, check_tensor
from .plainness import held

WARMUP = 3  # runs before recording, in which kernels are compiled and libraries set up


def graphed(model: nn.Module, images: Tensor) -> Graphed:
    """`model` for inference on batches like `images`, recorded as a CUDA graph now and replayed by every call.

    Recorded under the autocast that is on now, by `torch.cuda.make_graphed_callables`. What is made of the weights alone (M,
    the folded norms) is not made again by a replay, unlike under `torch.compile(model, mode="reduce-overhead")`; after weights
    have changed the next call records anew.

    Args:
        model: a `CRATE` in evaluation mode.
        images: (batch, channels, height, width) on a CUDA GPU; their values do not matter.

    Raises:
        TypeError: `images` is no tensor of floating point.
        ValueError: the model is in training mode.
        BackendError: the images are not on a CUDA GPU.
    """
    check_tensor("images", images)
    if images.device.type != "cuda":
        raise BackendError(f"graphed records CUDA graphs, and the images are on {images.device}; they must be on a CUDA GPU")
    return Graphed(model, images)


class Graphed:
    """What `graphed` returns. A call takes images and returns logits that are the caller's; images of another shape, dtype or
    device go through the model itself. Nothing is differentiated; hooks set and modules replaced later are not seen."""

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
            return self._model(images)

    def _record(self) -> None:
        if self._model.training:
            raise ValueError("graphed records inference, and the model is in training mode; call model.eval() first")
        off = torch.autocast(self._images.device.type, enabled=False)
        with torch.inference_mode(False), off, torch.cuda.device(self._images.device), held() as self._kept:
            self._replay = torch.cuda.make_graphed_callables(self._run, (self._images,), num_warmup_iters=WARMUP)
        owners = [module._parameters for module in self._model.modules()]
        self._weights = [(owner, name, p, p._version) for owner in owners for name, p in owner.items() if p is not None]

    def _is_current(self) -> bool:
        """Whether the weights, and what was made of them, are what they were when they were recorded."""
        same = all(owner.get(name) is p and p._version == version for owner, name, p, version in self._weights)
        return same and all(cache.has(entry) for cache, entry in self._kept.items())
