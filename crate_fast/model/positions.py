"""Position embeddings for images of another size than the model was made for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optional import require


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


def sine_positions(dim: int, side: int) -> Tensor:
    """Position embeddings of sines and cosines of rows and columns, (1, 1 + side × side, dim) float32, the class token's 0.

    The first half of `dim` tells the column, the second the row. Made by NumPy in float32, as where they were published: to the
    bit the same.

    Raises:
        MissingPackageError: NumPy is not installed.
    """
    require("numpy")
    import numpy as np

    omega = np.arange(dim // 4, dtype=np.float32)
    omega /= dim / 4.0
    omega = 1.0 / 10000**omega
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [np.einsum("m,d->md", axis.astype(np.float32), omega) for axis in (columns, rows)]
    positions = np.zeros((1, 1 + side * side, dim), dtype=np.float32)
    positions[0, 1:] = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(positions)
