"""Principal components of patches, of several images taken together, as numbers and as colours (arXiv:2308.16271)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InspectionError

COLOURS = 3


def principal_components(
    features: Sequence[Tensor], count: int = COLOURS, masks: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The first principal components of several images' patches, taken together.

    A component's sign is chosen so that its largest weight is positive.

    Args:
        features: of each image (rows, columns, width), finite.
        count: how many; those beyond the width are 0.
        masks: of each image (rows, columns), booleans: the patches that count; None: all.

    Returns:
        Of each image (rows, columns, count), float64 on the CPU; NaN where a mask is off.

    Raises:
        InspectionError: there are no images, one has another shape or no patches, they differ in width, values are not finite,
            the masks do not fit or leave nothing, or `count` is below 1.
    """
    _check(features, count, masks)
    flat = torch.cat([each.detach().flatten(0, 1).cpu().double() for each in features])
    kept = torch.ones(len(flat), dtype=torch.bool) if masks is None else torch.cat([mask.flatten().cpu() for mask in masks])
    if not flat[kept].isfinite().all():
        raise InspectionError("the projections are not finite, so they have no principal components")
    if not kept.any():
        raise InspectionError("the masks leave no patch, so there are no principal components")
    flat = flat - flat[kept].mean(dim=0)
    axes = torch.linalg.eigh(flat[kept].mT @ flat[kept]).eigenvectors.flip(1)[:, :count]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    components = torch.nn.functional.pad(flat @ axes, (0, count - axes.shape[1]))
    components[~kept] = torch.nan
    parts = components.split([each.shape[0] * each.shape[1] for each in features])
    return [part.view(*each.shape[:2], count) for part, each in zip(parts, features, strict=True)]


def principal_colours(features: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The first three principal components as red, green and blue: equal colours in different images mean equal directions.

    Every component is stretched to 0..1 over all images; one without variance is grey, and where a mask is off it is black.

    Args, Raises: as `principal_components`.

    Returns:
        Of each image (rows, columns, 3), float64 on the CPU, 0 to 1.
    """
    components = principal_components(features, COLOURS, masks)
    flat = torch.cat([each.flatten(0, 1) for each in components])
    seen = flat[flat.isfinite().all(dim=1)]
    low, high, largest = seen.amin(dim=0), seen.amax(dim=0), max(float(each.abs().max()) for each in features)
    still = high - low <= 1e-9 * largest
    return [torch.where(still, 0.5, (each - low) / torch.where(still, 1, high - low)).nan_to_num(0.0) for each in components]


def foreground_masks(features: Sequence[Tensor], threshold: float = 0.5, below: bool = False) -> list[Tensor]:
    """The patches of each image whose first principal component is above (or `below`) a part of that image's range, holes
    filled, as the published plot_pca_mask takes them.

    A component has no sign of its own: which side is the foreground is for who looks at it to say.

    Args, Raises: as `principal_components`.

    Returns:
        Of each image (rows, columns), booleans on the CPU.
    """
    masks = []
    for (component,) in (each.unbind(-1) for each in principal_components(features, 1)):
        low, high = component.min(), component.max()
        share = (component - low) / (high - low)
        masks.append(_filled(share < threshold if below else share > threshold))
    return masks


def _filled(mask: Tensor) -> Tensor:
    """`mask` (rows, columns) with what it is not, and what no way over edges joins to the rim."""
    free = torch.nn.functional.pad(~mask, (1, 1, 1, 1), value=True)
    reached, count = torch.zeros_like(free), -1
    reached[0] = True
    while count != (count := int(reached.sum())):
        grown = reached.clone()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & free
    return ~reached[1:-1, 1:-1]


def _check(features: Sequence[Tensor], count: int, masks: Sequence[Tensor] | None) -> None:
    if not len(features):
        raise InspectionError("there are no images to colour")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InspectionError(f"count is {count!r}; it must be a whole number, at least 1")
    for shape in [tuple(each.shape) for each in features]:
        if len(shape) != 3 or 0 in shape or shape[2] != features[0].shape[2]:
            raise InspectionError(f"a projection has shape {shape}; all must be (rows, columns, one width), not empty")
    for mask, each in zip(masks, features, strict=False) if masks is not None else ():
        if mask.dtype != torch.bool or mask.shape != each.shape[:2]:
            raise InspectionError(
                f"a mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be booleans {tuple(each.shape[:2])}"
            )
    if masks is not None and len(masks) != len(features):
        raise InspectionError(f"there are {len(masks)} masks of {len(features)} images")
