"""`crate-fast explore`: a page in which one moves through a model's layers, heads and patches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InspectionError
from ..files import as_bytes, first_line, printable, write_atomically
from ..optional import require
from .arguments import add_checkpoint, add_device, add_weights, as_path, positive, weights_of

if TYPE_CHECKING:
    from ..model.encoder import Encoder

ENDINGS = (".html", ".htm")


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Writes one page for a browser, which needs no server and no network: choose a layer and a head, point at a patch of a "
        "photograph and see where it attends, and slide through the layers to watch coding rate, sparsity and what the "
        "subspaces see, in colour."
    )
    parser.add_argument("photos", nargs="+", type=as_path, metavar="PHOTO", help="photographs")
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=as_path, metavar="PAGE.html", help="the file to write, or write anew")
    parser.add_argument(
        "--size", type=positive, metavar="N", help="scale the shorter side to N pixels first (default: the model's image)"
    )
    add_device(parser)
    add_weights(parser)
    parser.set_defaults(run=_explore)


def _explore(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.suffix.lower() not in ENDINGS:
        raise InspectionError(f"--out is {out}; its ending must be {' or '.join(ENDINGS)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InspectionError(f"--out is {out}, which {'is a directory' if out.is_dir() else 'lies in no directory'}")
    require("numpy", "PIL")
    from ..checkpoint.save_load import load_checkpoint
    from ..device import choose_compute
    from ..inspection.explore import explore
    from ..inspection.photos import Normalisation, PhotoError, cut_to_patches, read_photo
    from ..processes import Ranks

    device = choose_compute(arguments.device, "float32", Ranks()).device
    pictures = [read_photo(path) for path in arguments.photos]  # before anything is computed
    model = load_checkpoint(arguments.checkpoint, device=device, **weights_of(arguments)).float()
    encoder, photos = model.encoder(), []
    for path, picture in zip(arguments.photos, pictures, strict=True):
        try:
            side = arguments.size or min(encoder.image_size)
            photos.append((printable(path.name), cut_to_patches(picture, encoder.patch_size, side)))
        except (ValueError, MemoryError, OverflowError) as error:
            raise PhotoError(f"{path}: {first_line(error)}") from error
    page = explore(model, Normalisation(model, arguments.checkpoint), photos, _title(encoder, arguments.checkpoint))
    write_atomically(out, lambda file: file.write(as_bytes(page)))
    print(f"written to {printable(str(out))}, {len(page) / 2**20:.1f} MiB: open it in a browser")


def _title(encoder: Encoder, source: str) -> str:
    sizes = f"{encoder.depth} layers, {encoder.heads} heads, width {encoder.dim}"
    patches = f"patches of {'×'.join(map(str, encoder.patch_size))} pixels"
    return f"{printable(Path(source).name)}, {encoder.name}: {sizes}, {patches}"
