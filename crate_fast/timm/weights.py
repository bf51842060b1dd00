"""Weights for a `TimmCRATE`: of other classes, another size of image or number of channels than the model's."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layouts import FIRST, find_weights
from ..checkpoint.published import without_unused
from ..checkpoint.resize import grid_of
from ..checkpoint.start_from import read_weights, start_from
from ..checkpoint.timm_config import in_timms_words
from ..errors import CheckpointError
from ..eval_transform import Transform
from ..model.crate import CRATE
from ..model.positions import resample_positions

CONVOLUTION = "conv1.weight"  # of CRATE-α's patches
CLASSIFIER = ("mlp_head.1.weight", "mlp_head.1.bias")
_logger = logging.getLogger(__name__)


def load(model: CRATE, path: str | os.PathLike) -> None:
    """Gives `model` the weights in `path`, a file, a run or a model of the Hub, and what is known of how they are evaluated.

    The classifier is left as it is where the model has another number of classes. Positions of another size of image are
    resampled, bicubically; weights for another number of channels are made for the model's, see `with_channels`.

    Raises:
        CheckpointError: there are no weights of a CRATE, or of one that computes something else.
    """
    source = read_weights(os.fspath(path))
    weights = with_channels(source.weights, model.channels, math.prod(model.patch_size))
    arguments = source.arguments and {name: value for name, value in source.arguments.items() if name != "channels"}
    classes = weights[CLASSIFIER[0]].shape[0] if CLASSIFIER[0] in weights else 0
    new = () if classes == model.num_classes else CLASSIFIER
    line = start_from(model, source._replace(weights=weights, arguments=arguments), path, new, in_timms_words)
    _logger.info(line)
    if source.transform is not None:
        _take_transform(model, source.transform, names_fit=not new)


def _take_transform(model: CRATE, transform: Transform, names_fit: bool) -> None:
    """Has `model` and timm, which evaluates by `pretrained_cfg`, know the `transform` that the weights are evaluated with."""
    transform = transform if names_fit else transform._replace(names=None)
    if transform.mean is not None and len(transform.mean) not in (1, model.channels):
        transform = transform._replace(mean=None, std=None)
    model.transform = transform
    told: dict[str, Any] = {"crop_pct": transform.crop or 1.0, "crop_mode": "center" if transform.crop else "squash"}
    told |= {name: getattr(transform, name) for name in ("mean", "std") if getattr(transform, name) is not None}
    told |= {"label_names": transform.names, "num_classes": len(transform.names)} if transform.names else {}
    getattr(model, "pretrained_cfg", {}).update(told)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: CRATE) -> dict[str, Tensor]:
    """Weights that timm has brought, as `model` takes them: by the published names, for its channels and its size of image.

    Raises:
        CheckpointError: there are no weights of a CRATE.
    """
    weights = without_unused(find_weights(state_dict).weights)[0]
    if FIRST not in weights:
        raise CheckpointError("no weights of a CRATE")
    weights = with_channels(weights, model.channels, math.prod(model.patch_size))
    embedding, grid = weights[FIRST], grid_of(model.image_size, model.patch_size)
    side = math.isqrt(embedding.shape[1] - 1)
    there = grid if embedding.shape[1] == 1 + grid[0] * grid[1] else (side, side)
    return weights | {FIRST: resample_positions(embedding, there, grid)}


def with_channels(weights: dict[str, Tensor], channels: int, area: int) -> dict[str, Tensor]:
    """The weights of a model for images of so many `channels`, in patches of `area` pixels; themselves if they are.

    As timm does it, for one channel those of all are summed, which gives the same numbers for a grey image as the weights there
    give for it in colour; else they are repeated, and scaled to the same sum. The norm before the projection is made part of
    it, since it has a weight for each channel.
    """
    if CONVOLUTION in weights:
        kernel = weights[CONVOLUTION]
        if kernel.dim() != 4 or kernel.shape[1] in (0, channels):
            return weights
        made = _spread(kernel.to(torch.promote_types(kernel.dtype, torch.float32)).movedim(1, -1), channels).movedim(-1, 1)
        return weights | {CONVOLUTION: made.to(kernel.dtype).contiguous()}
    names = [f"to_patch_embedding.{name}" for name in ("1.weight", "1.bias", "2.weight", "2.bias")]
    if any(name not in weights for name in names):
        return weights
    gain, offset, project, bias = (weights[name] for name in names)
    values = len(gain) if gain.dim() == 1 else 0
    if values == channels * area or values == 0 or values % area or project.shape != (len(bias), values):
        return weights
    exact = torch.promote_types(project.dtype, torch.float32)
    by_channel = (project.to(exact) * gain.to(exact)).unflatten(1, (area, -1))
    made = _spread(by_channel, channels)
    bias = bias.to(exact) + project.to(exact) @ offset.to(exact)
    new = torch.ones(channels * area), torch.zeros(channels * area), made.flatten(1), bias
    return weights | {name: value.to(project.dtype) for name, value in zip(names, new, strict=True)}


def _spread(weights: Tensor, channels: int) -> Tensor:
    """(..., channels there) to (..., channels): the sum for one channel, else repeated, scaled to the same sum."""
    if channels == 1:
        return weights.sum(-1, keepdim=True)
    there = weights.shape[-1]
    return weights[..., torch.arange(channels) % there] * (there / channels)
