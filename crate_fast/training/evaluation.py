"""Evaluating what a run left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checkpoint import CheckpointError, load_model
from ..model import CRATE
from .compute import choose_compute
from .config import ConfigError, TrainConfig
from .digits import CHANNELS, CLASSES, Digits
from .metrics import Score, evaluate
from .rundir import RunDirectory


def evaluate_run(
    path: str | Path,
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Score:
    """The score of a trained model on the test split of the digits.

    Args:
        path: a run directory, its model.safetensors, or a checkpoint of it.
        backend, precision, batch_size: as in the run where None, and so exactly the score it logged on such a machine.
        device: as in training.

    Raises:
        CheckpointError: the model's file is missing, damaged or something else.
        ConfigError: the model is not for the digits, the run's config.json is damaged, a value is out of its bounds, or the
            device is not here.
        BackendError: the backend does not run here.
    """
    path = Path(path)
    asked = {"backend": backend, "precision": precision, "batch_size": batch_size}
    settings = replace(_settings(path), **{name: value for name, value in asked.items() if value is not None})
    file = _model_file(path)
    compute = choose_compute(device, settings.precision)
    model = load_model(file, backend=settings.backend)
    _check_fits(model, file)
    data = Digits(model.image_size, compute.device)
    return evaluate(model.to(compute.device), data.test_batches(settings.batch_size), compute)


def _settings(path: Path) -> TrainConfig:
    """How the run computed of which `path` is the directory, or a file up to two folders down; defaults without a run."""
    for folder in (path, path.parent, path.parent.parent):
        run = RunDirectory(folder)
        if run.config.is_file():
            return run.read_config()
    return TrainConfig()


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    run = RunDirectory(path)
    if not run.model.is_file():
        raise CheckpointError(f"{path}: no {run.model.name} in it; a run writes it at its end, its checkpoints before")
    return run.model


def _check_fits(model: CRATE, file: Path) -> None:
    channels, classes = model.channels, model.mlp_head[1].out_features
    if (channels, classes) != (CHANNELS, CLASSES):
        raise ConfigError(
            f"{file}: the model takes {channels} channels and tells {classes} classes apart; the digits have {CHANNELS} "
            f"and {CLASSES}"
        )
