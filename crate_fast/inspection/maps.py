"""Where the class token looks, and what the subspaces see: maps over the patches of an image (arXiv:2308.16271)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import check_tensor
from ..errors import InspectionError
from ..functional import check_number
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from .views import encoder_of, layer_views

FACETS = ("projection", "tokens")


class PhotoViews(NamedTuple):
    """What a model makes of one image: (heads, rows, columns) maps, and (rows, columns, width) features of its patches."""

    maps: Tensor
    features: Tensor


def attention_row(projection: Tensor, heads: int, scale: float | None = None, token: int = 0) -> Tensor:
    """One row of each head's attention, softmax(w_token · w_j · scale) over j, without the matrix of all rows.

    Args:
        projection: w, (batch, tokens, heads × head width), floating point.
        heads: number of heads.
        scale: factor on the scores; 1/sqrt(head width) when None.
        token: whose row; 0 is the class token.

    Returns:
        (batch, heads, tokens), in float32 or w's dtype if that is wider; every row sums to 1.

    Raises:
        InspectionError: the shape is another, heads do not divide the width, or there is no such token.
        TypeError: the projection is no tensor of floating point, or heads or token are no integers.
    """
    check_tensor("projection", projection)
    if projection.dim() != 3:
        raise InspectionError(f"projection has shape {tuple(projection.shape)}; it must be (batch, tokens, heads × head width)")
    for name, value in (("heads", heads), ("token", token)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
    _, tokens, width = projection.shape
    if heads < 1 or width % heads or width == 0:
        raise InspectionError(f"the projection has width {width}, which {heads} heads do not divide")
    if not -tokens <= token < tokens:
        raise InspectionError(f"there is no token {token}; the projection has {tokens}, from 0")
    w = projection.to(torch.promote_types(projection.dtype, torch.float32)).unflatten(-1, (heads, -1))
    factor = w.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    return torch.softmax(torch.einsum("bhp,bnhp->bhn", w[:, token], w) * factor, dim=-1)


@torch.no_grad()
def attention_maps(model: CRATE | CRATEMAE, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """How much the class token attends to each patch, by layer and head.

    Args:
        model: on any device, in any mode, which it keeps; of a CRATEMAE its encoder, no patch masked.
        images: (batch, channels, height, width), normalised; any size that patches divide.
        layers: which layers, from 0, or from the end below 0, in the order wanted; all when None.

    Returns:
        (layers, batch, heads, rows, columns), as `attention_row`; what is missing to a sum of 1 the class token gives itself.

    Raises:
        InspectionError: the model has no such layer.
        TypeError, ValueError: as `layer_views`.
    """
    encoder = encoder_of(model)
    wanted = [check_layer(encoder.depth, layer) for layer in (range(encoder.depth) if layers is None else layers)]
    if not wanted:
        raise InspectionError("no layers to show: the model has none, or none was asked for")
    grid, found = encoder.grid_of(images), {}
    for index, view in enumerate(layer_views(model, images)):
        if index in wanted:
            found[index] = attention_row(view.projection, view.heads, view.scale)[..., 1:].unflatten(-1, grid)
        if len(found) == len(set(wanted)):
            break
    return torch.stack([found[index] for index in wanted])


@torch.no_grad()
def look(model: CRATE | CRATEMAE, image: Tensor, layer: int, of_features: int = -1, facet: str = "projection") -> PhotoViews:
    """Attention of the class token in a layer, and the features of patches in one, in one run through the model.

    Args:
        model: on any device.
        image: (1, channels, height, width), normalised; patches divide it.
        layer: whose attention, from 0.
        of_features: whose features, from 0, or from the end below 0.
        facet: "projection", query, key and value in one; "tokens", what the layer ends with.

    Raises: as `attention_maps`; InspectionError where there is no such facet.
    """
    if facet not in FACETS:
        raise InspectionError(f"facet is {facet!r}; allowed are {', '.join(FACETS)}")
    encoder = encoder_of(model)
    image = image.to(encoder.device)
    grid, wanted = encoder.grid_of(image), check_layer(encoder.depth, of_features)
    maps = features = torch.empty(0)
    for index, view in enumerate(layer_views(model, image)):
        if index == wanted:
            features = getattr(view, facet)[0, 1:].unflatten(0, grid).cpu()
        if index == layer:
            maps = attention_row(view.projection, view.heads, view.scale)[0, :, 1:].unflatten(-1, grid).cpu()
    return PhotoViews(maps, features)


def check_layer(depth: int, layer: int) -> int:
    """`layer` counted from 0; raises InspectionError where a model of `depth` layers has no such one."""
    if not -depth <= layer < depth:
        raise InspectionError(f"layer is {layer}; the model has {depth}, 0 to {depth - 1}")
    return layer % depth


def keep_mass(maps: Tensor, mass: float = 0.6) -> Tensor:
    """Masks of the fewest patches, the heaviest first, that hold at least the share `mass` of each map.

    Args:
        maps: (..., rows, columns), at least 0.
        mass: above 0, at most 1.

    Returns:
        Booleans of the shape of `maps`.

    Raises:
        InspectionError: `mass` is out of its bounds, or the maps are of another shape, negative or not finite.
    """
    if not 0 < mass <= 1:
        raise InspectionError(f"mass is {mass}; it must be above 0 and at most 1")
    if maps.dim() < 2 or not (maps.isfinite() & (maps >= 0)).all():
        raise InspectionError(
            f"maps are {tuple(maps.shape)}; they must be (..., rows, columns), each value finite and at least 0"
        )
    flat = maps.flatten(-2).double().cpu()
    weights, order = flat.sort(dim=-1, descending=True, stable=True)
    sums = weights.cumsum(-1)
    before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
    kept = (before < mass * sums[..., -1:]) & (weights > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape).to(maps.device)


@torch.no_grad()
def patch_projections(model: CRATE | CRATEMAE, images: Tensor, layer: int = -1) -> Tensor:
    """The tied projections w of the patches in one layer: query, key and value in one.

    Args:
        model, images: as in `attention_maps`.
        layer: which layer, from 0, or from the end below 0.

    Returns:
        (batch, rows, columns, heads × head width), in the dtype computed in.

    Raises: as `attention_maps`.
    """
    encoder = encoder_of(model)
    wanted, grid = check_layer(encoder.depth, layer), encoder.grid_of(images)
    view = next(view for index, view in enumerate(layer_views(model, images)) if index == wanted)
    return view.projection[:, 1:].unflatten(1, grid)
