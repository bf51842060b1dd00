"""From a configuration to a finished run directory, on one process or many, from the start or from where it stopped."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checkpoint.save_load import arguments_of, save_model
from ..checkpoint.start_from import encoder_settings, go_on_from, read_weights, start_from
from ..data.open import Data, open_data
from ..data.order import check_parts, make_plan
from ..device import Compute, check_kernels, choose_compute
from ..errors import UnreadableError
from ..eval_transform import transform_of
from ..files import is_text
from ..inspection.reconstruct import draw_reconstructions
from ..locks import unlock
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from ..optional import TRAIN, require
from ..processes import ALONE, Ranks, process_group, read_ranks
from ..settings import ConfigError, RunSettings, TrainConfig
from ..signals import Signals, Stopped
from ..sizes import SIZES
from .cuda_graphs import check_graphs
from .loop import Trainer, TrainingError
from .metrics import Score
from .monitor import plot_curves, plot_watched
from .objectives import OBJECTIVES, mask_noise
from .optimizer import warmup_steps
from .parallel import check_strategy
from .published_run import Start, as_checkpoint, check_settings, describe_start, names_published, read_start
from .resolve import check_given_against_run, describe
from .resume import lock_and_read_checkpoint, take_up
from .run_directory import START, RunDirectory, check_free, find_run
from .same_data import check_same_data, warn_of_reader

LOST = {
    r"DataLoader worker .*(is killed|exited)|Pin memory thread exited": "a process that reads images was ended from outside, "
    "for want of memory perhaps; fewer --workers need less",
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|remote process exited": "another process of the run is gone",
}
"""What PyTorch's errors say where a part of the run was lost, and how it is told."""
SIZES_OF_ARCH = frozenset(SIZES["tiny"])
DRAWN = 8  # test images, of which reconstructions are drawn


def train(config: TrainConfig, *, given: dict | None = None, resume: str | None = None) -> tuple[RunDirectory | None, Score]:
    """Trains a CRATE and fills a run directory, in this process or, under torchrun, together with the others.

    Equal configurations give bit-identical weights on one machine with one number of processes and CPU threads, whether the
    run is stopped on its way or not.

    Args:
        config: the settings.
        given: those of them that were asked for, which a resumed run compares with its own.
        resume: a run directory or a checkpoint in one to go on from, or "auto": what is in `config.out`, if anything; or a
            checkpoint of the published main.py, from which a new run goes on.

    Returns:
        The run directory, None in all processes but the first, and the last score on the test images.

    Raises:
        ConfigError: the settings do not fit each other, the data, the machine or the disk.
        CheckpointError: the weights to start from cannot be used.
        BackendError: the backend asked for does not run here.
        TrainingError: a loss or gradient is not finite, or an image too many cannot be read.
        Stopped: a signal ended the run; it is saved.
        MissingPackageError: a package of the extra "train" is not installed.
    """
    require(*TRAIN)  # all of them now, and not after the last epoch
    ranks = read_ranks()
    _check_out(config, ranks, resume)
    with Signals(tell=ranks.first) as signals:
        try:
            with process_group(ranks, choose_compute(config.device, config.precision, ranks).device):
                task = _settle(config, given or {}, resume, ranks)
                compute = _check(task.config, ranks)
                with process_group(ranks, compute.device, alone=task.config.strategy == "fsdp"):
                    return _train(task, compute, ranks, signals)
        except RuntimeError as error:
            if isinstance(error, TrainingError | UnreadableError):
                raise
            if signals.received is not None:  # the others were gone first, and the sum over all processes failed
                raise Stopped(signals.received, f"stopped by signal {signals.received}") from error
            lost = next((words for pattern, words in LOST.items() if re.search(pattern, str(error))), None)
            if lost is None:
                raise
            raise TrainingError(f"{lost}; --resume goes on from the last checkpoint") from error
        finally:
            unlock()


class Task(NamedTuple):
    """What is to be trained, once that is settled.

    config: the settings; a resumed run's own.
    given: those of them that were asked for.
    run: the directory of a run that goes on, and by what word (itself, a checkpoint in it, "auto"); None: a new one.
    start: the checkpoint of the published main.py from which a new run goes on, if any.
    """

    config: TrainConfig
    given: dict
    run: tuple[RunDirectory, str] | None
    start: Start | None


def _settle(config: TrainConfig, given: dict, resume: str | None, ranks: Ranks) -> Task:
    """A new run, or an older one with its own settings."""
    start = None
    if resume is None or names_published(resume):
        again = ranks.share(lambda: _implied(config, ranks))
        start = read_start(Path(resume)) if resume and not again else None
        resume = again
    run = find_run(resume, config.out) if resume is not None else None
    if run is not None and resume is not None:
        own = run.read_config()
        config = replace(own, **check_given_against_run(own, given, run.path), out=str(run.path))
        return Task(config, given, (run, resume), start)
    if start is not None:
        config = replace(config, **check_settings(start, config, given))
    if config.init is not None and config.objective == "classes":
        of_arch = SIZES_OF_ARCH if given.get("arch") else frozenset()
        said = given.keys() | of_arch
        found = encoder_settings(config.init, config.heads if "heads" in said else None)
        config = replace(config, **{name: value for name, value in found.items() if name not in said})
    if (out := config.out) is not None:
        ranks.share(lambda: check_free(out))
    return Task(config, given, None, start)


def _check(config: TrainConfig, ranks: Ranks) -> Compute:
    """Where and how the run computes.

    Raises:
        ConfigError, BackendError, MissingPackageError: the settings do not fit each other or the machine.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    compute = choose_compute(config.device, config.precision, ranks)
    check_kernels(config.backend, config.device, compute, config.dim_head)
    check_graphs(config, compute)
    check_strategy(config, compute)
    if config.tensorboard:
        require("tensorboard")
        if not is_text(config.out or ""):
            raise ConfigError(f"--tensorboard is yes and --out is {config.out}; TensorBoard takes names in UTF-8 alone")
    check_parts(config, ranks)
    return compute


def _train(task: Task, compute: Compute, ranks: Ranks, signals: Signals) -> tuple[RunDirectory | None, Score]:
    trainer, run, lines = _make_trainer(task, compute, ranks, signals)
    if ranks.first:
        _announce(trainer, task.given, run, lines)
    score = trainer.fit(run)
    model = trainer.parallel.whole(trainer.evaluated_model)
    if ranks.first:
        save_model(model, run.model)
        rows, title = run.read_metrics(), f"{trainer.objective.name} on {trainer.data.name}: test {score}"
        plot_curves(rows, run.curves, title)
        plot_watched(rows, run.rates, title)
        if isinstance(model, CRATEMAE):
            _draw(model, trainer, run, title)
    return (run if ranks.first else None), score


def _draw(model: CRATEMAE, trainer: Trainer, run: RunDirectory, title: str) -> None:
    """Draws what the model makes of the first test images, masked as in their evaluation."""
    images, _ = next(iter(trainer.data.test_batches(DRAWN, ALONE)))
    noise = mask_noise(trainer.config.seed, 0, np.arange(len(images)), model.patch_embed.num_patches)
    draw_reconstructions(model.eval(), images, noise, trainer.config.mask_ratio, run.reconstructions, title)


def _make_trainer(task: Task, compute: Compute, ranks: Ranks, signals: Signals) -> tuple[Trainer, RunDirectory, list[str]]:
    """(a trainer at the step from which it is to go on, its run directory, what is to be said of that)"""
    config, start, checkpoint = task.config, task.start, None
    if task.run is not None:
        run, resume = task.run
        checkpoint = lock_and_read_checkpoint(run, resume, config, ranks)
        if checkpoint is None and (path := run.read_start()) is not None:  # killed before it had one of its own
            start = read_start(path)
    # Weights before data, which may have to be downloaded or listed for minutes.
    classifies = config.objective == "classes"
    weights = read_weights(config.init) if config.init and checkpoint is None and classifies else None
    data = open_data(config, compute.device, ranks, labelled=classifies)
    if task.run is not None:
        check_same_data(task.run[0], data.describe())
        if ranks.first:
            warn_of_reader(task.run[0], data.describe())
    plan = make_plan(config, data.train_count, ranks)
    model = build_model(config, data)
    lines = []
    if config.init and checkpoint is None:
        started: Any = model
        lines = [go_on_from(started, config.init) if weights is None else start_from(started, weights, config.init)]
    trainer = Trainer(config, model.to(compute.device), data, plan, compute, signals)
    if start is not None:
        trainer.load(as_checkpoint(start, trainer))
        lines += describe_start(start, config)
    if task.run is None:
        return trainer, ranks.share(lambda: _create(config, trainer, start)), lines
    return trainer, task.run[0], [*lines, take_up(trainer, task.run[0], checkpoint)]


def build_model(config: TrainConfig, data: Data) -> CRATE | CRATEMAE:
    """The model that `config` asks for, a CRATE's with a head for `data`, on the CPU, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    try:
        model = OBJECTIVES[config.objective](config).build(data)
    except ValueError as error:  # sizes that are within their bounds one by one
        raise ConfigError(str(error)) from error
    # There are no names for all outputs where there are more of them.
    names = data.class_names if isinstance(model, CRATE) and config.num_classes in (None, data.classes) else None
    model.transform = transform_of(config.eval_crop, data.describe(), names)
    return model


def _check_out(settings: RunSettings, ranks: Ranks, resume: str | None) -> None:
    """Where torchrun may restart a run, it must find it again."""
    if settings.out is not None:
        return
    if ranks.count > 1 and resume is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0").strip() not in ("", "0"):
        raise ConfigError(
            "torchrun may restart this run (--max-restarts), which has to find its directory again: give --out DIR"
        )
    if resume == "auto":
        raise ConfigError("--resume is 'auto', which goes on with the run in --out DIR; --out is not given")


def _launch() -> str | None:
    """What torchrun calls this launch in all its restarts; None where it gives no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def _implied(settings: RunSettings, ranks: Ranks) -> str | None:
    """What --resume is without being given: "auto" where torchrun has started this process again, which it does not count on
    every machine alike, so that a run of this same launch in `out` tells it too; else None."""
    if ranks.restarts:
        return "auto"
    before = RunDirectory(settings.out).read_launch() if settings.out is not None else None
    return "auto" if before is not None and before == _launch() else None


def _create(config: TrainConfig, trainer: Trainer, start: Start | None) -> RunDirectory:
    """A new run directory, locked; its config.json names the checkpoint of main.py from which it goes on, if any."""
    run = RunDirectory.create(config.out, trainer.data.name)
    held_out = getattr(trainer.data, "held_out", None)
    if held_out is not None:
        run.write_held_out(held_out)
    run.write_config(_describe(trainer) | ({} if start is None else {START: str(start.path.absolute())}))
    return run


def _announce(trainer: Trainer, given: dict, run: RunDirectory, lines: list[str]) -> None:
    """Says what is computed, where and how."""
    config, compute, ranks, backend = trainer.config, trainer.compute, trainer.ranks, trainer.backend
    print(f"{compute.describe()}, {compute.precision}, backend {backend.name} ({backend.reason}); run directory {run.path}")
    data, model = trainer.data, trainer.model
    layers = model.transformer.depth if isinstance(model, CRATE) else len(model.blocks) + len(model.decoder_blocks)
    print(
        f"{data.name}: {data.train_count:,} images of {data.classes} classes to train on, {data.test_count:,} to evaluate on; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters in {layers} layers; {trainer.steps:,} steps"
    )
    if given:
        print(f"asked for: {', '.join(describe(config, given))}; all settings are in {run.config}")
    for line in lines:
        print(line)
    idle = torch.cuda.device_count() if compute.device.type == "cuda" and ranks.count == 1 else 1
    if idle > 1:
        line = " ".join(sys.argv[1:])
        print(f"{idle} GPUs are here and one is used; all: torchrun --nproc_per_node={idle} -m crate_fast {line}")
    sys.stdout.flush()


def _describe(trainer: Trainer) -> dict:
    """What config.json says: the settings, and all that followed from them and from the machine."""
    config, compute = trainer.config, trainer.compute
    return {
        "config": asdict(config),
        "resolved": {
            "device": str(compute.device),
            "device_name": compute.describe(),
            "precision": compute.precision,
            "backend": trainer.backend._asdict(),
            "num_threads": torch.get_num_threads(),
            "training_flops": trainer.flops,
            "peak_flops": trainer.peak,
            "steps": trainer.steps,
            "warmup_steps": warmup_steps(trainer.steps, config.warmup),
        },
        "circumstances": trainer.circumstances(),
        "launch": _launch(),
        "model": arguments_of(trainer.model),
        "data": trainer.data.describe(),
    }
