"""What the published models are called and how large they are, and what can compute them; imports nothing."""

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

ARCHITECTURES = tuple(f"CRATE_{size}" for size in SIZES)

MAE_SIZES: dict[str, dict[str, int]] = {
    name: dict(embed_dim=size["dim"], depth=size["depth"], num_heads=size["heads"]) for name, size in SIZES.items()
}
"""The published sizes of CRATE-MAE (arXiv:2404.02446), of the encoder and of the decoder, which is as large."""
