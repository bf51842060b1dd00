"""What a run says of its progress: a bar on a terminal, elsewhere a line a minute, or main.py's lines if they are asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from ..bar import Bar
from ..settings import RunSettings
from .metrics import Meter, Score

EVERY = 60.0  # seconds after a line, where there is no bar, until another is due
REDRAWN = 0.5  # seconds from one drawing of the bar to the next while a model is evaluated
clock = time.monotonic


class Sums(NamedTuple):
    """Over steps: how many, the seconds they took and waited for images, and what their images scored."""

    steps: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    images: float = 0.0
    loss: float = 0.0
    correct: float = 0.0
    correct5: float = 0.0

    @classmethod
    def of(cls, steps: float, seconds: float, waited: float, score: Score) -> Sums:
        """Those of `steps` steps, from their mean."""
        return cls(steps, seconds, waited, score.count, score.loss * score.count, score.correct, score.correct5)

    def plus(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Sums) -> Sums:
        return Sums(*(a - b for a, b in zip(self, other, strict=True)))

    def values(self) -> list[float]:
        """Seconds a step, of them for images, loss, top-1 and top-5 in percent."""
        steps, images = max(1, self.steps), max(1, self.images)
        scores = self.loss / images, 100 * self.correct / images, 100 * self.correct5 / images
        return [self.seconds / steps, self.waited / steps, *scores]


FIELDS = {"Time": "6.3f", "Data": "6.3f", "Loss": ".4e", "Acc@1": "6.2f", "Acc@5": "6.2f"}
"""What a line has, by main.py's names and in its formats."""
TEST_FIELDS = {name: form for name, form in FIELDS.items() if name != "Data"}
ACCURACIES = ("Acc@1", "Acc@5")


def line_of(start: str, place: int, count: int, own: Sums, mean: Sums, fields: dict[str, str]) -> str:
    """main.py's line: `start`, [place/count], and fields with their values in `own` and, in brackets, in `mean`."""
    values = {name: pair for name, *pair in zip(FIELDS, own.values(), mean.values(), strict=True)}
    words = [f"{name} {values[name][0]:{form}} ({values[name][1]:{form}})" for name, form in fields.items()]
    return "\t".join([f"{start}[{place:{len(str(count))}d}/{count}]", *words])


def summary(score: Score) -> str:
    """What main.py prints after an evaluation; of a score that it has not, what it says itself."""
    if type(score) is not Score:
        return f" *   {score}"
    return f" *   Acc@1 {100 * score.top1:.3f} Acc@5 {100 * score.top5:.3f}"


class Speaker:
    """Says lines by `say`, and by `remind` one that is due: `EVERY` seconds after the last of either kind. Without `remind`
    none is due."""

    def __init__(self, say: Callable[[str], None] = lambda line: None, remind: Callable[[str], None] | None = None) -> None:
        self._say, self._remind, self._said = say, remind, clock()

    def say(self, line: str) -> None:
        self._say(line)
        self._said = clock()

    def is_due(self) -> bool:
        return self._remind is not None and clock() - self._said >= EVERY

    def remind(self, line: str) -> None:
        if self._remind is not None:
            self._remind(line)
            self._said = clock()


class Testing:
    """To be called after each of the `count` batches of an evaluation: says main.py's line of the first and of every `every`-th
    after it (0: of none), else how far it is, where that is due."""

    def __init__(self, count: int, every: int, speaker: Speaker, fields: dict[str, str] = TEST_FIELDS) -> None:
        self.place, self._count, self._every, self._speaker, self._fields = 0, count, every, speaker, fields
        self._begun, self._before = clock(), Sums()

    def __call__(self, meter: Meter) -> None:
        self.place += 1
        if self._every and (self.place - 1) % self._every == 0:
            total = Sums.of(self.place, clock() - self._begun, 0.0, meter.read())
            own, self._before = total.minus(self._before), total
            self._speaker.say(line_of("Test: ", self.place, self._count, own, total, self._fields))
        elif self._speaker.is_due():
            left = (self._count - self.place) * (clock() - self._begun) / self.place
            self._speaker.remind(f"evaluating: {self.place} of {self._count} batches, {_words(left)} left")


class Progress:
    """Of a run of `steps` steps, `epoch_steps` an epoch, after `step`; only the first process says anything.

    With --print-freq N or --print-log lines are those of the published main.py, of an epoch's first step and every N-th after
    it, field by field, so that what reads its logs reads these: `Epoch: [e][i/n]`, then each of `FIELDS` as value (mean of this
    epoch), tabs between. The value is that since the line before: main.py's, one step's, would have the host wait for the
    device at every step. Without `accuracies` there are none to tell.
    """

    def __init__(
        self, settings: RunSettings, steps: int, epoch_steps: int, step: int, first: bool, accuracies: bool = True
    ) -> None:
        self._fields, self._test_fields = (
            {name: form for name, form in fields.items() if accuracies or name not in ACCURACIES}
            for fields in (FIELDS, TEST_FIELDS)
        )
        self._accuracies = accuracies
        self._steps, self._epoch_steps, self._first = steps, epoch_steps, first
        self._every = settings.log_every if settings.print_log else 0
        self._bar = Bar(steps, step, hide=not first)
        self._speaker = Speaker(self._write, self._write if self._bar.disable else None) if first else Speaker()
        self._began, self._begun, self._drawn = step, clock(), clock()
        self._epoch, self._in_epoch, self._before = -1, Sums(), Sums()
        self._words: tuple[str, ...] = ()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def step(self, step: int, untold: Callable[[], Sums]) -> None:
        """After every step, the run's `step`-th; `untold` gives what `trained` was not told yet, and waits for the device."""
        self._bar.update()
        if self._every and (step - 1) % self._epoch_steps % self._every == 0:
            self._speaker.say(self._line(step, untold()))
        elif self._speaker.is_due():
            left = (self._steps - step) * (clock() - self._begun) / max(1, step - self._began)
            self._speaker.remind(f"{self._line(step, untold())}\t{_words(left)} left")

    def trained(self, step: int, sums: Sums, speed: float) -> None:
        """After the steps until `step` since this was called last, `speed` images a second."""
        loss, top1 = sums.values()[2:4]
        share = (f"top-1 {top1:.1f}%",) if self._accuracies else ()
        self._words = (f"loss {loss:.3f}", *share, f"{speed:,.0f} images/s")
        self._bar.say(*self._words)
        self._enter_epoch_of(step)
        self._in_epoch = self._in_epoch.plus(sums)

    def testing(self, count: int) -> Callable[[Meter], None]:
        """What is to be called after each of the `count` batches of an evaluation."""
        lines = Testing(count, self._every, self._speaker, self._test_fields)

        def after(meter: Meter) -> None:
            lines(meter)
            if not self._bar.disable and clock() - self._drawn >= REDRAWN:
                self._drawn = clock()
                self._bar.say(f"evaluating {lines.place} of {count}")

        return after

    def tested(self, score: Score, line: str | None) -> None:
        """After an evaluation; `line` is what there is to say of it in any case."""
        self._bar.say(*self._words)
        if self._every:
            self._speaker.say(summary(score))
        if line is not None:
            self._speaker.say(line)

    def warn(self, line: str) -> None:
        """Says `line` on stderr."""
        if self._first:
            self._bar.tell(f"crate-fast: warning: {line}", sys.stderr)

    def _enter_epoch_of(self, step: int) -> None:
        epoch = (step - 1) // self._epoch_steps
        if epoch != self._epoch:
            self._epoch, self._in_epoch, self._before = epoch, Sums(), Sums()

    def _line(self, step: int, untold: Sums) -> str:
        """main.py's line of a step, with what was `untold` until then."""
        self._enter_epoch_of(step)
        total = self._in_epoch.plus(untold)
        own, self._before = total.minus(self._before), total
        place = (step - 1) % self._epoch_steps + 1
        return line_of(f"Epoch: [{self._epoch}]", place, self._epoch_steps, own, total, self._fields)

    def _write(self, line: str) -> None:
        self._bar.tell(line, sys.stdout)


def _words(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
