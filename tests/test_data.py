"""Photographs: what is read, what is refused, what augmentation draws from."""

import re
from collections import Counter
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers.pictures import make_folder
from PIL import Image

from crate_fast.data.augment import (
    OPERATIONS,
    SIGNED,
    TRIVIALAUGMENT_RANGES,
    central_crop,
    change,
    erase,
    randaugment_ranges,
    random_crop,
    strength,
)
from crate_fast.data.folder import open_folder
from crate_fast.data.open import open_data
from crate_fast.data.order import Plan
from crate_fast.data.published_sets import SETS
from crate_fast.data_sets import DATA_SETS, UNCHANGED
from crate_fast.eval_transform import MEAN, STD
from crate_fast.processes import ALONE, Ranks
from crate_fast.training import ConfigError, TrainConfig, UnreadableError, resolve, train

CPU = torch.device("cpu")
SMALL = dict(
    image_size=16, patch_size=8, dim=16, depth=1, heads=1, dim_head=16, workers=0, epochs=1, num_threads=1, device="cpu"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"), train=30, val=13)


def config_for(data, **changes):
    return resolve(SMALL | {"data": str(data)} | changes)


def epoch_of(config, epoch=1, first=0, ranks=ALONE):
    data = open_data(config, CPU, ranks)
    plan = Plan(data.train_count, 8, config.seed, ranks=ranks)
    return [(images, labels) for images, labels in data.train_batches(plan, epoch, first)]


def test_labels_are_the_folders(folder):
    train_images, val, names = open_folder(folder)
    assert names == ["china", "flower", "hopper"]
    assert (len(train_images), len(val)) == (30, 13)
    for store in (train_images, val):
        for index in range(len(store)):
            assert f"/{names[store.label(index)]}/" in store.place(index)
            assert store.read(index).mode == "RGB"


def test_evaluation_sees_each_image_as_it_is(folder):
    config = config_for(folder, image_size=24, eval_crop=0.75)
    data = open_data(config, CPU, ALONE)
    seen = [torch.cat(parts) for parts in zip(*data.test_batches(5, ALONE), strict=True)]
    _, store, _ = open_folder(folder)
    assert seen[1].tolist() == [store.label(index) for index in range(13)]
    for index in (0, 12):
        pixels = np.asarray(store.read(index).resize((32, 32), Image.Resampling.BILINEAR).crop((4, 4, 28, 28))) / 255
        expected = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()
        torch.testing.assert_close(seen[0][index], expected, rtol=1e-5, atol=1e-5)
    shares = [[labels for _, labels in data.test_batches(2, Ranks(rank, 3))] for rank in range(3)]
    assert torch.equal(torch.cat([labels for share in shares for labels in share]), seen[1])


def test_samples_depend_on_seed_epoch_and_index_alone(folder):
    config = config_for(folder, augment="randaugment", erase=0.5)
    whole = epoch_of(config)
    assert [len(labels) for _, labels in whole] == [8, 8, 8, 6]
    later = epoch_of(config, first=2)
    in_workers = epoch_of(replace(config, workers=2))
    torch.rand(3)
    for number, (images, labels) in enumerate(whole):
        for other in (in_workers, [None, None, *later] if number > 1 else whole):
            assert torch.equal(other[number][0], images)
            assert torch.equal(other[number][1], labels)
    ranks = [epoch_of(config, ranks=Ranks(rank, 2)) for rank in range(2)]
    for number, (images, _) in enumerate(whole):
        assert torch.equal(torch.cat([part[number][0] for part in ranks]), images)
    assert not torch.equal(epoch_of(config, epoch=2)[0][0], whole[0][0])
    assert not torch.equal(epoch_of(replace(config, seed=1))[0][0], whole[0][0])


def test_two_images_of_a_batch_share_no_draws(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                make = np.random.default_rng(0).integers(256, size=(30, 30, 3), dtype=np.uint8)
                Image.fromarray(make).save(tmp_path / split / name / f"{index}.png")
    images = epoch_of(config_for(tmp_path))[0][0]
    assert len({image.numpy().tobytes() for image in images}) == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: (path / "val" / "china").rename(path / "val" / "porcelain"), "only train has china"),
        (lambda path: (path / "val" / "more").mkdir(), "only val has more"),
        (lambda path: Image.new("RGB", (8, 8)).save(path / "val" / "loose.jpg"), "loose.jpg lies in no folder of a class"),
        (lambda path: [(path / split / "empty").mkdir() for split in ("train", "val")], "empty has no images"),
        (lambda path: (path / "val").rename(path / "validation"), "val is no directory"),
        (lambda path: [file.unlink() for file in (path / "train" / "china").iterdir()], "china has no images"),
    ],
)
def test_folders_that_would_be_mislabelled_are_refused(tmp_path, make, words):
    make_folder(tmp_path, train=6, val=6)
    make(tmp_path)
    with pytest.raises(ConfigError, match=words):
        open_folder(tmp_path)


def test_unreadable_images_are_named_counted_and_skipped(tmp_path, capsys):
    make_folder(tmp_path / "data", train=24, val=9)
    files = sorted((tmp_path / "data").rglob("*.jpg"))
    damaged = [file for file in files if "train" in file.parts][:2] + [file for file in files if "val" in file.parts][:1]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:200])
    config = config_for(tmp_path / "data", max_unreadable=3, batch_size=8, out=str(tmp_path / "run"), epochs=2)
    run, score = train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unreadable" in line]
    assert len(lines) == 3
    for file in damaged:
        assert any(str(file) in line for line in lines)
    assert score.count == 8
    assert sum(row["count"] for row in run.read_metrics() if row["split"] == "train") == 2 * 22
    with pytest.raises(UnreadableError, match="2 images cannot be read, and --max-unreadable is 1; the last is "):
        train(replace(config, max_unreadable=1, out=str(tmp_path / "other")))


# Strengths of torchvision 0.29.1, for images of 331 by 200 pixels: RandAugment's and TrivialAugmentWide's at levels 9 and 15.
STRENGTHS = {
    "shear_x": ((0.09, 0.15), (0.297, 0.495)),
    "translate_x": ((45.0, 75.0), (9.6, 15.999999)),
    "translate_y": ((27.190332, 45.317219), (9.6, 15.999999)),
    "rotate": ((9.0, 15.0), (40.5, 67.5)),
    "contrast": ((0.27, 0.45), (0.297, 0.495)),
    "posterize": ((7, 6), (6, 5)),
    "solarize": ((178.5, 127.5), (178.5, 127.5)),
}


@pytest.mark.parametrize("operation", STRENGTHS)
def test_strengths_are_torchvisions(operation):
    wide, trivial = STRENGTHS[operation]
    ranges = randaugment_ranges(331, 200)
    assert [strength(operation, level, ranges) for level in (9, 15)] == pytest.approx(wide, abs=1e-5)
    assert [strength(operation, level, TRIVIALAUGMENT_RANGES) for level in (9, 15)] == pytest.approx(trivial, abs=1e-5)


def test_operations_do_what_they_are_called():
    pixels = np.random.default_rng(0).integers(20, 200, size=(20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for operation in OPERATIONS:
        value = strength(operation, 20, randaugment_ranges(30, 20))
        for signed in (value, -value) if operation in SIGNED else (value,):
            changed = np.asarray(change(image, operation, signed))
            assert changed.shape == pixels.shape
            assert np.array_equal(changed, pixels) == (operation == "identity"), operation
    assert np.array_equal(np.asarray(change(image, "translate_x", 5.9))[:, 5:], pixels[:, :-5])
    assert np.array_equal(np.asarray(change(image, "translate_y", -5.9))[:-5], pixels[5:])
    assert np.array_equal(np.asarray(change(image, "posterize", 3)), pixels & 0b11100000)
    assert np.array_equal(np.asarray(change(image, "solarize", 100.0)), np.where(pixels < 100, pixels, 255 - pixels))


def test_crops_stay_in_their_bounds():
    draw, image = np.random.default_rng(0), Image.new("RGB", (120, 80), (200, 100, 50))
    for size in ((120, 80), (400, 20), (1, 1), (5, 300)):
        crop = random_crop(image.resize(size), 16, 0.08, draw)
        assert crop.size == (16, 16)
        assert np.asarray(crop).min() == 50
        for part in (0.0, 0.875):
            assert central_crop(image.resize(size), (16, 24), part).size == (24, 16)


def test_erasing_is_as_frequent_as_asked():
    draw, pixels = np.random.default_rng(0), np.zeros((32, 32, 3), np.uint8)
    colour = np.array([9, 8, 7], np.uint8)
    shares = [(erase(pixels, 0.25, colour, draw) == colour).all(axis=2).mean() for _ in range(2000)]
    assert abs(sum(share > 0 for share in shares) / 2000 - 0.25) < 0.04
    assert max(shares) < 0.36
    assert Counter(erase(pixels, 0.0, colour, draw).ravel().tolist()) == {0: 3072}


def test_classes_must_agree(folder):
    assert open_data(config_for(folder, classes=3), CPU, ALONE).classes == 3
    with pytest.raises(ConfigError, match=re.escape("--classes is 10; folder has 3")):
        open_data(config_for(folder, classes=10), CPU, ALONE)


def test_synthetic_batches_time_the_loop_alone():
    data = open_data(resolve(SMALL | {"data": "synthetic", "classes": 7}), CPU, ALONE)
    images, labels = next(data.train_batches(Plan(data.train_count, 6, accumulate=2), 1))
    assert images.shape == (3, 3, 16, 16)
    assert (labels < 7).all()
    assert sum(len(labels) for _, labels in data.test_batches(4096, Ranks(2, 3))) == 50_000 - 2 * 50_000 // 3


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_has_what_opens_it_and_takes_what_changes_its_images_alone(name):
    known = DATA_SETS[name]
    assert callable(import_module(f"crate_fast.data.{known.module}").open_set)
    assert (name in SETS) == (known.module == "published_sets")
    still = {setting: none for settings in UNCHANGED.values() for setting, none in settings.items()} | {"data": name}
    for setting, none in still.items() - {("data", name)}:
        kind = next(kind for kind in UNCHANGED if setting in UNCHANGED[kind])
        some = "trivial" if none == "none" else 0.5
        if kind == known.images:
            assert getattr(TrainConfig(**still | {setting: some}), setting) == some
        else:
            with pytest.raises(ConfigError, match=f"--{setting} is {some!r}; it changes {kind}, and --data is {name}"):
                TrainConfig(**still | {setting: some})
