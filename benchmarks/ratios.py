"""Ratios of errors: how far from float64 a model ends under autocast, over how far the published code does.

Which entries turn at a relu's threshold is chance, and a gradient's error follows it. So two computations that are equally
exact do not give 1, unless each is judged by float64 on its own sides of the thresholds (ties.py).
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from crate_fast import CRATE, reference
from ties import recorded, replayed

# name of the row: (autocast dtype, stream of the fused layers)
OURS = {
    "bf16": (torch.bfloat16, "auto"),
    "fp16": (torch.float16, "auto"),
    "fp16, float16 stream": (torch.float16, "float16"),
}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def rotated(model: reference.CRATE) -> reference.CRATE:
    """The same function in other numbers: a random rotation of every head's basis, in the projection and the one back."""
    model = copy.deepcopy(model)
    for attention, _ in model.transformer.layers:
        module = attention.fn
        project, back = module.qkv.weight.data, module.to_out[0].weight.data
        width = project.shape[0] // module.heads
        for head in range(module.heads):
            rows = slice(head * width, (head + 1) * width)
            rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q.to(project)
            project[rows] = rotation.mT @ project[rows]
            back[:, rows] = back[:, rows] @ rotation
    return model


def run(model, images: Tensor, cotangent: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every parameter's gradient of ⟨cotangent, logits⟩."""
    model.zero_grad()
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(images)
    (logits.to(cotangent.dtype) * cotangent).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def errors(result: tuple[Tensor, dict], exact: tuple[Tensor, dict]) -> list[float]:
    """Relative errors in norm: of the logits, then of each gradient."""
    pairs = [(result[0], exact[0]), *((result[1][name], exact[1][name]) for name in exact[1])]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def judge(
    published: reference.CRATE, images: Tensor, cotangent: Tensor, own_sides: bool
) -> Callable[[torch.nn.Module, torch.dtype], list[float]]:
    """What gives the `errors` of a model with the weights of `published`, under autocast to a dtype.

    own_sides: its gradients are judged by those of float64 on the sides of the thresholds that it took; what it takes a side
    for that is not its own shows in the logits.
    """
    float64 = partial(run, copy.deepcopy(published).double(), images.double(), cotangent.double(), None)
    exact = float64()

    def judged(model: torch.nn.Module, autocast: torch.dtype) -> list[float]:
        with recorded() as sides:
            result = run(model, images, cotangent, autocast)
        if not own_sides:
            return errors(result, exact)
        with replayed(sides):
            _, gradients = float64()
        return errors(result, (exact[0], gradients))

    return judged


def compare(
    published: reference.CRATE,
    ours: CRATE,
    images: Tensor,
    cotangent: Tensor,
    rows: dict[str, tuple] = OURS,
    own_sides: bool = False,
) -> dict[str, list[float]]:
    """For each of `rows`, made as `OURS` is, the ratio of errors (logits, then gradients) to the published code's own autocast;
    for the published code rotated too, unless each is judged on its `own_sides` (see `judge`)."""
    judged, theirs, ratios = judge(published, images, cotangent, own_sides), {}, {}
    for row, (autocast, stream) in rows.items():
        if autocast not in theirs:
            theirs[autocast] = judged(published, autocast)
        ours.transformer.stream = stream
        ratios[row] = [a / b for a, b in zip(judged(ours, autocast), theirs[autocast], strict=True)]
    if own_sides:
        return ratios
    again = rotated(published)
    judged = judge(again, images, cotangent, False)
    for autocast, errors_published in theirs.items():
        mine = judged(again, autocast)
        ratios[f"{_SHORT[autocast]}, published again"] = [a / b for a, b in zip(mine, errors_published, strict=True)]
    return ratios


def summarise(seeds: list[list[float]]) -> dict[str, float]:
    """Geometric means over seeds: of the logits' ratio, of the median and 90th percentile over gradients ("median", "p90"), and
    of each gradient's ratio, of which the 90th percentile and the largest ("p90_of_means", "largest").

    "p90" is above 1 even between two equally precise computations, since one seed scatters; "p90_of_means" is not.
    """
    logs = torch.tensor(seeds).log()
    gradients = logs[:, 1:]
    return {
        "logits": math.exp(logs[:, 0].mean()),
        "median": math.exp(gradients.median(1).values.mean()),
        "p90": math.exp(gradients.quantile(0.9, dim=1).mean()),
        "p90_of_means": math.exp(gradients.mean(0).quantile(0.9)),
        "largest": math.exp(gradients.mean(0).max()),
    }
