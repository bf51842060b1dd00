"""Weights to start from: published checkpoints and ours, whatever their shape and from whatever device."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..model import CRATE
from ..positions import resample_positions
from ..reading import CheckpointError, model_file, read_model

HEAD = "mlp_head."


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in `path`, on the CPU, by the names of `CRATE`; whatever `crate_fast.load_checkpoint` reads.

    Raises:
        CheckpointError: the file is missing, damaged, or has no weights of a CRATE.
    """
    arguments, weights = read_model(model_file(path))
    return weights if arguments is not None else {key: value.float() for key, value in weights.items()}


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


def _resample(embedding: Tensor, model: CRATE, path: str | Path) -> Tensor:
    """`embedding`, (1, 1 + patches, dim) of a square image, for the grid of `model`."""
    rows, columns = (image // patch for image, patch in zip(model.image_size, model.patch_size, strict=True))
    side = round((embedding.shape[1] - 1) ** 0.5)
    if embedding.dim() != 3 or side**2 != embedding.shape[1] - 1 or not side:
        raise CheckpointError(f"{path}: its position embeddings, {tuple(embedding.shape)}, are of no square image")
    return resample_positions(embedding, (side, side), (rows, columns))
