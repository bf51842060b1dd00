"""`crate-fast train`, `finetune` and `pretrain`: flags from the settings and from the published scripts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from ..called import called
from ..data_sets import DATA_SETS
from ..files import shown
from ..optimizers import OPTIMIZERS
from ..settings import SETTINGS, ConfigError, Setting, TrainConfig, flag, listed
from ..training import resolve
from ..training.resolve import NAMES, choose_recipe, data_of_run, default_recipe, read_recipe
from .arguments import MODEL_KEYWORDS, number, switch, whole
from .published_flags import PUBLISHED, Published, architecture, data_set, optimizer, resume_switch

EVALUATED = ("backend", "precision", "device", "batch_size", "data", "data_dir", "workers", "arch", "eval_crop")
COMMON = ("data", "out", "init", "arch", "image_size", "epochs", "batch_size", "lr", "workers", "device", "seed")
RESUME = (
    "go on with the run PATH (its directory or a checkpoint in it), with 'auto' that in --out, if any, or in a new run from a "
    "checkpoint of the published main.py"
)
READERS = {"arch": architecture, "data": data_set, "optimizer": optimizer}
TYPES = {bool: switch, int: whole, float: number, str: str}
METAVARS = {bool: "{no,yes}", int: "N", float: "X", str: "NAME"}
SECTION_TEXTS = {
    "data": "; ".join(f"{name}: {known.text}" for name, known in DATA_SETS.items()),
    "optimisation": "; ".join(f"{name}: {known.text}" for name, known in OPTIMIZERS.items()),
}
DESCRIPTIONS = {
    "train": "Trains a CRATE and fills a run directory: config.json, metrics.jsonl, curves.png, checkpoints/ and "
    "model.safetensors. Without --data and --recipe: on the 1,797 handwritten digits that scikit-learn carries. All flags are "
    "optional; those of the published main.py work as well.",
    "finetune": "Trains a CRATE on CIFAR10, CIFAR100 or a folder, from the weights that --init (or --ckpt_dir) names or from "
    "random ones, and fills a run directory as `train` does. The flags of the published finetune.py work as well.",
    "pretrain": "Trains a CRATE-MAE, which learns to predict what is masked in images and needs no labels, and fills a run "
    "directory as `train` does, with reconstructions.png. Without --data and --recipe: on the digits. `train --init RUN` and "
    "`finetune --init RUN` start from its encoder.",
}


def add_flags(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Gives the parser of a subcommand its flags; `words` are the command line from "train", "finetune" or "pretrain" on."""
    command = words[0]
    recipe, values = _starting_values(words)
    parser.usage = f"{parser.prog} [--data DATA] [--out DIR] [--recipe NAME] [--resume PATH] [flag ...]"
    parser.description = (
        f"{DESCRIPTIONS[command]} In brackets: what recipe {recipe} has; --recipe or --data before --help shows another's."
    )
    published = {entry.setting: entry for entry in PUBLISHED[command] if entry.effect == "known" and _is_plain(entry)}
    section = parser.add_argument_group("mostly used")
    section.add_argument(
        "--recipe", metavar="NAME", help=f"values to start from: {', '.join(NAMES)}, a .toml file, or a run's config.json"
    )
    section.add_argument("--resume", type=resume_switch, metavar="PATH", help=RESUME)
    for name in COMMON:
        _add_setting(section, SETTINGS[name], published.get(name), values.get(name))
    for group, settings in groupby(SETTINGS.values(), key=lambda setting: setting.section):
        section = parser.add_argument_group(group, SECTION_TEXTS.get(group))
        for setting in settings:
            if setting.name not in COMMON:
                _add_setting(section, setting, published.get(setting.name), values.get(setting.name))
    section = parser.add_argument_group(f"of the published {'finetune.py' if command == 'finetune' else 'main.py'}")  # if any
    for entry in PUBLISHED[command]:
        if entry.setting != "resume" and not (entry.effect == "known" and _is_plain(entry)):
            _add_published(section, entry)
    parser.set_defaults(run=_run, command=command, ignored=[])


def _is_plain(entry: Published) -> bool:
    """Whether the flag is another name of a setting, its values read in the same way."""
    return entry.setting not in (None, "resume", "augment", "init") and entry.read is not None and not entry.also


def _starting_values(words: list[str]) -> tuple[str, dict]:
    """The recipe that these words would start from, and what it has for every setting, for the help; raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--data", default=SETTINGS["data"].default)
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    try:
        found = parser.parse_known_args(words[1:])[0]
    except argparse.ArgumentError:  # told where they are parsed
        return "digits", defaults
    recipe = found.recipe or default_recipe(words[0], found.data)
    return recipe, defaults | {"data": None} | read_recipe(recipe)


def _add_setting(section, setting: Setting, published: Published | None, value: object) -> None:
    choices, text, name = setting.choices, setting.text, flag(setting.name)
    others = [word for word in (published.names if published else ()) if word != name]
    read = READERS.get(setting.name)
    metavar = None if choices and not read else METAVARS[setting.kind]
    if choices and read:
        text += f": {', '.join(choices)}"
    if value is not None and setting.kind is not bool:
        text += f" [{value if isinstance(value, str) else shown(value)}]".replace("%", "%%")  # argparse's own sign
    section.add_argument(
        name,
        *others,
        dest=setting.name,
        type=read or TYPES[setting.kind],
        choices=None if read else choices or None,
        default=argparse.SUPPRESS,
        metavar=metavar,
        help=text,
        **{"nargs": "?", "const": True} if setting.kind is bool else {},  # a flag that may stand alone
    )


def _add_published(section, entry: Published) -> None:
    text = {"known": entry.text, "ignored": f"no effect: {entry.text}", "refused": f"refused: {entry.text}"}[entry.effect]
    action = {"known": "store", "ignored": _Ignore, "refused": _Refuse}[entry.effect]
    options = {"help": text.replace("%", "%%"), "action": action, "default": argparse.SUPPRESS}
    if entry.effect != "known":
        options |= {"nargs": 0} if entry.read is None else {"type": entry.read, "metavar": "X"}
        options |= {"reason": entry.text, "dest": "ignored"}
    elif entry.read is None:
        options |= {"action": "store_const", "const": entry.value, "dest": entry.setting}
    else:
        options |= {"type": entry.read, "metavar": "X", "dest": entry.setting}
    if entry.also:
        options |= {"action": _StoreAll, "also": entry.also}
    section.add_argument(*entry.names, **options)


class _StoreAll(argparse.Action):
    """Stores the value, and other settings that the flag gives besides."""

    def __init__(self, *args, also: tuple[tuple[str, object], ...], **options) -> None:
        super().__init__(*args, **options)
        self.also = also

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for name, value in ((self.dest, values), *self.also):
            setattr(namespace, name, value)


class _Ignore(argparse.Action):
    """Remembers a flag that has no effect here, to say so."""

    def __init__(self, *args, reason: str, **options) -> None:
        super().__init__(*args, **options)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.ignored = [*namespace.ignored, f"{option_string} has no effect: {self.reason}"]


class _Refuse(_Ignore):
    """Refuses a flag, saying what to use instead."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string} is not taken: {self.reason}")


def given_settings(arguments: argparse.Namespace) -> dict:
    """The settings that the command line names, by name."""
    return {name: getattr(arguments, name) for name in SETTINGS if hasattr(arguments, name)}


def warnings_of(arguments: argparse.Namespace, given: dict, config: TrainConfig) -> list[str]:
    """What the command line asks for that has no effect, a line each."""
    lines = list(arguments.ignored)
    own = {name for known in OPTIMIZERS.values() for name in known.takes} - {*OPTIMIZERS[config.optimizer].takes}
    for name in sorted(own & given.keys()):
        takers = listed(f"{other}'s" for other, known in OPTIMIZERS.items() if name in known.takes)
        lines.append(f"{flag(name)} has no effect: it is {takers}, and --optimizer is {config.optimizer}")
    if config.objective == "classes":
        for name in ("mask_ratio", "norm_pix_loss", "decoder_depth"):
            if name in given:
                lines.append(f"{flag(name)} has no effect: it is of a CRATE-MAE, and --objective is classes")
    changes = any(name in given for name in ("randaugment_ops", "randaugment_magnitude"))
    if changes and config.augment != "randaugment":
        lines.append(f"--randaugment-ops and --randaugment-magnitude have no effect: --augment is {config.augment}")
    if given.get("workers") and config.keep_short_side:
        lines.append(
            f"--workers has no effect: --keep-short-side is {config.keep_short_side}, by which this process keeps images"
        )
    return lines


def _for_few(given: dict) -> TrainConfig | None:
    """The settings for a small folder on a CPU, if that is what is `given`; says so."""
    chosen = choose_recipe(given)
    if chosen is None:
        return None
    recipe, more, why = chosen
    config = resolve(more | given, recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"{why}: recipe {recipe}, {config.epochs} epochs; --recipe main is that of the published main.py", flush=True)
    return config


def _is_published(resume: str) -> bool:
    from ..training.published_run import names_published  # which needs PyTorch, and is seldom asked

    return names_published(resume)


def _evaluate(arguments: argparse.Namespace, given: dict) -> None:
    """What main.py does with --evaluate."""
    resume, init = arguments.resume, given.get("init")
    if resume is not None and init is not None:
        raise ConfigError(f"--resume is {resume} and --init is {init}; --evaluate takes one of them, the weights to evaluate")
    path = resume or init
    if path is None or path == "auto":
        raise ConfigError("--evaluate needs --resume PATH or --init PATH, the weights to evaluate")
    from ..training.evaluation import evaluate_run, is_first
    from ..training.progress import summary

    asked: dict[str, Any] = {name: given[name] for name in (*EVALUATED, *MODEL_KEYWORDS) if name in given}
    asked.setdefault("precision", "float32")
    for line in _without_effect(arguments, given.keys() - {*asked, "init", "log_every", "print_log"}):
        print(f"crate-fast: warning: {line}", file=sys.stderr)
    lines = resolve({name: given[name] for name in ("log_every", "print_log") if name in given})
    score = evaluate_run(path, print_every=lines.log_every if lines.print_log else 0, **asked)
    if is_first():
        print(f"{summary(score)}\ntest {score}")


def _run(arguments: argparse.Namespace) -> None:
    given = given_settings(arguments)
    if getattr(arguments, "evaluate", False):
        _evaluate(arguments, given)
    else:
        _train(arguments, given)


def _without_effect(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """What --evaluate leaves aside, a line each; main.py takes its flags of training beside it too."""
    flags = [flag(name) for name in sorted(names)] + ["--recipe"] * (arguments.recipe is not None)
    none = f"{listed(flags)} {'have' if len(flags) > 1 else 'has'} no effect: --evaluate trains nothing" if flags else None
    return [*arguments.ignored, *([none] if none else [])]


def _train(arguments: argparse.Namespace, given: dict) -> None:
    recipe, resume = arguments.recipe, arguments.resume
    if recipe is not None and resume not in (None, "auto") and not _is_published(resume):
        raise ConfigError(f"--recipe is {recipe!r}; a resumed run keeps its own settings")
    config = resolve(data_of_run(resume) | given, recipe, command=arguments.command)
    if arguments.command == "train" and recipe is None and resume in (None, "auto"):
        config = _for_few(given) or config
    for line in warnings_of(arguments, given, config):
        print(f"crate-fast: warning: {line}", file=sys.stderr)
    from ..training import train  # what is wrong so far is told without PyTorch

    if recipe is not None and resume == "auto":  # a run that is there already is to have been started with it
        given = {name: getattr(config, name) for name in read_recipe(recipe)} | given
    run, score = train(config, given=given, resume=resume)
    if run is not None:  # rank 0
        print(f"test {score}")
        if config.objective == "classes" and resume is None:
            print(f"evaluate it again with: {called('evaluate', run.path)}")
