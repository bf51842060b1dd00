"""A model with another head, or for another size of image, than its file has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.crate import CRATE
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
        with torch.no_grad():
            weights["pos_embedding"] = resample_positions(weights["pos_embedding"], there, grid)
        lines.append(f"position embeddings resampled from {there[0]}×{there[1]} patches to {grid[0]}×{grid[1]}")
    return weights, lines
