"""`crate-fast prepare`: a folder of photographs packed into a few large files, once, so that reading keeps up."""

from __future__ import annotations

import argparse
import os
import sys

from ..called import called
from ..optional import require
from .arguments import as_path, positive


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Packs SRC, a folder with train/ and val/ and in each a folder per class, into a few large files in DST, "
        "which `crate-fast train --data DST` reads quickly. A command that was stopped or killed goes on where it was. "
        "Images that cannot be read are left out, listed in DST/unreadable.txt and on stderr."
    )
    parser.add_argument("layout", choices=("imagenet",), metavar="imagenet", help="how SRC is laid out: as ImageNet usually is")
    parser.add_argument("source", type=as_path, metavar="SRC", help="the folder")
    parser.add_argument("target", type=as_path, metavar="DST", help="where the packs go; made if it is not there")
    parser.add_argument(
        "--short-side",
        type=_pixels,
        default=256,
        metavar="N",
        help="reduce images to N pixels on their short side; 0: keep them as they are (default: 256)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--raw", action="store_true", help="store RGB bytes: fastest, about 335 GB for ImageNet at 256")
    kind.add_argument(
        "--quality", type=_quality, default=90, metavar="Q", help="of the JPEGs that training images become (default: 90)"
    )
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes that pack (default: one a core)"
    )
    parser.add_argument("--pack-images", type=positive, default=8192, metavar="N", help="images of a pack (default: 8192)")
    parser.add_argument("--verify", action="store_true", help="at the end read all packs back and compare their checksums")
    parser.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    require("PIL", "numpy", "simplejpeg", "tqdm")
    from ..data.pack_encoding import Settings
    from ..data.pack_folder import verify
    from ..data.pack_writer import UNREADABLE, in_words, prepare

    settings = Settings(arguments.short_side, arguments.raw, arguments.quality, arguments.pack_images)
    done = prepare(arguments.source, arguments.target, settings, arguments.workers)
    for entry in done.unreadable:
        place = arguments.source / entry.name
        print(f"crate-fast: warning: unreadable, left out: {place}: {entry.reason}", file=sys.stderr)
    counts = ", ".join(f"{count:,} {split}" for split, count in done.images.items())
    left_out = f"; {len(done.unreadable):,} left out, listed in {arguments.target / UNREADABLE}" if done.unreadable else ""
    print(f"{counts} images in {done.packs} packs, {in_words(done.size)}{left_out}")
    if arguments.verify:
        print(f"{verify(arguments.target):,} images read back: all are what was written")
    print(f"train on them with: {called('train', '--data', arguments.target)}")


def _pixels(text: str) -> int:
    return _whole(text, 0, 65_500, "0, or pixels up to 65,500")


def _quality(text: str) -> int:
    return _whole(text, 1, 100, "a whole number from 1 to 100")


def _whole(text: str, least: int, most: int, words: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be {words}")
    return int(text)
