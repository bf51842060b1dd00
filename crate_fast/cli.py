"""The command line: `crate-fast SUBCOMMAND`, or `python -m crate_fast SUBCOMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from . import __version__
from .arguments import add_crop, add_weights, place, whole
from .backend import BACKENDS, BackendError
from .convert_command import add_convert
from .extras import MissingPackageError
from .inspect_command import add_inspect
from .inspection import InspectionError
from .prepare_command import add_prepare
from .reading import CheckpointError
from .segment_command import add_segment
from .streams import keep_printing
from .train_command import add_train
from .training import ConfigError, SavingError, Stopped, TrainingError, UnreadableError, evaluate_run
from .training.config import ARCHITECTURES, PRECISIONS
from .training.evaluation import is_first
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
    _add_evaluate(subcommands)
    add_convert(subcommands)
    add_prepare(subcommands)
    add_inspect(subcommands)
    add_segment(subcommands)
    add_tune(subcommands)
    return parser


def _add_evaluate(subcommands) -> None:
    parser = subcommands.add_parser(
        "evaluate",
        help="measure the accuracy of a trained model",
        description="Reads a model back and prints its accuracy on its test images, computed as in its run unless flags say "
        "otherwise.",
    )
    parser.add_argument(
        "path",
        type=place,
        metavar="PATH",
        help="a run directory, its model.safetensors, a checkpoint, or one of the published scripts'",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:N, mps"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="what computes the layers (default: as in the run)")
    parser.add_argument("--precision", choices=PRECISIONS, help="autocast dtype, or float32 for none (default: as in the run)")
    parser.add_argument("--batch-size", type=whole, metavar="N", help="images at a time (default: as in the run)")
    parser.add_argument("--data", metavar="NAME", help="a name as in training, or a folder (default: as in the run)")
    parser.add_argument("--data-dir", metavar="DIR", help="where the files of the named data sets are (default: as in the run)")
    parser.add_argument("--workers", type=whole, metavar="N", help="processes that read images (default: as in the run)")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="the size that the model must have (default: any)")
    add_weights(parser)
    add_crop(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    names = ("backend", "precision", "device", "batch_size", "data", "data_dir", "workers", "arch", "weights", "eval_crop")
    score = evaluate_run(arguments.path, **{name: getattr(arguments, name) for name in names})
    if is_first():
        print(f"test {score}")


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
