"""How many images a second come in: the published pipeline, the folder loader and packs, on this machine's processor.

    python benchmarks/input.py                                          # 2 workers; about 3 minutes, 2 GB of disk
    python benchmarks/input.py --workers 16 --images 20000 --json input.json
    python benchmarks/input.py --only "packed, raw" --rounds 20         # half a minute, for when nothing else runs
    python benchmarks/input.py --data DIR                               # JPEGs of your own: train/ and val/ in DIR

JPEGs of 500 × 375 pixels are made, of noise with a photograph's spectrum and of about the published images' size, 110 kB, and
packed twice. They are in the system's memory when they are read. Two figures:

    batch   cropped and flipped images, as they reach the device: bytes from packs; from the published pipeline (torchvision's
            ImageFolder, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize in a DataLoader) float32, normalised
    full    normalised float32 images from all; where the device is a GPU, what is more than bytes is for it to do

The device is the processor here. "A core" is by the time that all processes together computed, and so the same on a machine
that others use as well. Each figure is the median over rounds of all pipelines in turn, an epoch in each, workers
started and every image's checksum compared before the clock; of them the row "first epoch" is measured once, with checksums.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from crate_fast.data.augment_batch import mirror
from crate_fast.data.open import open_data
from crate_fast.data.order import Plan
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_writer import prepare
from crate_fast.data.philox import CHANGES, uniforms
from crate_fast.eval_transform import MEAN, STD
from crate_fast.processes import ALONE
from crate_fast.settings import ConfigError, TrainConfig
from timing import machine

WIDTH, HEIGHT, BYTES = 500, 375, 110_000
DISTINCT, BATCH, CLASSES = 64, 128, 4
PACKS = {"packed, JPEG": Settings(), "packed, raw": Settings(raw=True)}
NAMES = ("published", "folder", *PACKS)
Epoch = Callable[[int], Iterator]


def photograph(draw: np.random.Generator) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8 noise whose amplitude falls with frequency as a photograph's does, in colours much alike."""
    down, across = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / WIDTH)
    white = draw.standard_normal((3, HEIGHT, WIDTH))
    white[1:] = 0.95 * white[:1] + 0.3 * white[1:]
    pixels = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(HEIGHT, WIDTH))
    pixels = 128 + 55 * pixels / pixels.std(axis=(1, 2), keepdims=True)
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def best_quality(picture: Image.Image) -> int:
    """The JPEG quality that comes closest to the published images' mean size."""

    def size(quality: int) -> int:
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=quality)
        return file.tell()

    return min(range(60, 100), key=lambda quality: abs(size(quality) - BYTES))


def make_folder(path: Path, images: int) -> Path:
    """`path` with train/ and val/ of JPEGs: `DISTINCT` pictures, over and over in train/."""
    draw, made, quality = np.random.default_rng(0), [], 0
    for _ in range(DISTINCT):
        picture, file = Image.fromarray(photograph(draw)), io.BytesIO()
        quality = quality or best_quality(picture)
        picture.save(file, "jpeg", quality=quality)
        made.append(file.getvalue())
    for split, count in (("train", images), ("val", CLASSES)):
        for number in range(count):
            target = path / split / f"class{number % CLASSES}" / f"{number:06d}.jpg"
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(made[number % DISTINCT])
    return path


def published(folder: Path, workers: int) -> dict[str, Epoch]:
    """The published pipeline; its batch is normalised already."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.ImageFolder(str(folder / "train"), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return {"batch": lambda _: iter(loader), "full": lambda _: iter(loader)}


def ours(path: Path, workers: int) -> dict[str, Epoch]:
    """What training reads from a folder, or from packs."""
    config = TrainConfig(data=str(path), workers=workers, batch_size=BATCH, image_size=224, rotate=0.0, zoom=0.0, shift=0.0)
    data = open_data(config, torch.device("cpu"), ALONE)
    plan = Plan(data.train_count, BATCH)
    epochs = {"full": lambda epoch: data.train_batches(plan, epoch)}
    if data.name == "packs":
        epochs["batch"] = lambda epoch: flipped(data, plan, epoch)
    return epochs


def flipped(data, plan: Plan, epoch: int) -> Iterator[tuple]:
    """An epoch's bytes and labels, cropped and flipped."""
    for pixels, labels, indices in data.read_epoch(plan, epoch):
        yield mirror(pixels, uniforms(plan.seed, epoch, indices, CHANGES, 1)[:, 0] < 0.5), labels


def rate(epoch: Iterator) -> tuple[float, float]:
    """Images of an epoch in a second, and in a second of computing, of all processes together."""
    start, computed, count = time.perf_counter(), processor_seconds(), 0
    for batch in epoch:
        count += len(batch[1])
    return count / (time.perf_counter() - start), count / (processor_seconds() - computed)


def processor_seconds() -> float:
    """What this process and those that it has started have computed."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    threads = [
        file for child in multiprocessing.active_children() for file in Path(f"/proc/{child.pid}/task").glob("*/schedstat")
    ]
    running = sum(int(file.read_text().split()[0]) for file in threads)
    return time.process_time() + ended.ru_utime + ended.ru_stime + 1e-9 * running


def measure(pipelines: dict[str, dict[str, Epoch]], rounds: int) -> list[dict]:
    """A row a pipeline and figure."""
    first = {name: rate(kinds.get("batch", kinds["full"])(1)) for name, kinds in pipelines.items()}
    rates: dict[tuple[str, str], list[tuple[float, float]]] = {
        (name, kind): [] for name in pipelines for kind in pipelines[name]
    }
    for epoch in range(2, 2 + rounds):
        for name, kind in rates:
            rates[name, kind].append(rate(pipelines[name][kind](epoch)))
    rows = [{"what": name, "figure": kind, "rates": found} for (name, kind), found in rates.items()]
    rows += [{"what": name, "figure": "first epoch", "rates": [first[name]]} for name in pipelines if "packed" in name]
    for row in rows:
        seconds, computing = zip(*row["rates"], strict=True)
        row["images_per_second"], row["per_core"] = statistics.median(seconds), statistics.median(computing)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown, with the ratio to the published pipeline's, or to the first row where that was not measured."""
    base = next((row for row in rows if row["what"] == "published"), rows[0])
    lines = ["| | figure | images/s | | images/s a core | |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = (f"{row[name]:,.0f} | {row[name] / base[name]:.2f}×" for name in ("images_per_second", "per_core"))
        lines.append(f"| {row['what']} | {row['figure']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: 2)")
    parser.add_argument("--images", type=int, default=4096, help="JPEGs to be made (default: 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each figure (default: 3)")
    parser.add_argument("--data", type=Path, help="a folder of JPEGs, with train/ and val/, in place of those that are made")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="pipelines to be measured (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        try:
            folder = arguments.data or make_folder(place / "folder", arguments.images)
            for number, settings in enumerate(PACKS.values()):
                prepare(folder, place / f"packs{number}", settings, os.cpu_count() or 1)
        except ConfigError as error:
            parser.error(str(error))
        packs = {name: place / f"packs{number}" for number, name in enumerate(PACKS)}
        opened = {
            name: published(folder, arguments.workers)
            if name == "published"
            else ours(packs.get(name, folder), arguments.workers)
            for name in arguments.only
        }
        rows = measure(opened, arguments.rounds)
    print(f"{arguments.workers} workers, {os.cpu_count()} cores, batch {BATCH}\n\n{table(rows)}")
    if arguments.json:
        about = {"machine": machine(torch.device("cpu")), "workers": arguments.workers, "cores": os.cpu_count(), "batch": BATCH}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
