"""`crate-fast segment`: where the class token looks in photographs, head by head, and what the subspaces see, in colour."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InspectionError
from ..files import first_line
from ..optional import require
from .arguments import add_checkpoint, add_device, add_weights, as_path, number, positive, weights_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.encoder import Encoder

FOREGROUNDS = ("attention", "above", "below")


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Draws the class token's attention, head by head, for photographs of any size: for each, in a folder "
        "of OUT called as it is, image.png, maps, overlays and masks of every head and of their mean, and heads.png with "
        "all in one; in OUT pca-*.png, the main directions of the last layer's projections in common colours."
    )
    parser.add_argument("images", nargs="+", type=as_path, metavar="IMAGE", help="photographs")
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=as_path, metavar="DIR", help="where to write; made if it is not there")
    parser.add_argument("--layer", type=positive, metavar="N", help="whose attention, counted from 1 (default: the last layer)")
    parser.add_argument("--heads", type=_numbers, metavar="N,N", help="which heads, counted from 1 (default: all)")
    parser.add_argument("--mass", type=_share, default=0.6, metavar="X", help="share of the attention in a mask (default: 0.6)")
    parser.add_argument(
        "--components", type=positive, metavar="N", help="draw the first N principal components each by itself, too"
    )
    parser.add_argument(
        "--pca-layer", type=positive, metavar="N", help="whose components, counted from 1 (default: the last layer)"
    )
    parser.add_argument(
        "--facet",
        choices=("projection", "tokens"),
        default="projection",
        help="components of what: the tied query, key and value (default), or the tokens that the layer ends with",
    )
    parser.add_argument(
        "--foreground",
        choices=FOREGROUNDS,
        help="components of some patches alone: those that hold --mass of the heads' mean attention, or are above or below "
        "the middle of the first component's range (default: of all)",
    )
    parser.add_argument(
        "--size", type=positive, metavar="N", help="scale the shorter side to N pixels first (default: as it is)"
    )
    parser.add_argument(
        "--enlarge",
        type=positive,
        metavar="N",
        help="draw each pixel N wide and high (default: as often as gives small pictures 448 pixels on the shorter side)",
    )
    add_device(parser)
    add_weights(parser, prefix="model-")  # --heads says which are drawn
    parser.set_defaults(run=_segment)


def _numbers(text: str) -> list[int]:
    numbers = [positive(part) for part in text.split(",")]
    if len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a head twice")
    return numbers


def _share(text: str) -> float:
    share = number(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; it must be above 0 and at most 1")
    return share


def _segment(arguments: argparse.Namespace) -> None:
    require("matplotlib", "numpy", "PIL")
    from ..checkpoint.save_load import load_checkpoint
    from ..device import choose_compute
    from ..inspection.figures import plot_heads, save_picture
    from ..inspection.maps import keep_mass, look
    from ..inspection.photos import Normalisation, read_photo, to_array
    from ..processes import Ranks

    device = choose_compute(arguments.device, "float32", Ranks()).device
    paths, out = arguments.images, arguments.out
    for photo in paths:
        read_photo(photo)  # before anything is computed
    model = load_checkpoint(arguments.checkpoint, device=device, **weights_of(arguments)).float()
    encoder = model.encoder()
    layer, heads = _check_layer(encoder, arguments.layer, "--layer"), _check_heads(encoder, arguments.heads)
    of_components = _check_layer(encoder, arguments.pca_layer, "--pca-layer")
    normalise = Normalisation(model, arguments.checkpoint)
    which = f"layer {layer + 1} of {encoder.depth}"
    print(f"normalised by {normalise.origin} mean and deviation; {which} of {encoder.name}")
    names, features, masks = _names(paths), [], []
    for path, name in zip(paths, names, strict=True):
        image = _cut(path, encoder, arguments.size)
        one = look(model, normalise(image), layer, of_components, arguments.facet)
        if not (one.maps.isfinite().all() and one.features.isfinite().all()):
            raise InspectionError(f"{path}: what {arguments.checkpoint} makes of it is not finite, so there is nothing to show")
        features.append(one.features)
        masks.append(keep_mass(one.maps.mean(0), arguments.mass))
        folder = _make(out / name)
        pixels = to_array(image)
        save_picture(pixels, folder / "image.png", arguments.enlarge)
        title = f"{path.name}: attention of the class token in {which} of {encoder.name}"
        numbers = [head + 1 for head in heads]
        plot_heads(pixels, one.maps[heads], numbers, title, folder / "heads.png")
        named = {f"head-{number:02}": one.maps[number - 1] for number in numbers} | {"mean": one.maps[heads].mean(0)}
        _draw(pixels, named, encoder.patch_size, folder, arguments)
    _draw_components(names, features, masks, encoder.patch_size, arguments)
    print(f"written to {out}: {', '.join(f'{name}/, pca-{name}.png' for name in names)}")


def _draw(
    pixels: Tensor, maps: dict[str, Tensor], patch_size: tuple[int, int], folder: Path, arguments: argparse.Namespace
) -> None:
    """Each map in colours, over the image, and as the mask of its heaviest patches, at the image's size, or enlarged."""
    from ..inspection.figures import blend, coloured, enlarged, save_picture
    from ..inspection.maps import keep_mass

    for name, one in maps.items():
        picture = enlarged(coloured(one), patch_size)
        mask = enlarged(keep_mass(one, arguments.mass).byte().mul(255).unsqueeze(-1), patch_size)
        for kind, drawn in (("map", picture), ("overlay", blend(pixels, picture)), ("mask", mask)):
            save_picture(drawn, folder / f"{name}-{kind}.png", arguments.enlarge)


def _draw_components(
    names: list[str],
    features: list[Tensor],
    masks: list[Tensor],
    patch_size: tuple[int, int],
    arguments: argparse.Namespace,
) -> None:
    """pca-NAME.png, the first three as colours, and NAME/component-1.png and so on, each by itself.

    masks: of each photograph, the patches that hold the attention.
    """
    import torch

    from ..inspection.components import foreground_masks, principal_colours, principal_components
    from ..inspection.figures import coloured, enlarged, save_picture

    kind, count, out = arguments.foreground, arguments.components, arguments.out
    kept = masks if kind == "attention" else foreground_masks(features, below=kind == "below") if kind else None
    for name, colours in zip(names, principal_colours(features, kept), strict=True):
        save_picture(enlarged((colours * 255).round().byte(), patch_size), out / f"pca-{name}.png", arguments.enlarge)
    for name, components in zip(names, principal_components(features, count, kept) if count else (), strict=False):
        least = components.nan_to_num(float("inf")).amin(dim=(0, 1))
        for nth, one in enumerate(torch.where(components.isnan(), least, components).unbind(-1), start=1):
            save_picture(enlarged(coloured(one), patch_size), out / name / f"component-{nth}.png", arguments.enlarge)


def _cut(path: Path, encoder: Encoder, short_side: int | None):
    """The photograph, scaled and cut as asked and as patches divide it, saying so where something falls away."""
    from ..inspection.photos import PhotoError, cut_to_patches, read_photo

    photo = read_photo(path)
    try:
        image = cut_to_patches(photo, encoder.patch_size, short_side)
    except (ValueError, MemoryError, OverflowError) as error:  # too small for a patch, or --size too large for Pillow
        raise PhotoError(f"{path}: {first_line(error)}") from error
    words = f"{path}: {photo.height}×{photo.width}"
    if short_side is not None:
        words += f", its shorter side scaled to {short_side}"
    patches = "×".join(map(str, encoder.patch_size))
    print(f"{words}; {image.height}×{image.width} of it seen, in patches of {patches}")
    return image


def _names(paths: list[Path]) -> list[str]:
    """What the photographs are called in OUT: their stems, and where several have one, numbered.

    The stem of "...png" is "..", which would be the folder that OUT lies in.
    """
    names: list[str] = []
    for path in paths:
        stem = path.stem if path.stem.strip(".") else f"{path.name}-"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InspectionError(f"--out: {folder} cannot be made a directory ({error.strerror})") from error
    return folder


def _check_layer(encoder: Encoder, layer: int | None, flag: str) -> int:
    depth = encoder.depth
    if not depth:
        raise InspectionError("the model has no layers to show")
    if layer is not None and layer > depth:
        raise InspectionError(f"{flag} is {layer}; the model has layers 1 to {depth}")
    return (layer or depth) - 1


def _check_heads(encoder: Encoder, heads: list[int] | None) -> list[int]:
    count = encoder.heads
    wrong = next((head for head in heads or () if head > count), None)
    if wrong is not None:
        raise InspectionError(f"--heads names {wrong}; the model has heads 1 to {count}")
    return [head - 1 for head in heads] if heads else list(range(count))
