"""The command line: `crate-fast SUBCOMMAND`, or `python -m crate_fast SUBCOMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .. import __version__
from ..backend import BackendError
from ..checkpoint.read import CheckpointError
from ..inspection import InspectionError
from ..optional import MissingPackageError
from ..streams import keep_printing
from ..training import ConfigError, SavingError, Stopped, TrainingError, UnreadableError
from .convert import add_convert
from .evaluate import add_evaluate
from .inspect import add_inspect
from .prepare import add_prepare
from .segment import add_segment
from .train import add_train
from .tune import add_tune

USER_ERRORS = (
    *(BackendError, CheckpointError, ConfigError, InspectionError, MissingPackageError, OSError),
    *(SavingError, TrainingError, UnreadableError),
)
FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes flags only in full."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As ever, but a subcommand's parser complains of what it does not know itself, and points to its own help."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (that of the process if None) and returns its exit status.

    0: done. 2: an error that the caller can mend, told in one line on stderr. 128 + N: ended by signal N (143 SIGTERM, 138
    SIGUSR1, 130 Ctrl-C), a training run after it was saved.
    """
    printed = keep_printing() if argv is None else []
    status = _run(argv)
    for stream in (sys.stdout, sys.stderr) if printed else ():
        stream.flush()
    lost = next((file.failed for file in printed if file.failed is not None), None)
    return _fail(f"error: what was printed is lost: {lost.strerror}", FAILED) if lost is not None else status


def _run(argv: Sequence[str] | None) -> int:
    _print_any_name()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except Stopped as stopped:
        return _fail(str(stopped), stopped.status) if str(stopped) else stopped.status
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except USER_ERRORS as error:
        return _fail(f"error: {error}", FAILED)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("error: out of memory; a smaller model or --batch-size needs less", FAILED)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; what it parses has the function to call as `run`."""
    parser = Parser(prog="crate-fast", description="CRATE, the white-box vision transformer.")
    parser.add_argument("--version", action="version", version=f"crate-fast {__version__}")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    add_train(subcommands, "train")
    add_train(subcommands, "finetune")
    add_evaluate(subcommands)
    add_convert(subcommands)
    add_prepare(subcommands)
    add_inspect(subcommands)
    add_segment(subcommands)
    add_tune(subcommands)
    return parser


def _print_any_name() -> None:
    """Has stdout write what its encoding has not as stderr does: names of files that are no UTF-8, in escapes."""
    stdout: Any = sys.stdout  # which may be another than the interpreter's
    if getattr(stdout, "errors", None) == "strict" and hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    print(f"crate-fast: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
