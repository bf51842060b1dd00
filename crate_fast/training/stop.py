"""Leaving on a signal: SIGTERM, SIGUSR1 (as Slurm sends before it preempts) and Ctrl-C save and end the run."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from .ranks import Ranks

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
GRACE = {True: 25.0, False: 10.0}  # seconds to reach the end of a step; the first process, which saves, has more


class Stopped(Exception):
    """A signal ended the run; `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number


class Signals:
    """While entered, remembers the first signal in `received`; the second Ctrl-C interrupts at once.

    A process that is caught in a sum over processes some of which are gone cannot come to the end of its step. So a process
    that got a signal leaves after its grace by itself, with the signal's status.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.received: int | None = None
        self.grace = GRACE[ranks.first]
        self._before: dict = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        self._timer = threading.Timer(self.grace, os._exit, (128 + number,))
        self._timer.daemon = True
        self._timer.start()


def leave_signals_to_the_run() -> None:
    """In a process that only reads images: signals are for the run's process to act on. A scheduler sends SIGTERM to every
    process, and the run wants images until its step is at an end; so that ends this one only when the run has had its time."""
    for number in SIGNALS:
        signal.signal(number, _leave_last if number == signal.SIGTERM else signal.SIG_IGN)


def _leave_last(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(max(GRACE.values()), os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
