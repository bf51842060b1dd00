"""timm's names of models and arguments, and what the config.json says that its `save_for_hf` and `push_to_hf_hub` write."""

from __future__ import annotations

from typing import Any

from ..sizes import ALPHA_SIZES, SIZES

IN21K = 21842  # classes
_PATCH8 = dict(patch_size=8, depth=12, num_classes=IN21K)
ARCHITECTURES: dict[str, dict[str, int]] = {
    **{f"crate_{size}_patch16_224": dict(patch_size=16) | sizes for size, sizes in SIZES.items()},
    "crate_small_21k_patch8_224": _PATCH8 | dict(dim=384, heads=6, dim_head=64),
    "crate_base_21k_patch8_224": _PATCH8 | dict(dim=768, heads=12, dim_head=64),
    "crate_base_demo_patch8_224": _PATCH8 | dict(dim=768, heads=6, dim_head=128),
}
"""By name: the published classifiers, those trained on ImageNet-21k, and the segmentation demo's, with 6 heads of 128."""
_PATCHES = {"base": (32, 16, 8), "large": (32, 14, 8)}  # others have those of their size alone
ALPHA_ARCHITECTURES: dict[str, dict[str, int]] = {
    f"crate_alpha_{size}_patch{patch}_224": sizes | dict(patch_size=patch)
    for size, sizes in ALPHA_SIZES.items()
    for patch in _PATCHES.get(size, (sizes["patch_size"],))
}
"""By name: CRATE-α's sizes in the patches that are published."""

NAMES = {
    "img_size": "image_size",
    "in_chans": "channels",
    "embed_dim": "dim",
    "num_heads": "heads",
    "head_dim": "dim_head",
    "pos_drop_rate": "emb_dropout",
    "attn_drop_rate": "dropout",
    "drop_path_rate": "drop_path",
}
"""What timm calls arguments of `crate_fast.CRATE`; both names are taken."""
TIMMS = {own: name for name, own in NAMES.items()}
POOLS: dict[str, str | None] = {"token": "cls", "avg": "mean", "": None}
"""timm's names of what the head reads: the class token; the mean of all tokens; every token by itself."""
DEFAULTS = dict(image_size=224, channels=3, num_classes=1000, dropout=0.0, emb_dropout=0.0, ista=0.1, lambd=0.1)


def in_timms_words(arguments: dict[str, Any]) -> str:
    """Arguments of `CRATE` as one writes them for `timm.create_model`."""
    pairs = {TIMMS.get(name, name): value for name, value in arguments.items()}
    squares = {name: value[0] for name, value in pairs.items() if isinstance(value, list) and value[0] == value[1]}
    return ", ".join(f"{name}={value!r}" for name, value in (pairs | squares).items())


def as_own(content: dict[str, Any]) -> dict[str, Any] | None:
    """timm's config.json as ours: arguments of `CRATE`, and "evaluation"; None where it is not of a CRATE that can be told."""
    sizes, given, cfg = (content.get(name) for name in ("architecture", "model_args", "pretrained_cfg"))
    known = ARCHITECTURES | ALPHA_ARCHITECTURES
    if not isinstance(sizes, str) or sizes not in known or not isinstance(given, dict | None):
        return None
    named: dict[str, Any] = {NAMES.get(str(name), str(name)): value for name, value in (given or {}).items()}
    pool = named.pop("global_pool", content.get("global_pool", "token"))
    if not isinstance(pool, str) or POOLS.get(pool) is None:
        return None
    count = {"num_classes": content["num_classes"]} if "num_classes" in content else {}
    arguments: dict[str, Any] = DEFAULTS | known[sizes] | named | count
    arguments |= {"model": "CRATEAlpha"} if sizes in ALPHA_ARCHITECTURES else {"pool": POOLS[pool]}
    return arguments | ({"evaluation": _evaluation(cfg, content.get("label_names"))} if isinstance(cfg, dict) else {})


def _evaluation(cfg: dict[str, Any], names: object) -> dict[str, Any]:
    """How images are evaluated, as `eval_transform.read_transform` reads it."""
    crop = 0.0 if cfg.get("crop_mode") == "squash" else cfg.get("crop_pct", 0.875)
    names = names or cfg.get("label_names")  # or a dictionary, of some of the classes
    return {"crop": crop, "mean": cfg.get("mean"), "std": cfg.get("std"), "names": names if isinstance(names, list) else None}
