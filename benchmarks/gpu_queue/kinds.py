"""What each kind of step of the queue does, in a process of its own; the options are those of `gpu_queue.queue`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import crate_fast.commands.tune
import workloads
from crate_fast.commands.main import main as crate_fast_command
from crate_fast.kernels import shapes, tuning
from crate_fast.optional import require
from crate_fast.training import train as train_model
from crate_fast.training.resolve import resolve
from judge import Judge
from peers import all_peers
from timing import interleave
from workloads import Workload, prepare

from .speed import Measurement, own_most, planned

DTYPE = "bfloat16"
SIDE_BY_SIDE = ("published", "sdpa", "crate_fast")
PARITY_BATCH = 1024
"""Images of a parity step, as of the timed step, so that it compiles and judges the same kernels."""
INFERENCE = (1, 8, 64, 1024)
OPERATIONS = ("layer forward", "layer backward", "mssa forward", "mssa backward", "ista forward", "ista backward")
PRECISION = ["--seeds=6", "--dim=384", "--depth=12", "--batch=16"]
TUNED_BATCH = 256
LOOP = {"arch": "CRATE_tiny", "image_size": 224, "patch_size": 16, "batch_size": 256, "workers": 14}
PHOTOGRAPHS = (10_240, 256)
"""Images of the synthetic folders that the training loop reads: train, val."""
ROOT = Path(__file__).parents[2]


class NoParity(RuntimeError):
    """A step's verdict: the message is the reason."""


class Place(NamedTuple):
    """Where a step runs: scratch is a folder that may be lost; `save` takes the rows of results as they come."""

    device: torch.device
    name: str  # of the device, as measured shapes are stored under
    scratch: Path
    workers: int
    collect_only: bool  # tests are collected, not run
    save: Callable[[list[dict]], None]


def parity(options: dict, place: Place) -> None:
    """The default path of a size, training and inference, against float64: every kernel of the timed steps."""
    published, *_, ours = all_peers(place.device, "triton")
    for what in ("train", "inference"):
        workload = Workload(what, what, options["size"], PARITY_BATCH, DTYPE)
        judge = Judge(workload, published, place.device)
        errors = judge.errors(prepare(workload, ours, "eager", place.device))
        print(what, "output and gradients from float64:", errors, "published:", judge.published)
        reason = judge.verdict(errors)
        if reason:
            raise NoParity(f"{what}, CRATE-{options['size']}: {reason}")


def train(options: dict, place: Place) -> None:
    """A training step beside the others, at the largest batch of the list that the published code has room for."""
    size, measurement = options["size"], Measurement(place.device, DTYPE, place.save)
    for mode in options["modes"]:
        workload = Workload("train", "train", size, 0, DTYPE)
        measurement.largest(workload, SIDE_BY_SIDE, mode, planned(size, "published", place.device))


def alone(options: dict, place: Place) -> None:
    """A training step of one peer: crate_fast at the batch of every prediction, another at the most that it has room for."""
    size, peer = options["size"], options["peer"]
    batches = (planned if peer == "crate_fast" else own_most)(size, peer, place.device)
    measurement = Measurement(place.device, DTYPE, place.save)
    measurement.largest(Workload("train", "train", size, 0, DTYPE), (peer,), "eager", batches)


def inference(options: dict, place: Place) -> None:
    measurement = Measurement(place.device, DTYPE, place.save)
    for batch in INFERENCE:
        for mode in options["modes"]:
            workload = Workload("inference", "inference", options["size"], batch, DTYPE)
            measurement.measure(workload, SIDE_BY_SIDE, mode)


def operations(options: dict, place: Place) -> None:
    """One layer, and the operations alone, at the first batch that is planned for training."""
    size, measurement = options["size"], Measurement(place.device, DTYPE, place.save)
    batch = planned(size, "published", place.device)[0]
    for what in OPERATIONS:
        suite = "layer" if what.startswith("layer") else "ops"
        measurement.measure(Workload(suite, what, size, batch, DTYPE), SIDE_BY_SIDE, "eager")


def tests(options: dict, place: Place) -> None:
    """A part of the tests marked "gpu"; a new one is in one of the parts by itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_queue.shard"]
    command += ["--shard", options["shard"], "--dist=worksteal", "tests"]
    command += ["--collect-only", "--numprocesses=0"] if place.collect_only else [f"--numprocesses={place.workers}"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise NoParity("tests failed; the lines above name them")


def precision(options: dict, place: Place) -> None:
    """The errors of 16 bit against float64, beside the published code's own."""
    import precision as measuring

    rows = measuring.measure(measuring.parse(PRECISION), place.device.type)
    place.save([{"suite": "precision", "what": name} | row for name, row in rows.items()])


def tune(options: dict, place: Place) -> None:
    """The fastest shapes for a size, each stored once it is found; those of an earlier call are kept."""
    size = workloads.SIZES[options["size"]]
    torch.manual_seed(0)
    tokens = torch.randn(TUNED_BATCH, workloads.TOKENS, size["dim"], dtype=torch.float16, device=place.device)

    def clock(run: Callable[[], object]) -> float:
        return interleave({"": run}, place.device, 0.15, least_rounds=3)[""].median

    for job in crate_fast.commands.tune.workloads(tokens, size["heads"], size["dim_head"]):
        if tuning.key(job.kernel, tokens.dtype, *job.sizes) not in tuning.measured(place.name):
            winners = crate_fast.commands.tune.find_winners([job], tokens.dtype, clock)
            tuning.store(place.name, winners)
            print(winners)
    shapes.forget()


def loop(options: dict, place: Place) -> None:
    """One epoch of the training loop with its loader, on images of noise: images a second, and the part spent waiting."""
    source = place.scratch / f"photographs-{os.getpid()}"
    _photographs(source)
    if options["packs"]:
        require("simplejpeg")
        packs = place.scratch / f"packs-{os.getpid()}"
        if crate_fast_command(["prepare", "imagenet", str(source), str(packs), "--raw"]):
            raise RuntimeError("crate-fast prepare failed")
        source = packs
    settings = {"data": str(source), "out": str(place.scratch / f"run-{os.getpid()}"), "device": place.device.type, **LOOP}
    settings |= {"epochs": 1, "log_every": 8, "optimizer": "AdamW", "rotate": 0.0, "zoom": 0.0, "shift": 0.0}
    directory, _ = train_model(resolve(settings))
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "waiting" in line]
    steady = trained[1:] or trained  # in the first line's time processes start
    rates = {key: sum(line[key] for line in steady) / len(steady) for key in ("images_per_second", "waiting")}
    place.save([{"suite": "loop", "what": "packs" if options["packs"] else "photographs", "settings": LOOP} | rates])


def _photographs(folder: Path) -> None:
    """A folder of train/ and val/ with two classes: 64 images of noise, each under many names."""
    from PIL import Image

    draw, (side, kinds) = random.Random(0), (256, 64)
    for part, count in zip(("train", "val"), PHOTOGRAPHS, strict=True):
        for number in range(count):
            path = folder / part / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number < kinds:
                coarse = Image.frombytes("RGB", (side // 8, side // 8), draw.randbytes(3 * (side // 8) ** 2))
                coarse.resize((side, side)).save(path, quality=90)
            else:
                first = number % kinds
                path.hardlink_to(folder / part / f"class{first % 2}" / f"{first}.jpg")


KINDS = {
    "parity": parity, "train": train, "alone": alone, "inference": inference, "operations": operations, "tests": tests,
    "precision": precision, "tune": tune, "loop": loop,
}  # fmt: skip
