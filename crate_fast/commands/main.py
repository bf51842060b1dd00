"""The command line: `crate-fast SUBCOMMAND`, or `python -m crate_fast SUBCOMMAND`.

Nothing here needs PyTorch, whose import takes seconds: a subcommand's flags are made where it is chosen, and what it computes
with is imported where it runs. So help and errors are told at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..errors import UserError
from ..optional import missing
from ..signals import Stopped
from ..streams import keep_printing

USER_ERRORS = (UserError, OSError)
FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
SUMMARIES = {
    "train": "train a CRATE",
    "finetune": "train a CRATE on a small data set, from published weights",
    "pretrain": "train a CRATE-MAE, which needs no labels and from which a CRATE may start",
    "evaluate": "measure the accuracy of a trained model",
    "predict": "tell what photographs show",
    "convert": "write a model's weights as another kind of file",
    "prepare": "pack a folder of photographs, for input that keeps up",
    "inspect": "measure what each layer of a model does",
    "segment": "draw where a model looks in photographs",
    "explore": "write a page in which one moves through a model's layers",
    "tune": "find the fastest shapes of the kernels on this GPU",
    "completion": "print a script by which a shell completes all this",
}
MODULES = {"finetune": "train", "pretrain": "train"}  # of subcommands, where one is not called as it is
CHOICE = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from (?P<choices>.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, which takes flags only in full, and has none before they are needed.

    Args:
        fill: adds its flags, where it is to parse the words given with it.
        options: as of argparse's.
    """

    def __init__(self, *, fill: Callable[[Parser, list[str]], None] | None = None, **options) -> None:
        super().__init__(**options, allow_abbrev=False)
        self._fill = fill

    def fill(self, words: list[str]) -> None:
        """Adds the flags with which `words` are parsed, if they have not been."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self, words)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As ever, but a subcommand's parser complains of what it does not know itself, and points to its own help."""
        self.fill(list(sys.argv[1:] if args is None else args))
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [word for word in self._option_string_actions if word.startswith("--")]
            meant = _did_you_mean(unknown[0].partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return namespace, unknown

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """As ever, but case does not matter in names."""
        value = super()._get_value(action, arg_string)
        if action.choices is None or not isinstance(value, str) or value in action.choices:
            return value
        same = [name for name in action.choices if str(name).lower() == value.lower()]
        return same[0] if len(same) == 1 else value

    def error(self, message: str) -> NoReturn:
        choice = CHOICE.search(message)
        if choice is not None:
            message += _did_you_mean(choice["word"], re.findall(r"[^\s,']+", choice["choices"]))
        self.exit(_fail(f"error: {' '.join(message.split())} (see {self.prog} --help)", FAILED))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that `word` is nearly, in a question; nothing where there is none."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.7)
    return f"; did you mean {names[near[0]]}?" if near else ""


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
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except Stopped as stopped:
        return _fail(str(stopped), stopped.status) if str(stopped) else stopped.status
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except USER_ERRORS as error:
        return _fail(f"error: {error}", FAILED)
    except ModuleNotFoundError as error:  # of an import at the head of a file, before anything could ask for the package
        needed = missing(error)
        if needed is None:
            raise
        return _fail(f"error: {needed}", FAILED)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("error: out of memory; a smaller model or --batch-size needs less", FAILED)
    return 0


def build_parser() -> Parser:
    """The parser of all subcommands; what it parses has the function to call as `run`."""
    parser = Parser(prog="crate-fast", description="CRATE, the white-box vision transformer.")
    parser.add_argument("--version", action="version", version=f"crate-fast {__version__}")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for name, summary in SUMMARIES.items():
        subcommands.add_parser(name, help=summary, fill=partial(_fill, name))
    return parser


def _fill(command: str, parser: Parser, words: list[str]) -> None:
    """Gives the parser of `command`, which is to parse `words`, its flags."""
    module = import_module(f"{__package__}.{MODULES.get(command, command)}")
    module.add_flags(parser, [command, *words])


def _print_any_name() -> None:
    """Has stdout write what its encoding has not as stderr does: names of files that are no UTF-8, in escapes."""
    stdout: Any = sys.stdout  # which may be another than the interpreter's
    if getattr(stdout, "errors", None) == "strict" and hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    print(_marked(f"crate-fast: {' '.join(message.split())}"), file=sys.stderr)
    return status


def _marked(line: str) -> str:
    """The line, its "error:" in red where stderr is a terminal with colours and nobody asks for none (NO_COLOR)."""
    shows = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return line.replace("error:", "\x1b[31merror:\x1b[0m", 1) if shows else line


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}  # PyTorch need not be there
    return not names.isdisjoint(("OutOfMemoryError", "MemoryError")) or "can't allocate memory" in str(error)
