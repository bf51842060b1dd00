"""CRATE, the white-box vision transformer, at the hardware's speed."""

from typing import TYPE_CHECKING

from .lazy import lazily
from .sizes import ALPHA_SIZES, MAE_SIZES, SIZES

if TYPE_CHECKING:  # what a type checker sees; the same is imported where it is used
    from . import functional
    from .backend import choose_backend
    from .checkpoint.save_load import load_checkpoint
    from .cpu_kernels import build_cpu_kernels
    from .errors import BackendError, CheckpointError
    from .model.alpha import (
        CRATEAlpha,
        CRATEAlpha_base,
        CRATEAlpha_huge,
        CRATEAlpha_large,
        CRATEAlpha_small,
        CRATEAlpha_tiny,
    )
    from .model.crate import CRATE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny, pair
    from .model.cuda_graph import graphed
    from .model.freezing import freeze
    from .model.linears import as_linears
    from .model.mae import CRATEMAE, mae_crate_base, mae_crate_large, mae_crate_small, mae_crate_tiny
    from .model.transformer import Transformer
    from .modules import Attention, FeedForward, PreNorm
    from .prediction import load
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "functional": (),
            "errors": ("BackendError", "CheckpointError"),
            "backend": ("choose_backend",),
            "cpu_kernels": ("build_cpu_kernels",),
            "checkpoint.save_load": ("load_checkpoint",),
            "model": ("CRATE", *(f"CRATE_{size}" for size in SIZES)),
            "model.alpha": ("CRATEAlpha", *(f"CRATEAlpha_{size}" for size in ALPHA_SIZES)),
            "model.crate": ("pair",),
            "model.cuda_graph": ("graphed",),
            "model.freezing": ("freeze",),
            "model.linears": ("as_linears",),
            "model.mae": ("CRATEMAE", *(f"mae_crate_{size}" for size in MAE_SIZES)),
            "model.transformer": ("Transformer",),
            "modules": ("Attention", "FeedForward", "PreNorm"),
            "prediction": ("load",),
        },
    )

__version__ = "0.1.0"
__all__ = [
    "CRATE",
    "CRATEMAE",
    "Attention",
    "BackendError",
    "CRATEAlpha",
    "CRATEAlpha_base",
    "CRATEAlpha_huge",
    "CRATEAlpha_large",
    "CRATEAlpha_small",
    "CRATEAlpha_tiny",
    "CRATE_base",
    "CRATE_large",
    "CRATE_small",
    "CRATE_tiny",
    "CheckpointError",
    "FeedForward",
    "PreNorm",
    "Transformer",
    "__version__",
    "as_linears",
    "build_cpu_kernels",
    "choose_backend",
    "freeze",
    "functional",
    "graphed",
    "load",
    "load_checkpoint",
    "mae_crate_base",
    "mae_crate_large",
    "mae_crate_small",
    "mae_crate_tiny",
    "pair",
]
