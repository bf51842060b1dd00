"""`crate-fast predict`: what a model takes photographs for, by name and probability."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InspectionError
from ..files import printable
from .arguments import add_crop, add_device, add_weights, as_path, place, positive, weights_of

if TYPE_CHECKING:
    from ..prediction import Guess

FORMATS = ("text", "json", "csv")
COLUMNS = ("photo", "rank", "class", "name", "probability")


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Tells the most probable classes of photographs, cut and normalised as the model was evaluated; names of classes are "
        "stored with the weights. Images that cannot be read are told on stderr, and the exit status is 2 then."
    )
    parser.add_argument(
        "model",
        type=place,
        metavar="MODEL",
        help="a run directory, a file of ours or of the published scripts, or ORGANISATION/NAME on the Hugging Face Hub",
    )
    parser.add_argument(
        "photos", nargs="+", type=as_path, metavar="PHOTO", help="photographs, and folders of them with all folders in them"
    )
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes to tell of each (default: 5)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="a line a photograph, one JSON list, or a table with a row a class (default: text)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at a time (default: 32)")
    add_device(parser)
    add_weights(parser)
    add_crop(parser)
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    _check_there(arguments.photos)
    from ..device import choose_compute
    from ..inspection.photos import PhotoError, find_photos
    from ..prediction import load, predict
    from ..processes import Ranks

    device = choose_compute(arguments.device, "float32", Ranks()).device
    paths = [path for given in arguments.photos for path in (find_photos(given, sys.stderr) if given.is_dir() else [given])]
    loaded = load(arguments.model, device=device, crop=arguments.eval_crop, **weights_of(arguments))
    loaded.model.float()
    failed: list[Path] = []

    def answered() -> Iterator[tuple[Path, list[Guess]]]:
        for path, answer in zip(paths, predict(loaded, paths, top=arguments.top, batch_size=arguments.batch_size), strict=True):
            if isinstance(answer, PhotoError):
                print(f"crate-fast: warning: {' '.join(str(answer).split())}", file=sys.stderr, flush=True)
                failed.append(path)
            else:
                yield path, answer

    {"text": _print_text, "json": _print_json, "csv": _print_csv}[arguments.format](answered())
    if failed:
        raise InspectionError(f"{len(failed)} of {len(paths)} photographs cannot be read, {failed[0]} first")


def _check_there(photos: list[Path]) -> None:
    """Raises InspectionError where one is no file and no folder, before a model is read."""
    absent = next((path for path in photos if not path.exists()), None)
    if absent is not None:
        raise InspectionError(f"{absent}: no such file or folder")


def _print_text(answers: Iterable[tuple[Path, list[Guess]]]) -> None:
    for path, guesses in answers:
        words = ", ".join(f"{printable(guess.name)} {guess.probability:.1%}" for guess in guesses)
        print(f"{printable(str(path))}: {words}", flush=True)


def _print_json(answers: Iterable[tuple[Path, list[Guess]]]) -> None:
    rows = []
    for path, guesses in answers:
        found = [{"class": guess.label, "name": guess.name, "probability": guess.probability} for guess in guesses]
        rows.append({"photo": str(path), "predictions": found})
    print(json.dumps(rows, indent=2))


def _print_csv(answers: Iterable[tuple[Path, list[Guess]]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for path, guesses in answers:
        for rank, guess in enumerate(guesses, start=1):
            writer.writerow((path, rank, guess.label, guess.name, guess.probability))
