"""`crate-fast completion`: a script by which a shell completes subcommands, flags, names and files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..optimizers import OPTIMIZERS
from ..optional import require
from ..sizes import ARCHITECTURES
from .arguments import SWITCHES, as_path, place, switch

SHELLS = ("bash", "zsh", "fish")
NAMES = {"arch": tuple(ARCHITECTURES), "optimizer": tuple(OPTIMIZERS)}
"""What is completed by its names, where its type alone knows them."""


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        'Prints a script for the shell. bash: add to ~/.bashrc the line  eval "$(crate-fast completion bash)"  ; '
        "zsh: crate-fast completion zsh > _crate-fast  in a folder of $fpath; "
        "fish: crate-fast completion fish > ~/.config/fish/completions/crate-fast.fish"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    parser.set_defaults(run=_complete)


def _complete(arguments: argparse.Namespace) -> None:
    require("shtab")
    import shtab

    print(shtab.complete(_with_all_flags(shtab.FILE), arguments.shell))


def _with_all_flags(files: Mapping) -> argparse.ArgumentParser:
    """The command's parser with the flags of every subcommand, which say what completes them; `files`: a file or a folder."""
    from .main import build_parser

    parser = build_parser()
    for group in parser._actions:
        if isinstance(group, argparse._SubParsersAction):
            for name, subcommand in group.choices.items():
                subcommand.fill([name])
                for action in subcommand._actions:
                    _say_what_completes(action, files)
    return parser


def _say_what_completes(action: argparse.Action, files: Mapping) -> None:
    if action.choices is not None or action.nargs == 0:
        return
    if action.dest in NAMES or action.type is switch:
        action.choices = NAMES.get(action.dest, tuple(SWITCHES))
    elif action.type in (None, str, place, as_path) or action.metavar in ("NAME", "PATH", "DIR"):
        action.complete = files  # pyright: ignore[reportAttributeAccessIssue] (shtab's)
