"""From a recipe and flags to a configuration: recipes are readable files, and every value in them yields to its flag."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..data.pictures import SUFFIXES
from ..data_sets import DATA_SETS
from ..files import check_regular, parse_json
from ..settings import SETTINGS, ConfigError, TrainConfig, as_flag, flag, read_stored
from ..sizes import ARCHITECTURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (an older Python's alone)

RECIPES = Path(__file__).parent / "recipes"
NAMES = tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))
# What a resumed run may be told anew: where things are, how often it saves, how it is watched, nothing that moves a bit of
# its weights.
SAVING = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
WATCHING = ("print_log", "tensorboard", "watch_rates", "profile", "peak_tflops")
CHANGEABLE = ("data_dir", "workers", *SAVING, "max_unreadable", *WATCHING)
FEW = 10_000  # photographs: what a CPU learns from in an hour, and what fits its memory, reduced
STEPS = 800  # of a run on few, about
MOST_EPOCHS, LEAST_EPOCHS = 100, 10
MODEL_SETTINGS = frozenset(setting.name for setting in SETTINGS.values() if setting.section == "model")
LONGER = "epochs"  # what it may be told more of: the learning rate is from there on that of the longer run


def resolve(given: dict, recipe: str | None = None, *, command: str = "train") -> TrainConfig:
    """The configuration that `recipe` and the settings in `given` make, the latter first.

    Args:
        given: settings that were asked for, by name.
        recipe: one of `NAMES`, or a file: TOML as in `RECIPES`, or the config.json of a run. None: with "train", the digits,
            or main.py's defaults if `given` names other data; with "finetune", finetune.py's defaults; with "pretrain",
            CRATE-MAE's, of the digits or of other data.
        command: "train" or "finetune", the published scripts' names here, or "pretrain".

    Raises:
        ConfigError: an unknown recipe, a damaged file, or a value that cannot be used.
    """
    recipe = recipe or default_recipe(command, given.get("data", "digits"))
    values = read_recipe(recipe)
    if "data" not in values and "data" not in given:
        raise ConfigError(f"--recipe is {recipe!r}, which needs --data DIR, a folder of photographs")
    if command == "finetune" and recipe in NAMES and given.get("optimizer", "AdamW") != "AdamW":
        values["weight_decay"] = 0.0  # the published script gives it to AdamW alone; a recipe of the user's own says its own
    asked = _sizes(given) | given
    config = TrainConfig(**values | asked)
    if command == "pretrain" and config.objective != "patches":
        raise ConfigError(f"--recipe is {recipe!r} and --objective is 'classes', for `train`; `pretrain` learns 'patches'")
    return config


def default_recipe(command: str, data: str) -> str:
    """What a run on `data` starts from where no recipe is named."""
    if command == "pretrain":
        return "mae-digits" if data == "digits" else "mae"
    return "finetune" if command == "finetune" else "digits" if data == "digits" else "main"


def data_of_run(resume: str | None) -> dict:
    """The setting "data" of the run that is to go on, by which other flags are judged; nothing where it cannot be read, which
    is said by whoever takes the run up.

    Args:
        resume: a run directory, or a checkpoint in one.
    """
    for place in () if resume in (None, "auto") else (Path(resume), Path(resume).absolute().parent.parent):
        try:
            check_regular(place / "config.json")
            data = parse_json((place / "config.json").read_text(encoding="utf-8"))["config"]["data"]
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            continue
        return {"data": data} if isinstance(data, str) else {}
    return {}


def read_recipe(name: str) -> dict:
    """The settings in a recipe, by name; those that an `arch` in it stands for are among them.

    Raises:
        ConfigError: there is no such recipe or file, or it is damaged, or it has an unknown setting.
    """
    path = RECIPES / f"{name}.toml" if name in NAMES else Path(name)
    if name not in NAMES and path.suffix not in (".toml", ".json"):
        raise ConfigError(f"--recipe is {name!r}; allowed are {', '.join(NAMES)}, a .toml file and a run's config.json")
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)["config"]
    except OSError as error:
        raise ConfigError(f"--recipe is {name!r}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # tomllib has a depth of its own
        raise ConfigError(f"{path}: no recipe ({error})") from error
    unknown = sorted(set(values) - set(SETTINGS)) if isinstance(values, dict) else ["it is no table"]
    if unknown:
        raise ConfigError(f"{path}: no recipe: unknown setting {unknown[0]!r}")
    values.pop("out", None)  # a run's own directory is not part of how to repeat it
    return _sizes(values) | values


def _sizes(values: dict) -> dict:
    """The settings of a model that `values["arch"]` stands for."""
    return dict(ARCHITECTURES.get(str(values.get("arch")), {}))


def check_given_against_run(config: TrainConfig, given: dict, where: Path) -> dict:
    """The settings of `given` that a resumed run takes; raises ConfigError if another one differs from the run's `config`, or
    if there are to be fewer epochs."""
    for name, value in given.items():
        ours = getattr(config, name)
        if name == LONGER and isinstance(value, int) and value > ours:
            continue
        if name == "precision" and value == "auto":  # the run's own, which it keeps, is what that turned out to mean
            continue
        if name not in (*CHANGEABLE, "out", "data") and read_stored(name, value) != ours:
            kept = "which a resumed run keeps" if name != LONGER else "and a resumed run has as many or more"
            before = f"the run in {where} was started with {as_flag(ours)}, {kept}"
            raise ConfigError(f"{flag(name)} is {as_flag(value)}; {before}")
    return {name: value for name, value in given.items() if name in (*CHANGEABLE, LONGER, "data")}


def check_run_against_checkpoint(config: TrainConfig, written: dict, where: Path, before: Iterable[int] = ()) -> None:
    """Raises ConfigError unless the settings read from `where` are those that a checkpoint was `written` with, but for what may
    change, and for epochs, of which there were as many as one of `before` says. Checkpoints of before have none."""
    for name in SETTINGS.keys() & written.keys() - {*CHANGEABLE, "out", "data"}:
        ours, theirs = getattr(config, name), read_stored(name, written[name])
        if ours != theirs and not (name == LONGER and theirs in before):
            raise ConfigError(f"{where}: {name} is {ours!r}; the run's checkpoints were written with {theirs!r}")


def describe(config: TrainConfig, names: Iterable[str] = tuple(SETTINGS)) -> list[str]:
    """The settings of these names that are set, as lines of TOML; all of them are a recipe that repeats the run."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]


def choose_recipe(given: dict) -> tuple[str, dict, str] | None:
    """For few photographs in a folder, no GPU and nothing asked for of the model: recipe, settings beside it, and why in words.

    Args:
        given: settings that were asked for, by name.
    """
    data, device = given.get("data", "digits"), given.get("device", "auto")
    if MODEL_SETTINGS & given.keys() or data in DATA_SETS or not Path(data).is_dir() or device not in ("auto", "cpu"):
        return None
    count = count_pictures(data, FEW)
    if not 0 < count <= FEW or _has_gpu(given):
        return None
    batch = given.get("batch_size", 32)
    epochs = max(LEAST_EPOCHS, min(MOST_EPOCHS, STEPS * batch // count))
    return "photos", {"epochs": epochs}, f"{count:,} photographs and no GPU"


def count_pictures(folder: str, most: int) -> int:
    """How many images lie in `folder` and below, by their names; more than `most` are counted no further."""
    count = 0
    for _, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in names)
        if count > most:
            break
    return count


def _has_gpu(given: dict) -> bool:
    if given.get("device") == "cpu":
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
