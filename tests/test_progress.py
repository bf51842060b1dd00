"""What a run prints of its progress, for people and for what reads logs of the published main.py."""

import json
import re

import pytest
from conftest import call

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
