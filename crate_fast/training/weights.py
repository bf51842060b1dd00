"""Weights to start from: published checkpoints and ours, whatever their shape and from whatever device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, load_checkpoint, load_model, read_safely
from ..model import CRATE, SIZES
from ..positions import resample_positions
from .rundir import model_file

HEAD = "mlp_head."
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, DistributedDataParallel and torch.compile
SHAPES = ("state_dict", "model")  # of main.py's and finetune.py's checkpoints


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in `path`, on the CPU, by the names of `CRATE`.

    Read are files of crate-fast (model.safetensors, for which its run's directory may stand, and checkpoints), the published
    main.py's checkpoints ("state_dict") and finetune.py's ("model"), and bare state dicts; prefixes of DataParallel and
    DistributedDataParallel are taken off.

    Raises:
        CheckpointError: the file is missing, damaged, or has no weights of a CRATE.
    """
    path = model_file(path)
    if path.suffix == ".safetensors":
        return load_model(path).state_dict()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    content = read_safely(path, "damaged, or no checkpoint")
    if isinstance(content, dict) and "arguments" in content:
        content = load_checkpoint(path)
        return content.get("ema") or content["model"]
    for name in SHAPES:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    weights = {_unwrapped(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    if "pos_embedding" not in weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: no weights of a CRATE in it")
    return {key: value.float() for key, value in weights.items()}


def start_from(model: CRATE, weights: dict[str, Tensor], path: str | Path) -> str:
    """Gives `model` the `weights` read from `path`, all but the head's; says in a line what was loaded, replaced and missing.

    Position embeddings of another image size are resampled, bicubically.

    Raises:
        CheckpointError: nothing fits, or a weight has another shape.
    """
    weights, own = dict(weights), model.state_dict()
    fresh = [key for key in own if key.startswith(HEAD)]
    wanted = [key for key in own if not key.startswith(HEAD)]
    missing = [key for key in wanted if key not in weights]
    surplus = [key for key in weights if key not in own]
    if len(missing) == len(wanted):
        raise CheckpointError(f"{path}: none of its {len(weights)} weights belongs to this model")
    resampled = ""
    if "pos_embedding" in weights and weights["pos_embedding"].shape != own["pos_embedding"].shape:
        weights["pos_embedding"] = _resample(weights["pos_embedding"], model, path)
        resampled = ", position embeddings resampled"
    for key in wanted:
        if key in weights and weights[key].shape != own[key].shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {tuple(weights[key].shape)}; this model's is {tuple(own[key].shape)}, another size"
            )
    loaded = {key: weights[key] for key in wanted if key in weights}
    model.load_state_dict(loaded, strict=False)
    line = f"{path}: {len(loaded)} weights loaded{resampled}; new: the head ({len(fresh)})"
    line += f"; missing there, and random: {', '.join(missing)}" if missing else ""
    return line + (f"; not of this model, and left out: {', '.join(map(str, surplus))}" if surplus else "")


def build_published(path: Path, arch: str | None, image_size: int, patch_size: int) -> CRATE:
    """The model in a published checkpoint, its size told by its shapes, or by `arch` where they leave it open.

    Raises:
        CheckpointError: as `read_weights`, or no published size has such shapes.
    """
    weights = read_weights(path)
    found = (weights["pos_embedding"].shape[-1], _depth(weights))
    names = [name for name, size in SIZES.items() if (size["dim"], size["depth"]) == found]
    if arch is not None:
        names = [arch.removeprefix("CRATE_")]
    if not names:
        raise CheckpointError(f"{path}: no published size has width {found[0]} and {found[1]} layers")
    with torch.device("meta"):
        classes = len(weights.get("mlp_head.1.bias", ()))
        model = CRATE(**SIZES[names[0]], image_size=image_size, patch_size=patch_size, num_classes=classes)
    own = model.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in some.items()} for some in (own, weights)]
    wrong = next((key for key in sorted({*own, *weights}) if shapes[0].get(key) != shapes[1].get(key)), None)
    if wrong:
        raise CheckpointError(f"{path}: {wrong!r} does not fit CRATE_{names[0]} for {image_size} pixels")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _depth(weights: dict[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in weights if key.startswith("transformer.layers.")})


def _unwrapped(key: object) -> str:
    key = str(key)
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def _resample(embedding: Tensor, model: CRATE, path: str | Path) -> Tensor:
    """`embedding`, (1, 1 + patches, dim) of a square image, for the grid of `model`."""
    rows, columns = (image // patch for image, patch in zip(model.image_size, model.patch_size, strict=True))
    side = round((embedding.shape[1] - 1) ** 0.5)
    if embedding.dim() != 3 or side**2 != embedding.shape[1] - 1 or not side:
        raise CheckpointError(f"{path}: its position embeddings, {tuple(embedding.shape)}, are of no square image")
    return resample_positions(embedding, (side, side), (rows, columns))
