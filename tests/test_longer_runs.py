"""Runs that are given more epochs, and what moves the weights beside the published schedules."""

import json
import math
import shutil

import pytest
import torch
from conftest import call
from safetensors.torch import load_file

from crate_fast.optimizers import OPTIMIZERS
from crate_fast.training import ConfigError, TrainConfig
from crate_fast.training.optimizer import build_optimizer, learning_rate_at

SMALL = ["--dim", 16, "--depth", 1, "--heads", 1, "--dim-head", 16, "--device", "cpu", "--num-threads", 1]


def test_a_run_at_a_constant_rate_that_is_lengthened_is_the_run_that_was_long_from_the_start(tmp_path, capsys):
    flags = [*SMALL, "--schedule", "constant", "--warmup", 0]
    for name, epochs in (("long", 4), ("short", 2)):
        assert call(capsys, "train", *flags, "--epochs", epochs, "--out", tmp_path / name)[0] == 0
    for epochs in (3, 4):  # more than once
        status, out, error = call(capsys, "train", "--resume", tmp_path / "short", "--epochs", epochs)
        assert (status, error) == (0, "")
        assert f"; {epochs} epochs, not {epochs - 1}: from step" in out
    long, short = (load_file(tmp_path / name / "model.safetensors") for name in ("long", "short"))
    assert all(torch.equal(long[key], short[key]) for key in long)
    status, _, error = call(capsys, "train", "--resume", tmp_path / "short", "--epochs", 3)
    assert (status, "--epochs is 3; the run in" in error, "as many or more" in error) == (2, True, True)


def test_a_run_that_is_lengthened_says_what_its_learning_rate_is_then(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(capsys, "train", *SMALL, "--epochs", 2, "--out", run)[0] == 0
    config = json.loads((run / "config.json").read_text())
    steps = config["resolved"]["steps"] // 2
    _, out, _ = call(capsys, "train", "--resume", run, "--epochs", 5)
    now = learning_rate_at(2 * steps + 1, steps, TrainConfig(**config["config"] | {"epochs": 5}))
    assert f"from step {2 * steps + 1} on the learning rate is that of a run of 5 epochs, {now:.3g} now, not 0" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["split"] == "test"] == [1, 2, 3, 4, 5]
    assert call(capsys, "train", "--resume", run)[0] == 0  # which is over, and is as long as it has become


def test_epochs_that_nobody_asked_for_are_refused(tmp_path, capsys):
    """One changed digit of config.json makes no other run; a kill after it was lengthened leaves one that goes on."""
    run = tmp_path / "run"
    assert call(capsys, "train", *SMALL, "--epochs", 2, "--out", run)[0] == 0
    config = json.loads((run / "config.json").read_text())
    changed = config | {"config": config["config"] | {"epochs": 3}}
    (run / "config.json").write_text(json.dumps(changed))
    status, _, error = call(capsys, "train", "--resume", run)
    assert (status, "epochs is 3; the run's checkpoints were written with 2" in error) == (2, True)
    (run / "config.json").write_text(json.dumps(changed | {"lengthened": [{"epochs": 2, "step": 22}]}))
    assert call(capsys, "train", "--resume", run)[0] == 0


@pytest.mark.parametrize("name", [name for name, known in OPTIMIZERS.items() if "beta1" in known.takes])
def test_betas_are_those_asked_for(name):
    model = torch.nn.Linear(2, 2)
    own = build_optimizer(model, TrainConfig(optimizer=name)).param_groups[0]["betas"]
    assert own == (0.9, 0.99 if name == "Lion" else 0.999)
    group = build_optimizer(model, TrainConfig(optimizer=name, beta1=0.8, beta2=0.95)).param_groups[0]
    assert group["betas"] == (0.8, 0.95)


def test_the_rate_falls_to_the_least_that_is_asked_for():
    settings = TrainConfig(lr=1e-3, min_lr=1e-5, warmup=0.0, epochs=10)
    rates = [learning_rate_at(step, 10, settings) for step in range(1, 101)]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and 1e-5 < rates[-1] < 1.1e-5
    assert rates[50] == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi / 2)))
    constant = TrainConfig(lr=1e-3, schedule="constant", warmup=0.1, epochs=10)
    assert {learning_rate_at(step, 10, constant) for step in range(10, 101)} == {1e-3}
    with pytest.raises(ConfigError, match="it is of --schedule cosine"):
        TrainConfig(min_lr=1e-5, schedule="main-epoch")
    with pytest.raises(ConfigError, match="at most --lr"):
        TrainConfig(min_lr=1.0)


def test_evaluate_as_the_published_script_has_it(tmp_path, capsys):
    assert call(capsys, "train", *SMALL, "--epochs", 1, "--out", tmp_path / "run")[0] == 0
    for flag in ("--resume", "--init"):
        status, out, _ = call(capsys, "train", "--evaluate", flag, tmp_path / "run", "--device", "cpu")
        assert (status, out.startswith(" *   Acc@1 "), "of 360)" in out) == (0, True, True)
    status, _, error = call(capsys, "train", "-e", "--out", tmp_path / "other")
    assert (status, "--evaluate needs --resume PATH or --init PATH" in error) == (2, True)


def test_a_head_may_have_more_outputs_than_there_are_classes(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(capsys, "train", *SMALL, "--epochs", 1, "--num-classes", 20, "--out", run)[0] == 0
    assert load_file(run / "model.safetensors")["mlp_head.1.weight"].shape[0] == 20
    status, out, _ = call(capsys, "evaluate", run, "--device", "cpu")
    assert (status, "of 360)" in out) == (0, True)
    shutil.copy(run / "model.safetensors", tmp_path / "alone.safetensors")
    status, _, error = call(capsys, "evaluate", tmp_path / "alone.safetensors", "--device", "cpu")
    assert (status, "tells 20 classes apart; digits has 1 and 10" in error) == (2, True)  # whose labels would be others
    status, _, error = call(capsys, "train", *SMALL, "--num-classes", 9, "--out", tmp_path / "x")
    assert (status, "--num-classes is 9; digits has 10 classes" in error) == (2, True)
