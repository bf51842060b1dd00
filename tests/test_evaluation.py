"""Evaluating weights as they are meant to be: their transform, their shape, which of two they are, whatever their dtype."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from crate_fast import CRATE, CheckpointError, load_checkpoint
from crate_fast.checkpoint import save_checkpoint, save_model
from crate_fast.checkpoint.start_from import read_weights, start_from
from crate_fast.data.loader import digest
from crate_fast.eval_transform import MEAN, STD, Transform, read_transform
from crate_fast.training import ConfigError, metrics
from crate_fast.training.checkpoints import Checkpoints
from crate_fast.training.evaluation import evaluate_run
from crate_fast.training.monitor import plot_curves
from crate_fast.training.run_directory import RunDirectory

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 2, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}


def model_of(**options):
    torch.manual_seed(0)
    return CRATE(**SMALL | options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, an image in each, far wider than high."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            Image.fromarray(draw.integers(0, 255, (40, 90, 3), np.uint8)).save(root / split / name / "1.png")
    return root


def shown(monkeypatch, path, folder, **options):
    """The images that `evaluate` shows the model in `path`."""
    seen = []
    real = metrics.evaluate

    def evaluate(model, batches, *rest, **more):
        return real(model, (seen.append(b[0]) or b for b in batches), *rest, **more)

    monkeypatch.setattr("crate_fast.training.evaluation.evaluate", evaluate)
    evaluate_run(path, data=str(folder), workers=0, device="cpu", **options)
    return torch.cat(seen)


def expected(folder, height, width, crop):
    """The first image as Pillow and torchvision make it: squeezed with 0, else resized until it covers, its middle cut out."""
    image = Image.open(folder / "val" / "a" / "1.png")
    if crop:
        scale = max(round(height / crop) / image.height, round(width / crop) / image.width)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(image) / 255 - MEAN) / STD).permute(2, 0, 1).float()


WAYS = {
    "main.py": (lambda model, path: torch.save({"state_dict": model.state_dict(), "arch": "x"}, path), 0.875),
    "finetune.py": (lambda model, path: torch.save({"model": model.state_dict(), "optimizer": {}, "scaler": {}}, path), 0.0),
    "bare": (lambda model, path: torch.save(model.state_dict(), path), 0.875),
    "ours, squeezed": (lambda model, path: save_checkpoint(_with(model, 0.0), path), 0.0),
    "ours, whole": (lambda model, path: save_checkpoint(_with(model, 1.0), path), 1.0),
    "a run's of before": (lambda model, path: save_checkpoint(model, path, settings={"eval_crop": 0.5}), 0.5),
}


def _with(model, crop):
    model.transform = Transform(crop, MEAN, STD)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_evaluated_by_their_own_transform(way, folder, tmp_path, monkeypatch, capsys):
    write, crop = WAYS[way]
    path = tmp_path / "x.pth"
    write(model_of(num_classes=2, dim=64, heads=1, dim_head=64), path)
    images = shown(monkeypatch, path, folder)
    torch.testing.assert_close(images[0], expected(folder, 16, 16, crop), rtol=1e-5, atol=1e-5)
    assert ("nothing in it tells how its images are cut" in capsys.readouterr().err) == (way == "bare")
    images = shown(monkeypatch, path, folder, eval_crop=0.25)  # what is asked for goes before
    torch.testing.assert_close(images[0], expected(folder, 16, 16, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", [0.0, 0.5, 0.875])
@pytest.mark.parametrize("size", [(16, 32), (32, 16), (8, 48)])
def test_a_model_of_rectangles_is_shown_rectangles(size, crop, folder, tmp_path, monkeypatch):
    save_model(_with(model_of(image_size=size), crop), tmp_path / "x.safetensors")
    images = shown(monkeypatch, tmp_path / "x.safetensors", folder)
    assert images.shape == (2, 3, *size)
    torch.testing.assert_close(images[0], expected(folder, *size, crop), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, std", [((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.5,), (0.25,))])
def test_images_are_normalised_as_the_file_of_the_weights_says(mean, std, folder, tmp_path, monkeypatch):
    model = model_of()
    model.transform = Transform(0.0, mean, std)
    save_model(model, tmp_path / "x.safetensors")
    images = shown(monkeypatch, tmp_path / "x.safetensors", folder)
    plain = expected(folder, 16, 16, 0.0).permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    wanted = ((plain - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    torch.testing.assert_close(images[0], wanted, rtol=1e-5, atol=1e-5)


def test_means_of_more_channels_than_the_model_takes_are_refused(folder, tmp_path):
    model = model_of()
    model.transform = Transform(0.0, (0.5, 0.5), (0.5, 0.5))
    save_model(model, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="means of 2 channels; the model takes 3"):
        evaluate_run(tmp_path / "x.safetensors", data=str(folder), workers=0, device="cpu")


def test_classes_with_line_breaks_in_their_names_are_told_apart():
    assert digest(["a\nb", "c"]) != digest(["a", "b\nc"])


@pytest.mark.parametrize("target", ["x.safetensors", "x.pth"])
def test_the_transform_goes_where_the_weights_go(target, tmp_path, capsys):
    torch.save({"model": model_of(dim=64, heads=1, dim_head=64).state_dict()}, tmp_path / "published.t7")
    assert call(capsys, "convert", tmp_path / "published.t7", tmp_path / target)[0] == 0
    assert load_checkpoint(tmp_path / target).transform == Transform(0.0)


@pytest.mark.parametrize("value", [1, {}, {"crop": 2, "mean": None, "std": None}, {"crop": 0, "mean": [0.5], "std": [0.0]}])
def test_a_transform_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="it must have crop, mean and std"):
        read_transform(value)


COUNTED = {"n_averaged": torch.tensor(7)}
BESIDE = {
    "timm": lambda last, mean: {"state_dict": last, "state_dict_ema": mean},
    "model_ema": lambda last, mean: {"model": last, "model_ema": {f"module.{key}": value for key, value in mean.items()}},
    "nested": lambda last, mean: {"model": last, "ema": {"module": mean, "decay": 0.9}},
    "named otherwise": lambda last, mean: {"state_dict": last, "swa_model": mean},
    "AveragedModel": lambda last, mean: {"model": last, "averaged": {f"module.{k}": v for k, v in mean.items()} | COUNTED},
}


@pytest.mark.parametrize("layout", BESIDE)
def test_of_weights_and_their_mean_it_is_said_which_was_taken(layout, tmp_path, capsys):
    mean = model_of().state_dict()
    last = {key: value * 0.5 for key, value in mean.items()}
    torch.save(BESIDE[layout](last, mean), tmp_path / "x.pth")
    for weights, chosen in ((None, mean), ("mean", mean), ("last", last)):
        model = load_checkpoint(tmp_path / "x.pth", weights=weights, heads=2)
        assert all(torch.equal(value, chosen[key]) for key, value in model.state_dict().items())
        words = (
            "taken: the last weights (--weights mean" if chosen is last else "taken: the mean of the weights (--weights last"
        )
        assert words in capsys.readouterr().err
    line = start_from(model_of(), read_weights(tmp_path / "x.pth"), "x.pth")
    assert "taken: the mean of the weights" in line
    torch.save({"state_dict": last}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="there are only the last weights"):
        load_checkpoint(tmp_path / "y.pth", weights="mean", heads=2)


def test_a_mean_of_some_weights_alone_is_not_taken_unasked(tmp_path, capsys):
    last = model_of().state_dict()
    torch.save({"state_dict": last, "ema": {"pos_embedding": 2 * last["pos_embedding"]}}, tmp_path / "x.pth")
    model = load_checkpoint(tmp_path / "x.pth", heads=2)
    assert all(torch.equal(value, last[key]) for key, value in model.state_dict().items())
    assert "taken: the last weights" in capsys.readouterr().err
    assert "taken: the last weights" in start_from(model_of(), read_weights(tmp_path / "x.pth"), "x.pth")


WEIGHT = "transformer.layers.0.1.fn.weight"
UNUSABLE = {
    "of whole numbers": (
        lambda weights: weights | {WEIGHT: weights[WEIGHT].to(torch.int8)},
        "no tensor of real floating point",
    ),
    "of 8 bits": (
        lambda weights: weights | {WEIGHT: weights[WEIGHT].to(torch.float8_e5m2)},
        "no tensor of real floating point",
    ),
    "nested": (
        lambda weights: weights | {WEIGHT: torch.nested.nested_tensor([torch.zeros(2)])},
        "no plain tensor: it is sparse, nested",
    ),
    "there twice": (lambda weights: weights | {f"module.{WEIGHT}": weights[WEIGHT] * 2}, "twice, once as 'module.transformer"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("what", UNUSABLE)
def test_weights_that_are_none_or_two_are_refused_to_evaluate_and_to_start_from(what, tmp_path):
    change, words = UNUSABLE[what]
    torch.save({"state_dict": change(model_of().state_dict())}, tmp_path / "x.pth")
    for read in (lambda path: load_checkpoint(path, heads=2), read_weights):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [True, 10**400, "0.1", float("nan"), None, [0.1]])
@pytest.mark.parametrize("name", ["ista", "lambd"])
def test_a_step_size_that_is_no_number_is_refused(name, value, tmp_path):
    save_checkpoint(model_of(), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt")
    content["arguments"][name] = value
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"its argument {name} is .*it must be a finite number"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed"])
def test_commands_take_weights_of_every_dtype(dtype, folder, tmp_path, capsys):
    model, path = model_of(), tmp_path / "x.safetensors"
    if dtype == "mixed":
        model.transformer.to(torch.float16)
    else:
        model.to(getattr(torch, dtype))
    save_model(model, path)
    image = folder / "val" / "a" / "1.png"
    for line in (
        ["evaluate", path, "--data", folder, "--workers", 0, "--device", "cpu"],
        ["inspect", "--checkpoint", path, "--images", folder, "--out", tmp_path / "i", "--device", "cpu"],
        ["segment", image, "--checkpoint", path, "--out", tmp_path / "s", "--device", "cpu"],
    ):
        status, _, err = call(capsys, *line)
        assert status == 0, err


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 4, "dim_head": 8}, "heads is 4 in it and 2 in this run.*--heads 4 --dim-head 8"),
        ({"ista": 0.5}, "ista is 0.5 in it and 0.1.*--ista 0.5"),
        ({"lambd": 0.2}, "lambd is 0.2"),
        ({"patch_size": (2, 8)}, "its patches are 2×8"),
    ],
    ids=str,
)
def test_weights_of_a_model_that_computes_otherwise_are_no_start(options, words, tmp_path):
    save_model(model_of(**options), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words):
        start_from(model_of(), read_weights(tmp_path / "x.safetensors"), "x.safetensors")


def test_another_pool_is_said_and_a_rectangle_of_positions_is_resampled_as_one(tmp_path):
    source = model_of(image_size=(8, 32), pool="mean")  # 2×8 patches, as many as the 4×4 of the other
    save_model(source, tmp_path / "x.safetensors")
    model = model_of()
    line = start_from(model, read_weights(tmp_path / "x.safetensors"), "x")
    assert "position embeddings resampled" in line and "by pool 'cls', not 'mean' as there" in line
    rows = source.pos_embedding[0, 1:].unflatten(0, (2, 8)).mean(0)  # a column of four patches each becomes one of two rows
    got = model.pos_embedding[0, 1:].unflatten(0, (4, 4))
    near = torch.nn.functional.cosine_similarity(got.mean(0), rows.view(4, 2, -1).mean(1), dim=-1)
    assert near.min() > 0.8 and torch.equal(model.pos_embedding[0, 0], source.pos_embedding[0, 0])


def test_a_damaged_line_of_the_metrics_is_passed_over(tmp_path, capsys):
    run, row = RunDirectory(tmp_path), {"step": 3, "epoch": 1, "split": "test", "loss": float("nan"), "top1": 0.5}
    run.log(**row)
    for damage in (b"{\n", b"\xff\xfe\n", b"7\n", b"[]\n", b'{"step": 1}\n', b"\n", b"[" * 5000 + b"\n"):
        run.metrics.write_bytes(run.metrics.read_bytes() + damage)
    run.log(**row | {"step": 6, "epoch": 2, "loss": 0.25})
    rows = run.read_metrics()
    assert rows == [row | {"loss": None}, row | {"step": 6, "epoch": 2, "loss": 0.25}]
    assert "7 lines are damaged, line 2 first" in capsys.readouterr().err
    plot_curves(rows, run.curves, "x")
    assert run.curves.stat().st_size > 1000


def test_a_loss_that_is_not_finite_in_evaluation_alone_ends_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    scores = [metrics.Score(loss, 1, 1, 360) for loss in (2.0, 1.0, float("inf"))]
    monkeypatch.setattr("crate_fast.training.loop.evaluate", lambda *_, **__: scores.pop(0))
    status, _, err = call(
        capsys,
        *("train", "--out", tmp_path / "r", "--epochs", 4, "--dim", 16, "--depth", 1, "--heads", 1, "--dim-head", 16),
        *("--batch-size", 1437, "--checkpoint-every", 1, "--device", "cpu", "--num-threads", 1),
    )
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"on the test images is not finite after step 3 .*the last good checkpoint is \S+step-00000002\.pt$", err)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["split"] == "test"] == [2.0, 1.0, None]


def test_a_good_checkpoint_is_one_whose_next_step_is_known(tmp_path):
    for step in (3, 7, 8):
        (tmp_path / f"step-{step:08d}.pt").touch()
    found = [Checkpoints(tmp_path, 3).newest_before(bad - 1) for bad in (10, 9, 8, 4)]
    assert [path and path.name for path in found] == ["step-00000008.pt", "step-00000007.pt", "step-00000003.pt", None]


@pytest.mark.parametrize(
    "line, words",
    {
        "convert {x} {t}/y.safetensors --ista -1": "at least 0",
        "convert {x} {t}/y.safetensors --lambd -1": "at least 0",
        "convert {x} {t}/y.safetensors --heads ２": "it must be a whole number",
        "train --data {t} --eval-crop 1e-9": "--eval-crop is 1e-09; it must be 0, or from 0.05 to 1",
        "evaluate {x} --eval-crop 1e-9": "it must be 0, or from 0.05 to 1",
        "finetune --randomaug 2": "it must be 0 or 1",
        "train --epochs ２": "it must be a whole number",
        "train --lr １": "it must be a number",
        "train --lambd -1": "at least 0",
        "train --out ''": "names nothing",
        "train --resume ''": "names nothing",
        "train --data _": "names nothing",
        "inspect --checkpoint _ --images digits --out {t}/o": "names nothing",
        "segment {x} --checkpoint {x} --out {t}/o --mass １": "it must be a number",
        "inspect --checkpoint {x} --images '' --out {t}/o": "names nothing",
        "inspect --checkpoint {x} --images digits --out ''": "names nothing",
        "segment {x} --checkpoint {x} --out ''": "names nothing",
        "evaluate ''": "names nothing",
        "prepare imagenet '' {t}/o": "names nothing",
        "prepare imagenet {t} {t}/o --short-side ２５６": "pixels up to",
        "inspect --checkpoint {x} --images digits --out {t}/o --limit ２": "positive number",
        "train --resume {x}": "--init",
    }.items(),
)
def test_what_a_flag_cannot_mean_is_one_line(line, words, tmp_path, capsys):
    save_model(model_of(), tmp_path / "x.safetensors")
    argv = [{"''": "", "_": " "}.get(word, word) for word in line.format(x=tmp_path / "x.safetensors", t=tmp_path).split()]
    try:
        status, _, err = call(capsys, *argv)
    except SystemExit as error:
        status, err = error.code, capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and words in err
    assert not (tmp_path / "y.safetensors").exists() and not (tmp_path / "o").exists()
