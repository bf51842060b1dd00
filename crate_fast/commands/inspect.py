"""`crate-fast inspect`: coding rates and sparsity of trained models, layer by layer, as numbers and figures."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

from ..errors import InspectionError
from ..files import as_bytes, write_atomically
from ..optional import require
from .arguments import add_crop, add_device, add_weights, as_path, place, positive, weights_of

DIGITS = "digits"


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Measures, layer by layer, the coding rate before and after attention, the share of non-zero entries after "
        "ISTA, and the coding rate of all tokens; writes layers.json, layers.csv, coding-rate.png and sparsity.png. With "
        "several checkpoints, such as those of several epochs, all stand in one figure."
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=place,
        metavar="PATH",
        help="models: run directories, files of ours or of the published scripts, ORGANISATION/NAME on the Hugging Face Hub",
    )
    parser.add_argument(
        "--checkpoint", nargs="+", type=place, action="extend", default=[], metavar="PATH", help="the same, or more of them"
    )
    parser.add_argument(
        "--images",
        type=place,
        required=True,
        metavar="DIR",
        help="a folder of images; 'digits': the digits runs' test images; FILE.pt: a batch as the published crate_hook reads "
        "it, (images, channels, height, width), normalised, by itself or under 'imgs'",
    )
    parser.add_argument("--out", required=True, type=as_path, metavar="DIR", help="where to write; made if it is not there")
    parser.add_argument("--pdf", action="store_true", help="write the figures as PDF too")
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N images (default: all)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at a time (default: 32)")
    add_device(parser)
    add_weights(parser)
    add_crop(parser)
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    sources = [*arguments.models, *arguments.checkpoint]
    if not sources:
        raise InspectionError("there is no model to inspect: give a run directory or a file, first or after --checkpoint")
    require("matplotlib", "numpy", "PIL")
    from ..checkpoint.save_load import load_checkpoint
    from ..device import choose_compute
    from ..inspection.photos import PhotoError, find_photos
    from ..inspection.rates import measure_layers
    from ..processes import Ranks

    device = choose_compute(arguments.device, "float32", Ranks()).device
    stored = _stored_batch(arguments.images, arguments.limit)
    is_folder = stored is None and not _is_digits(arguments.images)
    paths = find_photos(arguments.images)[: arguments.limit] if is_folder else None
    labels = unique_labels(sources)
    models = [load_checkpoint(source, device=device, **weights_of(arguments)).float() for source in sources]
    results = []
    for source, label, model in zip(sources, labels, models, strict=True):
        if stored is not None:
            batches = (part.to(device) for part in stored.split(arguments.batch_size))
        else:
            batches = _digits(model, arguments) if paths is None else _photos(model, source, paths, arguments)
        try:
            measures = measure_layers(model, batches)
        except PhotoError:
            raise
        except InspectionError as error:
            raise InspectionError(f"{source}: {error}") from error
        told = {"checkpoint": str(source), "label": label, "model": model.encoder().name}
        results.append({**told, "images": measures.rate.shape[1], "layers": measures.rows()})
    _write(results, arguments.out, (".png", ".pdf") if arguments.pdf else (".png",))


def _is_digits(images: str) -> bool:
    return images == DIGITS and not Path(images).exists()


def _stored_batch(images: str, limit: int | None):
    """The batch in a file that ends as PyTorch's do, None where `images` is something else."""
    path = Path(images)
    if path.suffix not in (".pt", ".pth") or path.is_dir():
        return None
    from ..inspection.photos import read_batch

    batch = read_batch(path)[:limit]
    print(f"{path}: {len(batch)} images, as they are")
    return batch


def _photos(model, source: str, paths: list[Path], arguments: argparse.Namespace):
    from ..inspection.photos import Normalisation, photo_batches

    normalise = Normalisation(model, source)
    print(f"{source}: {len(paths)} images, normalised by {normalise.origin} mean and deviation")
    return photo_batches(paths, model, normalise, arguments.batch_size, arguments.eval_crop)


def _digits(model, arguments: argparse.Namespace):
    from ..data.digits import Digits
    from ..processes import Ranks

    if model.channels != Digits.channels:
        raise InspectionError(f"the model takes {model.channels} channels; the digits have {Digits.channels}")
    images = Digits(model.image_size, model.cls_token.device)
    count = min(images.test_count, arguments.limit or images.test_count)
    print(f"the digits: {count} test images")
    for batch, _ in images.test_batches(arguments.batch_size, Ranks()):
        yield batch[:count]
        count -= len(batch[:count])


def unique_labels(sources: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; "model.safetensors" is called as its directory."""
    parts = [[part for part in Path(source).parts if part != "model.safetensors"] or [source] for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(some[-length:]) for some in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}: {source}" for index, source in enumerate(sources, start=1)]


def _write(results: list[dict], out: Path, endings: tuple[str, ...]) -> None:
    from ..inspection.figures import plot_rates, plot_sparsity
    from ..inspection.rates import PRECISION

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InspectionError(f"--out is {out}, which cannot be made a directory ({error.strerror})") from error
    text = json.dumps({"precision": PRECISION, "checkpoints": results}, indent=2) + "\n"
    write_atomically(out / "layers.json", lambda file: file.write(text.encode()))
    table = io.StringIO()
    rows = [{"checkpoint": result["label"], **row} for result in results for row in result["layers"]]
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "layers.csv", lambda file: file.write(as_bytes(table.getvalue())))
    measured = {result["label"]: result["layers"] for result in results}
    kinds = {result["model"] for result in results}
    what = min(kinds) if len(kinds) == 1 else ""
    for ending in endings:
        plot_rates(measured, out / f"coding-rate{ending}", what)
        plot_sparsity(measured, out / f"sparsity{ending}", what)
    print(_table(results))
    names = ", ".join(f"{name}{ending}" for ending in endings for name in ("coding-rate", "sparsity"))
    print(f"written to {out}: layers.json, layers.csv, {names}")


def _table(results: list[dict]) -> str:
    lines = []
    for result in results:
        lines.append(f"{result['label']}, {result['model']}: mean over {result['images']} images")
        lines.append("layer  R^c before MSSA   after  non-zero after ISTA  R of all tokens")
        for row in result["layers"]:
            rates = f"{row['subspace_rate_mean']:15.2f} {row['compressed_rate_mean']:7.2f}"
            lines.append(f"{row['layer']:5}  {rates}  {row['nonzero_mean']:19.2%}  {row['rate_mean']:15.2f}")
    return "\n".join(lines)
