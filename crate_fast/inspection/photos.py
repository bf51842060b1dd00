"""Photographs as the views take them: read whatever their kind, cut so that patches divide them, normalised."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from ..checkpoint.archives import read_archive
from ..checkpoint.read import check_all_plain
from ..data.pictures import SUFFIXES, check_pixels, find_pictures, read_picture, tell_left_out
from ..errors import InspectionError
from ..eval_transform import MAIN, imagenet_statistics
from ..files import parse_json, reason_of
from ..model.crate import CRATE
from ..model.mae import CRATEMAE

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}


class PhotoError(InspectionError):
    """A photograph cannot be used; the message names its file."""


class Normalisation:
    """(pixels − mean) / std by channel, of pixels of 0..1: the weights' own, else a run's config.json's, else ImageNet's."""

    def __init__(self, model: CRATE | CRATEMAE, source: str | Path) -> None:
        self._mode = _mode(model)
        stored = model.transform
        if stored is not None and stored.mean is not None and stored.std is not None:
            own = stored.mean, stored.std
        else:
            own = _of_run(Path(source))
        self.mean, self.std = own or imagenet_statistics(model.channels)
        self.origin = "its run's" if own else "ImageNet's"
        if not all(len(values) == model.channels for values in (self.mean, self.std)):
            raise InspectionError(
                f"{source}: its run's mean and std are of {len(self.mean)} channels, the model's are {model.channels}"
            )

    def __call__(self, image: Image) -> Tensor:
        """(1, channels, height, width) float32 of `image`."""
        pixels = to_array(image.convert(self._mode))
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels.permute(2, 0, 1)[None].float() / 255 - mean) / std


def _mode(model: CRATE | CRATEMAE) -> str:
    if model.channels not in MODES:
        raise InspectionError(f"the model takes {model.channels} channels; photographs have 3 (colour) or 1 (grey)")
    return MODES[model.channels]


def _of_run(source: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation in the config.json of the run of which `source` is the directory, or a file up to two folders down."""
    for folder in (source, source.parent, source.parent.parent):
        if not (folder / "config.json").is_file():
            continue
        try:
            data = parse_json((folder / "config.json").read_text(encoding="utf-8"))["data"]
            mean, std = (tuple(map(float, v if isinstance(v, list) else [v])) for v in (data["mean"], data["std"]))
        except (ValueError, KeyError, TypeError):
            continue  # it is no run's; what of a run's cannot be read just now is told, not passed over
        return mean, std
    return None


def to_array(image: Image) -> Tensor:
    """(height, width, channels) uint8 of an image in mode "L" or "RGB"."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(-1) if pixels.dim() == 2 else pixels


def read_photo(path: str | Path) -> Image:
    """`read_picture` of the photograph at `path`.

    Raises:
        PhotoError: the file is missing, damaged, or no image that Pillow reads.
    """
    try:
        return read_picture(path)
    except Exception as error:  # whatever a damaged file makes of the decoder
        raise PhotoError(f"{path}: cannot be read as an image ({reason_of(error)})") from error


def read_batch(path: Path) -> Tensor:
    """The images in a file of `torch.save`, (images, channels, height, width), by themselves or under "imgs" as the published
    crate_hook reads them; nothing in it is executed.

    Raises:
        InspectionError: it has no such images, or they are not finite.
        CheckpointError: the file is missing, damaged, or asks for code.
    """
    content = read_archive(path, "damaged, or no batch of images")
    batch = content.get("imgs") if isinstance(content, dict) else content
    check_all_plain(path, {"imgs": batch})
    if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
        words = f"{batch.dtype} of {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        raise InspectionError(f"{path}: it has {words}; it must have images, (images, channels, height, width), floating point")
    if not len(batch) or not batch.isfinite().all():
        raise InspectionError(f"{path}: it has {'no images' if not len(batch) else 'images that are not finite'}")
    return batch.float()


def find_photos(folder: str | Path, tell: TextIO | None = None) -> list[Path]:
    """The photographs in `folder` and the folders in it, sorted; `tell` (stdout if None) is told what was left out.

    Raises:
        InspectionError: it is no directory, or has none.
    """
    folder, left_out = Path(folder), Counter()
    if not folder.is_dir():
        raise InspectionError(f"{folder}: {'a file, no' if folder.exists() else 'no such'} directory of images")
    found = [Path(path) for path in find_pictures(folder, left_out)]
    tell_left_out(folder, left_out, tell or sys.stdout)
    if not found:
        raise InspectionError(f"{folder}: no images in it ({', '.join(SUFFIXES)})")
    return found


def photo_batches(
    paths: list[Path], model: CRATE | CRATEMAE, normalise: Normalisation, batch_size: int, crop: float | None = None
) -> Iterator[Tensor]:
    """The photographs as the model is evaluated on them: (batch, channels, height, width).

    `crop`, see `Transform`, is that stored with the weights where it is None, else main.py's.
    """
    crop = (model.transform or MAIN).crop if crop is None else crop
    device = model.cls_token.device
    for start in range(0, len(paths), batch_size):
        fitted = [normalise(_fitted(path, model.image_size, crop)) for path in paths[start : start + batch_size]]
        yield torch.cat(fitted).to(device)


def _fitted(path: Path, size: tuple[int, int], crop: float) -> Image:
    from ..data.augment import central_crop

    image = read_photo(path)
    try:
        return central_crop(image, size, crop)
    except ValueError as error:
        raise PhotoError(f"{path}: {error}") from error


def cut_to_patches(image: Image, patch_size: tuple[int, int], short_side: int | None = None) -> Image:
    """`image`, scaled to `short_side` if that is given, and its middle cut out so that patches divide it.

    Raises:
        InspectionError: it is smaller than a patch.
        ValueError: scaled, it would be larger than any image that is read.
    """
    from PIL import Image

    if short_side is not None:
        scale = short_side / min(image.size)
        sides = [max(1, round(side * scale)) for side in image.size]
        check_pixels(*sides)
        image = image.resize(sides, Image.Resampling.BICUBIC)
    height, width = (side // patch * patch for side, patch in zip(reversed(image.size), patch_size, strict=True))
    if not height or not width:
        raise InspectionError(
            f"the image is {image.height}×{image.width}, smaller than a patch of {patch_size[0]}×{patch_size[1]}"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
