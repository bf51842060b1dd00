"""On what the bits of a run depend beside its settings: written down with it, and compared where it goes on."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import cpu_kernels
from ..device import Compute
from ..files import digest_of
from ..processes import Ranks
from ..reference_alpha import WIDENING
from ..settings import ModelSettings

DIGITS = 16  # of a digest that are kept


def circumstances(settings: ModelSettings, compute: Compute, ranks: Ranks, *, fused: bool) -> dict[str, str | int | None]:
    """What the bits depend on, by name.

    Args:
        fused: whether the fused kernels compute.
    """
    return {
        "ranks": ranks.count,
        "device": compute.describe(),
        "precision": compute.precision,
        "torch": str(torch.__version__),
        "kernels": _digest_kernels(),
        "cpu_kernels": cpu_kernels.digest() if compute.device.type == "cpu" else None,
        "measured_shapes": _digest_shapes(settings, compute) if fused else None,
    }


def _digest_kernels() -> str:
    """Of the kernels' source, and of the table of their shapes in it."""
    digest = hashlib.sha256()
    specification: Any = find_spec("crate_fast.kernels")
    for folder in specification.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:DIGITS]


def _digest_shapes(settings: ModelSettings, compute: Compute) -> str | None:
    """Of the shapes that `crate-fast tune` measured, on this GPU, for layers of this size; None where it measured none."""
    if compute.device.type != "cuda":  # in the interpreter it is the table's that count
        return None
    from ..kernels import tuning

    dim, inner, wide = settings.dim, settings.heads * settings.dim_head, WIDENING * settings.dim
    if settings.model == "CRATEAlpha":
        products, sizes = tuning.ODL, ((dim, wide), (wide, dim))
    else:
        products, sizes = tuning.PRODUCTS, ((dim, inner), (inner, dim), (dim, dim))
    looked_up = [*product(tuning.ATTENTION, ((settings.dim_head,),)), *product(products, sizes)]
    own = {tuning.key(kernel, dtype, *size) for kernel, size in looked_up for dtype in (torch.float16, torch.float32)}
    measured = tuning.measured(torch.cuda.get_device_name(compute.device))
    found = {name: list(shape) for name, shape in measured.items() if name in own}
    return digest_of(found, {})[:DIGITS] if found else None


def warn_of_changes(before: dict, now: dict) -> None:
    """Says on stderr in what a run goes on otherwise than it began, so that its bits may be others."""
    for name, value in now.items():
        was = before.get(name)
        if was != value:
            words = f"{name.replace('_', ' ')} was {was or 'none'} and is {value or 'none'}"
            words += ": the run goes on with the same images in the same order, but not to the same bits"
            print(f"crate-fast: warning: {words}", file=sys.stderr, flush=True)
