"""Evaluating what a run left behind, or a published checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.constructor import PUBLISHED_MODEL, constructor_arguments
from ..checkpoint.read import model_file
from ..checkpoint.save_load import load_classifier
from ..data.open import Data, open_data
from ..data.order import most_batches
from ..data_sets import UNCHANGED
from ..device import check_kernels, choose_compute
from ..eval_transform import transform_of
from ..model.crate import CRATE
from ..processes import Ranks, process_group, read_ranks
from ..settings import ConfigError, DataSettings, MachineSettings, TrainConfig
from ..sizes import ARCHITECTURES
from .metrics import Score, evaluate
from .progress import Speaker, Testing
from .resolve import resolve
from .run_directory import RunDirectory
from .same_data import CLASS_NAMES, check_same_data

SAID = ("model", "dim", "depth", "heads")  # what --arch says of a model
# Settings of the run's own data, which are no others'.
UNMOVED = {name: none for settings in UNCHANGED.values() for name, none in settings.items()}


def evaluate_run(
    path: str | Path,
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    workers: int | None = None,
    arch: str | None = None,
    weights: str | None = None,
    eval_crop: float | None = None,
    print_every: int = 0,
    **overrides,
) -> Score:
    """The score of a trained model on its test images; under torchrun, of all processes together.

    Args:
        path: a run directory, its model.safetensors, a checkpoint of it, or a checkpoint of the published scripts.
        backend, precision, batch_size, data, data_dir, workers: as in the run where None, and so exactly the score it logged
            on such a machine; the digits, or main.py's settings for other data, where there is no run.
        device: as in training.
        arch: the size that the model must have, if any.
        weights: "last" or "mean", as in `load_checkpoint`.
        eval_crop: the part of an image that is seen, 0: all, squeezed; None: as stored with the weights, else as in the run,
            else as the published script does whose checkpoint it is.
        print_every: print the published main.py's `Test: [i/n]` lines, of the first batch and every so many after it; 0: none,
            but in any case one on stderr where a minute went by without any.
        overrides: keywords of `load_checkpoint` that say what the file leaves open, such as `heads`.

    Raises:
        CheckpointError: the model's file is missing, damaged or something else.
        ConfigError: the model is not for the data, the run's config.json is damaged, a value is out of its bounds, or the
            device is not here.
        BackendError: the backend does not run here.
    """
    path, ranks = Path(path), read_ranks()
    asked = {"backend": backend, "precision": precision, "batch_size": batch_size, "data": data, "data_dir": data_dir}
    asked |= {"workers": workers, "eval_crop": eval_crop}
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = _settings(path, asked)
    file = model_file(path)
    compute = choose_compute(device, settings.precision, ranks)
    check_kernels(settings.backend, device, compute)
    with process_group(ranks, compute.device):
        model, run = _load(file, settings, arch, {"weights": weights} | overrides), _run_of(path)
        if eval_crop is None:
            settings = replace(settings, eval_crop=_crop_of(model, file, settings, known=run is not None, tell=ranks.first))
        sizes = {"image_size": model.image_size[0], "patch_size": model.patch_size[0]}
        images = open_data(replace(settings, **sizes), compute.device, ranks, model.image_size)
        _check_fits(model, images, file, settings.num_classes)
        if run is not None:
            check_same_data(run, images.describe(), CLASS_NAMES)
        batch = max(1, settings.batch_size // ranks.count)
        tell = Testing(most_batches(images.test_count, batch, ranks), print_every, _speaker(ranks))
        batches = images.test_batches(batch, ranks)
        batches = _normalised_for(model, batches, images.describe(), file)
        return evaluate(model.to(compute.device), batches, compute, ranks, tell=tell)


def is_first() -> bool:
    """Whether this is the process that prints."""
    return read_ranks().first


def _speaker(ranks: Ranks) -> Speaker:
    """Prints lines as they come, and on stderr what is due, in the first process."""
    if not ranks.first:
        return Speaker()
    return Speaker(partial(print, flush=True), partial(print, "crate-fast:", file=sys.stderr, flush=True))


def _run_of(path: Path) -> RunDirectory | None:
    """The run of which `path` is the directory, or a file up to two folders down."""
    runs = map(RunDirectory, (path, path.parent, path.parent.parent))
    return next((run for run in runs if run.config.is_file()), None)


def _settings(path: Path, asked: dict) -> TrainConfig:
    """How the run of `path` computed; defaults without a run."""
    run = _run_of(path)
    if run is None:
        return resolve(asked)
    own = run.read_config()
    still = {} if asked.get("data", own.data) == own.data else UNMOVED
    return replace(own, classes=None, num_classes=own.num_classes if not still else None, **still | asked)


def _crop_of(model: CRATE, file: Path, settings: DataSettings, known: bool, tell: bool) -> float:
    """--eval-crop of a model: what its file says, else its run (`known`), else main.py, which a line on stderr says."""
    if model.transform is not None:
        return model.transform.crop
    if not known and settings.data != "digits" and tell:
        line = f"nothing in it tells how its images are cut; taken as in main.py: --eval-crop {settings.eval_crop}"
        print(f"crate-fast: {file}: {line}", file=sys.stderr)
    return settings.eval_crop


def _normalised_for(
    model: CRATE, batches: Iterator[tuple[Tensor, Tensor]], described: dict, file: Path
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of data that describe themselves so, normalised as the model's file says, where that is otherwise."""
    data, stored = transform_of(0.0, described), model.transform
    if stored is None or stored.mean is None or data.mean is None or data[1:3] == stored[1:3]:
        yield from batches
        return
    if len(stored.mean) not in (1, model.channels):
        raise ConfigError(f"{file}: its evaluation has means of {len(stored.mean)} channels; the model takes {model.channels}")
    mean, std, own_mean, own_std = (torch.tensor(values).view(1, -1, 1, 1) for values in (*data[1:3], *stored[1:3]))
    for images, labels in batches:
        factor, addend = ((value / own_std).to(images.device) for value in (std, mean - own_mean))
        yield images * factor + addend, labels


def _load(file: Path, settings: MachineSettings, arch: str | None, keywords: dict[str, Any]) -> CRATE:
    """The model in float32, to which `precision` refers, whatever its file has."""
    model = load_classifier(file, backend=settings.backend, **keywords).float()
    if arch is not None:
        own = {"model": PUBLISHED_MODEL} | constructor_arguments(model)
        if any(own[name] != ARCHITECTURES[arch][name] for name in SAID):
            size = ", ".join(f"{name} {own[name]}" for name in SAID[1:])
            raise ConfigError(f"--arch is {arch}; {file} holds a model of {size}, a {own['model']}")
    return model


def _check_fits(model: CRATE, data: Data, file: Path, outputs: int | None) -> None:
    """Raises ConfigError where `model` is for other images or classes; more `outputs` than classes are known of its run."""
    channels, classes = model.channels, model.mlp_head[1].out_features
    if channels != data.channels or classes != (outputs or data.classes):
        raise ConfigError(
            f"{file}: the model takes {channels} channels and tells {classes} classes apart; {data.name} has {data.channels} "
            f"and {data.classes}"
        )
