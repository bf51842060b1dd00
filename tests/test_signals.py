"""Signals are told at once, saved after the step they come in, obeyed at the second; and a lost reader of images ends a run."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import kill
import pytest
import torch

from crate_fast.signals import Signals
from crate_fast.training import Stopped, TrainConfig, train

SMALL = TrainConfig(
    **dict(image_size=8, dim=16, depth=1, heads=1, dim_head=16, device="cpu", num_threads=1, batch_size=256, epochs=4),
    **dict(checkpoint_every=1, log_every=2, ema=0.9, mixup=0.2, dropout=0.1, accumulate=2, last_batch="keep"),
)


@pytest.mark.slow
def test_signals_end_a_process_with_their_status(tmp_path):
    statuses = {}
    for name in ("SIGUSR1", "SIGINT"):
        out = tmp_path / name
        words = ["--epochs", "500", "--dim", "16", "--depth", "1", "--out", out, "--num-threads", "1", "--device", "cpu"]
        process = subprocess.Popen(
            [sys.executable, "-m", "crate_fast", "train", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        start = time.monotonic()
        error = process.communicate(timeout=300)[1]
        assert time.monotonic() - start < 30
        statuses[name] = process.returncode
        told = f"crate-fast: {name}: stopping after this step; again to stop now, unsaved\n"
        assert re.fullmatch(
            told + r"crate-fast: stopped by signal \d+ after step \d+, saved as \S+\.pt; to go on: .* --resume [^\n]+\n",
            error,
        )
    assert statuses == {"SIGUSR1": 138, "SIGINT": 130}


def in_a_process(action) -> int:
    """The exit status, negative for a signal, of a process that is this one and does `action`."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process ignores,
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
            torch.set_num_threads(1)  # those of this process are not in its copy, which would wait for them
            action()
            status = 0
        finally:
            os._exit(status)  # whatever happens: it must not go on as a second pytest
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_signal_is_told_at_once_and_obeyed_at_the_second_ctrl_c(capfd):
    def step() -> None:
        with Signals(tell=True) as signals:
            signals.training = True
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()  # torchrun's, for the same Ctrl-C
            threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM)).start()
            threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            torch.linalg.eigvals(torch.randn(3000, 3000))  # seconds in which Python runs no handler

    assert in_a_process(step) == 128 + signal.SIGINT
    first, second = capfd.readouterr().err.splitlines()
    assert first == "crate-fast: SIGINT: stopping after this step; again to stop now, unsaved"
    assert second == "crate-fast: stopped at once; what was not saved is lost"


def test_signals_that_are_ignored_stay_so_and_a_hangup_is_one():
    def ignored() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with Signals(tell=False) as signals:
            signals.training = True
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            os._exit(signals.received or 0)

    def heard() -> None:
        with Signals(tell=False) as signals:
            signals.training = True
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            os._exit(signals.received or 0)

    assert in_a_process(ignored) == 0
    assert in_a_process(heard) == signal.SIGHUP


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("crate_fast.training.run.open_data", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped by signal 15 before the first step"):
        train(replace(SMALL, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["folder", "packed"])
def test_a_killed_reader_of_images_ends_the_run_in_a_line(tmp_path, data):
    class Killed(kill.Attempt):
        def reader(self) -> int | None:
            return next(iter(kill._descendants(self.process.pid)), None)

    attempt = Killed(kill.make_data(tmp_path, data), tmp_path / "run", 1, 2)
    attempt.wait_for("step")
    while not (reader := attempt.reader()):  # between two epochs there is none
        time.sleep(0.01)
    os.kill(reader, signal.SIGKILL)
    assert attempt.process.wait(timeout=100) == 2, attempt.log()
    told = "crate-fast: error: a process that reads images was ended from outside.*--resume goes on.*"
    assert re.fullmatch(told, attempt.log().splitlines()[-1]), attempt.log()


def test_a_signal_ends_what_waits_outside_of_python(monkeypatch, capfd):
    def waiting() -> None:
        monkeypatch.setattr("crate_fast.signals.PROMPT", 0.2)
        ones = torch.ones(6000, 6000)
        with Signals(tell=True):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            ones @ ones  # seconds in which Python runs no handler

    assert in_a_process(waiting) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "crate-fast: stopped by signal 15 before the first step\n"
