"""Training on the digits: data, optimizer, settings, and what a run leaves behind."""

import json
import math

import matplotlib.image
import pytest
import torch

from crate_fast.checkpoint import load_checkpoint
from crate_fast.checkpoint.read import read_checkpoint
from crate_fast.data import digits
from crate_fast.data.digits import Digits, load_scans, split_indices, transform, transforms
from crate_fast.data.order import Plan
from crate_fast.device import choose_compute
from crate_fast.optional import MissingPackageError, require
from crate_fast.processes import ALONE
from crate_fast.training import ConfigError, TrainConfig, TrainingError, evaluate_run, train
from crate_fast.training.metrics import Meter, Score, measure
from crate_fast.training.optimizer import learning_rate

CPU = torch.device("cpu")
MINIATURE = dict(epochs=2, batch_size=256, image_size=8, dim=16, depth=1, heads=1, dim_head=16, device="cpu", num_threads=1)
NO_MOVES = dict(rotate=0.0, zoom=0.0, shift=0.0)


@pytest.fixture(scope="module")
def data():
    return Digits((8, 8), CPU)


def test_split_is_stratified_disjoint_and_complete():
    _, labels = load_scans()
    training, test = split_indices(labels)
    assert len(labels) == 1797
    assert len(test) == 360
    assert torch.equal(torch.cat((training, test)).sort().values, torch.arange(1797))
    share = torch.bincount(labels, minlength=10) * 360 / 1797
    assert (torch.bincount(labels[test], minlength=10) - share).abs().max() < 1


def test_split_is_fixed_by_its_seed_alone(monkeypatch):
    _, labels = load_scans()
    torch.manual_seed(1)
    first = split_indices(labels)
    torch.manual_seed(2)
    second = split_indices(labels)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    monkeypatch.setattr(digits, "SPLIT_SEED", 1)
    assert not torch.equal(first[1], split_indices(labels)[1])


def test_no_test_image_is_trained_on(data):
    scans, labels = load_scans()
    training, test = split_indices(labels)
    batches = list(data.train_batches(Plan(1437, 1437), 1))
    trained = (batches[0][0] * data.std + data.mean).flatten(1)
    assert len(batches) == 1
    torch.testing.assert_close(trained.sum(0), scans[training].flatten(1).sum(0), rtol=1e-4, atol=1e-3)
    tested = torch.cat([images for images, _ in data.test_batches(100, ALONE)])
    torch.testing.assert_close(tested * data.std + data.mean, scans[test], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([truth for _, truth in data.test_batches(100, ALONE)]), labels[test])


def test_normalised_by_the_training_images(data):
    images = torch.cat([images for images, _ in data.train_batches(Plan(1437, 1437), 1)])
    assert abs(images.mean().item()) < 1e-4
    assert abs(images.std().item() - 1) < 1e-3


def test_batches_depend_on_seed_and_epoch():
    data = Digits((8, 8), CPU, rotate=12.0, zoom=0.1, shift=1.0)

    def first(seed, epoch):
        return next(data.train_batches(Plan(1437, 64, seed), epoch))[0]

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(1, 1))
    assert not torch.equal(first(0, 1), first(0, 2))


def test_incomplete_batches_are_dropped_or_kept(data):
    for drop, expected in ((True, [128] * 11), (False, [128] * 11 + [29])):
        plan = Plan(1437, 128, drop_last=drop)
        assert [len(labels) for _, labels in data.train_batches(plan, 1)] == expected
        assert plan.steps == len(expected)


def test_transforms_stay_in_their_bounds():
    maps = transforms(1000, torch.Generator().manual_seed(0), rotate=20.0, zoom=0.2, shift=2.0)
    size = maps[:, :, :2].det().sqrt()
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    for value, bound in ((size - 1, 0.2), (angle, math.radians(20)), (maps[:, :, 2], 0.5)):
        assert 0.95 * bound < value.max() <= bound + 1e-5
        assert 0.95 * bound < -value.min() <= bound + 1e-5


def test_transform_shifts_by_whole_pixels():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    moved = transform(image, torch.tensor([[[1.0, 0, 0.25], [0, 1, 0]]]))
    torch.testing.assert_close(moved[..., :7], image[..., 1:])
    torch.testing.assert_close(moved[..., 7], torch.zeros(1, 1, 8), atol=1e-4, rtol=0)


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(1, 100, 2.0, 0.0) == 2.0


def test_meter_counts_what_has_a_label():
    meter = Meter(CPU)
    logits, labels = torch.arange(7.0).repeat(6, 1), torch.tensor([6, 5, 2, 1, 0, -100])
    logits[4] = math.nan
    meter.add(measure(torch.tensor(2.5), logits, labels, meter.sums))
    meter.add(measure(torch.tensor(1.0), logits[:1], labels[:1], meter.sums))
    assert meter.read() == Score(loss=pytest.approx(3.5 / 6), correct=2, correct5=4, count=6)
    assert str(Score(0.875, 3, 4, 4)) == "top-1 75.00% (3 of 4), top-5 100.00%, loss 0.8750"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
        ({"epochs": 1.5}, "--epochs is 1.5; it must be of type int"),
        ({"epochs": True}, "--epochs is True; it must be of type int"),
        ({"lr": "1"}, "--lr is '1'; it must be of type float"),
        ({"lr": math.inf}, "--lr is inf; it must be finite"),
        ({"seed": None}, "--seed is None; it must be of type int"),
        ({"warmup": 1.0}, "--warmup is 1.0; it must be below 1"),
        ({"rotate": 181.0}, "--rotate is 181.0; it must be at most 180"),
        ({"ista": 0}, "--ista is 0; it must be above 0"),
        ({"patch_size": 5}, "--image-size is 16, which patches of --patch-size 5 do not divide"),
        ({"pool": "max"}, "--pool is 'max'; allowed are cls, mean"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == words


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_compute("auto", "auto") == (CPU, "float32")
    assert choose_compute("cpu", "bfloat16").precision == "bfloat16"
    for name in ("cuda", "cuda:3", "mps", "meta", "gpu", ""):
        with pytest.raises(ConfigError, match=f"--device is '{name}'"):
            choose_compute(name, "auto")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn, tqdm: pip install 'crate-fast\[train\]'"):
        require("sklearn", "tqdm")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A miniature run: its directory and its score."""
    torch.set_num_threads(2)
    return train(TrainConfig(out=str(tmp_path_factory.mktemp("run")), log_every=2, checkpoint_every=2, **MINIATURE))


def test_run_directory(finished):
    run, score = finished
    names = {path.name for path in run.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "model.safetensors"}
    config = json.loads(run.config.read_text(encoding="utf-8"))
    assert config["config"] | MINIATURE == config["config"]
    assert config["resolved"] | {"device": "cpu", "precision": "float32", "steps": 10, "num_threads": 1} == config["resolved"]
    assert config["data"] | {"train_images": 1437, "test_images": 360} == config["data"]
    assert (
        config["versions"]["torch"] == torch.__version__.partition("+")[0] or config["versions"]["torch"] == torch.__version__
    )
    assert matplotlib.image.imread(run.curves).shape == (540, 1320, 4)
    assert score.count == 360


def test_metrics(finished):
    run, score = finished
    rows = run.read_metrics()
    assert [(row["step"], row["epoch"], row["split"]) for row in rows] == [
        *((step, 1, "train") for step in (2, 4, 5)),
        (5, 1, "test"),
        *((step, 2, "train") for step in (6, 8, 10)),
        (10, 2, "test"),
    ]
    assert all(0 <= row["top1"] == row["correct"] / row["count"] <= 1 and row["loss"] > 0 for row in rows)
    assert [row["count"] for row in rows if row["split"] == "train"] == [512, 512, 256, 256, 512, 512]
    assert (rows[-1]["loss"], rows[-1]["correct"], rows[-1]["count"]) == (score.loss, score.correct, score.count)


def test_evaluation_repeats_the_run(finished):
    run, score = finished
    for path in (run.path, run.model, run.checkpoints / "last.pt"):
        assert evaluate_run(path, device="cpu") == score
    other = evaluate_run(run.path, device="cpu", backend="reference", batch_size=7)
    assert other.count == 360
    assert other.loss == pytest.approx(score.loss, rel=1e-4)


def test_last_checkpoint_is_the_model(finished):
    run, _ = finished
    checkpoint, model = read_checkpoint(run.checkpoints / "last.pt"), load_checkpoint(run.model)
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 10)
    assert len(checkpoint["optimizer"]["state"]) == len(list(model.parameters()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][key]), key


def test_same_seed_same_bytes(finished, tmp_path):
    again, _ = train(TrainConfig(out=str(tmp_path / "again"), **MINIATURE))
    other, _ = train(TrainConfig(out=str(tmp_path / "other"), seed=1, **MINIATURE))
    assert again.model.read_bytes() == finished[0].model.read_bytes()
    assert other.model.read_bytes() != finished[0].model.read_bytes()


def test_training_learns(tmp_path):
    model = dict(image_size=8, dim=32, depth=1, heads=2, dim_head=16)
    _, score = train(
        TrainConfig(out=str(tmp_path), epochs=10, batch_size=32, lr=2e-3, device="cpu", **model, **NO_MOVES, num_threads=1)
    )
    assert score.top1 > 0.85


@pytest.mark.slow
def test_a_compiled_model_trains_as_one_that_is_not(tmp_path):
    settings = MINIATURE | {"epochs": 1, "batch_size": 360, "log_every": 1}
    rows = []
    for compiled in ("no", "yes"):
        run, _ = train(TrainConfig(out=str(tmp_path / compiled), compile=compiled, **settings))
        rows.append(run.read_metrics())
    losses = [[row["loss"] for row in some] for some in rows]
    assert len(losses[0]) == 4  # three steps, and the test
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_diverging_run_says_where(tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step \d of 10 \(epoch [12], learning rate.*checkpoint is none"):
        train(TrainConfig(out=str(tmp_path), lr=1000.0, weight_decay=1000.0, warmup=0.0, **MINIATURE))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        evaluate_run(tmp_path)


def test_used_directory_is_refused(finished):
    run, _ = finished
    before = run.model.read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        train(TrainConfig(out=str(run.path), **MINIATURE))
    assert run.model.read_bytes() == before


def test_names_of_runs_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    runs = [train(TrainConfig(**MINIATURE | {"epochs": 1}))[0].path.as_posix() for _ in range(2)]
    assert runs == ["runs/digits-20260101-000000", "runs/digits-20260101-000000-2"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config": {}}', '{"config": {"colour": 1}, "resolved": {"precision": "auto"}}']
)
def test_damaged_config_is_named(finished, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(finished[0].model.read_bytes())
    with pytest.raises(ConfigError, match=r"config\.json: not the configuration of a run"):
        evaluate_run(tmp_path)


def test_model_without_its_run(finished, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "copy").write_bytes(finished[0].model.read_bytes())
    assert evaluate_run(tmp_path / "a" / "b" / "copy", device="cpu").correct == finished[1].correct
