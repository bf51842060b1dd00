"""What a model takes photographs for: `load` gives it with all that belongs to it, `predict` asks it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .checkpoint.save_load import load_classifier
from .errors import ConfigError, InspectionError
from .eval_transform import LEAST_CROP, MAIN, allowed_crop
from .files import first_line
from .inspection.photos import Normalisation, PhotoError, read_photo
from .model.crate import CRATE
from .optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET = 1000  # classes


class Evaluated:
    """What is done to a photograph before the model sees it, as where it was evaluated.

    Args:
        model: whose images they shall be.
        source: where it is from.
        crop: the part of an image that is seen, 0: all, squeezed; None: as stored with the weights, else main.py's.
    """

    def __init__(self, model: CRATE, source: str | os.PathLike, crop: float | None = None) -> None:
        self.crop = (model.transform or MAIN).crop if crop is None else crop
        if not allowed_crop(self.crop):
            raise ConfigError(f"crop is {self.crop}; it must be 0, or from {LEAST_CROP} to 1")
        self.size, self.normalise = model.image_size, Normalisation(model, Path(source))

    def __call__(self, image: str | os.PathLike | Image) -> Tensor:
        """(channels, height, width) float32, on the CPU, of a file or an image of Pillow's.

        Raises:
            PhotoError: the file cannot be read as an image, or the image is too long for its height.
        """
        from .data.augment import central_crop

        is_file = isinstance(image, str | os.PathLike)
        picture = read_photo(Path(image)) if is_file else image
        try:
            return self.normalise(central_crop(picture, self.size, self.crop))[0]
        except ValueError as error:
            raise PhotoError(f"{image if is_file else 'the image'}: {first_line(error)}") from error


class Loaded(NamedTuple):
    """A model and what belongs to it.

    model: in evaluation mode.
    transform: from a photograph, a file's name or an image of Pillow's, to the (channels, height, width) that `model` takes.
    names: of the classes, in the order of the logits: "class 0" and so on where nothing tells them.
    """

    model: CRATE
    transform: Evaluated
    names: tuple[str, ...]


class Guess(NamedTuple):
    """A class by its number, from 0, and its name, and how probable it is, 0 to 1."""

    label: int
    name: str
    probability: float


def load(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    crop: float | None = None,
    **overrides,
) -> Loaded:
    """The model in `source`, as `load_checkpoint`, with the transform that its images need and the names of its classes.

    Where `source` has no names and 1000 classes, they are taken for ImageNet's, and a line on stderr says so.

    Args:
        source, device, weights, overrides: as of `load_checkpoint`.
        crop: as of `Evaluated`.

    Raises: as `load_checkpoint`; InspectionError where the model takes no photographs.
    """
    require("numpy", "PIL")
    model = load_classifier(source, device=device, weights=weights, **overrides)
    return Loaded(model, Evaluated(model, source, crop), _class_names(model, source))


def _class_names(model: CRATE, source: str | os.PathLike) -> tuple[str, ...]:
    """The class names: those stored with the weights, else ImageNet's for 1000 classes, else "class 0" and so on."""
    classes: int = model.mlp_head[1].out_features  # pyright: ignore[reportAssignmentType] (of nn.Linear)
    if model.transform is not None and model.transform.names is not None:
        return model.transform.names
    if classes == IMAGENET:
        try:
            from torchvision.models import ResNet18_Weights
        except Exception:  # it is not installed, or is not the one for this PyTorch
            words = "its classes have no names in it; those of ImageNet come with torchvision: pip install 'crate-fast[train]'"
        else:
            print(f"crate-fast: {source}: taken as ImageNet's, since it has 1000 classes and no names of them", file=sys.stderr)
            return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        print(f"crate-fast: {source}: {words}", file=sys.stderr)
    return tuple(f"class {label}" for label in range(classes))


def predict(
    loaded: Loaded, photos: Iterable[str | os.PathLike], *, top: int = 5, batch_size: int = 32
) -> Iterator[list[Guess] | PhotoError]:
    """Of each of `photos` the `top` most probable classes, the first first, or why it cannot be read.

    Raises:
        InspectionError: what the model makes of a photograph is not finite.
    """
    batch: list[tuple[str | os.PathLike, Tensor | PhotoError]] = []
    for photo in photos:
        try:
            batch.append((photo, loaded.transform(photo)))
        except PhotoError as error:
            batch.append((photo, error))
        if len(batch) == batch_size:
            yield from _predict(loaded, batch, top)
            batch = []
    yield from _predict(loaded, batch, top)


def _predict(
    loaded: Loaded, batch: list[tuple[str | os.PathLike, Tensor | PhotoError]], top: int
) -> Iterator[list[Guess] | PhotoError]:
    seen = [(photo, image) for photo, image in batch if isinstance(image, Tensor)]
    guesses = iter(_guess(loaded, seen, top) if seen else ())
    for _, image in batch:
        yield next(guesses) if isinstance(image, Tensor) else image


@torch.no_grad()
def _guess(loaded: Loaded, seen: list[tuple[str | os.PathLike, Tensor]], top: int) -> Iterator[list[Guess]]:
    """The most probable classes of each of the images that are `seen`, by their photographs' names."""
    place = loaded.model.pos_embedding
    images = torch.stack([image for _, image in seen]).to(place.device, place.dtype)
    logits = loaded.model(images).cpu().double()
    probabilities, labels = logits.softmax(-1).topk(min(top, logits.shape[-1]))
    for (photo, _), finite, some, of in zip(seen, logits.isfinite().all(-1), probabilities, labels, strict=True):
        if not finite:
            raise InspectionError(f"{photo}: what the model makes of it is not finite, so there is nothing to tell")
        yield [Guess(label, loaded.names[label], p) for label, p in zip(of.tolist(), some.tolist(), strict=True)]
