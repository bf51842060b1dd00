"""Whether data come in time: how long the device had nothing to do for want of them, and what to do about it."""

from __future__ import annotations

import time
from typing import Any

import torch

LATE = 0.1  # part of the time; more of it is told
WINDOW = 10.0  # seconds that are looked at together


class DataWait:
    """While entered, data are waited for; `read` tells how long.

    On a GPU what was launched goes on while the host waits, often for long: there it is the device's own pause that counts,
    from the end of what was launched before to the arrival of the data.

    Args:
        device: what computes.
        advice: what to do where data are late; None: nothing can be done.
    """

    def __init__(self, device: torch.device, advice: str | None) -> None:
        self._advice, self._pauses, self._seconds = advice, [], 0.0
        self._device, self._is_gpu = device, device.type == "cuda"
        self._begun, self._window, self._late = False, 0.0, 0.0

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_) -> None:
        if self._is_gpu:
            self._pauses.append((self._start, self._now()))
        else:
            self._seconds += self._now() - self._start

    def waited(self) -> float:
        """Seconds in which data were waited for since `read`; the device must have come to the end of what was launched."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._pauses) / 1000

    def read(self, seconds: float) -> tuple[float, str | None]:
        """The part of the last `seconds`, since it was read before, in which data were waited for, and a line to tell, once.

        The device must have come to the end of what was launched.
        """
        waited = self.waited()
        self._pauses, self._seconds = [], 0.0
        line = self._complain(waited, seconds) if self._begun else None  # processes start before the first line
        self._begun = True
        return waited / seconds, line

    def _complain(self, waited: float, seconds: float) -> str | None:
        self._window, self._late = self._window + seconds, self._late + waited
        if self._window < WINDOW or self._advice is None:
            return None
        part, self._window, self._late = self._late / self._window, 0.0, 0.0
        if part <= LATE:
            return None
        advice, self._advice = self._advice, None
        return f"{part:.0%} of the time was spent waiting for data; what helps: {advice} (docs/data.md)"

    def _now(self) -> Any:
        """Seconds, or on a GPU an event."""
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # the current device may be another
        return event
