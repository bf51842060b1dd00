"""Which recipe a folder of photographs starts from where none is named."""

from __future__ import annotations

import os
from pathlib import Path

from ..data.pictures import SUFFIXES
from ..data_sets import DATA_SETS
from ..settings import SETTINGS

FEW = 10_000  # photographs: what a CPU learns from in an hour, and what fits its memory, reduced
STEPS = 800  # of the run that is chosen, about
MOST_EPOCHS, LEAST_EPOCHS = 100, 10
OF_MODEL = frozenset(setting.name for setting in SETTINGS.values() if setting.section == "model")


def choose_recipe(given: dict) -> tuple[str, dict, str] | None:
    """For few photographs in a folder, no GPU and nothing asked for of the model: recipe, settings beside it, and why in words.

    Args:
        given: settings that were asked for, by name.
    """
    data, device = given.get("data", "digits"), given.get("device", "auto")
    if OF_MODEL & given.keys() or data in DATA_SETS or not Path(data).is_dir() or device not in ("auto", "cpu"):
        return None
    count = count_pictures(data, FEW)
    if not 0 < count <= FEW or _has_gpu(given):
        return None
    batch = given.get("batch_size", 32)
    epochs = max(LEAST_EPOCHS, min(MOST_EPOCHS, STEPS * batch // count))
    return "photos", {"epochs": epochs}, f"{count:,} photographs and no GPU"


def count_pictures(folder: str, most: int) -> int:
    """How many images lie in `folder` and below, by their names; more than `most` are counted no further."""
    count = 0
    for _, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in names)
        if count > most:
            break
    return count


def _has_gpu(given: dict) -> bool:
    if given.get("device") == "cpu":
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
