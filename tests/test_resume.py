"""A run that is killed, stopped, or robbed of its newest checkpoint goes on to the same bits; what cannot go on is refused."""

import builtins
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import kill
import pytest
import torch
from conftest import call

from crate_fast import CRATEAlpha, load_checkpoint
from crate_fast.checkpoint.read import CheckpointError, read_checkpoint
from crate_fast.commands.main import main
from crate_fast.locks import unlock
from crate_fast.settings import SETTINGS
from crate_fast.training import ConfigError, SavingError, Stopped, TrainConfig, evaluate_run, train
from crate_fast.training.loop import Trainer
from crate_fast.training.published_run import save_main
from crate_fast.training.resolve import describe
from crate_fast.training.run_directory import RunDirectory

SMALL = TrainConfig(
    **dict(image_size=8, dim=16, depth=1, heads=1, dim_head=16, device="cpu", num_threads=1, batch_size=256, epochs=4),
    **dict(checkpoint_every=1, log_every=2, ema=0.9, mixup=0.2, dropout=0.1, drop_path=0.2, accumulate=2, last_batch="keep"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing stopped: six steps an epoch."""
    torch.set_num_threads(1)
    run, _ = train(replace(SMALL, out=str(tmp_path_factory.mktemp("straight") / "run")))
    return run


def same_end(run: RunDirectory, other: RunDirectory) -> bool:
    return kill.outcome(run.path) == kill.outcome(other.path)


def stop_after(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of a step."""
    update = Trainer._update

    def update_and_signal(self, sums):
        update(self, sums)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_update", update_and_signal)


def test_float16_goes_on_with_its_scale(tmp_path, monkeypatch):
    config = replace(SMALL, precision="float16", epochs=2, optimizer="AdamW", clip_norm=1.0)
    straight, _ = train(replace(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stopped):
            train(replace(config, out=str(tmp_path / "run")))
    scaler = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["scaler"]
    assert scaler["_growth_tracker"] > 0
    run, _ = train(config, resume=str(tmp_path / "run"))
    assert same_end(run, straight)


def test_a_stopped_run_of_crate_alpha_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = replace(SMALL, model="CRATEAlpha", layer_scale=0.5, epochs=2)
    straight, _ = train(replace(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stopped):
            train(replace(config, out=str(tmp_path / "run")))
    run, _ = train(config, resume=str(tmp_path / "run"))
    assert same_end(run, straight)
    assert type(load_checkpoint(run.path)) is CRATEAlpha
    with pytest.raises(ConfigError, match=r"--arch is CRATE_small; .* holds a model of dim 16, depth 1, heads 1, a CRATEAlpha"):
        evaluate_run(run.path, arch="CRATE_small", device="cpu")
    with pytest.raises(CheckpointError, match=r"its model is a CRATEAlpha, which main.py does not have"):
        save_main(run.path / "checkpoints" / "last.pt", tmp_path / "x.pth.tar")


@pytest.mark.parametrize("step", [1, 6, 15, 24])
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, step):
    config = replace(SMALL, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped, match=f"signal 15 after step {step}, saved as") as caught:
            train(config)
        assert caught.value.status == 143
    before = signal.getsignal(signal.SIGTERM)
    run, score = train(config, resume="auto")
    assert same_end(run, finished)
    assert score.count == 360
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_goes_on_to_itself(finished, tmp_path):
    before = kill.outcome(finished.path)
    run, _ = train(SMALL, resume=str(finished.path))
    assert kill.outcome(run.path) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_three_kills_leave_no_trace(tmp_path, kind):
    kill.compare(tmp_path, 1, (0, 3), ("writing", "SIGTERM", "step"), kind=kind)


def test_a_damaged_newest_checkpoint_is_set_aside(finished, tmp_path, monkeypatch, capsys):
    config = replace(SMALL, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, 15)
        with pytest.raises(Stopped):
            train(config)
    newest = tmp_path / "run" / "checkpoints" / "step-00000015.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written"):
        read_checkpoint(newest)
    capsys.readouterr()
    run, _ = train(config, resume=str(tmp_path / "run"))
    out, err = capsys.readouterr()
    assert "going on after step 12 of 24" in out
    assert re.search(r"warning: .*step-00000015\.pt: damaged.*set aside as step-00000015\.damaged-", err)
    assert same_end(run, finished)
    assert len(list(run.checkpoints.glob("step-*.damaged-*"))) == 1


def contents(run: RunDirectory) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(file): file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}


def fail_on(monkeypatch, where: str, error: Exception) -> None:
    """Lets what reads a checkpoint fail, as on a file server that is away for a moment or with too little memory."""
    module, name = {
        "open": (builtins, "open"),
        "sums": (zipfile.ZipFile, "testzip"),
        "load": (torch, "load"),
        "list": (os, "listdir"),
    }[where]
    real = getattr(module, name)

    def failing(*arguments, **options):
        concerned = {"open": ".pt", "list": "checkpoints"}.get(where, "")
        if str(arguments[0]).endswith(concerned):
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        *(("open", errno.EACCES), ("open", errno.EMFILE), ("sums", errno.EIO), ("sums", None)),
        *(("load", errno.ESTALE), ("load", None), ("list", errno.EACCES)),
    ],
)
def test_what_cannot_be_read_just_now_is_no_damage(finished, tmp_path, monkeypatch, where, number):
    error = OSError(number, os.strerror(number)) if number else MemoryError()
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    before = contents(run)
    with monkeypatch.context() as patch:
        fail_on(patch, where, error)
        with pytest.raises((CheckpointError, OSError), match=os.strerror(number) if number else "not enough memory"):
            train(SMALL, resume=str(run.path))
    assert contents(run) == before


@pytest.mark.parametrize("what", ["all damaged", "only the best is left", "names of others are left", "none is there"])
def test_a_run_with_no_checkpoint_to_go_on_from_is_left_alone(finished, tmp_path, what):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    for file in list(run.checkpoints.glob("step-*" if "left" in what else "*")):
        if what == "all damaged":
            os.truncate(file, 1000)
        elif what == "names of others are left":
            file.rename(file.with_suffix(".damaged-20200101-000000"))
        else:
            file.unlink()
    before = contents(run)
    with pytest.raises((CheckpointError, ConfigError), match=r"is whole, so the run cannot go on|no checkpoint step|are gone"):
        train(SMALL, resume=str(run.path))
    assert contents(run) == before
    run.model.unlink()  # without it the metrics tell
    before = contents(run)
    with pytest.raises((CheckpointError, ConfigError)):
        train(SMALL, resume=str(run.path))
    assert contents(run) == before


def test_what_is_set_aside_does_not_grow_without_end(finished, tmp_path):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    for day in range(9):
        (run.checkpoints / f"step-00000030.left-2020010{day}-000000").write_bytes(b"old")
    train(SMALL, resume=str(run.checkpoints / "step-00000018.pt"))
    assert len(list(run.checkpoints.glob("step-*.left-*"))) == 3


KILLED = """
import os, signal, sys
from dataclasses import replace
from crate_fast.training import train
from test_resume import SMALL

rename = os.replace
os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith(sys.argv[1]) else rename(a, b)
train(replace(SMALL, out=sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["config.json", "step-00000006.pt", "model.safetensors"])
def test_a_run_killed_while_it_writes_a_file_goes_on_and_leaves_nothing_over(finished, tmp_path, moment):
    """In a new process, and none forked from this one, where a run in parts may have started the threads of a backward pass."""
    arguments = replace(SMALL, out=str(tmp_path / "run"))
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", KILLED, moment, arguments.out]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert list((tmp_path / "run").rglob(".*.tmp"))
    run, _ = train(arguments, resume="auto")
    assert same_end(run, finished)
    assert not list(run.path.rglob(".*"))


def test_a_run_goes_on_from_an_older_checkpoint(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    run, _ = train(SMALL, resume=str(tmp_path / "run" / "checkpoints" / "step-00000018.pt"))
    assert same_end(run, finished)
    assert read_checkpoint(run.checkpoints / "last.pt")["step"] == 24
    names = {path.name.partition(".")[2].partition("-")[0] for path in run.checkpoints.glob("step-*")}
    assert names == {"pt", "left"}


def test_the_newest_and_the_best_are_kept(finished):
    names = sorted(path.name for path in finished.checkpoints.iterdir())
    assert names == ["best.pt", "last.pt", "step-00000018.pt", "step-00000024.pt"]
    rows = [row for row in finished.read_metrics() if row["split"] == "test"]
    best = max(rows, key=lambda row: row["top1"])
    assert read_checkpoint(finished.checkpoints / "best.pt")["epoch"] == best["epoch"]
    assert read_checkpoint(finished.checkpoints / "last.pt")["step"] == 24


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    config = replace(SMALL, out=str(tmp_path / "run"))
    save, calls = torch.save, []

    def full(content, file, **options):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        SavingError, match=r"step-00000012\.pt cannot be written \(No space left on device\).*00006\.pt is kept"
    ):
        train(config)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.5}, "--lr is 0.5; the run in .* was started with 0.001, which a resumed run keeps"),
        ({"epochs": 3}, "--epochs is 3; .*4, and a resumed run has as many or more"),
        ({"seed": 1}, "--seed is 1"),
    ],
)
def test_a_resumed_run_keeps_its_settings(finished, given, words):
    with pytest.raises(ConfigError, match=words):
        train(replace(SMALL, **given), given=given, resume=str(finished.path))


def test_a_resumed_run_stays_in_its_directory(finished, tmp_path):
    (tmp_path / "link").symlink_to(finished.path)
    before = contents(finished)
    for resume in (finished.path, finished.checkpoints / "step-00000024.pt"):
        for out in (tmp_path / "new", tmp_path, finished.checkpoints):
            with pytest.raises(ConfigError, match=re.escape(f"--out is {out} and --resume is {resume}; ")):
                train(replace(SMALL, out=str(out)), resume=str(resume))
    assert contents(finished) == before and not (tmp_path / "new").exists()
    for out in (finished.path, tmp_path / "link", os.path.relpath(finished.path)):
        run, _ = train(replace(SMALL, out=str(out)), resume=str(finished.path))
        assert run.path == finished.path


def test_one_command_line_starts_a_run_by_a_recipe_and_goes_on_with_it(tmp_path, capsys):
    """As examples/slurm.sh has it; and what the recipe says otherwise by then is not passed over."""
    recipe, out = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text("\n".join(describe(replace(SMALL, epochs=1))))
    line = ("train", "--resume", "auto", "--recipe", recipe, "--out", out, "--precision", "auto")
    for words in (" 6 steps\n", "going on after step 6 of 6"):
        status, told, error = call(capsys, *line)
        assert status == 0 and words in told, error
    recipe.write_text(recipe.read_text().replace("dropout = 0.1", "dropout = 0.2"))
    status, _, error = call(capsys, *line)
    assert status == 2 and f"--dropout is 0.2; the run in {out} was started with 0.1" in error


def test_evaluating_in_the_way_of_main_names_what_it_leaves_aside(finished, capsys):
    line = ("train", "--evaluate", "--resume", finished.path, "--device", "cpu")
    status, _, error = call(capsys, *line, "--lr", 1, "--out", "there", "--recipe", "digits")
    assert status == 0
    assert error.splitlines()[0] == "crate-fast: warning: --lr, --out and --recipe have no effect: --evaluate trains nothing"
    status, _, error = call(capsys, *line, "--init", "weights.pth")
    assert status == 2 and f"--resume is {finished.path} and --init is weights.pth; --evaluate takes one" in error


def test_a_run_of_before_has_switches_in_words_and_goes_on(finished, tmp_path):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    (newest,) = (path for path in run.checkpoints.glob("step-*.pt") if path.name.endswith("24.pt"))
    content, checkpoint = json.loads(run.config.read_text()), torch.load(newest)
    switches = [name for name, setting in SETTINGS.items() if setting.kind is bool]
    for settings in (content["config"], checkpoint["settings"]):
        assert [settings[name] for name in switches] == [False] * len(switches)
        settings |= dict.fromkeys(switches, "no")
        del settings["stream"]  # which there was not
    run.config.write_text(json.dumps(content))
    torch.save(checkpoint, newest)
    train(SMALL, given={"compile": "no", "cuda_graphs": False}, resume=str(run.path))
    for value in (True, "yes"):
        with pytest.raises(ConfigError, match=r"--compile is yes; the run in .* was started with no, which"):
            train(SMALL, given={"compile": value}, resume=str(run.path))
    checkpoint["settings"]["compile"] = "yes"
    torch.save(checkpoint, newest)
    with pytest.raises(ConfigError, match="compile is False; the run's checkpoints were written with True"):
        train(SMALL, resume=str(run.path))


@pytest.mark.slow
def test_a_run_in_use_is_refused(finished, tmp_path):
    holder = RunDirectory(finished.path)
    holder.lock()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "crate_fast", "train", "--resume", str(finished.path)],
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    finally:
        unlock()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"crate-fast: error: {finished.path}: a run that is not over is in it"
    train(SMALL, resume=str(finished.path))  # and it is free again


def test_resume_names_what_it_needs(finished, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--out is not given"):
        train(SMALL, resume="auto")
    with pytest.raises(ConfigError, match="absent, which is not there"):
        train(SMALL, resume=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="neither a run directory nor a checkpoint"):
        train(SMALL, resume=str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="give --out DIR"):
        train(SMALL)


@pytest.mark.parametrize(("switch", "expected"), [("0", None), ("1", "auto"), ("some/run", "some/run")])
def test_resume_of_the_published_scripts(monkeypatch, switch, expected):
    seen = {}
    monkeypatch.setattr("crate_fast.training.train", lambda config, **options: seen.update(options) or (None, None))
    for command in ("train", "finetune"):
        assert main([command, "--resume", switch, "--out", "there"]) == 0
        assert seen["resume"] == expected


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"lr": 0.001', '"lr": 0.002', "lr is 0.002; the run's checkpoints were written with 0.001"),
        ('"seed": 0', '"seed": 1', "seed is 1"),
        ('"dim": 16', '"dim": 17', "dim is 17"),
        ('"precision": "float32"', '"precision": "float16"', "precision is 'float16'"),
        ('"config": {', '"config": [{', "not the configuration of a run"),
        ('"data": {', '"data": ' + "[" * 100_000, "not the configuration of a run"),
        ('"data": {"', '"data": 3, "x": {"', "not the configuration of a run"),
        ('"epochs": 4', '"epochs": 1' + 5000 * "0", "not the configuration of a run"),
    ],
)
def test_a_changed_configuration_is_refused(finished, tmp_path, before, after, words):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    text = json.dumps(json.loads(run.config.read_text()))
    assert before in text
    run.config.write_text(text.replace(before, after))
    kept = contents(run)
    with pytest.raises(ConfigError, match=re.escape(str(run.config)) + f": .*{re.escape(words)}"):
        train(SMALL, resume=str(run.path))
    assert contents(run) == kept


def test_metrics_shorter_than_the_checkpoint_are_refused(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="shorter than at the last checkpoint"):
        train(SMALL, resume=str(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: missing"):
        train(SMALL, resume=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["circumstances"]["ranks"] == 1
    assert re.fullmatch("[0-9a-f]{16}", config["circumstances"]["kernels"])
