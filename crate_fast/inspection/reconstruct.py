"""What a CRATE-MAE makes of images of which most is masked, drawn as its papers draw it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import drawable, write_atomically
from ..model.mae import CRATEMAE, patch_statistics
from ..optional import require

GREY = 0.5  # of what is masked
PANELS = ("masked", "reconstruction", "original")


class Reconstruction(NamedTuple):
    """Of each image what is left of it, with what is masked in grey, the whole as the model makes it, visible patches as they
    are, and the image itself: each (batch, height, width, channels), in 0..1."""

    masked: Tensor
    made: Tensor
    original: Tensor


@torch.no_grad()
def reconstruct(model: CRATEMAE, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> Reconstruction:
    """What `model` makes of `images` (batch, channels, height, width), normalised as it takes them.

    A model that predicts patches normalised by their own mean and deviation is told both of them, of masked patches too: how
    bright a patch is and how much it varies is then the image's, not its own.

    Args:
        mask_ratio, noise: as of `CRATEMAE.forward`.

    Raises: as `CRATEMAE.forward`.
    """
    _, pred, mask = model(images, mask_ratio, noise)
    patches = model.patchify(images.float())
    pred = pred.float()
    if model.norm_pix_loss:
        mean, deviation = patch_statistics(patches)
        pred = pred * deviation + mean
    hidden = mask[..., None] > 0
    made = _pixels(model, model.unpatchify(torch.where(hidden, pred, patches)))
    hole = model.unpatchify(hidden.expand_as(patches).to(patches.dtype)).permute(0, 2, 3, 1).cpu()
    original = _pixels(model, images.float())
    return Reconstruction(torch.where(hole > 0, GREY, original), made, original)


def _pixels(model: CRATEMAE, images: Tensor) -> Tensor:
    """From what a model takes to (batch, height, width, channels) in 0..1: by how its images are normalised, else by the range
    of these."""
    transform = model.transform
    if transform is not None and transform.mean is not None and transform.std is not None:
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (transform.mean, transform.std))
        images = images * std + mean
    else:
        least, most = images.amin(), images.amax()
        images = (images - least) / (most - least).clamp(min=1e-12)
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu()


def draw_reconstructions(
    model: CRATEMAE, images: Tensor, noise: Tensor | None, mask_ratio: float, path: Path, title: str
) -> None:
    """Draws `reconstruct` as one PNG at `path`, a column for each image, `title` above all."""
    require("matplotlib")
    from matplotlib.figure import Figure

    rows = reconstruct(model, images, mask_ratio, None if noise is None else noise.to(images.device))
    count = len(images)
    figure = Figure(figsize=(0.6 + 1.3 * count, 4.6), dpi=150, layout="constrained")
    places = figure.subplots(len(PANELS), count, squeeze=False)
    for line, name, pictures in zip(places, PANELS, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.suptitle(drawable(title))
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
