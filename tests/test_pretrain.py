"""`crate-fast pretrain` is a run like others: to the same bits when stopped, and its encoder is where a CRATE starts."""

import json
import signal
from dataclasses import replace

import kill
import numpy as np
import pytest
import torch
from conftest import call
from helpers.pictures import make_folder
from PIL import Image
from test_resume import stop_after

from crate_fast import CRATEMAE, load_checkpoint
from crate_fast.checkpoint import save_model
from crate_fast.data.digits import Digits
from crate_fast.data.order import Plan, indices_of_part
from crate_fast.device import Compute
from crate_fast.eval_transform import Transform
from crate_fast.inspection.reconstruct import reconstruct
from crate_fast.processes import Ranks
from crate_fast.training import Stopped, TrainConfig, resolve, train
from crate_fast.training.objectives import Patches, Place, mask_noise

SIZES = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
SMALL = TrainConfig(
    **SIZES,
    **dict(objective="patches", device="cpu", num_threads=1, batch_size=256, epochs=3, checkpoint_every=1, log_every=2),
    **dict(ema=0.9, accumulate=2, last_batch="keep", mask_ratio=0.5),
)
MODEL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_to_the_same_masks_and_bits(tmp_path, monkeypatch, precision):
    config = replace(SMALL, precision=precision)
    straight, score = train(replace(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stop_after(patch, 8, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(replace(config, out=str(tmp_path / "run")))
    run, again = train(config, resume=str(tmp_path / "run"))
    assert kill.outcome(run.path) == kill.outcome(straight.path) and again == score
    assert (score.count, score.counts()) == (360, {"count": 360}) and str(score).startswith("error of masked patches")
    assert isinstance(load_checkpoint(run.path), CRATEMAE)
    assert run.reconstructions.stat().st_size > 1000 and run.curves.stat().st_size > 1000


def test_an_image_is_masked_alike_whatever_process_computes_it():
    """The gradient of two processes' parts is that of the whole; what is drawn changes with the epoch."""
    config, compute = SMALL, Compute(torch.device("cpu"), "float32")
    model, data = CRATEMAE(**MODEL), Digits((8, 8), torch.device("cpu"))

    def losses(ranks, epoch=1):
        plan, found = Plan(data.train_count, 200, accumulate=2, ranks=ranks), torch.zeros(4, dtype=torch.float64)
        batches = data.train_batches(plan, 1, first=3)
        for part in plan.parts(3):
            place = Place((0, 0, 0, 0), epoch, part)
            found += Patches(config).loss(model, model, *next(batches), place, compute, found)[1]
        return found

    whole = losses(Ranks(0, 1))
    torch.testing.assert_close(sum(losses(Ranks(rank, 2)) for rank in range(2)), whole, rtol=1e-6, atol=0)
    assert whole[3] == 200 and abs(losses(Ranks(0, 1), epoch=2)[0] - whole[0]) > 1e-4
    noise = mask_noise(0, 1, np.arange(1000), 16)
    assert noise.shape == (1000, 16) and 0 <= noise.min() < 0.01 and 0.99 < noise.max() <= 1


def test_an_image_that_could_not_be_read_counts_nothing():
    model, images = CRATEMAE(**MODEL), torch.randn(3, 1, 8, 8)
    place, compute, none = Place((0,), 1, slice(0, 3)), Compute(torch.device("cpu"), "float32"), torch.zeros(4)
    loss, sums = Patches(SMALL).loss(model, model, images, torch.tensor([0, -100, 0]), place, compute, none)
    images[1] = torch.nan
    other, _ = Patches(SMALL).loss(model, model, images, torch.tensor([0, -100, 0]), place, compute, none)
    assert torch.equal(loss, other) and sums[3] == 2
    other.backward()


def test_a_folder_is_learned_without_its_labels_and_starts_a_crate(tmp_path, capsys):
    """Of all that a CRATE must be set to for an encoder, nothing need be said; what is said must be what it is."""
    make_folder(tmp_path / "data", 9, 3)
    words = ["--data", tmp_path / "data", "--device", "cpu", "--num-threads", 1, "--batch-size", 4, "--workers", 0]
    small = ["--image-size", 32, "--dim", 32, "--depth", 2, "--heads", 2, "--dim-head", 16, "--decoder-depth", 1]
    status, out, err = call(
        capsys, "pretrain", *words, *small, "--epochs", 2, "--norm-pix-loss", "no", "--lr", 0.001, "--out", tmp_path / "mae"
    )
    assert status == 0 and "test error of masked patches" in out, err
    rows = [json.loads(line) for line in (tmp_path / "mae" / "metrics.jsonl").read_text().splitlines()]
    assert all("top1" not in row for row in rows)
    begin = ["train", *words, "--image-size", 48, "--epochs", 1, "--init", tmp_path / "mae", "--recipe", "main"]
    status, out, err = call(capsys, *begin, "--out", tmp_path / "run")
    assert status == 0 and "of a CRATE-MAE: its encoder" in out and "position embeddings resampled" in out, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["dim"], config["depth"], config["heads"], config["lambd"], config["patch_size"]) == (32, 2, 2, 0.5, 16)
    status, _, err = call(capsys, *begin, "--out", tmp_path / "other", "--lambd", 0.1)
    assert status == 2 and "lambd is 0.5 in it and 0.1 in this run" in err


@pytest.mark.parametrize("splits", [("",), ("train", "val")], ids=["one folder", "train and val"])
def test_photographs_that_lie_in_no_folder_of_a_class_are_learned_from(splits, tmp_path, capsys):
    for split in splits:
        (tmp_path / "data" / split / "more").mkdir(parents=True)
        for index, name in enumerate(("a.png", "b.png", "more/c.png", "more/d.png")):
            Image.effect_noise((40, 32), 50 + index).convert("RGB").save(tmp_path / "data" / split / name)
    words = ["--data", tmp_path / "data", "--device", "cpu", "--num-threads", 1, "--workers", 0, "--epochs", 1]
    sizes = ["--image-size", 32, "--dim", 16, "--depth", 1, "--heads", 2, "--dim-head", 8, "--batch-size", 3]
    status, out, error = call(capsys, "pretrain", *words, *sizes, "--out", tmp_path / "run")
    assert status == 0 and f"{4 if splits[0] else 3} images of 1 classes to train on" in out, error
    status, _, error = call(capsys, "train", *words, *sizes, "--out", tmp_path / "other")
    assert status == 2 and "lies in no folder of a class, so nothing tells its label" in error


def test_a_bare_file_of_any_width_starts_a_crate_once_its_heads_are_said(tmp_path, capsys):
    torch.save(CRATEMAE(**MODEL).state_dict(), tmp_path / "x.pth")
    words = ["train", "--init", tmp_path / "x.pth", "--epochs", 1, "--device", "cpu", "--num-threads", 1, "--batch-size", 720]
    status, _, error = call(capsys, *words, "--out", tmp_path / "run")
    assert status == 2 and "say heads" in error
    status, out, error = call(capsys, *words, "--out", tmp_path / "run", "--heads", 2)
    assert status == 0 and "of a CRATE-MAE: its encoder" in out, error
    assert load_checkpoint(tmp_path / "run").transformer.layers[0][0].fn.scale == 8**-0.5


def test_it_goes_on_from_weights_of_its_own_kind_alone(tmp_path, capsys):
    save_model(CRATEMAE(**MODEL, lambd=0.1), tmp_path / "x.safetensors")
    run, _ = train(replace(SMALL, init=str(tmp_path / "x.safetensors"), epochs=1, lr=1e-12, ema=0.0))
    for key, value in load_checkpoint(tmp_path / "x.safetensors").state_dict().items():
        torch.testing.assert_close(load_checkpoint(run.path).state_dict()[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "words, said",
    {
        "--mixup 0.2": "--mixup is 0.2 and --objective is 'patches'",
        "--strategy fsdp": "--strategy is 'fsdp' and --objective is 'patches', which takes 'ddp' alone",
        "--heads 2": "--heads is 2 and --dim-head 16; of a CRATE-MAE they make --dim, 48, together",
        "--recipe digits": "--recipe is 'digits' and --objective is 'classes', for `train`; `pretrain` learns 'patches'",
        "--mask-ratio 1": "--mask-ratio is 1.0; it must be below 1",
        "--mask-ratio 1e-17": "--mask-ratio is 1e-17, which masks none of 16 patches",
        "--patch-size 1 --norm-pix-loss": "a patch of one value has no deviation to be normalised by",
    }.items(),
)
def test_what_a_crate_mae_has_not_is_refused_in_a_line(words, said, capsys):
    status, _, err = call(capsys, "pretrain", *words.split())
    assert status == 2 and said in err and err.count("\n") == 1


def test_the_recipe_is_that_of_the_codebase_which_the_published_readme_names():
    config = resolve({"data": "DIR"}, command="pretrain")
    assert (config.objective, config.mask_ratio, config.norm_pix_loss, config.crop_least) == ("patches", 0.75, True, 0.2)
    assert config.lr == pytest.approx(1.5e-4 * config.batch_size / 256) and config.warmup * config.epochs == 40
    assert resolve({}, command="pretrain").data == "digits"


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_is_the_image_where_it_is_seen(norm_pix_loss):
    model = CRATEMAE(**MODEL, norm_pix_loss=norm_pix_loss)
    model.transform = Transform(0.0, (0.5,), (0.25,))
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    masked, made, original = reconstruct(model, images, 0.75, torch.arange(16.0).expand(2, -1))
    torch.testing.assert_close(original[..., 0], images[:, 0] / 4 + 0.5)
    assert torch.equal(made[:, :2], original[:, :2]) and torch.equal(masked[:, :2], original[:, :2])  # patches 0 to 3
    assert (masked[:, 2:] == 0.5).all() and not torch.equal(made[:, 2:], original[:, 2:])


def test_a_part_of_the_training_images_has_every_class_and_is_always_the_same(tmp_path):
    labels = [0] * 50 + [1] * 10 + [2]
    chosen = indices_of_part(labels, 0.1)
    assert [labels[index] for index in chosen.tolist()] == [0] * 5 + [1, 2]
    assert torch.equal(chosen, indices_of_part(labels, 0.1))
    few, all_of_them = (Digits((8, 8), torch.device("cpu"), part=part) for part in (0.1, 1.0))
    assert few.train_count == 142 and few.test_count == 360 and few.mean == all_of_them.mean
    assert few.train_labels.bincount().min() >= 13
