"""Several processes under torchrun, and the published command lines in miniature."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import kill
import pytest
import torch
import torch.distributed as dist
from conftest import call
from helpers.pictures import make_archives, make_cifar10, make_folder, trust
from helpers.serving import served

from crate_fast import CRATE_tiny
from crate_fast.checkpoint import load_checkpoint
from crate_fast.checkpoint.read import read_checkpoint
from crate_fast.commands.main import main
from crate_fast.data.order import make_plan
from crate_fast.processes import Ranks, meet
from crate_fast.training import ConfigError, evaluate_run, resolve, train

pytestmark = pytest.mark.slow

TINY = ["--image-size", "32", "--patch-size", "16", "--num-threads", "1", "--device", "cpu"]


PUBLISHED_TRAINING = (
    "--arch CRATE_tiny --batch-size 512 --epochs 1 --optimizer Lion --lr 0.0002 --weight-decay 0.05 --print-freq 25"
)
PUBLISHED_FINETUNING = "--bs 256 --net CRATE_tiny --opt adamW --lr 5e-5 --n_epochs 1 --randomaug 1 --data cifar10"


def launch(ranks: int, *words, standalone=("--standalone",), program=("-m", "crate_fast")) -> subprocess.Popen:
    """torchrun with `crate-fast words`, or another program, in `ranks` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *standalone, f"--nproc_per_node={ranks}", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process: subprocess.Popen) -> str:
    """What a process that ends well prints."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def last_test(run: Path) -> dict:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "folder", train=40, val=1003, side=16)


@pytest.fixture(scope="module")
def trained(folder):
    """The published command line of main.py on two processes: its run, and what it printed."""
    line = PUBLISHED_TRAINING.replace("512", "32")
    run = folder.parent / "run"
    return run, output(launch(2, "train", *line.split(), "--data", folder, "-j", 2, "--out", run, *TINY))


def test_the_published_training_line_on_two_processes(trained):
    run, printed = trained
    row = last_test(run)
    expected = f"test top-1 {row['top1']:.2%} ({row['correct']} of 1003), top-5 {row['top5']:.2%}, loss {row['loss']:.4f}"
    assert expected in printed.splitlines()
    assert printed.count("run directory") == 1
    assert json.loads((run / "config.json").read_text())["circumstances"]["ranks"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"], row["count"]) for row in rows] == [("train", 2, 40), ("test", 2, 1003)]


def test_evaluation_counts_each_image_once_on_any_number_of_processes(trained, capsys):
    run, _ = trained
    row = last_test(run)
    assert main(["evaluate", str(run), "--workers", "0"]) == 0
    printed = [capsys.readouterr().out, *(output(launch(ranks, "evaluate", run, "--workers", 0)) for ranks in (2, 3))]
    counts = {re.search(r"\((\d+) of (\d+)\), top-5 ([\d.]+)%", text).groups() for text in printed}
    assert counts == {(str(row["correct"]), "1003", f"{100 * row['top5']:.2f}")}


def test_two_processes_train_as_one_does(trained, folder, tmp_path):
    """As long as nothing is drawn by rank: weights of two steps, up to the order of sums."""
    line = PUBLISHED_TRAINING.replace("512", "32")
    assert main(["train", *line.split(), "--data", str(folder), "-j", "0", "--out", str(tmp_path / "one"), *TINY]) == 0
    one, two = (load_checkpoint(path / "model.safetensors").state_dict() for path in (tmp_path / "one", trained[0]))
    for name, value in one.items():
        # A gradient near zero may change its sign, and Lion's step with it: two steps of two learning rates at most. One such
        # weight is chance, and in a vector much of the mean: the farthest does not count in it.
        apart = (value - two[name]).abs()
        assert apart.max() <= 4 * 2e-4 + 1e-6, name
        assert (apart.sum() - apart.max()) / apart.numel() < 2e-6, name


def save_as_published(model: torch.nn.Module, path: Path) -> Path:
    """Writes a checkpoint as main.py does."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "CRATE_tiny", "state_dict": weights, "best_acc1": torch.tensor(1.0)}, path)
    return path


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Makes the images that are published, of these counts."""

    def make(train: int, test: int) -> Path:
        folder = make_cifar10(tmp_path / "cifar", train, test)
        trust(monkeypatch, folder)
        return folder

    return make


def test_the_published_finetuning_line(tmp_path, capsys, cifar):
    cifar(train=50, test=20)
    torch.manual_seed(3)
    published = CRATE_tiny(image_size=64, patch_size=16)  # another image size: position embeddings are resampled
    file, run = save_as_published(published, tmp_path / "main.pth"), tmp_path / "run"
    paths = ["--ckpt_dir", file, "--data_dir", tmp_path / "cifar", "--out", run, "--workers", 0]
    words = [*PUBLISHED_FINETUNING.replace("256", "16").split(), *paths, *TINY]
    assert main(["finetune", *map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "main.pth: 104 weights loaded, position embeddings resampled; new: the head (4)" in out
    row = last_test(run)
    assert main(["evaluate", str(run)]) == 0
    assert f"({row['correct']} of 20)" in capsys.readouterr().out
    model = load_checkpoint(run / "model.safetensors")
    moved = (model.state_dict()["cls_token"] - published.cls_token).abs().max().item()
    assert 0 < moved < 1e-3  # a few steps of 5e-5 from where it started


def test_finetuning_on_two_processes(tmp_path, capsys, cifar, monkeypatch):
    """The first downloads, the other waits for it."""
    source, data = make_archives(cifar(train=50, test=21)), tmp_path / "data"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file, run = save_as_published(CRATE_tiny(image_size=32, patch_size=16), tmp_path / "main.pth"), tmp_path / "run"
    line = PUBLISHED_FINETUNING.replace("256", "16")
    paths = ["--ckpt_dir", file, "--data_dir", data, "--out", run, "--workers", 2]
    with served(source) as server:
        program = (Path(__file__).with_name("helpers") / "trusting.py", source, server.url)
        printed = output(launch(2, "finetune", *line.split(), *paths, *TINY, program=program))
        assert server.asked == {"cifar-10-python.tar.gz": 1}
    assert printed.count("downloading") == 1
    assert printed.count("main.pth: 104 weights loaded; new: the head (4)") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"], row["count"]) for row in rows] == [("train", 4, 50), ("test", 4, 21)]
    assert main(["evaluate", str(run), "--workers", "0"]) == 0
    assert f"({rows[-1]['correct']} of 21)" in capsys.readouterr().out


def test_the_published_lines_with_nothing_changed_but_epochs_paths_and_workers(tmp_path, capsys, cifar):
    """At 224 pixels, on few images: a step of each, incomplete as it is, and the score of each read back."""
    folder, data = make_folder(tmp_path / "folder", train=6, val=3), cifar(train=5, test=4)
    main_run, finetune_run = tmp_path / "main", tmp_path / "finetune"
    paths = ["--data", folder, "-j", 0, "--out", main_run]
    assert main(["train", *PUBLISHED_TRAINING.split(), *map(str, paths)]) == 0
    file = save_as_published(load_checkpoint(main_run / "checkpoints" / "last.pt"), tmp_path / "main.pth")
    paths = ["--ckpt_dir", file, "--data_dir", data, "--workers", 0, "--out", finetune_run]
    assert main(["finetune", *PUBLISHED_FINETUNING.split(), *map(str, paths)]) == 0
    assert "main.pth: 104 weights loaded; new: the head (4)" in capsys.readouterr().out
    recipes = {main_run: "imagenet-readme", finetune_run: "cifar10-finetune"}
    changed = {"epochs", "data", "data_dir", "init", "out", "workers", "print_log"}
    for run, count in ((main_run, 3), (finetune_run, 4)):
        row, config = last_test(run), json.loads((run / "config.json").read_text())["config"]
        assert (row["step"], row["count"]) == (1, count)
        plain = asdict(resolve({"data": config["data"]}, recipes[run]))
        assert {name for name, value in config.items() if value != plain[name]} <= changed
        assert main(["evaluate", str(run)]) == 0
        assert f"({row['correct']} of {count}), top-5 {row['top5']:.2%}, loss {row['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda weights: {"model": weights}, "104 weights loaded; new: the head"),
        (lambda weights: weights, "104 weights loaded; new: the head"),
        (
            lambda weights: {"model": {k: v for k, v in weights.items() if k != "cls_token"}},
            "missing there, and random: cls_token",
        ),
        (lambda weights: weights | {"extra": torch.zeros(1)}, "not of this model, and left out: extra"),
    ],
)
def test_checkpoints_of_every_shape(tmp_path, capsys, cifar, wrap, words):
    torch.save(wrap(CRATE_tiny(image_size=32, patch_size=16).state_dict()), tmp_path / "file.pth")
    cifar(train=10, test=5)
    given = ["--ckpt_dir", tmp_path / "file.pth", "--data_dir", tmp_path / "cifar", "--out", tmp_path / "run", *TINY]
    assert main(["finetune", *map(str, given), "--epochs", "1", "--workers", "0"]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"state_dict": {"fc.weight": torch.zeros(2)}}, [1], {"model": 3}, CRATE_tiny])
def test_weights_of_something_else_are_refused(tmp_path, cifar, content):
    made = content(dim=64, image_size=32).state_dict() if callable(content) else content
    torch.save(made, tmp_path / "file.pth")
    cifar(train=10, test=5)
    settings = {"init": str(tmp_path / "file.pth"), "data_dir": str(tmp_path / "cifar"), "image_size": 32, "workers": 0}
    with pytest.raises(ValueError, match=r"file\.pth: .*(no weights of a CRATE|another size)"):
        train(resolve(settings | {"out": str(tmp_path / "run")}, "cifar10-finetune"))
    assert not (tmp_path / "run").exists()


def test_published_checkpoints_are_evaluated(tmp_path, trained, folder):
    run, _ = trained
    weights = load_checkpoint(run / "model.safetensors").state_dict()
    path = tmp_path / "main.pth.tar"
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    assert evaluate_run(path, data=str(folder)).count == evaluate_run(run, data=str(folder)).count
    with pytest.raises(ValueError, match=r"--arch is CRATE_base; .*main\.pth\.tar holds a model of dim"):
        evaluate_run(path, data=str(folder), arch="CRATE_base")
    published = CRATE_tiny(num_classes=3)
    torch.save({"state_dict": published.state_dict()}, path)
    small = make_folder(tmp_path / "small", train=3, val=5, side=16)
    assert evaluate_run(path, data=str(small), workers=0, device="cpu").count == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"RANK": "7", "WORLD_SIZE": "2"}, "RANK is 7; of 2 processes it must be 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "１", "WORLD_SIZE": "2"}, "RANK is '１'; it must be a whole number"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.invalid", "MASTER_PORT": "1"},
            "at no.such.invalid:1: .* not known",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; it must be"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 3"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; it must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9+'; it must be"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, of 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set; it must be"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "{taken}"},
            "cannot meet at localhost:.* in use",
        ),
    ],
)
def test_processes_that_cannot_meet_say_so_in_a_line(tmp_path, capsys, monkeypatch, settings, words):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("localhost", 0)) as taken:
        for name, value in settings.items():
            monkeypatch.setenv(name, value.format(taken=taken.getsockname()[1]))
        status, _, err = call(capsys, "train", "--out", tmp_path / "run", "--device", "cpu")
    assert status == 2
    assert re.fullmatch(f"crate-fast: error: .*{words}.*\n", err)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "of another protocol"])
def test_a_stranger_at_the_port_of_the_first_process_is_told_in_a_line(tmp_path, capsys, monkeypatch, answer):
    stranger = socket.create_server(("localhost", 0))
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(stranger.getsockname()[1])}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("crate_fast.processes.ANSWERING", 1.0)
    met = []

    def greet():
        with contextlib.suppress(OSError):  # of the socket, when the test is over
            while True:
                met.append(stranger.accept()[0])
                if answer:
                    met[-1].sendall(answer)

    threading.Thread(target=greet, daemon=True).start()
    with stranger:
        status, _, error = call(capsys, "train", "--device", "cpu", "--out", tmp_path / "run")
    assert (status, error.count("\n"), "cannot meet at localhost:" in error) == (2, 1, True), error


def test_batches_that_do_not_divide_are_refused():
    config = resolve({"batch_size": 32, "accumulate": 5})
    words = "--batch-size is 32, over all processes; it must divide by 10: 2 processes × --accumulate 5"
    with pytest.raises(ConfigError, match=words):
        make_plan(config, 100, Ranks(1, 2))


def test_processes_meet_whatever_was_there_before():
    """Twice in one store, as after a restart that only one of the agents has counted."""
    store, names = dist.HashStore(), []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            starts = [pool.submit(meet, store, Ranks(rank, 3), 10.0) for rank in (2, 1, 0)]
            found = {start.result() for start in starts}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 2
    with pytest.raises(RuntimeError, match="3 processes did not meet"):
        meet(store, Ranks(1, 3), 0.2)


def test_a_signal_under_torchrun_saves_and_any_number_of_processes_goes_on(tmp_path, capsys):
    """As many go on to the same bits. Another number goes on with the same images in the same order: as long as nothing is
    drawn by process (mixing, dropout), to the same weights and losses but for the order of sums.
    """
    data, run, straight = make_folder(tmp_path / "data", train=90, val=30), tmp_path / "run", tmp_path / "straight"
    alike = ["--epochs", "4", "--mixup", "0", "--cutmix", "0", "--dropout", "0", "--workers", "0"]
    words = ["train", "--data", data, *kill.SETTINGS, *alike]
    signals = ("--standalone", "--signals-to-handle=SIGUSR1,SIGTERM")
    through = launch(2, *words, "--out", straight)
    stopped = launch(2, *words, "--out", run, standalone=signals)
    while not (run / "checkpoints" / "step-00000003.pt").exists():
        assert stopped.poll() is None, stopped.communicate()[1]
        time.sleep(0.01)
    workers = kill._descendants(stopped.pid)
    start = time.monotonic()
    stopped.send_signal(signal.SIGUSR1)
    errors = stopped.communicate(timeout=60)[1]
    assert stopped.returncode != 0
    assert time.monotonic() - start < 40
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    step = int(re.search(r"crate-fast: stopped by signal 10 after step (\d+), saved as \S+\.pt; to go on: [^\n]+\n", errors)[1])
    assert 3 <= step < 32
    assert read_checkpoint(run / "checkpoints" / "last.pt")["step"] == step

    output(through)
    other = shutil.copytree(run, tmp_path / "other")
    assert f"going on after step {step} of 32" in output(launch(2, "train", "--resume", run))
    assert kill.outcome(run) == kill.outcome(straight)

    assert main(["train", "--resume", str(other)]) == 0
    printed = capsys.readouterr()
    assert f"going on after step {step} of 32" in printed.out
    assert "ranks was 2 and is 1: the run goes on with the same images in the same order, but not to the same" in printed.err
    (_, rows), (_, expected) = kill.outcome(other), kill.outcome(straight)
    places = [[(row["split"], row["step"], row["count"], row.get("lr")) for row in some] for some in (rows, expected)]
    assert places[0] == places[1]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_a_killed_worker_restarts_the_run(tmp_path):
    """Two agents that meet over c10d on loopback; one of the two workers is killed, and the run ends as if it were not."""
    data = make_folder(tmp_path / "data", train=90, val=90)
    words = ["train", "--data", data, *kill.SETTINGS, "--epochs", "2", "--workers", "0"]
    straight = launch(2, *words, "--out", tmp_path / "straight")
    rendezvous = ["--nnodes=2", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-id={tmp_path.name}"]
    rendezvous += [f"--rdzv-endpoint=127.0.0.1:{29500 + os.getpid() % 1000}", "--monitor-interval=0.2"]
    agents = [launch(1, *words, "--out", tmp_path / "killed", standalone=rendezvous) for _ in range(2)]
    checkpoints, end = tmp_path / "killed" / "checkpoints", time.monotonic() + 400
    while not list(checkpoints.glob("step-*.pt")):
        assert time.monotonic() < end
        assert all(agent.poll() is None for agent in agents), agents[0].communicate()[1]
        time.sleep(0.02)
    os.kill(kill._descendants(agents[0].pid)[-1], 9)
    printed = [output(agent) for agent in agents]
    assert any("going on after step" in text for text in printed)
    assert output(straight)
    assert kill.outcome(tmp_path / "straight") == kill.outcome(tmp_path / "killed")
    shutil.rmtree(tmp_path / "data")
