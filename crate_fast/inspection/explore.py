"""A page that shows a model from within: one file that a browser opens, with nothing of it on any server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InspectionError
from ..model.crate import CRATE
from ..model.transformer import layers_of
from .components import principal_colours
from .photos import Normalisation
from .rates import coding_rate, nonzero_share, subspace_rate
from .views import LayerView, layer_views, project

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "@DATA@"  # of the data, in the template
LARGEST = 200 << 20  # bytes of a page: what browsers open without trouble
INTEGERS = 32767  # projections are stored as whole numbers of 16 bits


def explore(model: CRATE, normalise: Normalisation, photos: Sequence[tuple[str, Image]], title: str) -> str:
    """The page, as HTML, of `photos` by their names, each cut so that patches divide it.

    Raises:
        InspectionError: there are no layers or photographs, the page would be too large, or a layer's tokens are not finite.
    """
    transformer = model.transformer
    if not transformer.depth or not photos:
        raise InspectionError("there is nothing to explore: the model has no layers, or there are no photographs")
    width = next(layers_of(transformer))[0].fn.qkv.out_features
    _check_size(model, photos, width)
    pages, projections = [], []
    for name, image in photos:
        layers, seen = _measured(model, normalise(image), name)
        rows, columns = image.height // model.patch_size[0], image.width // model.patch_size[1]
        sizes = {"width": image.width, "height": image.height, "rows": rows, "columns": columns}
        pages.append({"name": name, "image": _picture(image), **sizes, "layers": layers})
        projections.append([one[1:].unflatten(0, (rows, columns)) for one in seen])
    for layer, of_photos in enumerate(zip(*projections, strict=True)):
        for page, colours in zip(pages, principal_colours(of_photos), strict=True):
            page["layers"][layer]["colours"] = _base64((colours * 255).round().byte())
    sizes = {"depth": transformer.depth, "heads": transformer.heads, "width": width // transformer.heads}
    return _filled({"title": title, **sizes, "photos": pages})


def _check_size(model: CRATE, photos: Sequence[tuple[str, Image]], width: int) -> None:
    patch = model.patch_size[0] * model.patch_size[1]
    patches = sum(image.width * image.height // patch + 1 for _, image in photos)
    size = patches * model.transformer.depth * (2 * width + 3) * 4 // 3
    if size > LARGEST:
        words = f"of {len(photos)} photographs with {patches:,} patches together the page would have {size >> 20:,} MiB"
        raise InspectionError(f"{words}, and at most {LARGEST >> 20} are written; take fewer, or a smaller --size")


@torch.no_grad()
def _measured(model: CRATE, image: Tensor, name: str) -> tuple[list[dict], list[Tensor]]:
    """What the page says of each layer for one image, (1, channels, height, width), and its projections, (tokens, width)."""
    layers, seen = [], []
    for number, view in enumerate(layer_views(model, image.to(model.pos_embedding.device)), start=1):
        try:
            layers.append(_measures(view))
        except InspectionError as error:
            raise InspectionError(f"{name}: layer {number}: {error}") from error
        projection = view.projection[0].float().cpu()
        # Scores are products of two; the factor on them goes into each.
        most = projection.abs().max().item() or 1.0
        whole = (projection / most * INTEGERS).round().to(torch.int16)
        layers[-1] |= {"projections": _base64(whole), "scale": most / INTEGERS * abs(view.scale) ** 0.5}
        seen.append(projection)
    return layers, seen


def _measures(view: LayerView) -> dict:
    return {
        "before": subspace_rate(view.projection, view.heads).item(),
        "after": subspace_rate(project(view.layer, view.compressed), view.heads).item(),
        "nonzero": nonzero_share(view.tokens).item(),
        "rate": coding_rate(view.tokens).item(),
    }


def _base64(values: Tensor) -> str:
    """Bytes and whole numbers of 16 bits, the low byte first."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _picture(image: Image) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, format="JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _filled(data: dict) -> str:
    """The template with the data in it, among which nothing can end the element that they stand in."""
    text = json.dumps(data, allow_nan=False).replace("<", r"\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after
