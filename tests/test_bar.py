"""The bar on a terminal, whose width may change."""

import os
import re
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
import torch
from helpers.terminal import Terminal

from crate_fast.settings import TrainConfig
from crate_fast.training.metrics import Meter, Score
from crate_fast.training.progress import Progress, Sums

WIDTHS = (60, 100, 40, 80, 25, 200, 61)


@pytest.fixture(params=[True, False], ids=["reflows", "cuts"])
def terminal(request, monkeypatch):
    """One of 120 columns."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal = Terminal(120, request.param)
    yield terminal
    terminal.close()


@contextmanager
def shown_on(terminal):
    """Both streams are; stdout keeps what it is given until it is flushed."""
    stdout = os.dup(terminal.stream.fileno())
    with (
        open(stdout, "w", buffering=8192, encoding="utf-8") as kept,
        redirect_stdout(kept),
        redirect_stderr(terminal.stream),
    ):
        yield


def is_bar(row, columns):
    return len(row) < min(80, columns) and re.match(r" *\d+% .+ *\d+/500, (\S+ left(, (\S+ \S+))*)?", row)


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_a_terminal_of_another_width_shows_one_bar_and_all_lines(terminal, told):
    """At once where the process is told of the width, else when the bar is drawn next."""
    lines = []
    with shown_on(terminal), Progress(TrainConfig(log_every=1), 500, 10, 0, first=True) as progress:
        for step, columns in enumerate([120, *WIDTHS], start=1):
            terminal.resize(columns)
            if told and step > 1:
                os.kill(os.getpid(), signal.SIGWINCH)
                *above, bar = terminal.rows()
                assert is_bar(bar, columns) and (above == lines or not terminal.reflows), above
            progress.step(step, Sums)
            progress.trained(step, Sums.of(step, 1.0, 0.1, Score(1.23456, 1, 1, 2)), 123456.0)
            *above, bar = terminal.rows()
            assert is_bar(bar, columns) and above == lines
            progress.tested(Score(1.0, 1, 1, 1), f"epoch {step}")
            lines.append(f"epoch {step}")
    *above, bar, end = terminal.rows()
    assert above == lines and is_bar(bar, columns) and end == ""


def test_a_bar_tells_of_an_evaluation_while_it_lasts(terminal, monkeypatch):
    monkeypatch.setattr("crate_fast.training.progress.REDRAWN", 0.0)
    with shown_on(terminal), Progress(TrainConfig(), 500, 10, 0, first=True) as progress:
        progress.step(1, Sums)
        progress.trained(1, Sums.of(1, 1.0, 0.1, Score(1.23456, 1, 1, 2)), 3.0)
        evaluated = progress.testing(7)
        for place in (1, 2):
            evaluated(Meter(torch.device("cpu")))
            assert terminal.rows()[-1].endswith(f"left, evaluating {place} of 7")
        progress.tested(Score(1.0, 1, 1, 1), None)
        assert terminal.rows()[-1].endswith("left, loss 1.235, top-1 50.0%, 3 images/s")
