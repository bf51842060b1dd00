"""From packs: the same batches however they are read, in evaluation those of the folder; damage told in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from helpers.pictures import make_folder, photographs
from PIL import Image

from crate_fast.data import pack_loader
from crate_fast.data.open import open_data
from crate_fast.data.order import Plan
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_file import Pack, PackError
from crate_fast.data.pack_folder import open_packs
from crate_fast.data.pack_writer import prepare
from crate_fast.processes import ALONE, Ranks
from crate_fast.training import TrainConfig, resolve, train

CPU = torch.device("cpu")
SMALL = Settings(short_side=24, raw=True, pack_images=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("packed") / "folder", train=36, val=12)


def config_for(data: Path, **changes) -> TrainConfig:
    """Settings of a small run on `data`."""
    small = dict(image_size=24, patch_size=8, dim=16, depth=1, heads=1, dim_head=16, workers=0, num_threads=1, device="cpu")
    return resolve(small | {"data": str(data), "batch_size": 8} | changes)


def test_evaluation_from_packs_is_the_folders_to_the_bit(folder, tmp_path):
    """At the size of evaluation, 24 of 32 pixels, of images that lie raw in packs of JPEGs."""
    prepare(folder, tmp_path / "packs", Settings(short_side=32, pack_images=5), workers=1)
    config = config_for(folder, eval_crop=0.75)
    ours = open_data(replace(config, data=str(tmp_path / "packs"), workers=2), CPU, ALONE)
    for pair in zip(open_data(config, CPU, ALONE).test_batches(5, ALONE), ours.test_batches(5, ALONE), strict=True):
        assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])
    shares = [[labels for _, labels in ours.test_batches(2, Ranks(rank, 3))] for rank in range(3)]
    assert torch.equal(
        torch.cat([labels for share in shares for labels in share]), torch.from_numpy(open_packs(tmp_path / "packs").val.labels)
    )


@pytest.mark.parametrize(("raw", "bound"), [(False, ("CHUNK", 3)), (True, ("LARGEST", 3 * 3 * 24**2)), (True, ("CHUNK", 8))])
def test_batches_depend_on_seed_epoch_and_index_alone(folder, tmp_path, monkeypatch, raw, bound):
    """Whatever the number of workers and processes, where an epoch is begun, and how an epoch before was left."""
    prepare(folder, tmp_path / "packs", Settings(short_side=32, raw=raw, pack_images=5), workers=1)
    monkeypatch.setattr(pack_loader, *bound)
    config = config_for(tmp_path / "packs", augment="randaugment", erase=0.5)

    def epoch_of(data, epoch: int = 1, first: int = 0, ranks: Ranks = ALONE) -> list:
        plan = Plan(data.train_count, 8, config.seed, ranks=ranks)
        return [(images.clone(), labels) for images, labels in data.train_batches(plan, epoch, first)]

    def same(some, others) -> bool:
        return all(
            torch.equal(*x) and torch.equal(*y) for x, y in (zip(*two, strict=True) for two in zip(some, others, strict=True))
        )

    alone, several = open_data(config, CPU, ALONE), open_data(replace(config, workers=2), CPU, ALONE)
    whole, second = epoch_of(alone), epoch_of(alone, epoch=2)
    assert [len(labels) for _, labels in whole] == [8, 8, 8, 8, 4]
    assert same(epoch_of(several), whole)
    sparse = [labels for _, labels in several.train_batches(Plan(36, 8, config.seed, accumulate=6), 1)]
    assert sorted(map(len, sparse[-6:])) == [0, 0, 1, 1, 1, 1]
    assert torch.equal(torch.cat(sparse), torch.cat([labels for _, labels in whole]))
    left = several.train_batches(Plan(36, 8, config.seed), 1)
    next(left)
    next(several.test_batches(4, ALONE))
    assert same(epoch_of(several, epoch=2), second) and same(epoch_of(several, first=3), whole[3:])
    halves = [epoch_of(open_data(config, CPU, ALONE), ranks=Ranks(rank, 2)) for rank in range(2)]
    assert same([map(torch.cat, zip(*parts, strict=True)) for parts in zip(*halves, strict=True)], [*map(tuple, whole)])
    assert not torch.equal(second[0][0], whole[0][0])
    assert not torch.equal(epoch_of(open_data(replace(config, seed=1), CPU, ALONE))[0][0], whole[0][0])


def test_a_training_crop_is_what_the_folder_would_give(tmp_path):
    """Enlarged, to one value of 256; where both sides shrink, a mean over areas; a large JPEG decoded smaller."""
    photograph = photographs()["china"]
    for split in ("train", "val"):
        (tmp_path / "folder" / split / "a").mkdir(parents=True)
        photograph.save(tmp_path / "folder" / split / "a" / "a.jpg", quality=95)
    prepare(tmp_path / "folder", tmp_path / "packs", Settings(short_side=0), workers=1)
    split, pixels = open_packs(tmp_path / "packs").train, np.asarray(Image.open(tmp_path / "folder" / "val" / "a" / "a.jpg"))
    for box, size, (mean, most) in (
        ((31, 50, 150, 200), 224, (0.3, 1)),
        ((9, 8, 280, 260), 224, (1.5, 30)),
        ((20, 30, 400, 600), 64, (3, 50)),
    ):
        top, left, height, width = box
        out = np.empty((size, size, 3), np.uint8)
        pack_loader.read_crop(split, 0, box, out)
        cropped = Image.fromarray(pixels[top : top + height, left : left + width])
        expected = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
        apart = np.abs(out.astype(int) - expected)
        assert apart.mean() < mean and apart.max() <= most, (apart.mean(), apart.max())


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_damaged_pack_ends_in_one_line(folder, tmp_path, capsys, workers):
    prepare(folder, tmp_path / "packs", SMALL, workers=1)
    words = [
        "train",
        "--data",
        tmp_path / "packs",
        "--image-size",
        16,
        "--patch-size",
        8,
        "--dim",
        16,
        "--depth",
        1,
        "--heads",
        1,
    ]
    words += ["--dim-head", 16, "--epochs", 2, "--device", "cpu", "--num-threads", 1, "--batch-size", 8, "--workers", workers]
    status, out, err = call(capsys, *words, "--out", tmp_path / "good")
    assert (status, err) == (0, "")
    assert "test top-1" in out
    pack = tmp_path / "packs" / "train-00002.pack"
    content, place = bytearray(pack.read_bytes()), int(Pack(pack).index["offset"][4])
    content[place] ^= 1
    pack.write_bytes(content)
    status, _, err = call(capsys, *words, "--out", tmp_path / "bad")
    assert status == 2
    assert err.startswith(f"crate-fast: error: {pack}: damaged at byte {place}: image 4, train/")
    assert err.count("\n") == 1
    (tmp_path / "packs" / "val-00000.pack").unlink()
    status, _, err = call(capsys, "evaluate", tmp_path / "good")
    assert (status, err) == (2, f"crate-fast: error: {tmp_path / 'packs' / 'val-00000.pack'}: No such file or directory\n")


def test_packs_that_are_not_all_there_are_refused(folder, tmp_path):
    prepare(folder, tmp_path / "packs", SMALL, workers=1)
    (tmp_path / "packs" / "packs.json").unlink()
    with pytest.raises(PackError, match="has not come to its end there; the same command goes on with it"):
        open_data(config_for(tmp_path / "packs"), CPU, ALONE)
    (tmp_path / "packs" / "packs.json").write_text("{}")
    with pytest.raises(PackError, match=r"packs\.json: damaged"):
        open_data(config_for(tmp_path / "packs"), CPU, ALONE)


def test_a_run_is_not_taken_up_with_other_data(folder, tmp_path, capsys):
    """The same images elsewhere or packed again are the same data; other classes, counts, or a folder for packs are not."""
    prepare(folder, tmp_path / "packs", SMALL, workers=1)
    run, _ = train(config_for(tmp_path / "packs", epochs=1, out=str(tmp_path / "run")))
    moved = (tmp_path / "packs").rename(tmp_path / "moved")
    assert call(capsys, "train", "--resume", run.path, "--data", moved)[0] == 0
    renamed = Path(shutil.copytree(folder, tmp_path / "renamed"))
    for split in ("train", "val"):
        first = min((renamed / split).iterdir())
        first.rename(first.with_name("zzz"))
    prepare(renamed, tmp_path / "other names", SMALL, workers=1)
    fewer = make_folder(tmp_path / "fewer", train=30, val=12)
    prepare(fewer, tmp_path / "fewer packs", SMALL, workers=1)
    for data, words in (
        (tmp_path / "other names", "the classes have other names, or another order"),
        (tmp_path / "fewer packs", "the number of training images is another (30, not 36)"),
        (folder, "they are of another kind (folder, not packs)"),
    ):
        status, _, err = call(capsys, "train", "--resume", run.path, "--data", data)
        assert (status, err.count("\n")) == (2, 1)
        assert f"--data: not what the run in {run.path} was started with: {words}" in err
    status, _, err = call(capsys, "evaluate", run.path, "--data", tmp_path / "other names")
    assert status == 2 and "the classes have other names, or another order" in err
    assert call(capsys, "evaluate", run.path, "--data", folder)[0] == 0
