"""Models as files: written whole or not at all, checked when read, never executed; ours, published ones and others' kinds."""

from .read import METADATA_KEY, CheckpointError, read_checkpoint
from .save_load import constructor_arguments, load_checkpoint, save_checkpoint, save_model

__all__ = [
    "METADATA_KEY",
    "CheckpointError",
    "constructor_arguments",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "save_model",
]
