"""Run directories that were written before go on to the same bits, are evaluated, inspected and converted; see tests/data/runs.

The bits of a run are those of the processor that it is on, so none are stored. What is held to them, on whatever processor, is
`plain_end`: the run as one loop over PyTorch's functions, from the stored checkpoint as PyTorch alone reads it.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.distributed import checkpoint as dcp

from crate_fast import CRATE, load_checkpoint

RUNS = Path(__file__).parent / "data" / "runs"
GOING_ON = ("digits", "digits-first", "digits-parts")
STEP, STEPS, STEPS_PER_EPOCH = 7, 20, 5
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@pytest.fixture
def run(request, tmp_path):
    """A copy of the run that the test asks for by its name."""
    return Path(shutil.copytree(RUNS / request.param, tmp_path / request.param))


def checkpoint_of(run: Path) -> Path:
    return next((run / "checkpoints").glob("step-00000007.*"))


def read_plainly(path: Path, names: list[str]) -> tuple[dict, dict, dict | None]:
    """(weights, moments by parameter, mean of the weights) in a checkpoint, read by PyTorch alone.

    names: of the parameters in the optimizer's order.
    """
    if path.suffix == ".pt":
        found = torch.load(path, weights_only=True)
        return found["model"], {names[n]: each for n, each in found["optimizer"]["state"].items()}, found["ema"]
    reader = dcp.FileSystemReader(path)
    tensors = {name: torch.empty(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    moments = {name: {key: tensors[f"optimizer.{name}.{key}"] for key in MOMENTS} for name in names}
    return {name: tensors[f"model.{name}"] for name in names}, moments, None


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The training images, (1437, 1, 8, 8), not normalised, and their labels."""
    scans = load_digits()
    chosen, _ = train_test_split(range(len(scans.target)), test_size=360, stratify=scans.target, random_state=0)
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(8, 8), mode="bicubic", align_corners=False)
    return images[chosen], torch.from_numpy(scans.target).long()[chosen]


def moves(count: int, draw: torch.Generator, settings: dict) -> torch.Tensor:
    """(count, 2, 3): how an epoch's images are turned, enlarged and shifted."""
    angle, size, right, down = torch.rand(4, count, generator=draw).mul_(2).sub_(1)
    angle, size = angle * math.radians(settings["rotate"]), 1 + size * settings["zoom"]
    right, down = (move * settings["shift"] * 2 / 8 for move in (right, down))
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.stack((cos, -sin, right, sin, cos, down), dim=1).view(count, 2, 3)


def hashed(*key: int) -> int:
    mixed = 0
    for value in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + value + 1) % 2**63
    return mixed


def loss_of(model, images: torch.Tensor, labels: torch.Tensor, settings: dict, key: tuple[int, ...]) -> torch.Tensor:
    """The sum of the cross-entropies of a part of a step, mixed where the run mixes."""
    torch.default_generator.manual_seed(hashed(*key))  # the run's number, which --seed of the tests leaves as it is
    options = {"label_smoothing": settings["label_smoothing"], "reduction": "sum"}
    if not settings["mixup"]:
        return F.cross_entropy(model(images), labels, **options)
    part = float(np.random.default_rng(key).beta(settings["mixup"], settings["mixup"]))
    logits = model(images.lerp(images.flip(0), 1 - part))
    return part * F.cross_entropy(logits, labels, **options) + (1 - part) * F.cross_entropy(logits, labels.flip(0), **options)


def plain_gradients(model, data: tuple[torch.Tensor, torch.Tensor], step: int, settings: dict) -> None:
    """Leaves in `model` the gradient of the mean over a step's images, computed in two parts."""
    images, labels = data
    average, spread = images.mean().item(), images.std().item()
    epoch, place = divmod(step - 1, STEPS_PER_EPOCH)
    draw = torch.Generator().manual_seed(settings["seed"] * 1_000_003 + epoch + 1)
    order, maps = torch.randperm(len(labels), generator=draw), moves(len(labels), draw, settings)
    first, last = 300 * place, min(300 * place + 300, len(labels))
    middle = first + (last - first) // 2
    model.zero_grad()
    for part, cut in enumerate((slice(first, middle), slice(middle, last))):
        grid = F.affine_grid(maps[cut], [len(maps[cut]), 1, 8, 8], align_corners=False)
        moved = (F.grid_sample(images[order[cut]], grid, align_corners=False) - average) / spread
        loss = loss_of(model, moved, labels[order[cut]], settings, (settings["seed"], step, 0, part))
        (loss * (1 / (last - first))).backward()


def plain_end(run: Path, skipped: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights at the checkpoint, weights at the end) that a run is to be evaluated with; `skipped` steps are left out."""
    config = json.loads((run / "config.json").read_text())
    settings, model = config["config"], CRATE(**config["model"])
    torch.set_num_threads(settings["num_threads"])
    own = dict(model.named_parameters())
    matrices, others = ([name for name in own if (own[name].dim() == 2) == flat] for flat in (True, False))
    weights, moments, mean = read_plainly(checkpoint_of(run), [*matrices, *others])
    model.load_state_dict(weights)
    groups = [{"params": [own[n] for n in matrices]}, {"params": [own[n] for n in others], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], weight_decay=settings["weight_decay"], foreach=True)
    for name, values in moments.items():
        optimizer.state[own[name]] = values
    before = {name: value.clone() for name, value in (mean or weights).items()}
    data = digits()
    for step in range(STEP + 1 + skipped, STEPS + 1):
        plain_gradients(model, data, step, settings)
        for group in optimizer.param_groups:  # two steps of warmup, then half a cosine
            group["lr"] = settings["lr"] * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 2)))
        optimizer.step()
        for name, value in (mean or {}).items():
            value.lerp_(own[name].detach(), 1 - min(settings["ema"], (1 + step) / (10 + step)))
    return before, mean or {name: value.detach() for name, value in own.items()}


def far(found: dict, expected: dict, before: dict) -> float:
    """How far weights are from those expected, as a part of the way from those of before."""
    apart, way = (torch.cat([(a[k] - b[k]).flatten() for k in b]) for a, b in ((found, expected), (expected, before)))
    return (apart.norm() / way.norm()).item()


@pytest.mark.parametrize("run", GOING_ON, indirect=True)
def test_a_run_of_before_goes_on_to_the_bits_of_a_plain_loop(run, capsys):
    kept, rows = load_file(run / "model.safetensors"), (run / "metrics.jsonl").read_text().splitlines()
    before, expected = plain_end(run)
    wrong = plain_end(run, skipped=1)[1]
    status, out, error = call(capsys, "train", "--resume", run)
    assert status == 0, error
    assert f"going on after step {STEP} of {STEPS}" in out
    found = load_file(run / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()
    # Other processors and versions sum otherwise, a little: with a step left out it is a hundred times as far and more.
    assert far(found, kept, before) < 1e-3 < 0.1 < far(wrong, kept, before)
    again = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == [json.loads(row)["step"] for row in rows]
    assert [json.dumps(row) for row in again[:5]] == rows[:5]


@pytest.mark.parametrize("run", [*GOING_ON, "digits-unnumbered"], indirect=True)
def test_a_run_of_before_is_evaluated_inspected_and_converted(run, tmp_path, capsys):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    checkpoint = next((run / "checkpoints").glob("*.*"))
    assert f"({last['correct']} of 360)" in call(capsys, "evaluate", run)[1]
    assert "of 360)" in call(capsys, "evaluate", checkpoint)[1]
    views = ("--images", "digits", "--limit", 20, "--out", tmp_path / "views")
    assert call(capsys, "inspect", "--checkpoint", run, checkpoint, *views)[0] == 0
    for source in (run, checkpoint):
        for target in (tmp_path / f"{source.name}.safetensors", tmp_path / f"{source.name}.pth"):
            assert call(capsys, "convert", source, target)[0] == 0
            converted, own = load_checkpoint(target).state_dict(), load_checkpoint(source).state_dict()
            assert converted.keys() == own.keys() and all(torch.equal(converted[name], own[name]) for name in own)


@pytest.mark.parametrize("run", ["digits-unnumbered"], indirect=True)
def test_a_run_that_could_not_yet_be_gone_on_with_says_so_and_what_can_be_done(run, capsys):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for resume in (run, run / "checkpoints" / "last.pt"):
        status, _, error = call(capsys, "train", "--resume", resume)
        assert status == 2 and error.count("\n") == 1 and "last.pt" in error and "--init" in error
    size = ("--image-size", 8, "--dim", 16, "--depth", 1, "--heads", 2, "--dim-head", 8, "--epochs", 1, "--device", "cpu")
    assert call(capsys, "train", "--init", run, *size, "--out", run.parent / "new")[0] == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
