"""What a CRATE-MAE is in files: how its weights are told from others, its constructor's arguments, a CRATE of its encoder."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..files import first_line
from ..model.mae import CRATEMAE
from ..sizes import MAE_SIZES
from .layouts import FIRST_OF_MAE
from .published import HEAD_WIDTH, whole_root

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads")
MAE_ARGUMENTS = (*SIZES, "norm_pix_loss", "lambd")
OPEN = {"norm_pix_loss": False, "lambd": 0.5}  # as published
ALIASES = {"heads": ("num_heads", "decoder_num_heads"), "image_size": ("img_size",)}  # what a CRATE's are called
NEEDED = {FIRST_OF_MAE: 3, "mask_token": 3, "patch_embed.proj.weight": 4}
LAYERS = {"depth": "blocks.", "decoder_depth": "decoder_blocks."}
ENCODER = "blocks.{}.layers.0."
BACK = "0.fn.to_out."  # which a single head has not
OF_LAYER = (
    "0.norm.weight",
    "0.norm.bias",
    "0.fn.qkv.weight",
    f"{BACK}0.weight",
    f"{BACK}0.bias",
    "1.norm.weight",
    "1.norm.bias",
    "1.fn.weight",
)
NOTE = "of a CRATE-MAE: its encoder, without decoder and mask token; the norms of a CRATE's patches are new, it has none"
STEP_SIZE = 0.1  # which its constructor does not take


def is_mae(weights: Collection[str]) -> bool:
    """Whether weights of these names are of a CRATE-MAE."""
    return FIRST_OF_MAE in weights


def mae_arguments(model: CRATEMAE) -> dict:
    """The arguments of `CRATEMAE` that build a model like this one; raises ValueError where none do."""
    rows: list[Any] = [model.blocks, model.decoder_blocks]
    steps = [block.layers[0][1].fn for block in rows[0]]
    heads: list[set[int]] = [{block.heads for block in blocks} for blocks in rows]
    if any((step.lambd, step.step_size) != (steps[0].lambd, STEP_SIZE) for step in steps) or any(len(one) > 1 for one in heads):
        raise ValueError("the layers differ in heads, lambd or step size; the constructor gives all the same")
    return {
        "img_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.cls_token.shape[-1],
        "depth": len(model.blocks),
        "num_heads": min(heads[0], default=model.heads),
        "decoder_depth": len(model.decoder_blocks),
        "decoder_num_heads": min(heads[1], default=model.heads),
        "norm_pix_loss": model.norm_pix_loss,
        "lambd": float(steps[0].lambd) if steps else OPEN["lambd"],
    }


def infer_mae(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """As `published.infer_arguments`, of a CRATE-MAE; raises ValueError where shapes tell too little."""
    check_needed(weights)
    dim, channels, height, width = weights["patch_embed.proj.weight"].shape
    patches = weights[FIRST_OF_MAE].shape[1] - 1
    side = whole_root(patches)
    if side is None or height != width:
        raise ValueError(f"{patches} patches of {height}×{width} make no CRATE-MAE; both must be squares")
    shapes: dict[str, Any] = {"img_size": side * height, "patch_size": height, "in_chans": channels, "embed_dim": dim}
    shapes |= {name: depth_of(weights, prefix) for name, prefix in LAYERS.items()}
    inferred, assumed = _infer_heads(weights, dim, shapes["depth"], known)
    assumed |= {name: value for name, value in OPEN.items() if name not in known}
    return shapes | inferred | assumed | known, assumed


def check_needed(weights: dict[str, Tensor]) -> None:
    """Raises ValueError where weights by which a CRATE-MAE is told are missing, or have other dimensions."""
    for name, dimensions in NEEDED.items():
        if getattr(weights.get(name), "ndim", None) != dimensions:
            raise ValueError(f"no weights of a CRATE-MAE: it has no {name!r} of {dimensions} dimensions")


def depth_of(weights: Collection[str], prefix: str) -> int:
    """How many layers there are under `prefix`, whose number comes next."""
    return len({key[len(prefix) :].partition(".")[0] for key in weights if isinstance(key, str) and key.startswith(prefix)})


def _infer_heads(weights: dict[str, Tensor], dim: int, depth: int, known: dict) -> tuple[dict, dict]:
    """(heads of encoder and decoder that are inferred, those that are assumed)."""
    places = {"num_heads": "blocks.0.layers.0.0", "decoder_num_heads": "decoder_blocks.0.layers.0.1"}
    single = {
        name: 1
        for name, place in places.items()
        if f"{place}.fn.qkv.weight" in weights and f"{place}.fn.to_out.0.weight" not in weights
    }  # the only case without a projection back
    published = (size["num_heads"] for size in MAE_SIZES.values() if (size["embed_dim"], size["depth"]) == (dim, depth))
    by_width = dim // HEAD_WIDTH if dim % HEAD_WIDTH == 0 else None
    likely = next((n for n in chain((known.get("num_heads"),), published, (by_width,)) if n), None)
    if likely is None and len(single) < len(places):
        raise ValueError(f"its shapes leave the number of heads open ({dim} values in all heads); say heads")
    return single, {name: likely for name in places if name not in known and name not in single}


def mae_keywords(overrides: dict) -> dict:
    """`overrides` of a CRATE-MAE, where what a CRATE's are called is taken too; raises ValueError for those that it has not."""
    own: dict[str, Any] = {}
    for name, value in overrides.items():
        own |= dict.fromkeys(ALIASES[name], value) if name in ALIASES else {name: value}
    taken = (*MAE_ARGUMENTS, "decoder_embed_dim", "mlp_ratio", "backend", "stream")
    wrong = next((name for name in own if name not in taken), None)
    if wrong is not None:
        raise ValueError(f"it holds a CRATE-MAE, which has no {wrong}")
    return own


def as_crate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CRATE without its head from a CRATE-MAE's: layers, class token, positions and the projection of patches.

    A CRATE normalises patches before that projection and after it. The norm before it is left as it is made; that after it
    scales by what the projection makes of patches of unit variance, about what the layers were trained with beside positions.

    Raises:
        ValueError: weights by which a CRATE-MAE is told are missing, or its layers are not all there, or are others.
    """
    check_needed(weights)
    _check_layers(weights)
    project = weights["patch_embed.proj.weight"]
    dim, channels, height, width = project.shape
    vector = project.new_empty(channels * height * width), project.new_empty(dim)
    found = {"pos_embedding": weights[FIRST_OF_MAE]}
    found["to_patch_embedding.2.weight"] = project.permute(0, 2, 3, 1).flatten(1).contiguous()
    for index, norm in zip((1, 3), vector, strict=True):
        found[f"to_patch_embedding.{index}.weight"] = torch.ones_like(norm)
        found[f"to_patch_embedding.{index}.bias"] = torch.zeros_like(norm)
    found["to_patch_embedding.3.weight"] *= project.flatten(1).square().sum(dim=1).mean().sqrt()
    for theirs, ours in (("patch_embed.proj.bias", "to_patch_embedding.2.bias"), ("cls_token", "cls_token")):
        if theirs in weights:
            found[ours] = weights[theirs]
    for key, value in weights.items():
        if key.startswith(LAYERS["depth"]):
            _, number, _, _, *name = key.split(".")
            found[".".join(("transformer.layers", number, *name))] = value
    return found


def _check_layers(weights: dict[str, Tensor]) -> None:
    """Raises ValueError where what is called a layer of the encoder is none of a CRATE-MAE, such as a layer of another MAE."""
    there = {key for key in weights if key.startswith(LAYERS["depth"])}
    names = [name for name in OF_LAYER if not name.startswith(BACK) or any(key.endswith(name) for key in there)]
    wanted = {ENCODER.format(n) + name for n in range(depth_of(there, LAYERS["depth"])) for name in names}
    for odd, words in ((wanted - there, "of its encoder are missing"), (there - wanted, "are of no encoder of a CRATE-MAE")):
        if odd:
            raise ValueError(f"{len(odd)} weights {words}, {min(odd)!r} first")


def crate_arguments(arguments: dict) -> dict:
    """What a CRATE of the encoder is built with, but for its head, from the arguments of `CRATEMAE`."""
    image, patch, heads = arguments["img_size"], arguments["patch_size"], arguments["num_heads"]
    return {
        **{"image_size": [image, image], "patch_size": [patch, patch], "channels": arguments["in_chans"]},
        **{"dim": arguments["embed_dim"], "depth": arguments["depth"], "heads": heads},
        **{"dim_head": arguments["embed_dim"] // heads, "ista": STEP_SIZE, "lambd": arguments["lambd"]},
    }


def changed_arguments(model: CRATEMAE, words: str) -> dict:
    """`mae_arguments`; raises ValueError with `words` where a module is in the place of another."""
    try:
        return mae_arguments(model)
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{words}: {first_line(error)}") from error
