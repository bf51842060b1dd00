"""How words on the command line are read, and flags that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..eval_transform import LEAST_CROP, allowed_crop
from ..files import names_something
from ..settings import SWITCHES
from ..sizes import POOLS


def whole(text: str) -> int:
    """A whole number in ASCII digits; raises argparse.ArgumentTypeError, as all here."""
    return _read(int, text, "a whole number")


def number(text: str) -> float:
    """A number in ASCII characters."""
    return _read(float, text, "a number")


def _read(kind: type, text: str, words: str):
    try:
        if not text.isascii() or "_" in text:  # Python reads full-width and other digits too, and 1_0 as 10
            raise ValueError
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be {words}") from None


def switch(text: str) -> bool:
    """Whether a switch is on: "yes" or "no"."""
    if text not in SWITCHES:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed are {', '.join(SWITCHES)}")
    return SWITCHES[text]


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def place(text: str) -> str:
    """The name of a file or a folder, which is not blank (empty would be, to the system, the folder one is in)."""
    if not names_something(text):
        raise argparse.ArgumentTypeError(f"it is {text!r}, which names nothing")
    return text


def as_path(text: str) -> Path:
    """`place`, as a path."""
    return Path(place(text))


MODEL_KEYWORDS = {
    "heads": (whole, "heads of a layer"),
    "pool": (str, "what the head reads"),
    "ista": (number, "step size of the ISTA step"),
    "lambd": (number, "threshold of the ISTA step"),
    "image_size": (whole, "side of the images in pixels"),
    "patch_size": (whole, "side of a patch in pixels"),
}
"""Keywords of `load_checkpoint` that say what a file leaves open: how each is read, and what it is."""


def crop(text: str) -> float:
    """A part of an image that evaluation sees."""
    part = number(text)
    if not allowed_crop(part):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be 0, or from {LEAST_CROP} to 1")
    return part


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint, the model of a command whose other words are photographs."""
    parser.add_argument(
        "--checkpoint",
        type=place,
        required=True,
        metavar="PATH",
        help="a run directory, a file of ours or of the published scripts, or ORGANISATION/NAME",
    )


def add_weights(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Adds --weights, and what may have to be said of weights beside which nothing tells it; for `weights_of`.

    Args:
        prefix: of the names of the latter, where a command has such names for other things.
    """
    parser.add_argument(
        "--weights",
        metavar="WHICH",
        help="of a checkpoint that has both: last, the last weights, or mean, their mean over the steps (default: the mean, "
        "which is said); of one with several models: the name of one",
    )
    section = parser.add_argument_group("what the shapes of weights alone do not tell")
    for name, (kind, text) in MODEL_KEYWORDS.items():
        choices = POOLS if name == "pool" else None
        metavar = None if choices else {whole: "N", number: "X"}[kind]
        words, dest = f"{text} (default: as published)", f"model_{name}"
        section.add_argument(
            f"--{prefix}{name.replace('_', '-')}", dest=dest, type=kind, choices=choices, metavar=metavar, help=words
        )


def weights_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_weights` read, as keywords of `load_checkpoint`."""
    given = {name: getattr(arguments, f"model_{name}") for name in MODEL_KEYWORDS}
    return {"weights": arguments.weights} | {name: value for name, value in given.items() if value is not None}


def add_crop(parser: argparse.ArgumentParser) -> None:
    """Adds --eval-crop."""
    parser.add_argument(
        "--eval-crop",
        type=crop,
        metavar="X",
        help="part of the image that is seen, its middle; 0: all of it, squeezed (default: as stored with the weights)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:N, mps"
    )
