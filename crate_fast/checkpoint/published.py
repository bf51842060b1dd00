"""What a state dict alone tells of its model: its names and shapes, and the published values for what they leave open."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..sizes import ALPHA_SIZES, SIZES
from .layouts import FIRST

NEEDED = {"pos_embedding": 3, "to_patch_embedding.1.weight": 1, "mlp_head.1.weight": 2}
NEEDED_BY_ALPHA = {"pos_embedding": 3, "conv1.weight": 4, "mlp_head.1.weight": 2}
OPEN = {"pool": "cls", "ista": 0.1, "lambd": 0.1}  # as published
OPEN_IN_ALPHA = {"ista": 0.1, "lambd": 0.1}
SCALED, INIT_VALUES = "transformer.layers.0.0.scale", 1e-5  # LayerScale, and what it is at first in the published code
HEAD_WIDTH = 64  # the constructor's
DEMO = {"dim": 768, "depth": 12, "heads": 6}  # of the published segmentation demo, which no other published model is like
UNUSED = ("head.weight", "head.bias")  # of the demo, whose forward ends before
OUTPUTS = {768: 6, 21842: None}  # of a model of that width: the demo's, and of either, with 6 heads or 12


def without_unused(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict, str | None]:
    """(weights, arguments, note): without the `head` that stands beside `mlp_head` in the segmentation demo's, and that tells
    its 6 heads of 128, which no shape does; the weights themselves, nothing and None where there is no such head."""
    beside = [name for name in UNUSED if name in weights]
    if not beside or not all(name in weights for name in NEEDED):
        return weights, {}, None
    left = {name: value for name, value in weights.items() if name not in beside}
    width = weights[FIRST].shape[-1] if weights[FIRST].dim() else 0
    is_demo = width == DEMO["dim"] and _depth(weights) == DEMO["depth"]
    inferred = {"heads": DEMO["heads"]} if is_demo else {}
    note = "left out: the 'head' beside 'mlp_head', which the segmentation demo's forward does not use"
    return left, inferred, note + (f"; as in the demo: heads={DEMO['heads']}" if is_demo else "")


def model_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The argument "model" where names tell that the weights are of another member of the family than CRATE."""
    return {"model": "CRATEAlpha"} if "conv1.weight" in weights and "to_patch_embedding.1.weight" not in weights else {}


def infer_arguments(weights: dict[str, Tensor], known: dict, image_size=None) -> tuple[dict, dict]:
    """The arguments of `CRATE`, or as names tell `CRATEAlpha`, that fit `weights`: those that shapes tell, and those that are
    assumed to be as published.

    Args:
        weights: by the names of its class.
        known: arguments that the caller knows; they go before what shapes tell.
        image_size: likewise, where it has as many patches as the weights have positions; else it counts for nothing.

    Returns:
        (all arguments, those of them that are assumed because neither shapes nor `known` tell them).

    Raises:
        ValueError: shapes tell too little; the message names what has to be said.
    """
    model = model_of(weights)
    needed, left, sizes = (NEEDED_BY_ALPHA, OPEN_IN_ALPHA, ALPHA_SIZES) if model else (NEEDED, OPEN, SIZES)
    for name, dimensions in needed.items():
        if name not in weights or weights[name].dim() != dimensions:
            raise ValueError(f"no weights of a CRATE: it has no {name!r} of {dimensions} dimensions")
    _, tokens, dim = weights["pos_embedding"].shape
    arguments = {"dim": dim, "num_classes": len(weights["mlp_head.1.weight"])}
    arguments["depth"] = _depth(weights)
    if model:
        _, channels, *patch = weights["conv1.weight"].shape
        values = channels * math.prod(patch)
        known = {"channels": channels, "patch_size": patch} | known
    else:
        values = len(weights["to_patch_embedding.1.weight"])
    if image_size is not None:
        tried = _infer_sizes(values, tokens - 1, known | {"image_size": image_size})
        if math.prod(i // max(1, p) for i, p in zip(_as_pair(image_size), tried["patch_size"], strict=True)) == tokens - 1:
            known = known | {"image_size": image_size}
    arguments |= _infer_sizes(values, tokens - 1, known)
    inferred, assumed = _infer_heads(weights, dim, arguments["depth"], known, sizes)
    left = left | ({"init_values": INIT_VALUES} if SCALED in weights else {})
    assumed |= {name: value for name, value in left.items() if name not in known}
    return model | arguments | inferred | assumed | known, assumed


def _depth(weights: dict[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in weights if key.startswith("transformer.layers.")})


def _infer_sizes(values: int, patches: int, known: dict) -> dict:
    """channels, patch_size and image_size from the values of a patch and the number of patches, squares unless known."""
    patch = _as_pair(known["patch_size"]) if "patch_size" in known else None
    if patch is not None:
        channels = known.get("channels", values // max(1, patch[0] * patch[1]))
    else:
        # 3·a² = b² has no solution, so that colour and grey cannot be mistaken for each other.
        tried = (known["channels"],) if "channels" in known else (3, 1)
        channels = next((c for c in tried if c > 0 and values % c == 0 and whole_root(values // c)), None)
        if channels is None:
            raise ValueError(f"a patch has {values} values, of no square patch with {' or '.join(map(str, tried))} channels; "
                             "say patch_size")  # fmt: skip
        patch = (math.isqrt(values // channels),) * 2
    if "image_size" not in known and not whole_root(patches):
        raise ValueError(f"{patches} patches make no square image; say image_size")
    side = whole_root(patches) or 0
    image = known.get("image_size", [side * patch[0], side * patch[1]])
    return {"channels": channels, "patch_size": list(patch), "image_size": image}


def _infer_heads(weights: dict[str, Tensor], dim: int, depth: int, known: dict, sizes: dict) -> tuple[dict, dict]:
    """(heads and dim_head that are inferred, those that are assumed); `sizes`: the published ones of its kind."""
    first = "transformer.layers.0.0.fn."
    if depth and f"{first}to_out.0.weight" not in weights:
        return {"heads": 1, "dim_head": dim}, {}  # the only case without a projection back
    project = weights.get(f"{first}qkv.weight")
    width = len(project) if project is not None and project.dim() == 2 else HEAD_WIDTH
    if "heads" in known:
        return {"dim_head": width // max(1, known["heads"])}, {}
    if "dim_head" in known:
        return {"heads": width // max(1, known["dim_head"])}, {}
    outputs = len(weights["mlp_head.1.weight"])
    if sizes is SIZES and (dim, depth, width) == (DEMO["dim"], DEMO["depth"], DEMO["dim"]) and outputs in OUTPUTS:
        heads = OUTPUTS[outputs]
        if heads is None:
            raise ValueError(f"{outputs} classes are those of a base model with 12 heads and of the segmentation demo with 6; "
                             "say heads")  # fmt: skip
        return {}, {"heads": heads, "dim_head": width // heads}
    for size in sizes.values():
        if (size["dim"], size["depth"], size["heads"] * size["dim_head"]) == (dim, depth, width):
            return {}, {"heads": size["heads"], "dim_head": size["dim_head"]}
    if width % HEAD_WIDTH or (depth and width == dim == HEAD_WIDTH):  # one head as wide as a token has no projection back
        raise ValueError(f"its shapes leave the number of heads open ({width} values in all heads); say heads")
    return {}, {"heads": width // HEAD_WIDTH, "dim_head": HEAD_WIDTH}


def _as_pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def whole_root(number: int) -> int | None:
    """The whole root of a positive square, else None."""
    root = math.isqrt(max(0, number))
    return root if root and root**2 == number else None
