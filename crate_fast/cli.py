"""The command line: `crate-fast SUBCOMMAND`, or `python -m crate_fast SUBCOMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from typing import NoReturn

import torch

from . import __version__
from .backend import BACKENDS, BackendError
from .checkpoint import CheckpointError
from .extras import MissingPackageError
from .training import ConfigError, TrainConfig, TrainingError, evaluate_run, train
from .training.config import PRECISIONS, flag
from .tune import add_tune

USER_ERRORS = (BackendError, CheckpointError, ConfigError, MissingPackageError, OSError, TrainingError)
FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes flags only in full."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (that of the process if None) and returns its exit status.

    0: done. 2: an error that the caller can mend, told in one line on stderr. 130: interrupted.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except USER_ERRORS as error:
        return _fail(f"error: {error}", FAILED)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("error: out of memory; a smaller model or --batch-size needs less", FAILED)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; what it parses has the function to call as `run`."""
    parser = Parser(prog="crate-fast", description="CRATE, the white-box vision transformer.")
    parser.add_argument("--version", action="version", version=f"crate-fast {__version__}")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    _add_train(subcommands)
    _add_evaluate(subcommands)
    add_tune(subcommands)
    return parser


def _add_train(subcommands) -> None:
    parser = subcommands.add_parser(
        "train",
        help="train a CRATE on handwritten digits",
        description="Trains a CRATE with Lion on the 1,797 handwritten digits that scikit-learn carries, and fills a run "
        "directory: config.json, metrics.jsonl, curves.png, checkpoints/ and model.safetensors. All flags are optional.",
    )
    for group, settings in groupby(fields(TrainConfig), key=lambda setting: setting.metadata["group"]):
        section = parser.add_argument_group(group)
        for setting in settings:
            _add_setting(section, setting)
    parser.set_defaults(run=_train)


def _add_setting(section, setting) -> None:
    kind, choices, text = (setting.metadata[key] for key in ("kind", "choices", "text"))
    if setting.default is not None:
        text += f" (default: {setting.default})"
    metavar = None if choices else {int: "N", float: "X", str: "NAME"}[kind]
    section.add_argument(flag(setting.name), type=kind, default=setting.default, choices=choices, metavar=metavar, help=text)


def _add_evaluate(subcommands) -> None:
    parser = subcommands.add_parser(
        "evaluate",
        help="measure the accuracy of a trained model",
        description="Reads a model back and prints its accuracy on the test split of the digits, computed as in its run "
        "unless flags say otherwise.",
    )
    parser.add_argument("path", metavar="PATH", help="a run directory, its model.safetensors, or one of its checkpoints")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:N, mps"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="what computes the layers (default: as in the run)")
    parser.add_argument("--precision", choices=PRECISIONS, help="autocast dtype, or float32 for none (default: as in the run)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: as in the run)")
    parser.set_defaults(run=_evaluate)


def _train(arguments: argparse.Namespace) -> None:
    settings = {setting.name: getattr(arguments, setting.name) for setting in fields(TrainConfig)}
    run, score = train(TrainConfig(**settings))
    print(f"test {score}")
    print(f"evaluate it again with: crate-fast evaluate {run.path}")


def _evaluate(arguments: argparse.Namespace) -> None:
    score = evaluate_run(
        arguments.path,
        backend=arguments.backend,
        precision=arguments.precision,
        device=arguments.device,
        batch_size=arguments.batch_size,
    )
    print(f"test {score}")


def _fail(message: str, status: int) -> int:
    print(f"crate-fast: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
