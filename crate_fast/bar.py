"""A bar on a terminal that is one row of it, however wide the terminal gets."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

# One estimate, and no more columns than a terminal of 80 has.
FORMAT = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
COLUMNS = 79
LEAST = 8  # columns of the bar itself, for which words make room


class Bar(tqdm):
    """How many of `total` are done, on stderr where that is a terminal; `hide`: in no case.

    The cursor waits where the row begins. A terminal that gets narrower cuts the row off, or breaks it into several and keeps
    the cursor at the first: in both cases what is drawn next begins where the row did, and erases all that has become of it.
    That is done as soon as the terminal's width changes.
    """

    words: tuple[str, ...] = ()  # what else there is to say, the least important last

    def __init__(self, total: int, initial: int = 0, hide: bool = False) -> None:
        self._process, self._before = os.getpid(), None
        hidden = True if hide else None  # None: unless it is a terminal
        super().__init__(total=total, initial=initial, disable=hidden, bar_format=FORMAT, ncols=columns(), file=sys.stderr)
        if not self.disable:
            self._listen()

    def say(self, *words: str) -> None:
        """Draws the bar with `words`, as many as there is room for."""
        self.words = words
        self.refresh()

    def tell(self, line: str, stream: TextIO) -> None:
        """Prints `line` above the bar: it has arrived when the bar is drawn again, and a log's reader need not wait for it."""
        with self.external_write_mode(stream):
            print(line, file=stream, flush=True)

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGWINCH, self._before)
            self._before = None
        super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws from, with the words that fit."""
        self.ncols, words = columns(), self.words
        values: dict[str, Any] = dict(super().format_dict)
        least: dict[str, Any] = values | {"ncols": None, "bar_format": FORMAT.replace("{bar}", LEAST * "#")}
        while words and self._length({**least, "postfix": ", ".join(words)}) > self.ncols:
            words = words[:-1]
        return values | {"postfix": ", ".join(words)}

    def _length(self, values: dict[str, Any]) -> int:
        return len(self.format_meter(**values))

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def draw(text: str) -> None:
            file.write(row(text))
            file.flush()

        return draw

    def _listen(self) -> None:
        """Hears of the terminal's new widths from here on, if this may."""
        if hasattr(signal, "SIGWINCH") and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGWINCH)
            if before is not None:  # None: of somebody who is not Python, and could not be given it back
                self._before = signal.signal(signal.SIGWINCH, self._resized)
                signal.siginterrupt(signal.SIGWINCH, False)  # what waits in C is not to end for it

    def _resized(self, number: int, frame: FrameType | None) -> None:
        """Draws the bar anew, past Python's own buffers, in which this may have interrupted a write."""
        if os.getpid() == self._process and not self.disable:  # a process that was forked hears of it too
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), row(str(self)).encode(sys.stderr.encoding, "replace"))
        if callable(self._before):
            self._before(number, frame)


def row(text: str) -> str:
    """What draws `text` in place of the row at whose beginning the cursor is, and leaves it there."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return f"\r{text:{columns()}}\r"
    return f"\r{text}\x1b[J\r"


def columns() -> int:
    """How wide a bar is: a line that reached a terminal's last column would be broken by many."""
    width = 0
    with suppress(OSError, ValueError, AttributeError):
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    return max(1, min(COLUMNS, (width or shutil.get_terminal_size().columns) - 1))
