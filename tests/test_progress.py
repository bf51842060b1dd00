"""What a run prints of its progress, for people and for what reads logs of the published main.py."""

import json
import re
from itertools import pairwise

import pytest
import torch
from conftest import call

from crate_fast.settings import TrainConfig
from crate_fast.training import progress
from crate_fast.training.metrics import Meter, Score
from crate_fast.training.progress import Progress, Sums

NUMBER = r"\s*[-+.e\d]+"


def reader(start, *names):
    """What people look for in main.py's logs: the place, in as many columns as the number of places, values and means."""
    fields = "".join(rf"\t{name} ({NUMBER}) \(({NUMBER})\)" for name in names)
    return re.compile(rf"{start}\[([ \d]+)/(\d+)\]{fields}")


EPOCH = reader(r"Epoch: \[(\d+)\]", "Time", "Data", "Loss", "Acc@1", "Acc@5")
TEST = reader("Test: ", "Time", "Loss", "Acc@1", "Acc@5")
SUMMARY = re.compile(r" \*   Acc@1 ([.\d]+) Acc@5 ([.\d]+)")
SMALL = ["--dim", 16, "--depth", 1, "--heads", 1, "--dim-head", 16, "--device", "cpu", "--num-threads", 1, "--epochs", 2]


def run_printing(capsys, folder, every):
    """(lines, rows of metrics in training, in evaluation) of a run with --print-freq."""
    status, out, error = call(capsys, "train", *SMALL, "--print-freq", every, "--out", folder)
    assert (status, error) == (0, "")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return out.splitlines(), *([row for row in rows if row["split"] == split] for split in ("train", "test"))


def found(expression, lines):
    return [match.groups() for match in map(expression.fullmatch, lines) if match]


def test_lines_are_those_of_the_published_script(tmp_path, capsys):
    lines, trained, tested = run_printing(capsys, tmp_path / "run", 1)
    epochs, tests, steps = found(EPOCH, lines), found(TEST, lines), trained[-1]["step"] // 2
    assert [(int(e), i, n) for e, i, n, *_ in epochs] == [
        (row["epoch"] - 1, f"{row['step'] - (row['epoch'] - 1) * steps:2d}", str(steps)) for row in trained
    ]
    for line, row in zip(epochs, trained, strict=True):
        since = [one for one in trained if one["epoch"] == row["epoch"] and one["step"] <= row["step"]]
        images = sum(one["count"] for one in since)
        assert float(line[7]) == pytest.approx(row["loss"], rel=1e-3)
        assert [float(line[9]), float(line[11])] == pytest.approx([100 * row["top1"], 100 * row["top5"]], abs=0.006)
        assert float(line[10]) == pytest.approx(100 * sum(one["correct"] for one in since) / images, abs=0.006)
        assert 0 <= float(line[5]) <= float(line[3]) + 0.001  # seconds a step, of them for images
    assert [line[:2] for line in tests] == 2 * [("1", "3"), ("2", "3"), ("3", "3")]
    for end, row in zip((tests[2], tests[5]), tested, strict=True):
        assert [float(end[i]) for i in (5, 7, 9)] == pytest.approx(
            [row["loss"], 100 * row["top1"], 100 * row["top5"]], abs=0.006
        )
    assert [float(top1) for top1, _ in found(SUMMARY, lines)] == pytest.approx([100 * row["top1"] for row in tested], abs=6e-4)


def test_lines_come_at_the_published_scripts_steps(tmp_path, capsys):
    """Counted from each epoch's beginning and each evaluation's, the first step among them."""
    every_line, few_lines = (run_printing(capsys, tmp_path / str(every), every)[0] for every in (1, 4))
    kept = [line for line in found(EPOCH, every_line) if line[1].strip() in ("1", "5", "9")]
    few = found(EPOCH, few_lines)
    means = [[line[i] for i in (0, 1, 2, 8, 10, 12)] for line in kept]
    assert means == [[line[i] for i in (0, 1, 2, 8, 10, 12)] for line in few] and len(few) == 6
    assert [line[:2] for line in found(TEST, few_lines)] == 2 * [("1", "3")]
    status, out, _ = call(
        capsys, "train", "--evaluate", "--resume", tmp_path / "4", "-p", 2, "--batch-size", 100, "--device", "cpu"
    )
    tests = found(TEST, out.splitlines())
    assert (status, [line[:2] for line in tests], len(found(SUMMARY, out.splitlines()))) == (0, [("1", "4"), ("3", "4")], 1)


class Clock:
    """Seconds that pass only as a test says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "clock", clock)
    return clock


def lines_of(capsys, clock, seconds, acts):
    """(time, line) of what each act, `seconds` long, printed."""
    said = []
    for act in acts:
        clock.now += seconds
        act()
        said += [(clock.now, line) for line in capsys.readouterr().out.splitlines()]
    return said


@pytest.mark.parametrize("seconds", [0.7, 25.0, 60.0, 95.0])
def test_a_log_is_silent_for_a_minute_at_most_and_the_step_that_ends_it(capsys, clock, seconds):
    """In training and in evaluation, however seldom metrics are written."""
    steps, batches = 600, 300
    settings, meter = TrainConfig(log_every=10**6), Meter(torch.device("cpu"))
    with Progress(settings, steps, steps, 0, first=True) as told:
        sums = [Sums.of(step, seconds * step, 0.0, Score(2.5, step, 2 * step, 4 * step)) for step in range(steps + 1)]
        training = [lambda step=step: told.step(step, lambda: sums[step]) for step in range(1, steps + 1)]
        evaluated = told.testing(batches)
        said = lines_of(capsys, clock, seconds, [*training, *batches * [lambda: evaluated(meter)]])
    times = [0.0, *(when for when, _ in said), clock.now]
    pauses = [after - before for before, after in pairwise(times)]
    assert max(pauses) < progress.EVERY + seconds and min(pauses[:-1]) >= progress.EVERY
    texts = [line for _, line in said]
    for line in texts[:4]:
        place, _, left = found(EPOCH, [line.rpartition("\t")[0]])[0][1], *line.rpartition("\t")[1:]
        assert re.fullmatch(r"(\d+ days?, )?\d+:\d\d:\d\d left", left) and 1 <= int(place) <= steps
        assert "Loss 2.5000e+00 (2.5000e+00)\tAcc@1  25.00 ( 25.00)\tAcc@5  50.00" in line
    assert re.fullmatch(rf"evaluating: \d+ of {batches} batches, (\d days?, )?\d+:\d\d:\d\d left", texts[-1])


def test_a_run_says_where_it_is_between_lines_of_metrics(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(Clock, "__call__", lambda self: setattr(self, "now", self.now + 25.0) or self.now)
    status, out, _ = call(capsys, "train", *SMALL, "--log-every", 1000, "--out", tmp_path / "run")
    rows = [json.loads(line)["split"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    places = [line[1] for line in found(EPOCH, [line.rpartition("\t")[0] for line in out.splitlines()])]
    assert (status, rows) == (0, 2 * ["train", "test"]) and len(places) > 6 and places[0] != "11"
    assert "evaluating: " in out
    status, out, error = call(capsys, "evaluate", tmp_path / "run", "--batch-size", 20, "--device", "cpu")
    assert (status, out.count("\n")) == (0, 1)  # what reads it finds the score alone
    assert re.match(r"crate-fast: evaluating: \d+ of 18 batches, \d+:\d\d:\d\d left\n", error)


def test_other_processes_than_the_first_say_nothing(capsys, clock):
    with Progress(TrainConfig(print_log=True), 9, 9, 0, first=False) as told:
        evaluated = told.testing(9)
        acts = [
            lambda: told.step(1, Sums),
            lambda: evaluated(Meter(torch.device("cpu"))),
            lambda: told.tested(Score(1.0, 1, 1, 1), ""),
        ]
        assert lines_of(capsys, clock, 100.0, acts) == []
    assert capsys.readouterr().err == ""
