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
from ..model.encoder import Encoder
from ..model.mae import CRATEMAE
from .components import principal_colours
from .photos import Normalisation
from .rates import measures_of
from .views import LayerView, encoder_of, layer_views

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "@DATA@"  # of the data, in the template
LARGEST = 200 << 20  # bytes of a page: what browsers open without trouble
MEASURED = ("before", "after", "nonzero", "rate")  # what the page calls a layer's measures
INTEGERS = 32767  # projections are stored as whole numbers of 16 bits


def explore(model: CRATE | CRATEMAE, normalise: Normalisation, photos: Sequence[tuple[str, Image]], title: str) -> str:
    """The page, as HTML, of `photos` by their names, each cut so that patches divide it.

    Raises:
        InspectionError: there are no layers or photographs, the page would be too large, or a layer's tokens are not finite.
    """
    encoder = encoder_of(model)
    if not encoder.depth or not photos:
        raise InspectionError("there is nothing to explore: the model has no layers, or there are no photographs")
    width = encoder.layers[0][0].fn.qkv.out_features
    _check_size(encoder, photos, width)
    pages, projections = [], []
    for name, image in photos:
        layers, seen = _measured(model, normalise(image), name)
        rows, columns = (side // patch for side, patch in zip((image.height, image.width), encoder.patch_size, strict=True))
        sizes = {"width": image.width, "height": image.height, "rows": rows, "columns": columns}
        pages.append({"name": name, "image": _picture(image), **sizes, "layers": layers})
        projections.append([one[1:].unflatten(0, (rows, columns)) for one in seen])
    for layer, of_photos in enumerate(zip(*projections, strict=True)):
        for page, colours in zip(pages, principal_colours(of_photos), strict=True):
            page["layers"][layer]["colours"] = _base64((colours * 255).round().byte())
    sizes = {"depth": encoder.depth, "heads": encoder.heads, "width": width // encoder.heads}
    return _filled({"title": title, **sizes, "photos": pages})


def _check_size(encoder: Encoder, photos: Sequence[tuple[str, Image]], width: int) -> None:
    patch = encoder.patch_size[0] * encoder.patch_size[1]
    patches = sum(image.width * image.height // patch + 1 for _, image in photos)
    size = patches * encoder.depth * (2 * width + 3) * 4 // 3
    if size > LARGEST:
        words = f"of {len(photos)} photographs with {patches:,} patches together the page would have {size >> 20:,} MiB"
        raise InspectionError(f"{words}, and at most {LARGEST >> 20} are written; take fewer, or a smaller --size")


@torch.no_grad()
def _measured(model: CRATE | CRATEMAE, image: Tensor, name: str) -> tuple[list[dict], list[Tensor]]:
    """What the page says of each layer for one image, (1, channels, height, width), and its projections, (tokens, width)."""
    layers, seen = [], []
    for number, view in enumerate(layer_views(model, image.to(model.cls_token.device)), start=1):
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
    return dict(zip(MEASURED, (value.item() for value in measures_of(view)), strict=True))


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
