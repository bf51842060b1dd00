"""Every file that a command reads, changed in every way: the command works or says in a line what is wrong.

`make fuzz` tries on for an hour; here it is a few hundred cases, always the same ones.
"""

import os
import random
import re
import shutil
import time
from collections import Counter

import pytest
import torch
from fuzzing import MEMORY, SECONDS, Kind, case, change_archive, change_bytes, change_json, change_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_folder
from PIL import Image

from crate_fast import CRATE

MODEL, LAST = "{}/model.safetensors", "{}/run/checkpoints/last.pt"
SIZES = ["--dim", "16", "--depth", "1", "--heads", "1", "--dim-head", "16", "--device", "cpu", "--epochs", "1"]
RESUME = ("train", "--resume", "{}/run", "--device", "cpu")
EVALUATE = ("evaluate", "{}/run", "--device", "cpu")
PACKED = (
    "train",
    "--data",
    "{}/packs",
    "--image-size",
    "16",
    "--patch-size",
    "8",
    *SIZES,
    "--batch-size",
    "4",
    "--workers",
    "0",
)
INSPECT = ("inspect", "--checkpoint", "{}/main.pth.tar", "--images", "{}/images", "--out", "{}/out", "--device", "cpu")
SHOWN = (
    ("inspect", "--checkpoint", MODEL, "--images", "{}/images", "--out", "{}/out", "--device", "cpu"),
    ("segment", "{}/images/NAME", "--checkpoint", MODEL, "--out", "{}/out", "--device", "cpu"),
)
IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}
KINDS = {
    "config": Kind("run/config.json", change_json, (RESUME, EVALUATE)),
    "metrics": Kind("run/metrics.jsonl", change_json, (RESUME,)),
    "checkpoint": Kind(
        "run/checkpoints/last.pt", change_archive,
        (RESUME, ("evaluate", LAST, "--device", "cpu"), ("convert", LAST, "{}/a.pth")),
    ),
    "model": Kind("run/model.safetensors", change_tensors, (EVALUATE, ("convert", "{}/run", "{}/a.safetensors"))),
    "weights": Kind(
        "model.safetensors", change_tensors,
        (("convert", MODEL, "{}/a.pth"), ("train", "--init", MODEL, *SIZES, "--out", "{}/new")),
    ),
    "published": Kind(
        "main.pth.tar", change_archive,
        (("convert", "{}/main.pth.tar", "{}/a.safetensors"), INSPECT),
    ),
    "pack": Kind("packs/train-00000.pack", change_bytes, ((*PACKED, "--out", "{}/new"),)),
    "packs": Kind("packs/packs.json", change_json, ((*PACKED, "--out", "{}/new"),)),
    **{
        name: Kind(f"images/a.{name}", change_bytes, tuple(tuple(x.replace("NAME", f"a.{name}") for x in y) for y in SHOWN))
        for name in IMAGES
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """For each kind a folder with what its commands need, and no more."""
    place = tmp_path_factory.mktemp("fuzz")
    from crate_fast.cli import main

    assert main(["train", "--out", str(place / "run"), *SIZES]) == 0
    torch.manual_seed(0)
    model = CRATE(image_size=16, patch_size=8, num_classes=10, dim=16, depth=1, heads=1, dim_head=16)
    content = {"epoch": 1, "arch": "CRATE_tiny", "best_acc1": torch.tensor(1.0)}
    content["state_dict"] = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(content, place / "main.pth.tar")
    shutil.copy(place / "run" / "model.safetensors", place / "model.safetensors")
    make_folder(place / "folder", train=6, val=4, side=20)
    assert main(["prepare", "imagenet", str(place / "folder"), str(place / "packs"), "--workers", "1"]) == 0
    (place / "images").mkdir()
    for name, kind in IMAGES.items():
        Image.effect_noise((24, 20), 60).convert("RGB").save(place / "images" / f"a.{name}", kind)
    found = {}
    for name, kind in KINDS.items():
        found[name] = place / "samples" / name
        for entry in {word.partition("{}/")[2].partition("/")[0] for line in kind.commands for word in line if "{}" in word}:
            source, target = place / entry, found[name] / entry
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry == "images":
                target.mkdir()
                shutil.copy(place / (kind.file if "images" in kind.file else "images/a.png"), target)
            elif source.exists():
                (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return found


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    path = tmp_path_factory.mktemp("canary") / "sang"
    os.environ["FUZZ_CANARY"] = str(path)
    yield path
    del os.environ["FUZZ_CANARY"]


def check(samples, canary, name: str, seed: int, place) -> int:
    """Runs one case; its status."""
    command, outcome = case(samples[name], KINDS[name], random.Random(seed), place)
    told = f"{name} {seed}: {' '.join(command)}: {outcome}"
    assert outcome.status in (0, 2), told
    assert outcome.seconds < SECONDS and outcome.bytes < MEMORY, told
    assert "Traceback" not in outcome.err and "out of memory" not in outcome.err, told
    assert not canary.exists(), told
    if outcome.status == 2:
        assert re.fullmatch(r"crate-fast[ a-z]*: error: .+", outcome.err.splitlines()[-1]), told
    return outcome.status


def test_samples_are_read_as_they_are(samples, canary, tmp_path):
    for name, kind in KINDS.items():
        for command in kind.commands:
            same = kind._replace(change=lambda content, draw: content, commands=(command,))
            _, outcome = case(samples[name], same, random.Random(0), tmp_path)
            assert outcome.status == 0, (name, command, outcome)


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 8)), deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", KINDS)
def test_changed_files_work_or_are_refused_in_a_line(samples, canary, tmp_path_factory, name, seed):
    check(samples, canary, name, seed, tmp_path_factory.getbasetemp())


if "FUZZ_SECONDS" in os.environ:

    def test_for_as_long_as_asked(samples, canary, tmp_path):
        counts, draw, end = Counter(), random.SystemRandom(), time.monotonic() + float(os.environ["FUZZ_SECONDS"])
        while time.monotonic() < end:
            for name in KINDS:
                counts[name, check(samples, canary, name, draw.randrange(2**32), tmp_path)] += 1
        for (name, status), count in sorted(counts.items()):
            print(f"{name}: {count} cases ended with status {status}")
