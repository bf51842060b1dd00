"""From photographs to what a CRATE takes, as a processor of transformers: to the bit what `crate_fast.load` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs

from ..checkpoint.hub_config import BILINEAR, preprocessor_config
from ..data.augment import central_crop
from ..eval_transform import LEAST_CROP, MAIN, MEAN, STD, allowed_crop
from ..inspection.photos import MODES, read_photo, to_array
from .configuration import FamilyConfig

BYTES = 1 / 255  # the usual `rescale_factor`, by which CRATE's own transform divides
LEFT_OUT = ("do_center_crop", "do_pad")  # what other processors do and this one does not


class CrateImagesKwargs(ImagesKwargs, total=False):
    """The settings of transformers' processors, and CRATE's own."""

    crop_pct: float | int | None


class CrateImageProcessor(BaseImageProcessor):
    """Cuts out the middle of a photograph, scales it bilinearly, antialiased, and normalises its channels.

    Called with images (Pillow's, arrays or tensors of one or three channels, names of files, addresses; one or a list) it gives
    `pixel_values`, of each (channels, height, width) float32; with `return_tensors="pt"` (batch, channels, height, width).

    Args:
        size: {"height", "width"} of what the model takes, in pixels, or one side of a square.
        crop_pct: part of the image's largest rectangle of that shape that is seen, its middle, 0.05 to 1; 0: all, squeezed.
        image_mean, image_std: by channel, of pixels of 0..1; of one channel for grey.
        do_resize, do_rescale, rescale_factor, do_normalize: as in transformers' processors.

    Raises:
        ValueError: a setting is none of these, or an image is too long for its height.
        PhotoError: a file cannot be read as an image.
    """

    valid_kwargs = CrateImagesKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own, as the next)
    do_resize = True
    size = {"height": 224, "width": 224}  # noqa: RUF012
    crop_pct = MAIN.crop
    resample = BILINEAR
    do_rescale = True
    rescale_factor = BYTES
    do_normalize = True
    image_mean = MEAN
    image_std = STD

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @classmethod
    def from_config(cls, config: FamilyConfig) -> CrateImageProcessor:
        """The processor for a model's images, as they were evaluated by `config.evaluation`, else as in main.py.

        Raises:
            ValueError: no photograph has as many channels.
        """
        side = config.image_size
        settings = preprocessor_config([side, side] if isinstance(side, int) else side, config.channels, config.transform())
        if settings is None:
            raise ValueError(f"channels is {config.channels}; photographs have 1 or 3, and mean and std as many values")
        return cls(**settings)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Files by `crate_fast`'s own reader, addresses by transformers'."""
        if isinstance(image_url_or_urls, str | Path) and Path(image_url_or_urls).is_file():
            return read_photo(image_url_or_urls)
        return super().fetch_images(cast("Any", image_url_or_urls))

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As transformers', with its own setting in the place of each that is None, and one number for every channel."""
        own = {name: getattr(self, name, None) if value is None else value for name, value in kwargs.items()}
        for name in ("image_mean", "image_std"):
            if isinstance(own.get(name), int | float):
                own[name] = (own[name],) * len(self.image_mean)
        return super()._standardize_kwargs(**own)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (all by name)
        asked = next((name for name in LEFT_OUT if kwargs.get(name)), None)
        if asked is not None:
            raise ValueError(f"{asked} is True; a CRATE's images are cut by crop_pct and size alone")
        if kwargs["resample"] not in (None, BILINEAR):
            raise ValueError(f"resample is {kwargs['resample']!r}; a CRATE's images are scaled bilinearly, {BILINEAR}")
        if not allowed_crop(kwargs["crop_pct"]):
            raise ValueError(f"crop_pct is {kwargs['crop_pct']!r}; it must be 0, or from {LEAST_CROP} to 1")
        if kwargs["do_resize"] and not (kwargs["size"].height and kwargs["size"].width):
            raise ValueError(f"size is {dict(kwargs['size'])}; it must have height and width")
        if len(kwargs["image_mean"]) not in MODES or len(kwargs["image_mean"]) != len(kwargs["image_std"]):
            raise ValueError(f"image_mean is {kwargs['image_mean']!r}; it and image_std must have 1 or 3 values")

    def _preprocess_image_like_inputs(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        pixels = [self._processed(image, kwargs) for image in cast("list", self._prepare_images_structure(images))]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=kwargs.get("return_tensors"))

    def _processed(self, image: Any, kwargs: dict[str, Any]) -> Tensor:
        """(channels, height, width) float32 of one image."""
        channels = len(kwargs["image_mean"])
        planes = _as_pictures(image, kwargs.get("input_data_format"))
        if kwargs["do_resize"]:
            size = (kwargs["size"].height, kwargs["size"].width)
            planes = [central_crop(plane, size, kwargs["crop_pct"]) for plane in planes]
        if planes[0].mode != "F":
            planes = [plane.convert(MODES[channels]) for plane in planes]
        pixels = torch.cat([to_array(plane) for plane in planes], dim=-1).permute(2, 0, 1).float()
        if len(pixels) != channels:
            raise ValueError(f"an image has {len(pixels)} channels; it must have {channels}, as image_mean")
        if kwargs["do_rescale"]:
            factor = kwargs["rescale_factor"]
            pixels = pixels / 255 if factor == BYTES else pixels * factor
        if kwargs["do_normalize"]:
            mean, std = (torch.tensor(kwargs[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        return pixels.contiguous()


def _as_pictures(image: Any, layout: str | ChannelDimension | None) -> list[Image.Image]:
    """An image as Pillow's: one of bytes, or of floating point one for each channel, whose values stay as they are."""
    if isinstance(image, Image.Image):
        return [image]
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    elif (layout or infer_channel_dimension_format(array, num_channels=(1, 3, 4))) == ChannelDimension.FIRST:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.uint8:
        return [Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))]
    return [Image.fromarray(np.ascontiguousarray(array[..., channel], dtype=np.float32)) for channel in range(array.shape[-1])]
