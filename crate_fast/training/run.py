"""From a configuration to a finished run directory, on one process or many, from the start or from where it stopped."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict, replace

import torch

from ..backend import choose_backend
from ..checkpoint import constructor_arguments, load_checkpoint, save_model
from ..extras import DISTRIBUTIONS, require
from ..model import CRATE
from .compute import choose_compute
from .config import ConfigError, TrainConfig
from .data import Data, open_data
from .loop import Trainer, TrainingError
from .metrics import Score
from .optimizer import warmup_steps
from .plan import make_plan
from .plots import plot_curves
from .ranks import Ranks, join, leave, read_ranks
from .resolve import check_unchanged, describe
from .rundir import RunDirectory, find_run
from .saving import Checkpoints, circumstances, warn_of_changes
from .stop import Signals, Stopped
from .weights import start_from


def train(config: TrainConfig, *, given: dict | None = None, resume: str | None = None) -> tuple[RunDirectory | None, Score]:
    """Trains a CRATE and fills a run directory, in this process or, under torchrun, together with the others.

    Equal configurations give bit-identical weights on one machine with one number of processes and CPU threads, whether the
    run is stopped on its way or not.

    Args:
        config: the settings.
        given: those of them that were asked for, which a resumed run compares with its own.
        resume: a run directory or a checkpoint in one to go on from, or "auto": what is in `config.out`, if anything.

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
    require(*DISTRIBUTIONS)  # all of them now, and not after the last epoch
    ranks = read_ranks()
    resume = "auto" if ranks.restarts and resume is None else resume
    if resume == "auto" or resume is None:
        _check_out(config, ranks, resume)
    run = find_run(resume, config.out) if resume else None
    if run is not None:
        own = run.read_config()
        config = replace(own, **check_unchanged(own, given or {}, run.path), out=str(run.path))
    with Signals(ranks) as signals:
        try:
            return _train(config, run, resume, ranks, signals)
        except RuntimeError as error:
            if signals.received is None or isinstance(error, TrainingError):
                raise
            # The others were gone first, and the sum over all processes failed.
            raise Stopped(signals.received, f"stopped by signal {signals.received}") from error
        finally:
            if run is not None:
                run.unlock()


def _train(
    config: TrainConfig, run: RunDirectory | None, resume: str | None, ranks: Ranks, signals: Signals
) -> tuple[RunDirectory | None, Score]:
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    compute = choose_compute(config.device, config.precision, ranks)
    join(ranks, compute.device)
    warnings.filterwarnings("ignore", message="find_unused_parameters")
    data = open_data(config, compute.device, ranks)
    plan = make_plan(config, data.train_count, ranks)
    model = build_model(config, data)
    lines = [start_from(model, config.init)] if config.init and run is None else []
    model.to(compute.device)
    trainer = Trainer(config, model, data, plan, compute, signals)
    opened = ranks.share(lambda: _open(config, run, data, trainer) if ranks.first else None)
    try:
        checkpoint = _find_checkpoint(opened, resume, ranks)
        if checkpoint is not None:
            trainer.load(checkpoint)
            if ranks.first:
                warn_of_changes(checkpoint["circumstances"], circumstances(compute, ranks))
                opened.cut_log(checkpoint["logged"])
                lines.append(f"going on after step {trainer.step} of {trainer.steps}")
        elif run is not None and ranks.first:
            opened.cut_log(0)
        if ranks.first:
            _announce(config, trainer, opened, lines)
        score = trainer.fit(opened)
        if ranks.first:
            save_model(trainer.evaluated_model, opened.model)
            plot_curves(opened.read_metrics(), opened.curves, f"CRATE on {data.name}: test {score}")
    finally:
        if ranks.first:
            opened.unlock()
    leave(ranks)
    return (opened if ranks.first else None), score


def build_model(config: TrainConfig, data: Data) -> CRATE:
    """The CRATE that `config` asks for, with a head for `data`, on the CPU, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return CRATE(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=data.classes,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        pool=config.pool,
        channels=data.channels,
        dim_head=config.dim_head,
        dropout=config.dropout,
        emb_dropout=config.dropout,
        ista=config.ista,
        lambd=config.lambd,
        backend=config.backend,
    )


def _check_out(config: TrainConfig, ranks: Ranks, resume: str | None) -> None:
    """Where torchrun may restart a run, it must find it again."""
    if config.out is None and (ranks.restarts or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))) and ranks.count > 1:
        raise ConfigError(
            "torchrun may restart this run (--max-restarts), which has to find its directory again: give --out DIR"
        )
    if config.out is None and resume == "auto":
        raise ConfigError("--resume is 'auto', which goes on with the run in --out DIR; --out is not given")


def _open(config: TrainConfig, run: RunDirectory | None, data: Data, trainer: Trainer) -> RunDirectory:
    """The directory of the run, locked: made, or where it goes on, as it is."""
    if run is not None:
        run.lock()
        return run
    run = RunDirectory.create(config.out, data.name)
    try:
        run.write_config(_describe(config, trainer))
    except BaseException:
        run.unlock()
        raise
    return run


def _find_checkpoint(run: RunDirectory, resume: str | None, ranks: Ranks) -> dict | None:
    """The checkpoint to go on from, in every process."""
    if resume is None:
        return None
    if resume.endswith(".pt"):
        return load_checkpoint(resume)

    def newest() -> str | None:
        found = Checkpoints(run.checkpoints, 1).load_newest()
        return found and str(found[0])

    path = ranks.share(newest)
    return None if path is None else load_checkpoint(path)


def _announce(config: TrainConfig, trainer: Trainer, run: RunDirectory, lines: list[str]) -> None:
    """Says what is computed, where and how."""
    compute, ranks = trainer.compute, trainer.ranks
    backend = choose_backend(config.backend, trainer.model.pos_embedding, config.dim_head)
    print(f"{compute.describe()}, {compute.precision}, backend {backend.name} ({backend.reason}); run directory {run.path}")
    print(describe(config))
    for line in lines:
        print(line)
    idle = torch.cuda.device_count() if compute.device.type == "cuda" and ranks.count == 1 else 1
    if idle > 1:
        line = " ".join(sys.argv[1:])
        print(f"{idle} GPUs are here and one is used; all: torchrun --nproc_per_node={idle} -m crate_fast {line}")
    sys.stdout.flush()


def _describe(config: TrainConfig, trainer: Trainer) -> dict:
    """What config.json says: the settings, and all that followed from them and from the machine."""
    compute = trainer.compute
    backend = choose_backend(config.backend, trainer.model.pos_embedding, config.dim_head)
    return {
        "config": asdict(config),
        "resolved": {
            "device": str(compute.device),
            "device_name": compute.describe(),
            "precision": compute.precision,
            "backend": backend._asdict(),
            "num_threads": torch.get_num_threads(),
            "steps": trainer.steps,
            "warmup_steps": warmup_steps(trainer.steps, config.warmup),
        },
        "circumstances": circumstances(compute, trainer.ranks),
        "model": constructor_arguments(trainer.model),
        "data": trainer.data.describe(),
    }
