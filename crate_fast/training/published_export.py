"""A run as the published main.py would have saved it, for its --resume and for finetune.py's --ckpt_dir."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint.distributed import SUFFIX, is_in_parts
from ..checkpoint.layouts import WRAPPERS
from ..checkpoint.read import CheckpointError, read_checkpoint
from ..checkpoint.save_load import constructor_arguments, load_file, transform_entry
from ..files import write_atomically
from ..model.crate import CRATE
from ..settings import TrainConfig
from ..sizes import SIZES
from .checkpoint_contents import check_values, check_whole
from .optimizer import build_optimizer, main_factor
from .resolve import check_written
from .run_directory import RunDirectory

KINDS = (".pt", SUFFIX)
GROUPS: dict[str, dict] = {
    "Lion": {},
    "AdamW": {"eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
    | {"differentiable": False, "fused": None},
}
"""What main.py's optimizers have in their group of parameters beside learning rate, betas, decay and parameters."""
OTHERWISE = "; --layout state_dict writes its weights alone"


def find_trained(source: str | Path) -> Path | None:
    """The checkpoint of a run that `source` is, or the newest of the run whose directory it is; None where there is none."""
    path = Path(source)
    if _run_of(path) is not None:
        return path
    run = RunDirectory(path)
    if not run.config.is_file() or not run.checkpoints.is_dir():
        return None
    return next((name for name in sorted(run.checkpoints.glob("step-*"), reverse=True) if name.suffix in KINDS), None)


def _run_of(path: Path) -> RunDirectory | None:
    """The run in whose folder the checkpoint `path` lies."""
    run = RunDirectory(path.absolute().parent.parent)
    return run if path.suffix in KINDS and path.absolute().parent == run.checkpoints and run.config.is_file() else None


def save_main(source: Path, target: Path, prefix: str = WRAPPERS[0], wanted: str | None = None) -> tuple[CRATE, list[str]]:
    """Writes the run's checkpoint `source` to `target` as main.py saves its own; (model, what is to be said of it).

    Names have `prefix`, by default "module." as on a GPU there: finetune.py takes no others, and says nothing of it.

    Args:
        wanted: "mean" for the mean of the weights, where the run keeps one, else the last ones, which the optimizer has moved.

    Raises:
        CheckpointError: the checkpoint is damaged, or its run did what main.py cannot go on with.
        ConfigError: its run's config.json is damaged.
        OSError: `target` cannot be written.
    """
    run = _run_of(source)
    if run is None or is_in_parts(source):
        raise CheckpointError(f"{source}: in parts, so that its optimizer is not in one place{OTHERWISE}")
    config, content = run.read_config(), check_values(source, read_checkpoint(source))
    check_written(config, content.get("settings", {}), run.config, run.former_epochs())
    if config.optimizer not in GROUPS or config.decay != "all":
        words = f"its optimizer is {config.optimizer} with --decay {config.decay}; main.py has AdamW and Lion, which decay all"
        raise CheckpointError(f"{source}: {words}{OTHERWISE}")
    model = load_file(source, "cpu", {}, wanted or ("last" if content.get("ema") is not None else None))
    optimizer = build_optimizer(model, config)
    check_whole(model, optimizer, content, False, source)
    saved = _as_main(model, config, content, prefix, optimizer.param_groups[0]["betas"])
    write_atomically(target, lambda file: torch.save(saved, file))
    return model, _notes(content, config, saved["arch"], run.read_steps() // config.epochs)


def _as_main(model: CRATE, config: TrainConfig, content: dict, prefix: str, betas: tuple[float, float]) -> dict:
    epoch, count = content["epoch"], len(list(model.parameters()))
    rate = config.lr * main_factor(epoch, config.epochs)
    group = {
        **GROUPS[config.optimizer],
        "betas": betas,
        "lr": rate,
        "initial_lr": config.lr,
        "weight_decay": config.weight_decay,
    }
    return {
        "epoch": epoch,
        "arch": name_of(model),
        "state_dict": {prefix + name: value for name, value in model.state_dict().items()},
        "best_acc1": torch.tensor(100 * max(0.0, content["best"])),
        "optimizer": {"state": content["optimizer"]["state"], "param_groups": [group | {"params": list(range(count))}]},
        "scheduler": {
            **{"base_lrs": [config.lr], "last_epoch": epoch, "_step_count": epoch + 1, "_last_lr": [rate]},
            "lr_lambdas": [None],
        },
        "arguments": constructor_arguments(model),  # main.py passes over it
        **transform_entry(model),
    }


def name_of(model: CRATE) -> str:
    """The published size that `model` is, or "CRATE"."""
    own = {name: getattr(model.transformer, name) for name in ("dim", "depth", "heads")}
    return next((f"CRATE_{name}" for name, size in SIZES.items() if own.items() <= size.items()), "CRATE")


def _notes(content: dict, config: TrainConfig, name: str, steps: int) -> list[str]:
    lines = [f"for finetune.py --ckpt_dir, and main.py --resume with --optimizer {config.optimizer} --epochs {config.epochs}"]
    if content["step"] != content["epoch"] * steps:
        lines.append(f"it is of step {content['step']}, within epoch {content['epoch'] + 1}, which main.py begins again")
    if config.schedule != "main-epoch":
        lines.append(f"its learning rates were those of --schedule {config.schedule}; main.py goes on with its own")
    if name == "CRATE":
        lines.append("it is of no published size, and main.py builds no other")
    return lines
