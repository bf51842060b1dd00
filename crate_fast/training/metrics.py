"""Loss and accuracy, summed on the device and read seldom: reading waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compute import Compute


class Score(NamedTuple):
    """Mean loss over `count` images, `correct` of which got their label, and the first step of a non-finite loss, or None."""

    loss: float
    correct: int
    count: int
    bad_step: int | None = None

    @property
    def top1(self) -> float:
        """The part of the images that got their label."""
        return self.correct / self.count

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} ({self.correct} of {self.count}), loss {self.loss:.4f}"


class Meter:
    """Sums over batches, on `device`; adding never waits for it."""

    NEVER = torch.iinfo(torch.int64).max

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_step = torch.full((), self.NEVER, device=device)
        self._count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int = 0) -> None:
        """Adds a batch: its mean `loss`, `logits` (batch, classes) and `labels` (batch,), and the step they are of."""
        loss = loss.detach().float()
        self._loss += loss * len(labels)
        self._correct += (logits.detach().argmax(dim=1) == labels).sum()
        self._bad_step = torch.where(loss.isfinite(), self._bad_step, self._bad_step.clamp(max=step))
        self._count += len(labels)

    def read(self) -> Score:
        """The score of all batches so far; waits for the device."""
        bad_step = self._bad_step.item()
        loss = self._loss.item() / self._count
        return Score(loss, self._correct.item(), self._count, None if bad_step == self.NEVER else bad_step)


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute, step: int = 0) -> Score:
    """The score of `model`, put in evaluation mode, on `batches` of images and labels; `step` is how long it was trained."""
    model.eval()
    meter = Meter(compute.device)
    with torch.inference_mode(), compute.autocast():
        for images, labels in batches:
            logits = model(images).float()
            meter.add(F.cross_entropy(logits, labels), logits, labels, step)
    return meter.read()
