"""Leaving on a signal: SIGTERM, SIGHUP, SIGUSR1 (as Slurm sends before it preempts) and Ctrl-C save and end the run."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from .files import as_bytes

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT") if hasattr(signal, name))
PROMPT = 3.0  # seconds in which Python must have heard of a signal that ends a process which has nothing to save
AGAIN = 1.0  # seconds between Ctrl-C and one that is meant as another: torchrun passes on what a terminal has sent to all
LONGEST_STEP = 600.0  # seconds that a process which reads images stays after SIGTERM, for the step that wants them


BEFORE = "stopped by signal {} before the first step"


class Stopped(Exception):
    """A signal ended the run; `status` is the exit status, 128 + the signal's number. Without a message where another process
    says so."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number


class Signals:
    """While entered, remembers the first signal in `received`, says so at once, and leaves it to the run to save and end.

    Before `training` is set there is nothing to save: the first signal raises `Stopped`, or ends a process that waits outside
    of Python, as for other processes. Afterwards nothing ends a process between two steps but a second Ctrl-C. A signal is
    told, and the second obeyed, by a thread that the interpreter writes to where it is interrupted: its own handlers wait for
    the end of what is computed outside of Python, such as a backward pass.
    A signal that is ignored when this is entered (nohup, a shell's background) stays ignored.

    Args:
        tell: whether this process says what it does.
    """

    def __init__(self, tell: bool) -> None:
        self.received: int | None = None
        self.training = self._heard = False
        self._tell = tell
        self._before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            reader, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._receive) for number in heard}
            if hasattr(signal, "SIGCHLD") and (handler := signal.getsignal(signal.SIGCHLD)) is not None:
                self._before[signal.SIGCHLD] = handler
            self._listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._pipe, b"\0")  # closing it is not enough: processes that were forked have it too
            self._listener.join()
            os.close(self._pipe)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number  # the listener may be later than the end of the step
        self._heard = True
        if not self.training:
            raise Stopped(number, BEFORE.format(number))

    def _listen(self, reader: int) -> None:
        """Acts on signals as they come, until there comes a 0."""
        first = None
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1)[0]:
                if number not in SIGNALS:  # others have handlers too
                    continue
                if first is None:
                    self.received, first = number, time.monotonic()
                    self._say(f"{signal.Signals(number).name}: stopping after this step; again to stop now, unsaved")
                    if not self.training:
                        timer = threading.Timer(PROMPT, self._leave_unheard, (number,))
                        timer.daemon = True
                        timer.start()
                elif number == signal.SIGINT and time.monotonic() - first > AGAIN:
                    self._say("stopped at once; what was not saved is lost")
                    os._exit(128 + number)

    def _leave_unheard(self, number: int) -> None:
        """Ends a process with nothing to save, whose main thread does not come back to Python to hear that it is to end."""
        if not (self._heard or self.training):
            _write(f"crate-fast: {BEFORE.format(number)}\n", self._tell)
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        _write(f"crate-fast: {text}\n", self._tell and self.training)


def _write(text: str, tell: bool) -> None:
    """Writes a line, if this process tells anything."""
    with suppress(OSError):  # nobody reads it
        if tell:
            over = f"\r{text[:-1]:79}\n" if os.isatty(2) else text  # a bar may be there, and the cursor where it begins
            os.write(2, as_bytes(over))


def hear_of_no_process() -> None:
    """Nothing is interrupted any more because a process that was started has ended. `Signals` undoes it."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave_signals_to_the_run() -> None:
    """In a process that only reads images: signals are for the run's process to act on. A scheduler sends SIGTERM to every
    process, and the run wants images until its step is at an end; so that ends this one only when the run has had its time."""
    for number in SIGNALS:
        signal.signal(number, _leave_last if number == signal.SIGTERM else signal.SIG_IGN)


def _leave_last(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(LONGEST_STEP, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _hear_nothing() -> None:
    """In a process that was forked: what interrupts it is not told to the one it comes from."""
    signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hear_nothing)
