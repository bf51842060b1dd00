"""main.py's checkpoints both ways: a run goes on from one as if it had been ours, and main.py from what we convert."""

import math

import pytest
import torch
from conftest import call
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from crate_fast import load_checkpoint

MODEL = ["--dim", "16", "--depth", "1", "--heads", "2", "--dim-head", "8"]
HOW = [
    *("--num-threads", "1", "--device", "cpu", "--epochs", "3", "--schedule", "main-epoch"),
    *("--checkpoint-every", "1", "--keep-checkpoints", "9"),
]


def optimizer_of(kind, parameters, lr=1e-3, decay=0.1):
    """As main.py makes it."""
    if kind == "AdamW":
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    from lion_pytorch import Lion

    return Lion(parameters, lr=lr, weight_decay=decay)


def factor(step, epochs=3):
    return min((step + 1) / (20 + 1e-8), 0.5 * (math.cos(step / epochs * math.pi) + 1))


@pytest.fixture(scope="module", params=["Lion", "AdamW"])
def run(request, tmp_path_factory):
    """(directory, optimizer, checkpoint after 2 of 3 epochs, that as main.py saves it) of a run on the digits."""
    from crate_fast.commands.main import main

    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "--out", str(folder / "run"), *MODEL, *HOW, "--optimizer", request.param]) == 0
    second = sorted((folder / "run" / "checkpoints").glob("step-*"))[1]
    assert main(["convert", str(second), str(folder / "main.pth.tar")]) == 0
    return folder / "run", request.param, second, folder / "main.pth.tar"


def test_a_run_goes_on_from_main_py_to_the_same_bits(run, tmp_path, capsys):
    path, kind, _, file = run
    status, out, err = call(capsys, "train", "--resume", file, "--out", tmp_path / "on", *HOW)
    assert status == 0, err
    assert f"going on after epoch 2 of 3, with its weights and optimizer (optimizer {kind}, lr 0.001" in out
    assert (tmp_path / "on" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert call(capsys, "train", "--resume", tmp_path / "on")[0] == 0  # from then on a run as any other


def test_a_run_that_was_killed_at_once_goes_on_from_the_same_file(run, tmp_path, capsys):
    path, _, _, file = run
    assert call(capsys, "train", "--resume", file, "--out", tmp_path / "on", *HOW)[0] == 0
    for name in ("model.safetensors", "metrics.jsonl", "curves.png"):
        (tmp_path / "on" / name).unlink()
    for checkpoint in (tmp_path / "on" / "checkpoints").iterdir():
        checkpoint.unlink()
    status, out, err = call(capsys, "train", "--resume", tmp_path / "on")
    assert status == 0 and "going on after epoch 2 of 3" in out, err
    assert (tmp_path / "on" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_main_py_takes_what_is_converted(run, published_class):
    """What it does with a checkpoint on a GPU, where its model is in a DataParallel."""
    _, kind, second, file = run
    checkpoint = torch.load(file)
    sizes = dict(image_size=16, patch_size=4, num_classes=10, dim=16, depth=1, heads=2, dim_head=8)
    sizes["channels"] = checkpoint["arguments"]["channels"]
    model = nn.DataParallel(published_class(**sizes))
    optimizer = optimizer_of(kind, model.parameters())
    scheduler = LambdaLR(optimizer, lr_lambda=factor)
    assert checkpoint["epoch"] == 2 and checkpoint["best_acc1"].dim() == 0 and checkpoint["best_acc1"] >= 0
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    ours = torch.load(second)
    for number, parameter in enumerate(model.parameters()):
        moments = ours["optimizer"]["state"][number]
        assert all(torch.equal(optimizer.state[parameter][name], moments[name]) for name in moments)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor(2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor(3), abs=1e-12)


def saved_by_main(published_class, kind, **changes):
    """A checkpoint as main.py writes it, of the published class and its own optimizer and schedule."""
    model = published_class(image_size=16, patch_size=4, num_classes=10, dim=384, depth=12, heads=6, dim_head=64)
    optimizer = optimizer_of(kind, model.parameters())
    scheduler = LambdaLR(optimizer, lr_lambda=factor)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    whole = {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}
    whole |= {"epoch": 1, "arch": "CRATE_tiny", "best_acc1": torch.tensor(12.5), "optimizer": optimizer.state_dict()}
    return whole | {"scheduler": scheduler.state_dict()} | changes


def test_what_main_py_saved_is_taken_with_its_settings(published_class, tmp_path):
    from crate_fast.training.published_run import read_start

    for kind in ("Lion", "AdamW"):
        content = saved_by_main(published_class, kind)
        torch.save(content, tmp_path / "main.pth.tar")
        start = read_start(tmp_path / "main.pth.tar")
        assert (start.epoch, start.best, start.settings["optimizer"]) == (1, 0.125, kind)
        assert start.settings["arch"] == "CRATE_tiny" and start.settings["lr"] == 1e-3 and start.settings["weight_decay"] == 0.1
        assert start.rate == pytest.approx(1e-3 * factor(1))
        assert start.settings["num_classes"] == 10  # the head's, which may be more than the data's
        assert list(start.weights) == list(load_checkpoint(tmp_path / "main.pth.tar").state_dict())


WRONG = {
    "another learning rate": (lambda content: content, ["--lr", "0.5"], "--lr is 0.5; .* has 0.001"),
    "no epochs left": (lambda content: content, ["--epochs", "2"], "has made 2, so that nothing is left"),
    "weights of two places": (lambda content: content, ["--init", "{file}"], "a run takes its weights from one of them"),
    "no optimizer": (lambda content: content | {"optimizer": None}, [], "weights alone, which have no optimizer: --init"),
    "no epoch": (lambda content: content | {"epoch": "x"}, [], "its 'epoch' is x"),
    "a best that is none": (lambda content: content | {"best_acc1": torch.zeros(3)}, [], "'best_acc1'"),
    "another optimizer": (lambda content: content | {"optimizer": {"param_groups": [{}], "state": {}}}, [], "has made no step"),
    "groups that are none": (lambda content: content | {"optimizer": {"param_groups": 3, "state": {}}}, [], "in one group"),
    "a state of words": (lambda content: _with_state(content, "x"), [], "has made no step"),
    "moments of another shape": (lambda content: _with_state(content, None), [], "checkpoint"),
}


def _with_state(content, value):
    state = dict(content["optimizer"]["state"])
    state[0] = value if value is not None else {name: torch.zeros(3, 3, 3) for name in state[0]}
    return content | {"optimizer": content["optimizer"] | {"state": state}}


@pytest.mark.parametrize("what", WRONG)
def test_what_no_run_can_go_on_from_is_told_in_a_line(run, what, tmp_path, capsys):
    change, flags, words = WRONG[what]
    file = tmp_path / "x.pth.tar"
    torch.save(change(torch.load(run[3])), file)
    how = [word.format(file=file) for word in [*HOW, *flags]]
    status, _, err = call(capsys, "train", "--resume", file, "--out", tmp_path / "on", *how)
    assert (status, err.count("\n")) == (2, 1), err
    assert __import__("re").search(words, err), err
    assert not (tmp_path / "on").exists()


def test_finetune_py_finds_every_name(run, tmp_path, capsys):
    """It takes names with "module." alone, and passes over all others without a word."""
    path, _, _, _ = run
    for source in (path, path / "model.safetensors"):
        assert call(capsys, "convert", source, tmp_path / "x.pth.tar", "--overwrite")[0] == 0
        assert all(name.startswith("module.") for name in torch.load(tmp_path / "x.pth.tar")["state_dict"])


@pytest.mark.parametrize("prefix", ["module.", "none", "_orig_mod."])
def test_a_file_is_said_to_be_for_the_scripts_that_take_it(run, prefix, tmp_path, capsys):
    path, kind, _, _ = run
    for source, main in ((path, f"for main.py --resume with --optimizer {kind} "), (path / "model.safetensors", None)):
        target = tmp_path / "x.pth.tar"
        status, out, _ = call(capsys, "convert", source, target, "--prefix", prefix, "--overwrite")
        assert (status, "not for finetune.py --ckpt_dir" in out) == (0, prefix != "module.")
        assert "for finetune.py --ckpt_dir" in out
        if main is not None:
            assert (main in out, " on a CPU or one --gpu" in out) == (prefix != "_orig_mod.", prefix == "none")
