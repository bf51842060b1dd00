"""Runs of the published main.py: going on from its checkpoint here, with weights, optimizer and epoch; a run as it would have
saved it, for its --resume and for finetune.py's --ckpt_dir."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.archives import read_beside_others
from ..checkpoint.constructor import PUBLISHED_MODEL
from ..checkpoint.distributed import SUFFIX, is_in_parts
from ..checkpoint.layouts import FIRST, WRAPPERS, find_weights
from ..checkpoint.read import check_all_plain, read_checkpoint
from ..checkpoint.save_load import constructor_arguments, load_file, transform_entry
from ..errors import CheckpointError
from ..files import write_atomically
from ..model.crate import CRATE
from ..optimizers import OPTIMIZERS
from ..settings import ConfigError, TrainConfig, flag
from ..sizes import SIZES
from .checkpoint_contents import check_values, check_whole, is_count
from .objectives import Patches
from .optimizer import build_optimizer, main_factor
from .resolve import check_run_against_checkpoint
from .run_directory import NO_RUN, RunDirectory

SHAPE = ("dim", "depth", "heads", "dim_head", "pool", "ista", "lambd")  # of ours, converted: what its arguments say
HEAD = "mlp_head.1.weight"
KEPT = ("arch", *SHAPE, "num_classes", "patch_size", "image_size", "optimizer", "lr", "weight_decay")


class Start(NamedTuple):
    """What a checkpoint of main.py tells.

    settings: those that the run had, by our names.
    weights: by the names of `CRATE`.
    state: of the optimizer, by the number of the parameter.
    epoch: epochs made.
    best: the best top-1 so far, as a part.
    rate: the learning rate of the next epoch.
    """

    path: Path
    settings: dict
    weights: dict[str, Tensor]
    state: dict[int, dict]
    epoch: int
    best: float
    rate: float


def names_published(resume: str | None) -> bool:
    """Whether `--resume` names a file that lies in no run's folder of checkpoints."""
    if resume is None or resume == "auto":
        return False
    path = Path(resume)
    return path.is_file() and not (path.suffix == ".pt" and RunDirectory(path.absolute().parent.parent).config.is_file())


def read_start(path: Path) -> Start:
    """What the file `path` of main.py has for a run to go on.

    Raises:
        CheckpointError: it is missing, damaged, or something else.
        ConfigError: it has weights and no optimizer or epoch.
    """
    if path.suffix == ".safetensors":  # which have no optimizer, whoever wrote them
        raise ConfigError(f"--resume is {path}, which {NO_RUN}")
    content, _ = read_beside_others(path, "damaged, or no checkpoint of main.py")
    try:
        weights = find_weights(content, "last").weights if isinstance(content, dict) else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if FIRST not in weights:
        raise CheckpointError(f"{path}: no weights of a CRATE in it")
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict) or "epoch" not in content:
        raise ConfigError(f"--resume is {path}, which {NO_RUN}")
    check_all_plain(path, {"weights": weights, "optimizer": optimizer, "best": content.get("best_acc1")})
    if not is_count(content["epoch"]):
        raise CheckpointError(f"{path}: its 'epoch' is {str(content['epoch'])[:100]}")
    settings, state, rate = _read_optimizer(path, optimizer)
    settings |= _read_sizes(content)
    if weights.get(HEAD) is not None and weights[HEAD].dim() == 2:  # main.py's has 1000 outputs, whatever the data
        settings["num_classes"] = len(weights[HEAD])
    return Start(path, settings, weights, state, content["epoch"], _read_best(path, content), rate)


def _read_sizes(content: dict) -> dict:
    if isinstance(content.get("arguments"), dict):
        said = {name: content["arguments"].get(name) for name in (*SHAPE, "patch_size", "image_size")}
        for name in ("patch_size", "image_size"):
            sides = said[name]
            said[name] = sides[0] if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1] else None
        return {name: value for name, value in said.items() if value is not None}
    arch = content.get("arch")
    known = {f"CRATE_{name}": size for name, size in SIZES.items()}
    return {"arch": arch, **known[arch]} if arch in known else {}


def _read_best(path: Path, content: dict) -> float:
    found = content.get("best_acc1", 0.0)
    best: Any = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if type(best) not in (int, float) or not 0 <= best <= 100:
        raise CheckpointError(f"{path}: its 'best_acc1' is {str(best)[:100]}; it must be a percentage")
    return best / 100


def _read_optimizer(path: Path, optimizer: dict) -> tuple[dict, dict[int, dict], float]:
    """(settings, state by parameter, learning rate) of an optimizer's state_dict."""
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: its optimizer is none of main.py, which has all parameters in one group")
    moments = {frozenset(one) if isinstance(one, dict) else frozenset() for one in state.values()}
    kind = next((name for name, one in OPTIMIZERS.items() if one.main is not None and moments == {one.keeps}), None)
    if kind is None:
        raise CheckpointError(f"{path}: its optimizer has made no step, or is neither AdamW nor Lion, main.py's")
    rates: dict[str, Any] = {name: groups[0].get(name) for name in ("lr", "weight_decay")}
    rates["peak"] = groups[0].get("initial_lr", rates["lr"])
    wrong = next((name for name, value in rates.items() if type(value) not in (int, float) or not math.isfinite(value)), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: its optimizer's {wrong} is {str(rates[wrong])[:100]}")
    for one in state.values():  # before PyTorch 1.12 a plain number
        if is_count(one.get("step")):
            one["step"] = torch.tensor(float(one["step"]))
    settings = {"optimizer": kind, "lr": float(rates["peak"]), "weight_decay": float(rates["weight_decay"])}
    return settings, state, float(rates["lr"])


def check_settings(start: Start, config: TrainConfig, given: dict) -> dict:
    """The settings that a run takes from `start`; raises ConfigError where it asks for others, or for what main.py has not."""
    for name in KEPT:
        if name in start.settings and name in given and given[name] != start.settings[name]:
            raise ConfigError(
                f"{flag(name)} is {given[name]}; {start.path} has {start.settings[name]}, with which a run goes on "
                "(to take its weights alone: --init)"
            )
    if config.init is not None:
        raise ConfigError(f"--init is {config.init} and --resume is {start.path}; a run takes its weights from one of them")
    for name, only in (("strategy", "ddp"), ("decay", "all"), ("model", PUBLISHED_MODEL)):
        if getattr(config, name) != only:
            raise ConfigError(
                f"{flag(name)} is {getattr(config, name)!r}; from a checkpoint of main.py a run goes on with {only!r}"
            )
    if start.epoch >= config.epochs:
        raise ConfigError(f"--epochs is {config.epochs}; {start.path} has made {start.epoch}, so that nothing is left")
    return {name: value for name, value in start.settings.items() if name not in given}


def as_checkpoint(start: Start, trainer: Any) -> dict:
    """`start` as a checkpoint of ours, for `trainer` to load, which judges it as it does all."""
    mean = None if trainer.average is None else start.weights
    return {
        "path": str(start.path),
        "model": start.weights,
        "ema": mean,
        "optimizer": {"state": start.state},
        "scaler": trainer.scaler.state_dict(),
        "step": start.epoch * trainer.plan.steps,
        "epoch": start.epoch,
        "meter": [0.0] * 4,
        "score": None,
        "best": start.best,
    }


def describe_start(start: Start, config: TrainConfig) -> list[str]:
    """What is said of a run that goes on from `start`."""
    taken = ", ".join(f"{name} {value}" for name, value in start.settings.items())
    lines = [f"{start.path}: going on after epoch {start.epoch} of {config.epochs}, with its weights and optimizer ({taken})"]
    expected = config.lr * main_factor(start.epoch, config.epochs)
    if config.schedule != "main-epoch":
        lines.append(f"--schedule is {config.schedule!r}, as if it had been so from the start, and main.py's is main-epoch")
    elif not math.isclose(expected, start.rate, rel_tol=1e-4, abs_tol=1e-12):
        lines.append(
            f"the run before had other --epochs: its next learning rate is {start.rate:.4g}; taken: {expected:.4g}, as with "
            f"--epochs {config.epochs}"
        )
    if config.ema:
        lines.append("the mean of the weights begins with those of the checkpoint")
    return lines


STATE_SUFFIXES = (".pt", SUFFIX)
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
    return next((name for name in sorted(run.checkpoints.glob("step-*"), reverse=True) if name.suffix in STATE_SUFFIXES), None)


def _run_of(path: Path) -> RunDirectory | None:
    """The run in whose folder the checkpoint `path` lies."""
    run = RunDirectory(path.absolute().parent.parent)
    return run if path.suffix in STATE_SUFFIXES and path.absolute().parent == run.checkpoints and run.config.is_file() else None


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
    check_run_against_checkpoint(config, content.get("settings", {}), run.config, run.former_epochs())
    name = Patches.name if config.objective == "patches" else config.model
    if name != PUBLISHED_MODEL:
        raise CheckpointError(f"{source}: its model is a {name}, which main.py does not have{OTHERWISE}")
    if config.optimizer not in GROUPS or config.decay != "all":
        words = f"its optimizer is {config.optimizer} with --decay {config.decay}; main.py has AdamW and Lion, which decay all"
        raise CheckpointError(f"{source}: {words}{OTHERWISE}")
    model = load_file(source, "cpu", {}, wanted or ("last" if content.get("ema") is not None else None))
    optimizer = build_optimizer(model, config)
    check_whole(model, optimizer, content, False, source)
    saved = _as_main(model, config, content, prefix, optimizer.param_groups[0]["betas"])
    write_atomically(target, lambda file: torch.save(saved, file))
    return model, _notes(content, config, saved["arch"], run.read_steps() // config.epochs, prefix)


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


def taken_by_finetune(prefix: str) -> str:
    """Whether the published finetune.py takes weights whose names have `prefix`."""
    if prefix == WRAPPERS[0]:
        return "for finetune.py --ckpt_dir"
    return f"not for finetune.py --ckpt_dir, which takes nothing but names with {WRAPPERS[0]} and does not say so"


def _notes(content: dict, config: TrainConfig, name: str, steps: int, prefix: str) -> list[str]:
    flags = f"--optimizer {config.optimizer} --epochs {config.epochs}"
    main = f"main.py --resume with {flags}{'' if prefix else ' on a CPU or one --gpu'}"
    lines = [f"for {main}" if prefix in ("", WRAPPERS[0]) else "not for main.py --resume", taken_by_finetune(prefix)]
    if content["step"] != content["epoch"] * steps:
        lines.append(f"it is of step {content['step']}, within epoch {content['epoch'] + 1}, which main.py begins again")
    if config.schedule != "main-epoch":
        lines.append(f"its learning rates were those of --schedule {config.schedule}; main.py goes on with its own")
    if name == "CRATE":
        lines.append("it is of no published size, and main.py builds no other")
    return lines
