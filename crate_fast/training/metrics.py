"""Loss and accuracy, summed on the device and read seldom: reading waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.samples import IGNORED
from ..device import Compute
from ..processes import ALONE, Ranks


class Score(NamedTuple):
    """Mean loss over `count` images, and how many of them got their label as the first, or among the first five."""

    loss: float
    correct: int
    correct5: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (tuple's own is not missed)

    @property
    def top1(self) -> float:
        """The part of the images that got their label."""
        return self.correct / max(self.count, 1)

    @property
    def top5(self) -> float:
        """The part of the images whose label was among the first five."""
        return self.correct5 / max(self.count, 1)

    def counts(self) -> dict[str, float]:
        """What a line of metrics has of it beside the loss."""
        return {"top1": self.top1, "top5": self.top5, "correct": self.correct, "count": self.count}

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} ({self.correct} of {self.count}), top-5 {self.top5:.2%}, loss {self.loss:.4f}"


class PatchScore(Score):
    """Mean squared error of masked patches over `count` images, of which none has a label to get."""

    def counts(self) -> dict[str, float]:
        return {"count": self.count}

    def __str__(self) -> str:
        return f"error of masked patches {self.loss:.4f} ({self.count} images)"


class Meter:
    """Sums over batches and processes, on `device`, of which `score` is made; adding never waits for it."""

    def __init__(self, device: torch.device, score: type[Score] = Score) -> None:
        self.score = score
        # Sums of counts are exact in float64, so that equal images give equal numbers in whatever order they are added.
        self.sums = torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def add(self, sums: Tensor) -> None:
        """Adds what `measure` gave."""
        self.sums += sums

    def read(self) -> Score:
        """The score of all that was added; waits for the device."""
        loss, correct, correct5, count = self.sums.tolist()
        return self.score(loss / max(count, 1), int(correct), int(correct5), int(count))


def measure(loss: Tensor, logits: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """(4,) of the dtype of `like`: the batch's summed `loss`, correct at the first and among the first five, and images."""
    logits = logits.detach()
    own = logits.gather(1, labels.clamp(min=0).unsqueeze(1))
    known = labels >= 0
    hit = known & own.squeeze(1).isfinite()  # a NaN has no place among the first
    first = hit & (logits.argmax(dim=1) == labels)
    # As many logits at most may be larger than the label's as leave it a place: no sort.
    among5 = hit & ((logits > own).sum(dim=1) < 5)
    return torch.stack([value.to(like.dtype) for value in (loss.detach(), first.sum(), among5.sum(), known.sum())])


def measure_patches(
    model: Any, images: Tensor, labels: Tensor, pred: Tensor, mask: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(the sum of the images' losses, as a scalar; (4,) of the dtype of `like`: that sum, two zeros, and images).

    Args:
        model: a CRATEMAE, that made `pred` and `mask` of `images`; those with label -100 count nothing.
    """
    known = labels >= 0
    loss = torch.where(known, model.image_losses(images, pred.float(), mask), 0).sum()
    none = torch.zeros_like(like[0])
    return loss, torch.stack([loss.detach().to(like.dtype), none, none, known.sum().to(like.dtype)])


Judge = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""From a model, images, labels and a meter's sums to what they add to them; called in autocast, without gradients."""


def classified(model: Any, images: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """What a batch adds to a meter's sums where `model` tells classes apart."""
    logits = model(images).float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return measure(loss, logits, labels, like)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    compute: Compute,
    ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
    tell: Callable[[Meter], None] = lambda meter: None,
    judge: Judge = classified,
    score: type[Score] = Score,
) -> Score:
    """The `score` of `model`, put in evaluation mode, on the `batches` of all processes, each measured by `judge`. After each
    `tell` is called with this process's own sums so far, then `between`."""
    model.eval()
    meter = Meter(compute.device, score)
    # What FSDP gathers in inference mode could not be trained with later.
    without_gradients = torch.no_grad if hasattr(model, "unshard") else torch.inference_mode
    with without_gradients(), compute.autocast():
        for images, labels in batches:
            meter.add(judge(model, images, labels, meter.sums))
            tell(meter)
            between()
        ranks.sum(meter.sums)
    return meter.read()
