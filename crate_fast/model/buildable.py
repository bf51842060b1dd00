"""Which sizes a model may have, and what is said of others."""

from __future__ import annotations

from collections.abc import Sequence

from ..files import shown

MOST_LAYERS, MOST_WEIGHTS = 10_000, 10**10  # no machine trains more; the largest that is published has 24 and 78 million


def as_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the argument `name`; raises TypeError or ValueError where it is no positive whole number, nor two."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or not all(hasattr(side, "__index__") and not isinstance(side, bool) for side in sides):
        raise TypeError(f"{name} is {shown(value)}; it must be an integer, or two: height and width")
    height, width = map(int, sides)
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {shown(value)}; it must be positive")
    return height, width


def divide(image: int, patch: int) -> int:
    """Patches of a side of the image; raises ValueError where they do not divide it."""
    if image % patch:
        raise ValueError(f"image_size {shown(image)} is not divisible by patch_size {shown(patch)}")
    return image // patch


def check_buildable(
    dim: int, depth: int, inner: int, patch_dim: int, tokens: int, num_classes: int, sparse: int | None = None
) -> None:
    """Raises ValueError where a model of these sizes would keep the constructor busy, or ask for memory, without end.

    sparse: weights of a layer's step of sparsification; None: as of ISTA, dim².
    """
    if depth > MOST_LAYERS:
        raise ValueError(f"depth is {shown(depth)}; it must be at most {MOST_LAYERS:,}")
    sparse = dim * dim if sparse is None else sparse
    weights = dim * (depth * 2 * inner + patch_dim + tokens + num_classes) + depth * sparse + patch_dim
    if weights > MOST_WEIGHTS:
        count = f"{weights:,}" if weights < 10**30 else "more than 10^30"
        layers = f"{depth:,} layers of {shown(inner)} in all heads"
        words = f"{layers}, patches of {shown(patch_dim)} values, {shown(tokens)} tokens and {shown(num_classes)} classes"
        raise ValueError(f"a model of width {shown(dim)}, {words} has {count} weights; it must have at most {MOST_WEIGHTS:,}")


def times(size: Sequence[int]) -> str:
    """A size in words."""
    return f"{size[0]}×{size[1]}"
