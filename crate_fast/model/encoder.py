"""What a model of the family makes of images before any head, decoder or mask: all that a view of its layers asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import autocasts
from ..modules.layer import Layer
from .buildable import times
from .positions import resample_positions


class Encoder(NamedTuple):
    """The embedding of patches, which are all seen, and the layers behind it.

    Attributes:
        name: what it is, in words.
        layers: in order.
        heads: of a layer.
        channels, image_size, patch_size: of the images that the model is made for; sizes are (height, width).
        embed: (batch, channels, height, width), which patches divide, to (batch, patches, dim), without their positions.
        cls_token: (1, 1, dim).
        positions: (1, 1 + patches, dim), those of an image of `image_size`.
    """

    name: str
    layers: list[Layer]
    heads: int
    channels: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    embed: Callable[[Tensor], Tensor]
    cls_token: Tensor
    positions: Tensor

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.positions.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches that images are cut into; raises TypeError or ValueError where they are not."""
        if not isinstance(images, Tensor):
            raise TypeError(f"the images are a {type(images).__name__}; they must be a tensor")
        if not images.is_floating_point():
            raise TypeError(f"the images are {images.dtype}; they must be real floating point")
        if images.dim() != 4 or images.shape[1] != self.channels:
            words = f"it must be (batch, {self.channels}, height, width)"
            raise ValueError(f"the images have shape {tuple(images.shape)}; {words}")
        size = tuple(images.shape[2:])
        if any(side == 0 or side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"the images are {times(size)}, which patches of {times(self.patch_size)} do not divide")
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def tokens(self, images: Tensor) -> Tensor:
        """What enters the first layer, (batch, 1 + patches, dim), the class token first; positions of another grid than the
        model's are resampled bicubically. Raises as `grid_of`, and where device or dtype are not the model's."""
        height, width = self.patch_size
        own, grid = (self.image_size[0] // height, self.image_size[1] // width), self.grid_of(images)
        model = self.cls_token
        if images.device != model.device:
            raise ValueError(
                f"the images are on {images.device} and the model on {model.device}; they must be on the same device"
            )
        if images.dtype != model.dtype and not autocasts(images.device.type):
            raise TypeError(
                f"the images are {images.dtype} and the model {model.dtype}; outside autocast they must be the same"
            )
        patches = self.embed(images)
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return x + resample_positions(self.positions, own, grid)
