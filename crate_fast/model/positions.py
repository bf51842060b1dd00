"""Position embeddings for images of another size than the model was made for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings of one grid of patches for another, bicubically; the class token's stays as it is.

    Args:
        embedding: (1, 1 + rows × columns, dim), floating point: the class token's, then the patches' row by row.
        grid: (rows, columns) of patches that `embedding` is for.
        new_grid: (rows, columns) wanted.

    Returns:
        (1, 1 + new rows × new columns, dim) of the same dtype; `embedding` itself where the grids are equal. With antialiasing
        where an axis shrinks, so that no embedding is passed over.

    Raises:
        ValueError: `embedding` is not of `grid`, or a grid is empty.
    """
    if embedding.dim() != 3 or len(embedding) != 1 or embedding.shape[1] != 1 + grid[0] * grid[1] or min(*grid, *new_grid) < 1:
        raise ValueError(
            f"position embeddings of shape {tuple(embedding.shape)} for {grid[0]}×{grid[1]} patches make none for "
            f"{new_grid[0]}×{new_grid[1]}; the shape must be (1, 1 + patches, dim)"
        )
    if tuple(grid) == tuple(new_grid):
        return embedding
    patches = embedding[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    exact = patches.to(torch.promote_types(patches.dtype, torch.float32))
    shrinks = new_grid[0] < grid[0] or new_grid[1] < grid[1]
    moved = F.interpolate(exact, size=tuple(new_grid), mode="bicubic", align_corners=False, antialias=shrinks)
    return torch.cat((embedding[:, :1], moved.flatten(2).transpose(1, 2).to(embedding.dtype)), dim=1)
