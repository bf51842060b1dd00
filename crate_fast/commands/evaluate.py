"""`crate-fast evaluate`: the accuracy of a trained model."""

from __future__ import annotations

import argparse

from ..settings import PRECISIONS
from ..sizes import ARCHITECTURES, BACKENDS
from .arguments import add_crop, add_device, add_weights, place, weights_of, whole


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Reads a model back and prints its accuracy on its test images, computed as in its run unless flags say otherwise."
    )
    parser.add_argument(
        "path",
        type=place,
        metavar="PATH",
        help="a run directory, its model.safetensors, a checkpoint, or one of the published scripts'",
    )
    add_device(parser)
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
    from ..training.evaluation import evaluate_run, is_first

    names = ("backend", "precision", "device", "batch_size", "data", "data_dir", "workers", "arch", "eval_crop")
    score = evaluate_run(arguments.path, **{name: getattr(arguments, name) for name in names}, **weights_of(arguments))
    if is_first():
        print(f"test {score}")
