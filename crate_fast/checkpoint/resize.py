"""A model with another head, or for another size of image, than its file has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..model.positions import resample_positions

HEAD = "mlp_head."


def grid_of(image: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of patches."""
    return image[0] // patch[0], image[1] // patch[1]


def resized_weights(model: CRATE, num_classes: int, grid: tuple[int, int]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights, what is new in them, in words) of `model` with a head for `num_classes` and positions for `grid` patches.

    As `finetune` does it: the whole head is drawn anew, its norm too, where the number of classes is another, and positions are
    resampled bicubically, see `resample_positions`.
    """
    weights, lines = model.state_dict(), []
    classes, dim = weights[f"{HEAD}1.weight"].shape
    if num_classes != classes:
        head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes)).to(weights[f"{HEAD}1.weight"].dtype)
        weights |= {HEAD + name: value for name, value in head.state_dict().items()}
        lines.append(f"a new head, random, for {num_classes} classes, where it has {classes}")
    there = grid_of(model.image_size, model.patch_size)
    if grid != there:
        lines.append(_resample(weights, ("pos_embedding",), there, grid))
    return weights, lines


def resized_mae_weights(model: CRATEMAE, grid: tuple[int, int]) -> tuple[dict[str, Tensor], str]:
    """As `resized_weights`, of a CRATE-MAE, whose positions are resampled, too: those that it was trained with."""
    weights = model.state_dict()
    return weights, _resample(weights, ("pos_embed", "decoder_pos_embed"), model.patch_embed.grid_size, grid)


@torch.no_grad()
def _resample(weights: dict[str, Tensor], names: Sequence[str], there: tuple[int, int], grid: tuple[int, int]) -> str:
    """Puts position embeddings for `grid` patches in the place of those for the patches `there`; says so in a line."""
    for name in names:
        weights[name] = resample_positions(weights[name], there, grid)
    return f"position embeddings resampled from {there[0]}×{there[1]} patches to {grid[0]}×{grid[1]}"
