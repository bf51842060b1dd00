"""What a run says of its progress: a bar on a terminal, elsewhere a line a minute, or main.py's lines if they are asked for."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta
from typing import NamedTuple

from tqdm import tqdm

from ..settings import RunSettings
from .metrics import Score

# One estimate, and no more columns than a terminal of 80 has.
BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
COLUMNS = 79
EVERY = 60.0  # seconds at least from line to line where there is neither a bar nor a wish for more


class Sums(NamedTuple):
    """Over steps: how many, the seconds they took and waited for images, and what their images scored."""

    steps: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    images: float = 0.0
    loss: float = 0.0
    correct: float = 0.0
    correct5: float = 0.0

    def plus(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def values(self) -> list[float]:
        """Seconds a step, of them for images, loss, top-1 and top-5 in percent."""
        steps, images = max(1, self.steps), max(1, self.images)
        scores = self.loss / images, 100 * self.correct / images, 100 * self.correct5 / images
        return [self.seconds / steps, self.waited / steps, *scores]


FIELDS = (("Time", "6.3f"), ("Data", "6.3f"), ("Loss", ".4e"), ("Acc@1", "6.2f"), ("Acc@5", "6.2f"))
"""What a line has, by main.py's names and in its formats."""


class Progress:
    """Of a run of `steps` steps, `epoch_steps` an epoch, after `step`; only the first process says anything. With --print-freq
    or --print-log every line of training metrics is printed.

    Lines are those of the published main.py, field by field, so that what reads its logs reads these: `Epoch: [e][i/n]`, then
    each of `FIELDS` as value (mean of this epoch), tabs between. The value is that since the line before: main.py's, one
    step's, would have the host wait for the device at every step.
    """

    def __init__(self, settings: RunSettings, steps: int, epoch_steps: int, step: int, first: bool) -> None:
        self._steps, self._epoch_steps, self._first, self._all = steps, epoch_steps, first, settings.print_log
        hide = None if first else True  # None: hidden unless stderr is a terminal
        self._bar = tqdm(total=steps, initial=step, disable=hide, bar_format=BAR, ncols=columns())
        self._began, self._begun = step, time.monotonic()
        self._said, self._epoch = self._begun, -1
        self._since = self._in_epoch = Sums()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def step(self) -> None:
        """After every step."""
        self._bar.update()

    def trained(self, step: int, sums: Sums, speed: float) -> None:
        """After the steps until `step` since this was called last, `speed` images a second."""
        loss, top1 = sums.values()[2:4]
        self._bar.set_postfix_str(f"loss {loss:.3f}, top-1 {top1:.1f}%, {speed:,.0f} images/s")
        epoch, place = divmod(step - 1, self._epoch_steps)
        if epoch != self._epoch:
            self._epoch, self._since, self._in_epoch = epoch, Sums(), Sums()
        self._since, self._in_epoch = self._since.plus(sums), self._in_epoch.plus(sums)
        if self._all:
            self._say(self._line(epoch, place + 1))
        elif self._bar.disable and time.monotonic() - self._said >= EVERY:
            left = (self._steps - step) * (time.monotonic() - self._begun) / max(1, step - self._began)
            self._say(f"{self._line(epoch, place + 1)}\t{timedelta(seconds=round(left))} left")

    def tested(self, score: Score, line: str | None) -> None:
        """After an evaluation; `line` is what there is to say of it in any case."""
        if self._all:
            self._say(f" *   Acc@1 {100 * score.top1:.3f} Acc@5 {100 * score.top5:.3f}")
        if line is not None:
            self._say(line)

    def warn(self, line: str) -> None:
        """Says `line` on stderr."""
        if self._first:
            self._bar.write(f"crate-fast: warning: {line}", file=sys.stderr)

    def _line(self, epoch: int, place: int) -> str:
        digits, pairs = len(str(self._epoch_steps)), zip(self._since.values(), self._in_epoch.values(), strict=True)
        words = [f"{name} {own:{form}} ({mean:{form}})" for (name, form), (own, mean) in zip(FIELDS, pairs, strict=True)]
        self._since = Sums()
        return "\t".join([f"Epoch: [{epoch}][{place:{digits}d}/{self._epoch_steps}]", *words])

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._first:
            self._bar.write(line)
            sys.stdout.flush()  # to a file, whose reader waits


def columns() -> int:
    """How wide the bar is: a line that reached a terminal's last column would be broken by many."""
    return min(COLUMNS, shutil.get_terminal_size().columns - 1)
