"""Training on one folder of classes: what is held out, how a small folder is read, and which recipe a newcomer gets."""

import json
import re
import shutil
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import call
from helpers.pictures import make_folder

from crate_fast.commands.train import warnings_of
from crate_fast.data.folder import divide_folder
from crate_fast.data.loader import cores, workers_of
from crate_fast.data.open import open_data
from crate_fast.data.order import Plan
from crate_fast.data.pictures import read_or_stop
from crate_fast.processes import ALONE, Ranks
from crate_fast.training import ConfigError, resolve
from crate_fast.training.resolve import FEW, choose_recipe

SMALL = dict(
    image_size=16, patch_size=8, dim=16, depth=1, heads=1, dim_head=16, workers=0, epochs=2, num_threads=1, device="cpu"
)
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three classes with 10 images each."""
    return make_folder(tmp_path_factory.mktemp("one"), train=30, val=3) / "train"


def names(store):
    return {store.place(index) for index in range(len(store))}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_of_each_class_its_share_is_held_out_and_the_same_ones_wherever_the_folder_is(folder, tmp_path, share):
    train, val, classes, held_out = divide_folder(folder, share)
    assert classes == ["china", "flower", "hopper"]
    assert not names(train) & names(val)
    assert len(train) + len(val) == 30
    counts = [sum(val.label(index) == label for index in range(len(val))) for label in range(3)]
    assert counts == [min(9, max(1, round(10 * share)))] * 3
    assert names(val) == {str(folder / name) for name in held_out}
    shutil.copytree(folder, tmp_path / "copy")
    assert divide_folder(tmp_path / "copy", share)[3] == held_out


def test_more_images_move_no_other_ones_into_training(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    before = set(divide_folder(tmp_path / "more", 0.2)[3])
    for number in range(10):
        shutil.copy(next((folder / "china").iterdir()), tmp_path / "more" / "china" / f"new-{number}.png")
    after = set(divide_folder(tmp_path / "more", 0.4)[3])
    assert len(before - after) <= 1


def test_a_class_of_one_image_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "few")
    for file in sorted((tmp_path / "few" / "hopper").iterdir())[1:]:
        file.unlink()
    with pytest.raises(ConfigError, match="hopper has 1 image; a class needs 2"):
        divide_folder(tmp_path / "few", 0.2)


def test_images_that_are_kept_are_read_once_and_give_the_same_every_epoch(folder, monkeypatch):
    config = resolve(SMALL | {"data": str(folder), "keep_short_side": 24})
    data, read = open_data(config, torch.device("cpu"), ALONE), []
    monkeypatch.setattr("crate_fast.data.folder.read_or_stop", lambda path: read.append(path) or read_or_stop(path))
    plan = Plan(data.train_count, 8, config.seed, ranks=ALONE)
    epochs = [[images for images, _ in data.train_batches(plan, 1)] for _ in range(2)]
    seen = [torch.cat([images for images, _ in data.test_batches(4, ALONE)]) for _ in range(2)]
    assert len(read) == len(set(read)) == 30
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True))
    assert torch.equal(*seen)
    plain = open_data(replace(config, keep_short_side=0), torch.device("cpu"), ALONE)
    assert torch.equal(torch.cat([images for images, _ in plain.test_batches(4, ALONE)]), seen[0])  # evaluation is as ever


@pytest.mark.parametrize(
    ("recipe", "named"),
    [("main", {"prepare", "--workers", "--data"}), ("photos", {"--image-size", "--keep-short-side", "--augment"})],
)
def test_advice_names_what_helps(folder, recipe, named):
    """Images that are kept in memory are read by this process alone, and no pack is quicker than that."""
    config = resolve({"data": str(folder), "workers": 0}, recipe)
    advice = open_data(config, torch.device("cpu"), ALONE).advice
    assert set(re.findall("prepare|--[a-z-]+", advice or "")) == named


def test_workers_that_are_not_used_are_told(folder, capsys):
    config = resolve({"data": str(folder), "workers": 3}, "photos")
    arguments = Namespace(ignored=[])
    assert ["--workers has no effect" in line for line in warnings_of(arguments, {"workers": 3}, config)] == [True]
    assert warnings_of(arguments, {"workers": 3}, replace(config, keep_short_side=0)) == []


def test_no_more_processes_read_than_there_are_cores(recwarn, folder):
    for workers in (0, 1, 16, 1024):
        for count in (1, 2, 8):
            each = workers_of(workers, Ranks(0, count, 0, count))
            assert each * count < cores() + count
            assert (each > 0) == (workers > 0)
    data = open_data(resolve(SMALL | {"data": str(folder), "workers": 64}), torch.device("cpu"), ALONE)
    assert len(list(data.test_batches(8, ALONE))) == 1
    assert not recwarn.list


def test_a_run_writes_down_what_it_holds_out_and_goes_on_only_with_that(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "photos")
    out = tmp_path / "run"
    status, printed, err = call(capsys, "train", "--data", tmp_path / "photos", *FLAGS, "--batch-size", 8, "--out", out)
    assert (status, err) == (0, "")
    assert "of 6)" in printed
    held_out = json.loads((out / "held-out.json").read_text())
    assert held_out == divide_folder(tmp_path / "photos", 0.2)[3]
    last = printed.splitlines()[-2]
    assert call(capsys, "evaluate", out)[1] == f"{last}\n"
    _, answers, _ = call(capsys, "predict", out, *(tmp_path / "photos" / name for name in held_out), "--top", 1)
    right = sum(f"/{line.split(': ')[1].split()[0]}/" in line for line in answers.splitlines())
    assert f"({right} of 6)" in last
    other = tmp_path / "photos" / held_out[0]
    other.rename(other.with_name("another.png"))
    status, _, err = call(capsys, "train", "--resume", out)
    assert status == 2
    assert "the images that are held out for evaluation are others" in err or "number of" in err


def test_few_photographs_without_a_gpu_get_a_recipe_that_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    chosen = choose_recipe({"data": str(folder)})
    assert chosen is not None
    recipe, more, why = chosen
    config = resolve(more | {"data": str(folder)}, recipe)
    assert (config.image_size, config.workers, why) == (64, 0, "30 photographs and no GPU")
    assert choose_recipe({"data": str(folder), "arch": "CRATE_base"}) is None  # who asks for a model gets main.py's
    assert choose_recipe({"data": str(folder), "device": "cuda"}) is None
    assert choose_recipe({"data": "digits"}) is None
    monkeypatch.setattr(sys.modules["crate_fast.training.resolve"], "count_pictures", lambda *_: FEW + 1)
    assert choose_recipe({"data": str(folder)}) is None


@pytest.mark.parametrize("flags", [(), ("--resume", "auto")], ids=["", "auto"])
def test_the_recipe_for_few_photographs_is_that_of_resume_auto_too(folder, tmp_path, monkeypatch, capsys, flags):
    begun = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("crate_fast.training.train", lambda config, **_: begun.append(config) or (None, None))
    assert call(capsys, "train", "--data", folder, "--out", tmp_path / "run", *flags)[0] == 0
    assert begun[0] == resolve({"data": str(folder), "out": str(tmp_path / "run"), "epochs": begun[0].epochs}, "photos")
