"""The command lines of the published scripts: what every flag of them does here; recipes; what is refused."""

import argparse
import functools
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import call

from crate_fast.commands.main import build_parser, main
from crate_fast.commands.published_flags import PUBLISHED
from crate_fast.commands.train import given_settings, warnings_of
from crate_fast.model import SIZES
from crate_fast.optimizers import OPTIMIZERS
from crate_fast.settings import SETTINGS, flag
from crate_fast.training import ConfigError, TrainConfig, resolve
from crate_fast.training.resolve import NAMES, describe, read_recipe

DOCS = Path(__file__).parent.parent / "docs" / "training.md"


def parsed(line: str) -> tuple[TrainConfig, list[str]]:
    """The configuration that a command line means, and the warnings that it is worth."""
    arguments = build_parser().parse_args(line.split())
    given = given_settings(arguments)
    config = resolve(given, arguments.recipe, command=arguments.command)
    return config, warnings_of(arguments, given, config)


# flag and value of the published script: the setting it gives and its value, or "warning", or "refused" and a word of it
MAIN = {
    "--data some/folder": ("data", "some/folder"),
    "-a CRATE_base": ("dim", 768),
    "--arch CRATE_small": ("dim_head", 48),
    "--arch vit_tiny": ("refused", "CRATE_tiny"),
    "-j 3": ("workers", 3),
    "--workers 5": ("workers", 5),
    "--epochs 7": ("epochs", 7),
    "--start-epoch 3": ("refused", "--resume"),
    "--label_smooth 0.2": ("label_smoothing", 0.2),
    "-b 64": ("batch_size", 64),
    "--batch-size 32": ("batch_size", 32),
    "--lr 0.25": ("lr", 0.25),
    "--learning-rate 0.5": ("lr", 0.5),
    "--momentum 0.8": ("warning", "SGD"),
    "--optimizer SGD --momentum 0.8": ("momentum", 0.8),
    "--wd 0.3": ("weight_decay", 0.3),
    "--weight-decay 0.4": ("weight_decay", 0.4),
    "-p 11": ("log_every", 11),
    "--print-freq 12": ("log_every", 12),
    "-e": ("evaluates", None),
    "--evaluate": ("evaluates", None),
    "--pretrained": ("warning", "--init"),
    "--world-size 2": ("warning", "torchrun"),
    "--rank 1": ("warning", "torchrun"),
    "--dist-url tcp://127.0.0.1:1": ("warning", "torchrun"),
    "--dist-backend gloo": ("warning", "gloo"),
    "--seed 9": ("seed", 9),
    "--gpu 1": ("warning", "--device"),
    "--optimizer Lion": ("optimizer", "Lion"),
    "--optimizer AdamW": ("optimizer", "AdamW"),
    "--multiprocessing-distributed": ("warning", "torchrun"),
    "--dummy": ("data", "synthetic"),
}
FINETUNE = {
    "--lr 0.25": ("lr", 0.25),
    "--opt adamW": ("optimizer", "AdamW"),
    "--opt adam": ("weight_decay", 0.0),
    "--opt sgd": ("optimizer", "SGD"),
    "--opt sgd --weight-decay 0.5": ("weight_decay", 0.5),
    "--net CRATE_large": ("depth", 24),
    "--net vit": ("refused", "CRATE_tiny"),
    "--bs 24": ("batch_size", 24),
    "--data cifar100": ("data", "cifar100"),
    "--data flower": ("data", "flowers102"),
    "--data pets": ("data", "pets"),
    "--classes 10": ("classes", 10),
    "--randomaug 1": ("augment", "randaugment"),
    "--randomaug 0": ("augment", "trivial"),
    "--rand_aug_n 3": ("randaugment_ops", 3),
    "--rand_aug_m 9": ("randaugment_magnitude", 9),
    "--randomaug 0 --rand_aug_m 9": ("warning", "trivial"),
    "--erase_prob 0.25": ("erase", 0.25),
    "--n_epochs 3": ("epochs", 3),
    "--patch 8": ("warning", "--patch-size"),
    "--ckpt_dir file.pth": ("init", "file.pth"),
    "--ckpt_dir None": ("init", None),
    "--data_dir there": ("data_dir", "there"),
}
CASES = [("train", *case) for case in MAIN.items()] + [("finetune", *case) for case in FINETUNE.items()]


@pytest.mark.parametrize(("command", "words", "effect"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_flag_has_its_effect(capsys, command, words, effect):
    line = f"{command} {'' if '--data ' in words or command == 'finetune' else '--data folder '}{words}"
    kind, value = effect
    if kind == "refused":
        with pytest.raises(SystemExit) as caught:
            parsed(line)
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1)
        assert value in error
        assert words.split()[0] in error
        return
    config, warned = parsed(line)
    if kind == "evaluates":
        assert build_parser().parse_args(line.split()).evaluate and not hasattr(
            build_parser().parse_args(["train"]), "evaluate"
        )
    elif kind == "warning":
        assert len(warned) == 1
        assert value in warned[0]
        plain = parsed(line.replace(words, "")) if "--randomaug" not in words else parsed(f"{command} --randomaug 0")
        assert plain[0] == config or "momentum" in words or "rand_aug" in words
    else:
        assert warned == []
        assert getattr(config, kind) == value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finetune_decays_as_the_users_recipe_says_and_else_with_adamw_alone(tmp_path, optimizer):
    mine = "\n".join(describe(resolve({}, "finetune"))).replace("weight_decay = 0.01", "weight_decay = 0.05")
    (tmp_path / "mine.toml").write_text(mine)
    line = f"finetune --opt {optimizer}"
    assert parsed(f"{line} --recipe {tmp_path / 'mine.toml'}")[0].weight_decay == 0.05
    for recipe in ("", " --recipe cifar10-finetune"):
        assert parsed(line + recipe)[0].weight_decay == (0.01 if optimizer == "AdamW" else 0.0)
        assert parsed(f"{line}{recipe} --weight-decay 0.3")[0].weight_decay == 0.3


def test_all_published_flags_are_tried_and_in_the_documentation():
    text = DOCS.read_text(encoding="utf-8")
    for command, cases in (("train", MAIN), ("finetune", FINETUNE)):
        tried = {word for words in cases for word in words.split() if word.startswith("-")}
        names = {name for entry in PUBLISHED[command] for name in entry.names}
        assert names - tried == {"--resume"}  # tried in test_resume.py
        for entry in PUBLISHED[command]:
            rows = [line for line in text.splitlines() if line.startswith(f"| `{entry.names[0]}`")]
            assert any(entry.text in row and entry.effect in row for row in rows), (
                f"a row of {DOCS.name} must have: {entry.text}"
            )


def test_published_lines_mean_what_they_mean_there():
    line = "--arch CRATE_tiny --batch-size 512 --epochs 200 --optimizer Lion --lr 0.0002 --weight-decay 0.05 --print-freq 25"
    config, warned = parsed(f"train {line} --data DIR")
    assert (warned, config) == ([], resolve({"data": "DIR", "print_log": True}, "imagenet-readme"))
    assert (config.dim, config.schedule, config.label_smoothing, config.last_batch) == (384, "main-epoch", 0.1, "keep")
    line = (
        "--bs 256 --net CRATE_tiny --opt adamW --lr 5e-5 --n_epochs 200 --randomaug 1 --data cifar10 --ckpt_dir C --data_dir D"
    )
    config, warned = parsed(f"finetune {line}")
    assert (warned, config) == ([], resolve({"init": "C", "data_dir": "D"}, "cifar10-finetune"))
    assert (config.image_size, config.weight_decay, config.schedule, config.eval_crop) == (224, 0.01, "finetune-epoch", 0)


def test_defaults_are_the_scripts():
    assert parsed("train")[0] == TrainConfig() == resolve({}, "digits")
    config = parsed("train --data DIR")[0]
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay, config.workers) == (90, 256, 4e-4, 0.1, 16)
    assert (config.optimizer, config.dim, config.log_every) == ("AdamW", 384, 10)
    config = parsed("finetune")[0]
    assert (config.epochs, config.batch_size, config.lr, config.data, config.classes) == (400, 50, 1e-4, "cifar10", None)


@pytest.mark.parametrize("name", NAMES)
def test_flags_go_before_recipes(name):
    values = read_recipe(name)
    data = {} if "data" in values else {"data": "DIR"}
    config = resolve(data | {"lr": 0.125, "arch": "CRATE_base"}, name)
    assert (config.lr, config.dim, config.heads) == (0.125, SIZES["base"]["dim"], 12)
    plain = resolve(data, name)
    assert {key: getattr(plain, key) for key in values} == values


def test_a_printed_configuration_is_a_recipe(tmp_path):
    config = resolve({"data": "DIR", "mixup": 0.2, "out": "away"}, "imagenet-paper")
    (tmp_path / "again.toml").write_text("\n".join(describe(config)))
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(config)}))
    for file in ("again.toml", "config.json"):
        assert resolve({"out": "away"}, str(tmp_path / file)) == config


SWITCHES = [name for name, setting in SETTINGS.items() if setting.kind is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_stands_alone_or_says_yes_or_no_and_is_a_boolean(tmp_path, name):
    flag = f"--{name.replace('_', '-')}"
    for words, meant in ((flag, True), (f"{flag} yes", True), (f"{flag} no", False), ("", False)):
        assert getattr(parsed(f"train {words}")[0], name) is meant
    for text, meant in (("true", True), ("false", False), ('"yes"', True), ('"no"', False)):
        (tmp_path / "recipe.toml").write_text(f"data = 'digits'\n{name} = {text}")
        assert getattr(resolve({}, str(tmp_path / "recipe.toml")), name) is meant
    for value, words in (("maybe", "allowed are no, yes"), (1, "must be of type bool"), (None, "must be of type bool")):
        with pytest.raises(ConfigError, match=f"{flag} is {value!r}; .*{words}"):
            TrainConfig(**{name: value})


# What no setting takes: of any type that TOML, JSON or a caller can bring.
NEVER = [math.nan, -math.inf, 10**400, -(10**5000), 1j, b"1", [1], {"a": 1}, object(), "\u0661", "", " ", functools.reduce(
    lambda inner, _: [inner], range(100_000), [])]  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_what_it_is_not_and_each_says_so_in_a_line(name):
    setting = SETTINGS[name]
    taken = ["\u0661"] if setting.kind is str and not setting.choices else [10**400] if setting.kind is int else []
    for value in [value for value in NEVER if value not in taken]:  # a batch has no largest
        with pytest.raises(ConfigError) as caught:
            TrainConfig(**{name: value})
        assert str(caught.value).startswith(f"--{name.replace('_', '-')} is ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
    for value in (True, 1.5, "1"):
        if setting.kind is int:
            with pytest.raises(ConfigError, match="must be of type int"):
                TrainConfig(**{name: value})


WRONG = """
train --recipe nothing
train --recipe none.toml
train --recipe {here}/bad.toml
train --recipe {here}/unknown.toml
train --recipe {here}/wrong.toml
train --recipe imagenet-paper
train --arch CRATE_huge
train --optimizer Adagrad
train --lr x
train --batch-size 1.5
train --batch-size 64 --accumulate 3
train --accumulate 0
train --mixup -1
train --cutmix nan
train --clip-norm -1
train --ema 1
train --decay some
train --schedule linear
train --last-batch half
train --workers -1
train --augment randaugment
train --augment strong --data {here}
train --erase 0.5
train --erase 2 --data {here}
train --rotate 3 --data synthetic
train --crop-least 0
train --eval-crop 1.5
train --keep-checkpoints 0
train --checkpoint-minutes 0
train --classes 9
train --init {here}/absent.pt
train --init {here}/bad.toml
train --data {here}/absent
train --data {here}/bad.toml
train --data {here}
train --resume auto
train --resume {here}/absent
train --resume {here}
train --resume {here}/bad.toml
train --recipe digits --resume {here}
train --n_epochs 3
train --label-smooth 0.1
train --compile maybe
finetune --data_dir {here}/empty --data cifar10
finetune --randomaug x
finetune --opt rmsprop
finetune --ckpt_dir
finetune --classes 0
finetune --rand_aug_m 31
finetune --erase_prob 1.5
evaluate {here}/bad.toml
evaluate {here} --workers x
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with damaged recipes and data."""
    path = tmp_path_factory.mktemp("here")
    (path / "bad.toml").write_text("lr = = 1")
    (path / "unknown.toml").write_text("colour = 'red'")
    (path / "wrong.toml").write_text("lr = 'fast'")
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": {}}, path / "arguments.pth")
    (path / "empty" / "cifar-10-batches-py").mkdir(parents=True)
    return path


def refusal(capsys, words) -> str:
    """The one line in which `crate-fast words` ends."""
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(r"crate-fast[^\n]*: [^\n]+\n", error), error
    return error


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_values_end_in_one_line(capsys, here, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, [word.format(here=here) for word in line.split()])
    assert not any(tmp_path.iterdir())


# Nothing tells where data would be: were it looked for before the values are judged, its absence would be the error.
REASONS = {
    "train --out=": "--out is ''",
    "train --data=": "--data is ''",
    "finetune --ckpt_dir=": "--init is ''",
    "train --backend triton": "--backend is 'triton', whose kernels need a CUDA GPU; --device is 'auto', here cpu",
    "evaluate {here} --backend triton": "no model.safetensors in it",
    "train --cuda-graphs": "--cuda-graphs is 'yes', which needs a CUDA GPU; --device is 'auto', here cpu",
    "train --cuda-graphs --compile": "a run takes one of them",
    "train --n_epochs 3": "(see crate-fast train --help)",
    "evaluate --epochs 3 {here}": "(see crate-fast evaluate --help)",
    "finetune --data_dir absent --backend triton": "--backend is 'triton'",
    "finetune --data_dir absent --accumulate 3": "--accumulate 3",
    "finetune --data_dir absent --ckpt_dir {here}/absent": "absent: No such file",
    "finetune --data_dir absent --ckpt_dir {here}": "a directory with no model.safetensors in it",
    "finetune --data_dir absent --ckpt_dir {here}/bad.toml": "(it is no file of torch.save)",
    "finetune --data_dir absent --ckpt_dir {here}/arguments.pth": "(it asks for argparse.Namespace, and only tensors and plain",
    "finetune --data_dir absent --out {here}": "which is not empty",
    "finetune --data_dir absent --out {here}/bad.toml": "which cannot be made a directory",
    "finetune --data_dir absent --out {here}/bad.toml/below": "bad.toml is a file)",
}


@pytest.mark.parametrize(("line", "reason"), REASONS.items())
def test_the_value_at_fault_is_named_before_anything_is_read_or_written(capsys, here, tmp_path, monkeypatch, line, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crate_fast.kernels.INTERPRETED", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("crate_fast.training.run.open_data", lambda *_, **__: pytest.fail("data was looked for"))
    assert reason in refusal(capsys, [word.format(here=here) for word in line.split()])
    assert not any(tmp_path.iterdir())


def test_without_pydantic_settings_are_the_same_but_unchecked():
    """As on a machine lent for its GPU, which has PyTorch and can fetch nothing."""
    lines = [
        "import sys; sys.modules['pydantic'] = None",
        "from crate_fast.settings import SETTINGS, TrainConfig",
        "print([*map(tuple, SETTINGS.values())], TrainConfig(tensorboard='yes', epochs=3))",
    ]
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[*map(tuple, SETTINGS.values())]} {TrainConfig(tensorboard=True, epochs=3)}"
    assert done.stderr.strip() == "crate-fast: warning: pydantic is not installed: settings are taken unchecked"


@pytest.mark.parametrize(
    ("words", "recipe", "lr"),
    [
        (["train"], "digits", "0.001"),
        (["train", "--data", "photographs"], "main", "0.0004"),
        (["train", "--recipe", "imagenet-paper"], "imagenet-paper", None),
        (["finetune"], "finetune", None),
    ],
)
def test_help_shows_what_the_recipe_at_hand_has(words, recipe, lr, capsys):
    status, out, _ = call(capsys, *words, "--help")
    text = " ".join(out.split())
    lr = lr or str(read_recipe(recipe)["lr"])
    assert (status, f"what recipe {recipe} has" in text, f"learning rate, after warmup [{lr}]" in text) == (0, True, True)
    assert text.index("--epochs") < text.index("--max-unreadable")  # what is mostly used comes first
    assert all(text.count(f"{flag(name)} ") > 0 for name in SETTINGS)


def test_help_of_a_recipe_that_is_not_there_says_so(capsys):
    assert call(capsys, "train", "--recipe", "nope", "--help")[0] == 2


@pytest.mark.parametrize("resume", ["", "checkpoints/step-1.pt"])
def test_flags_beside_a_run_that_goes_on_are_judged_by_its_own_data(tmp_path, monkeypatch, capsys, resume):
    taken = []
    monkeypatch.setattr("crate_fast.training.train", lambda config, **_: taken.append(config) or (None, None))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"data": str(tmp_path)}}))
    words = ("train", "--resume", tmp_path / resume, "--augment", "randaugment")
    assert call(capsys, *words) == (0, "", "") and taken[0].data == str(tmp_path)
    assert call(capsys, *words, "--data", "digits")[0] == 2


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.kind is int])
def test_no_whole_number_is_without_an_upper_bound(name):
    """What is computed with them is in floating point at last, and what is said of them has few digits."""
    for number in (10**400, 10**5000):
        with pytest.raises(ConfigError, match=re.escape(flag(name))):
            TrainConfig(**{name: number})
