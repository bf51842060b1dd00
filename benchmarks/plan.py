"""How long a training run takes, and what it needs of GPUs, network, disk and processors: a model to rerun with own figures.

    python benchmarks/plan.py                                                  # all sizes and recipes
    python benchmarks/plan.py --model base --recipe paper --gpus 16 --images-per-second 9000 --network-gbps 100
    python benchmarks/plan.py --write docs/planning.md                         # makes the tables of that page anew

A step is computing, then summing gradients; nothing overlaps. Computing takes the floor of floors.py divided by `of_floor`,
or what a measured rate of one GPU says, and never less than launching its kernels. Summing takes the quicker of a ring and a
tree over the slowest link. An epoch ends with a forward pass, a third of the work, over the 50,000 validation images.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from crate_fast.model import SIZES
from floors import Shape, milliseconds
from floors import model as model_floor

TRAIN_IMAGES, TEST_IMAGES, TOKENS, PATCH_DIM, CLASSES = 1_281_167, 50_000, 197, 768, 1000
LAUNCHES = 11  # a layer, forward and backward
START, END = "<!-- made by `python benchmarks/plan.py --write docs/planning.md` -->", "<!-- end of what is made -->"


class Recipe(NamedTuple):
    """A published recipe: images of a step over all GPUs, and epochs."""

    batch: int
    epochs: int


RECIPES = {"paper": Recipe(2048, 150), "readme": Recipe(512, 200)}
GPUS = (1, 8, 64, 512)


class Figures(NamedTuple):
    """What the model is told of machines. The first two were measured on an H200; nothing else here was measured."""

    tflops: float = 790.0  # a large 16-bit product
    tbps: float = 4.3  # a copy on the device, read and written bytes, TB/s
    of_floor: float = 0.5  # the part of the floor's speed that the kernels reach
    images_per_second: float | None = None  # of one GPU in training, measured; in place of the three above
    launch_us: float = 10.0  # a kernel's launch
    gpus_per_node: int = 8
    node_gbps: float = 3600.0  # a GPU to the others of its node, gigabits a second, one way
    network_gbps: float = 400.0  # a GPU's share of the network, likewise
    hop_us: float = 20.0  # from one GPU to the next
    fsdp: bool = False  # weights are gathered twice and gradients scattered: 3 passes of a ring for 2
    image_kb: float = 262.0  # on the disk: raw 256 × 341 pixels; the published JPEGs have 115
    per_core: float = 8700.0  # images a second that a core reads and crops: raw; 500 for the published JPEGs


class Needs(NamedTuple):
    """What a run takes and needs."""

    step_ms: float
    summing: float  # its part of a step
    images_per_second: float
    hours: float
    gpu_hours: float
    memory_gb: float  # of one GPU: activations of its whole share of the batch, weights, gradients, Lion's state
    network_gbps: float  # of each GPU, sent, averaged over a step
    disk_gbs: float  # all together
    cores: int  # all together


def parameters(size: str) -> int:
    """Parameters of a published size."""
    s = SIZES[size]
    dim, inner = s["dim"], s["heads"] * s["dim_head"]
    layer = dim * (2 * inner + dim) + 5 * dim
    ends = 2 * PATCH_DIM + (PATCH_DIM + 1) * dim + 2 * dim + (TOKENS + 1) * dim + 2 * dim + (dim + 1) * CLASSES
    return s["depth"] * layer + ends


def compute_seconds(size: str, images: int, figures: Figures) -> float:
    """One GPU's forward, backward and update of `images`."""
    s = SIZES[size]
    launching = 1e-6 * figures.launch_us * LAUNCHES * s["depth"]
    if figures.images_per_second is not None:
        return max(launching, images / figures.images_per_second)
    shape = Shape(images, TOKENS, s["dim"], s["heads"] * s["dim_head"], s["depth"], 2)
    ceilings = {"flops_per_second": 1e12 * figures.tflops, "bytes_per_second": 1e12 * figures.tbps}
    return max(launching, 1e-3 * milliseconds(model_floor(shape, training=True), ceilings) / figures.of_floor)


def sum_seconds(size: float, gpus: int, figures: Figures) -> float:
    """Summing `size` bytes over `gpus`: a ring sends 2 (n - 1) / n of them in 2 (n - 1) hops, a tree twice all in 2 log2 n."""
    if gpus == 1:
        return 0.0
    gbps = figures.node_gbps if gpus <= figures.gpus_per_node else min(figures.node_gbps, figures.network_gbps)
    rate, hop = 1e9 * gbps / 8, 1e-6 * figures.hop_us
    passes = 3 if figures.fsdp else 2
    ring = passes * (gpus - 1) * (size / gpus / rate + hop)
    tree = 2 * (size / rate + math.ceil(math.log2(gpus)) * hop)
    return ring if figures.fsdp else min(ring, tree)


def plan(size: str, recipe: Recipe, gpus: int, figures: Figures = Figures()) -> Needs:  # noqa: B008
    """The needs of training CRATE-`size` by `recipe` on `gpus`.

    Raises:
        ValueError: there are more GPUs than images in a step, or fewer than one.
    """
    if not 1 <= gpus <= recipe.batch:
        raise ValueError(f"--gpus is {gpus}; it must be from 1 to the {recipe.batch} images of a step")
    share, weights = math.ceil(recipe.batch / gpus), 4.0 * parameters(size)
    computing, summing = compute_seconds(size, share, figures), sum_seconds(weights, gpus, figures)
    step = computing + summing
    rate = recipe.batch / step
    testing = TEST_IMAGES / gpus * computing / share / 3
    hours = recipe.epochs * (math.ceil(TRAIN_IMAGES / recipe.batch) * step + testing) / 3600
    s = SIZES[size]
    kept = share * TOKENS * s["depth"] * (4 * s["dim"] + 4 * s["heads"] * s["dim_head"] + 4 * s["heads"] + 16)
    sent = (3 if figures.fsdp else 2) * (gpus - 1) / gpus * weights
    state = 16 * parameters(size) / (gpus if figures.fsdp else 1)
    return Needs(
        step_ms=1e3 * step,
        summing=summing / step,
        images_per_second=rate,
        hours=hours,
        gpu_hours=hours * gpus,
        memory_gb=(kept + state) / 1e9,
        network_gbps=8e-9 * sent / step,
        disk_gbs=1e-6 * figures.image_kb * rate,
        cores=math.ceil(rate / figures.per_core),
    )


HEADER = ("GPUs", "step, ms", "of it sums", "images/s", "hours", "GPU-hours", "GB a GPU", "Gbit/s a GPU", "disk, GB/s", "cores")


def cells(gpus: int, needs: Needs) -> list[str]:
    """A row of the table."""
    n = needs
    return [
        *(f"{gpus:,}", f"{n.step_ms:,.1f}", f"{n.summing:.0%}", f"{n.images_per_second:,.0f}", f"{n.hours:,.2f}"),
        *(f"{n.gpu_hours:,.0f}", f"{n.memory_gb:,.1f}", f"{n.network_gbps:,.1f}", f"{n.disk_gbs:,.1f}", f"{n.cores:,}"),
    ]


def table(size: str, name: str, counts: tuple[int, ...], figures: Figures) -> str:
    """The Markdown table of a size and a recipe."""
    recipe = RECIPES[name]
    rows = [HEADER, ("---:",) * len(HEADER)]
    rows += [cells(gpus, plan(size, recipe, gpus, figures)) for gpus in counts]
    title = f"CRATE-{size}, {name} recipe: batch {recipe.batch:,}, {recipe.epochs} epochs"
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in rows)])


def tables(sizes=tuple(SIZES), names=tuple(RECIPES), counts=GPUS, figures: Figures = Figures()) -> str:  # noqa: B008
    """The tables of all `sizes` by all recipes in `names`."""
    return "\n\n".join(table(size, name, counts, figures) for size in sizes for name in names)


def write_page(path: Path) -> None:
    """Puts the tables between their marks on the page `path`."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"--write is {path}, which has no {START} and {END} in it")
    path.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="makes the tables of a page anew")
    for name, default in Figures._field_defaults.items():
        options = {"action": "store_true"} if default is False else {"type": int if type(default) is int else float}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="see Figures", **options)
    arguments = parser.parse_args(argv)
    figures = Figures(**{name: getattr(arguments, name) for name in Figures._fields})
    wrong = next(
        (f for f in Figures._fields if f != "fsdp" and getattr(figures, f) is not None and getattr(figures, f) <= 0), None
    )
    if wrong is not None:
        parser.error(f"--{wrong.replace('_', '-')} is {getattr(figures, wrong)}; it must be above 0")
    try:
        if arguments.write is not None:
            write_page(arguments.write)
        else:
            print(tables(arguments.model, arguments.recipe, arguments.gpus, figures))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
