"""What a run prints of its progress, for people and for what reads logs of the published main.py."""

import json
import re

import pytest
from conftest import call

NUMBER = r"\s*[-+.e\d]+"
# What people's readers of main.py's logs look for.
LINE = re.compile(
    r"Epoch: \[(\d+)\]\[\s*(\d+)/(\d+)\]"
    + "".join(rf"\t{name} ({NUMBER}) \(({NUMBER})\)" for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))
)
SUMMARY = re.compile(r" \*   Acc@1 ([.\d]+) Acc@5 ([.\d]+)")
SMALL = ["--dim", 16, "--depth", 1, "--heads", 1, "--dim-head", 16, "--device", "cpu", "--num-threads", 1, "--epochs", 2]


def test_lines_are_those_of_the_published_script(tmp_path, capsys):
    status, out, error = call(capsys, "train", *SMALL, "--print-freq", 5, "--out", tmp_path / "run")
    assert (status, error) == (0, "")
    found = [match.groups() for match in map(LINE.fullmatch, out.splitlines()) if match]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"]
    steps = trained[-1]["step"] // 2
    assert [(int(e), int(i), int(n)) for e, i, n, *_ in found] == [
        (row["epoch"] - 1, row["step"] - (row["epoch"] - 1) * steps, steps) for row in trained
    ]
    for line, row in zip(found, trained, strict=True):
        since = [one for one in trained if one["epoch"] == row["epoch"] and one["step"] <= row["step"]]
        images = sum(one["count"] for one in since)
        assert float(line[7]) == pytest.approx(row["loss"], rel=1e-3)
        assert [float(line[9]), float(line[11])] == pytest.approx([100 * row["top1"], 100 * row["top5"]], abs=0.006)
        assert float(line[10]) == pytest.approx(100 * sum(one["correct"] for one in since) / images, abs=0.006)
        assert 0 <= float(line[5]) <= float(line[3]) + 0.001  # seconds a step, of them for images
    summaries = [match.groups() for match in map(SUMMARY.fullmatch, out.splitlines()) if match]
    tested = [row for row in rows if row["split"] == "test"]
    assert [float(top1) for top1, _ in summaries] == pytest.approx([100 * row["top1"] for row in tested], abs=6e-4)


@pytest.mark.parametrize(("every", "lines"), [(0.0, 6), (3600.0, 0)])
def test_a_log_is_not_silent_where_there_is_no_terminal(tmp_path, capsys, monkeypatch, every, lines):
    monkeypatch.setattr("crate_fast.training.progress.EVERY", every)
    status, out, _ = call(capsys, "train", *SMALL, "--log-every", 5, "--out", tmp_path / "run")
    said = [line.rpartition("\t") for line in out.splitlines() if line.startswith("Epoch:")]
    assert (status, len(said)) == (0, lines)
    assert all(LINE.fullmatch(line) and re.fullmatch(r"\d+:\d\d:\d\d left", left) for line, _, left in said)
