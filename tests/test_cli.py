"""The command line, in process and as a process."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

import matplotlib.image
import pytest
import torch
from conftest import call
from safetensors import safe_open
from safetensors.torch import save_file

from crate_fast import CRATE, __version__
from crate_fast.checkpoint import METADATA_KEY, save_model
from crate_fast.commands.main import main

MINIATURE = [
    *("--epochs", "2", "--batch-size", "256", "--image-size", "8", "--dim", "16", "--depth", "1"),
    *("--heads", "1", "--dim-head", "16", "--device", "cpu", "--num-threads", "1"),
]


def process(*argv):
    """The finished process `python -m crate_fast argv`."""
    command = [sys.executable, "-m", "crate_fast", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a miniature run."""
    path = tmp_path_factory.mktemp("cli") / "run"
    torch.set_num_threads(2)
    assert main(["train", *MINIATURE, "--out", str(path)]) == 0
    return path


def test_train_fills_a_run_directory(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "model.safetensors"}
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names >= {"last.pt", "best.pt", "step-00000010.pt"}
    assert json.loads((run / "config.json").read_text())["config"]["batch_size"] == 256
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert all({"step", "epoch", "split", "loss", "top1"} <= set(row) for row in rows)
    assert min(matplotlib.image.imread(run / "curves.png").shape[:2]) > 400


@pytest.mark.parametrize("name", ["", "model.safetensors", "checkpoints/last.pt"])
def test_evaluate_prints_what_was_logged(run, capsys, name):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    status, out, err = call(capsys, "evaluate", run / name)
    expected = f"test top-1 {last['top1']:.2%} ({last['correct']} of 360), top-5 {last['top5']:.2%}, loss {last['loss']:.4f}\n"
    assert (status, out, err) == (0, expected, "")


def test_a_run_is_what_another_starts_from(run, capsys, tmp_path):
    status, out, err = call(capsys, "train", *MINIATURE, "--epochs", "1", "--init", run, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert f"{run}: 14 weights loaded; new: the head (4)" in out


def test_a_file_that_says_its_size_is_no_other(run, capsys):
    assert_refused(call(capsys, "evaluate", run, "--arch", "CRATE_base"), "--arch is CRATE_base", "dim 16, depth 1, heads 1")


def test_train_prints_where_and_how_well(capsys, tmp_path):
    status, out, err = call(capsys, "train", *MINIATURE, "--epochs", "1", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith(f"run directory {tmp_path / 'run'}")
    assert re.fullmatch(r"test top-1 \d+\.\d\d% \(\d+ of 360\), top-5 \d+\.\d\d%, loss \d+\.\d{4}", lines[-2])
    assert lines[-1] == f"evaluate it again with: crate-fast evaluate {tmp_path / 'run'}"


def test_version_and_help(capsys):
    assert call(capsys, "--version") == (0, f"crate-fast {__version__}\n", "")
    for arguments in ([], ["train"], ["evaluate"]):
        status, out, err = call(capsys, *arguments, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(" ".join(["usage: crate-fast", *arguments]))


WRONG = [
    "",
    "frobnicate",
    "--vers train",
    "train extra",
    "train --epoch 1",
    "train --epochs",
    "train --epochs 0",
    "train --epochs 1.5",
    "train --epochs 99999999999999999999",
    "train --lr nan",
    "train --lr -1",
    "train --lr 1e300",
    "train --seed -1",
    "train --dropout 1",
    "train --pool max",
    "train --precision int8",
    "train --backend cuda",
    "train --backend triton --dim-head 8",
    "train --device gpu",
    "train --device cuda:77",
    "train --image-size 16 --patch-size 5",
    "train --batch-size 1438",
    "train --dim 99999999999999999999",
    "train --num-threads 100000",
    "train --checkpoint-every 0",
    "train --out {run}",
    "train --out {run}/config.json",
    "train --out {run}/config.json/below",
    "evaluate",
    "evaluate {run} {run}",
    "evaluate {run} --devic cpu",
    "evaluate {run} --device nowhere",
    "evaluate {run} --batch-size 0",
    "evaluate {run} --batch-size -3",
    "evaluate {run} --precision half",
    "evaluate {run}/nothing",
    "evaluate {run}/checkpoints",
    "evaluate {run}/curves.png",
    "evaluate {run}/metrics.jsonl",
]


def assert_refused(result, *words) -> None:
    """`result` is that of a user error: status 2 and one line that has all of `words`."""
    status, _, err = result
    assert status == 2
    assert re.fullmatch(r"crate-fast[^\n]*: [^\n]+\n", err), err
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(run, capsys, line):
    words = line.format(run=run).split()
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    result = call(capsys, *words)
    assert_refused(result)
    assert result[1] == ""
    culprits = [word.lstrip("-") for word in words if word.startswith("--")] or words[1:] or words or ["SUBCOMMAND"]
    assert any(culprit in result[2] for culprit in culprits)
    assert sorted(run.rglob("*")) == before


def test_line_breaks_in_arguments_stay_one_line(run, capsys, tmp_path):
    assert_refused(call(capsys, "train", "a\nb"), "a b")
    assert_refused(call(capsys, "evaluate", tmp_path / "a\nb"), "No such file")


def test_model_of_something_else(capsys, tmp_path):
    save_model(CRATE(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, dim_head=8), tmp_path / "file")
    assert_refused(call(capsys, "evaluate", tmp_path / "file"), "3 channels", "3 classes", str(tmp_path / "file"))


@pytest.mark.parametrize("change", [{"ista": "x"}, {"lambd": None}, {"ista": float("nan")}, {"dim": 10**30}, {"depth": 10**9}])
def test_false_metadata(run, capsys, tmp_path, change):
    with safe_open(run / "model.safetensors", framework="pt") as file:
        arguments, weights = (
            json.loads(file.metadata()[METADATA_KEY]),
            {key: file.get_tensor(key) for key in file.offset_keys()},
        )
    del arguments["digest"]
    save_file(weights, tmp_path / "file", {METADATA_KEY: json.dumps(arguments | change)})
    assert_refused(call(capsys, "evaluate", tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/last.pt"])
def test_truncated_file(run, capsys, tmp_path, name):
    content = (run / name).read_bytes()
    (tmp_path / "file").write_bytes(content[: len(content) // 2])
    assert_refused(call(capsys, "evaluate", tmp_path / "file"), f"{tmp_path / 'file'}: damaged")


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.slow
def test_hostile_pickle_is_not_executed(tmp_path):
    pickled = pickle.dumps({"arguments": {}, "model": Hostile(tmp_path / "marker")}, protocol=4)
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    done = process("evaluate", tmp_path / "file")
    assert not (tmp_path / "marker").exists()
    assert_refused((done.returncode, done.stdout, done.stderr), f"{tmp_path / 'file'}: damaged")
    pickle.loads(pickled)
    assert (tmp_path / "marker").exists()


def test_out_of_memory_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    too_large = ["train", "--dim", "1000000", "--dim-head", "1000000", "--out", tmp_path / "run"]
    assert_refused(call(capsys, *too_large), "it must have at most 10,000,000,000")
    monkeypatch.setattr("crate_fast.training.run.open_data", full)
    assert_refused(call(capsys, "train", "--out", tmp_path / "run"), "out of memory")
    assert not (tmp_path / "run").exists()


def test_interruption(run, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("crate_fast.training.evaluation.evaluate_run", interrupted)
    assert call(capsys, "evaluate", run) == (130, "", "crate-fast: interrupted\n")


def test_other_errors_are_not_hidden(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("crate_fast.training.evaluation.evaluate_run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["evaluate", str(run)])


@pytest.mark.slow
def test_as_a_process(run):
    done = process("evaluate", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"test top-1 [^\n]+\n", done.stdout)
