"""How a run that exists goes on: from which checkpoint, what is cut back to it, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..processes import Ranks
from ..settings import TrainConfig
from .circumstances import warn_of_changes
from .loop import Trainer
from .optimizer import learning_rate_at
from .parallel import parallel_kind
from .resolve import check_run_against_checkpoint
from .run_directory import RunDirectory


def lock_and_read_checkpoint(run: RunDirectory, resume: str, config: TrainConfig, ranks: Ranks) -> dict | None:
    """Locks a run that exists; the checkpoint to go on from, in every process, or None where it has none yet."""

    checkpoints = parallel_kind(config).checkpoints(run.checkpoints, 1)

    def lock_and_find() -> str | None:
        run.lock()
        run.tidy()
        if resume.endswith(checkpoints.suffix):
            checkpoints.set_aside_after(checkpoints.read(Path(resume))["step"])
            return resume
        found = checkpoints.load_newest()
        if found is None:
            run.check_begun(config.checkpoint_every)
        return found and str(found[0])

    path = ranks.share(lock_and_find)
    if path is None:
        return None
    checkpoint = checkpoints.read(Path(path), whole=False)
    check_run_against_checkpoint(
        config, checkpoint.get("settings", {}), run.config, [run.read_config().epochs, *run.former_epochs()]
    )
    return checkpoint


def take_up(trainer: Trainer, run: RunDirectory, checkpoint: dict | None) -> str:
    """Loads `checkpoint` and cuts the metrics back to it; a line that says where the run goes on."""
    if checkpoint is not None:
        trainer.load(checkpoint)  # which may refuse it, and then nothing is to have been touched
    if trainer.ranks.first:
        run.cut_log(checkpoint["logged"] if checkpoint else 0)
    longer = _lengthen(trainer, run)
    if checkpoint is None:
        return f"no checkpoint yet: from the {'start' if run.read_start() is None else 'published one'}{longer}"
    if trainer.ranks.first:
        warn_of_changes(checkpoint["circumstances"], trainer.circumstances())
    return f"going on after step {trainer.step} of {trainer.steps}{longer}"


def _lengthen(trainer: Trainer, run: RunDirectory) -> str:
    """Where the run is to have more epochs than it was begun with, writes that down; what it means, in words, else nothing."""
    config, step, epoch_steps = trainer.config, trainer.step + 1, trainer.plan.steps
    before = trainer.ranks.share(lambda: run.read_config().epochs)
    if config.epochs == before:
        return ""
    if trainer.ranks.first:
        run.lengthen(config.epochs, trainer.steps, trainer.step)
    old = learning_rate_at(step, epoch_steps, replace(config, epochs=before)) if step <= before * epoch_steps else 0.0
    return (
        f"; {config.epochs} epochs, not {before}: from step {step} on the learning rate is that of a run of {config.epochs} "
        f"epochs, {learning_rate_at(step, epoch_steps, config):.3g} now, not {old:.3g}"
    )
