"""What a run shows beside its metrics."""

import errno
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from helpers.pictures import make_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, load_checkpoint
from crate_fast.data.digits import Digits
from crate_fast.device import Compute
from crate_fast.inspection import measure_layers
from crate_fast.processes import ALONE
from crate_fast.training import TrainConfig, data_wait
from crate_fast.training.monitor import peak_flops, training_flops

SMALL = ["--epochs", "2", "--num-threads", "1", "--device", "cpu", "--dim", "16", "--depth", "1", "--heads", "1"]


def test_a_run_is_watched(tmp_path, capsys):
    watched = ("--tensorboard", "--profile", "--peak-tflops", "0.5", "--log-every", "5")
    words = ["train", *SMALL, *watched, "--out", tmp_path / "run"]
    status, _, err = call(capsys, *words)
    assert (status, "no trace" in err) == (0, False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for split in ("train", "test"):
        found = [(event.step, event.value) for event in events.Scalars(f"{split}/loss")]
        assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows if row["split"] == split]
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = sorted(event["name"] for event in trace if event["name"].startswith("ProfilerStep#"))
    assert steps == ["ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"]
    assert {"aten::addmm", "Optimizer.step#Lion.step"} <= {event["name"] for event in trace if event["ph"] == "X"}
    flops = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]["training_flops"]
    for row in rows:
        if row["split"] == "train":
            assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / 5e11, rel=1e-2)
    status, _, err = call(capsys, "train", *SMALL, "--batch-size", "719", "--profile", "--out", tmp_path / "short")
    assert (status, "no trace: --profile needs 8 steps" in err) == (0, True)
    assert "mfu" not in (tmp_path / "short" / "metrics.jsonl").read_text()  # nobody has said what the peak is


@pytest.mark.parametrize("late", [-1.0, 1.0])
def test_input_that_cannot_keep_up_is_told_once(tmp_path, capsys, monkeypatch, late):
    """Whatever the machine does meanwhile, none of the time is too much waiting, or all of it would not be."""
    folder = make_folder(tmp_path / "folder", train=24, val=3)
    monkeypatch.setattr(data_wait, "WINDOW", 0.0)
    monkeypatch.setattr(data_wait, "LATE", late)
    words = ["train", "--data", folder, *SMALL, "--image-size", 8, "--patch-size", 4, "--log-every", 1, "--batch-size", 8]
    status, _, err = call(capsys, *words, "--workers", 0, "--out", tmp_path / "run")
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if 0 < row.get("waiting", 0) < 1]) == 6
    line = (
        r"crate-fast: warning: \d+% of the time was spent waiting for data; what helps: more --workers \(now 0; \d+ cores are "
        rf"here\), or packs: crate-fast prepare imagenet {folder} DST, then train --data DST \(docs/data\.md\)\n"
    )
    assert re.fullmatch(line if late < 0 else "", err), err


def test_waiting_is_told_where_it_is_a_tenth_of_ten_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(data_wait.time, "perf_counter", lambda: clock[0])
    times = data_wait.DataWait(torch.device("cpu"), "patience")

    def wait(seconds: float) -> None:
        with times:
            clock[0] += seconds

    told = []
    for seconds in (5.0, 0.4, 0.4, 0.5, 0.7, 3.0, 3.0):  # the first while processes start, the next in time
        wait(seconds)
        share, line = times.read(6.0)
        assert share == pytest.approx(seconds / 6)
        told.append(line)
    assert told == [None] * 4 + ["10% of the time was spent waiting for data; what helps: patience (docs/data.md)"] + [None] * 2


def test_on_a_gpu_the_devices_own_pauses_count(monkeypatch):
    """The host waits for 4 s twice; the device is busy until 1 s and 9 s, and so stands still for 3 s and then not at all."""
    reached = iter([1000.0, 4000.0, 9000.0, 9000.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "the stream of cuda:1"
            self.at = next(reached)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    times = data_wait.DataWait(torch.device("cuda:1"), "patience")
    for _ in range(2):
        with times:
            pass
    assert times.read(10.0) == (pytest.approx(0.3), None)
    assert times.read(10.0) == (0.0, None)


def test_flops_are_those_of_the_products():
    model = CRATE(image_size=32, patch_size=8, num_classes=7, dim=48, depth=2, heads=3, dim_head=16, backend="reference")
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(1, 3, 32, 32))
    ista = 2 * 17 * 48 * 48 * 2  # of one product in both layers; the published code makes three of it
    assert training_flops(model) == 3 * (counted.get_total_flops() - 2 * ista)


def test_only_known_peaks_are_taken():
    compute = SimpleNamespace(device=torch.device("cuda"), precision="bfloat16", describe=lambda: "NVIDIA H100 80GB HBM3")
    assert peak_flops(TrainConfig(), compute) == 989e12
    compute.describe = lambda: "NVIDIA H100 PCIe"
    assert peak_flops(TrainConfig(), compute) == 756e12
    compute.describe = lambda: "NVIDIA GeForce GTX 1080"
    assert peak_flops(TrainConfig(), compute) is None
    assert peak_flops(TrainConfig(peak_tflops=2.0), compute) == 2e12
    assert peak_flops(TrainConfig(), Compute(torch.device("cpu"), "float32")) is None


@pytest.mark.parametrize("good", [0, 1, 5])  # records before the disk is full
def test_a_disk_that_is_full_for_tensorboard_is_told_in_a_line(tmp_path, capsys, monkeypatch, good):
    write, written = RecordWriter.write, []

    def full(writer, data):
        written.append(data)
        if len(written) > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    status, _, err = call(capsys, "train", *SMALL, "--tensorboard", "--log-every", "5", "--out", tmp_path / "run")
    start = f"crate-fast: error: {tmp_path / 'run' / 'tensorboard'} cannot be written (No space left on device); "
    assert (status, err.startswith(start), err.count("\n")) == (2, True, 1), err


def test_files_of_a_run_that_do_not_fit_on_the_disk_are_named(tmp_path, capsys, monkeypatch):
    flush = os.fsync

    def full(descriptor):
        if "metrics" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = call(capsys, "train", *SMALL, "--out", tmp_path / "run")
    assert (status, err.count("\n"), str(tmp_path / "run" / "metrics.jsonl") in err) == (2, 1, True), err


def test_rates_are_those_that_inspect_measures_and_move_no_bit_of_the_run(tmp_path, capsys):
    small = [word if word != "1" or flag != "--depth" else "2" for flag, word in zip(["", *SMALL], SMALL, strict=False)]
    for name, flags in (("plain", []), ("watched", ["--watch-rates", "--tensorboard"])):
        status, _, err = call(capsys, "train", *small, *flags, "--out", tmp_path / name)
        assert (status, err) == (0, "")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "watched")]
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    tests = [row for row in rows if row["split"] == "test"]
    images = Digits((16, 16), torch.device("cpu")).test_batches(32, ALONE)
    measures = measure_layers(load_checkpoint(tmp_path / "watched"), next(images)[0])
    events = EventAccumulator(str(tmp_path / "watched" / "tensorboard")).Reload()
    for name, values in measures._asdict().items():
        assert tests[-1][name] == pytest.approx(values.mean(dim=1).tolist())
        assert [event.value for event in events.Scalars(f"test/{name}/layer-02")] == pytest.approx(
            [row[name][1] for row in tests]
        )
    assert (tmp_path / "watched" / "rates.png").stat().st_size > 10_000
    assert not (tmp_path / "plain" / "rates.png").exists()
    status, _, err = call(capsys, "train", *small, "--watch-rates", "--strategy", "fsdp", "--out", tmp_path / "parts")
    assert (status, "--watch-rates is 'yes' and --strategy is 'fsdp'" in err) == (2, True)
