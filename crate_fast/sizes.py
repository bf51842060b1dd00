"""What the published models are called and how large they are, and what can compute them; imports nothing."""

from __future__ import annotations

from typing import Any

POOLS = ("cls", "mean")
STREAMS = ("auto", "float16", "bfloat16", "float32")
"""Dtypes of the activations between fused kernels; see `crate_fast.CRATE`."""
BACKENDS = ("auto", "triton", "torch", "reference")

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=384, depth=12, heads=6, dim_head=64),
    "small": dict(dim=576, depth=12, heads=12, dim_head=48),
    "base": dict(dim=768, depth=12, heads=12, dim_head=64),
    "large": dict(dim=1024, depth=24, heads=16, dim_head=64),
}
"""The four published sizes (arXiv:2306.01129, table 3), all for images of 224 and patches of 16 pixels."""

ALPHA_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3, dim_head=64, patch_size=16),
    "small": dict(dim=576, depth=12, heads=12, dim_head=48, patch_size=16),
    "base": dict(dim=768, depth=12, heads=12, dim_head=64, patch_size=16),
    "large": dict(dim=1024, depth=24, heads=16, dim_head=64, patch_size=14),
    "huge": dict(dim=1280, depth=32, heads=16, dim_head=80, patch_size=14),
}
"""The sizes of CRATE-α in its published code (arXiv:2405.20299), each with one of its published patch sizes."""

MODELS = ("CRATE", "CRATEAlpha")
"""The classifiers of the family, by the names of their classes."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{f"CRATE_{size}": dict(model="CRATE") | sizes for size, sizes in SIZES.items()},
    **{f"CRATEAlpha_{size}": dict(model="CRATEAlpha") | sizes for size, sizes in ALPHA_SIZES.items()},
}
"""What the published sizes are called: which model each is, and its arguments."""

MAE_SIZES: dict[str, dict[str, int]] = {
    name: dict(embed_dim=size["dim"], depth=size["depth"], num_heads=size["heads"]) for name, size in SIZES.items()
}
"""The published sizes of CRATE-MAE (arXiv:2404.02446), of the encoder and of the decoder, which is as large."""
