"""The published sizes under timm's names; timm lists them as of a module "crate"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..checkpoint.timm_config import ALPHA_ARCHITECTURES, ARCHITECTURES, NAMES, POOLS, TIMMS
from ..eval_transform import MAIN
from ..files import shown
from .model import TimmCRATE, TimmCRATEAlpha
from .weights import checkpoint_filter_fn


def build(
    *,
    global_pool: str = "token",
    device: Any = None,
    dtype: torch.dtype | None = None,
    kind: type[TimmCRATE] = TimmCRATE,
    **options,
) -> TimmCRATE:
    """The model of arguments by timm's names; those that timm has no name for by `TimmCRATE`'s.

    Args:
        global_pool: what the head reads: "token", the class token; "avg", the mean of all tokens, the class token too, as the
            published class has it; "", nothing is pooled.
        device, dtype: of its weights; PyTorch's default where they are None.
        kind: its class.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an unknown `global_pool`, and as `crate_fast.CRATE`.
    """
    if global_pool not in POOLS:
        raise ValueError(f"global_pool is {shown(global_pool)}; allowed are {', '.join(map(repr, POOLS))}")
    arguments: dict[str, Any] = dict(image_size=224, num_classes=1000)
    arguments |= {NAMES.get(name, name): value for name, value in options.items()}
    with torch.device(torch.get_default_device() if device is None else device):
        return kind(pool=POOLS[global_pool], **arguments).to(dtype=dtype)


def build_alpha(**options) -> TimmCRATE:
    """The CRATE-α of arguments by timm's names, as `build`."""
    return build(kind=TimmCRATEAlpha, **options)


def _by_timms_names(options: dict[str, Any]) -> dict[str, Any]:
    """The `options` by timm's names, which it looks for; raises TypeError where one is there by both."""
    renamed = {TIMMS.get(name, name): value for name, value in options.items()}
    if len(renamed) < len(options):
        twice = next(name for name in options if NAMES.get(name) in options)
        raise TypeError(f"{twice} and {NAMES[twice]} are the same argument by two names; say one of them")
    return renamed


def _create(name: str, pretrained: bool = False, pretrained_cfg_overlay: dict | None = None, **options) -> nn.Module:
    """The model called `name`; weights in a file that the overlay names are read by crate_fast's reader."""
    overlay = dict(pretrained_cfg_overlay or {})
    if overlay.get("file"):
        overlay.setdefault("custom_load", True)
    features = dict(out_indices=options.pop("out_indices", 3), feature_cls="getter")
    alpha = name in ALPHA_ARCHITECTURES
    sizes = ALPHA_ARCHITECTURES[name] if alpha else ARCHITECTURES[name]
    arguments = _by_timms_names(sizes) | _by_timms_names(options)
    model = build_model_with_cfg(
        build_alpha if alpha else build, name, pretrained, pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **arguments,
    )  # fmt: skip
    own = getattr(model, "model", model)  # around which features_only puts another
    if isinstance(own, TimmCRATE):  # which takes this size alone, where timm's word is that of the published weights
        model.pretrained_cfg["input_size"] = (own.channels, *own.image_size)
    return model


def _cfg(arguments: dict[str, int]) -> dict[str, Any]:
    """timm's description of a model: how its images are evaluated, here as by the published main.py."""
    return dict(
        num_classes=arguments.get("num_classes", 1000), input_size=(3, 224, 224), fixed_input_size=True, pool_size=None,
        crop_pct=MAIN.crop, interpolation="bilinear", mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD, first_conv="to_patch_embedding.2",
        classifier="mlp_head.1", license="mit", origin_url="https://github.com/Ma-Lab-Berkeley/CRATE",
        paper_name="White-Box Transformers via Sparse Rate Reduction", paper_ids="arXiv:2306.01129",
    )  # fmt: skip


def _alpha_cfg(arguments: dict[str, int]) -> dict[str, Any]:
    return _cfg(arguments) | dict(
        first_conv="conv1", origin_url="https://github.com/UCSC-VLAA/CRATE-alpha",
        paper_name="Scaling White-Box Transformers for Vision", paper_ids="arXiv:2405.20299",
    )  # fmt: skip


_cfgs: dict[str, Any] = {name: _cfg(arguments) for name, arguments in ARCHITECTURES.items()}
default_cfgs = generate_default_cfgs(_cfgs | {name: _alpha_cfg(each) for name, each in ALPHA_ARCHITECTURES.items()})


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """What timm calls to build `name`; it knows a function by its name and its module."""

    def create(pretrained: bool = False, **options) -> nn.Module:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    sizes = ARCHITECTURES | ALPHA_ARCHITECTURES
    create.__doc__ = f"The CRATE called {name}: {', '.join(f'{key} {value}' for key, value in sizes[name].items())}."
    return create


for _name in (*ARCHITECTURES, *ALPHA_ARCHITECTURES):
    globals()[_name] = register_model(_entry_point(_name))
