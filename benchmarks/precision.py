"""How far from float64 CRATE ends under autocast: the published code, and the fused layers, for logits and gradients.

    python benchmarks/precision.py [--seeds 6] [--dim 384] [--depth 12] [--batch 16] [--own-sides] [--json FILE]
    python benchmarks/precision.py --checkpoint FILE [--seeds 6] [--batch 1437] [--own-sides] [--json FILE]

A model with perturbed norms, random images and a random cotangent on its logits is run in float64, then as published under
bf16 and fp16 autocast, then by the fused layers. Reported is the ratio of the relative errors, ours over the published: of
the logits, and of each parameter's gradient (median, 90th percentile and largest over parameters), as geometric means over
seeds.

`--checkpoint` takes a model of the digits run, and as images what it was trained on: thousands, since in a small trained
model a gradient's error turns on the few entries that lie at the threshold, and on few images one such entry more or less is
a factor of ten.

Two computations that are equally exact do not give 1: which entries turn at the relu's threshold is chance, and a gradient's
error follows it. The rows "published again" say what chance does: the published code against itself with the basis of every
head rotated, which is the same function with the same number of roundings of other values. With `--own-sides` a gradient is
judged by float64 on the sides of the thresholds that its own run took, so that no entry's turning counts, and these rows are
left out.

On a GPU the kernels themselves run. Without one, their launchers are replaced by PyTorch that rounds where they round
(`EMULATED`): Triton's interpreter cannot multiply bfloat16 and takes minutes for one step of this model.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import torch
from torch import Tensor
from tqdm import tqdm

from crate_fast import CRATE, reference
from crate_fast.checkpoint import constructor_arguments, load_checkpoint
from crate_fast.data.digits import Digits
from crate_fast.data.order import Plan
from crate_fast.kernels import layer
from crate_fast.kernels.gradients import Gradient, column_blocks, row_blocks
from crate_fast.kernels.linear import Folded, Statistics
from crate_fast.kernels.weight_gradients import Parts
from crate_fast.training.resolve import resolve
from ratios import compare, summarise


def _prepare_weights(project, gamma1, beta1, out, square, gamma2, beta2, operand: torch.dtype, shrinkage: float) -> tuple:
    def fold(weight: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, gamma, beta = weight.float(), gamma.float(), beta.float()
        matrix = (gamma[..., None] * weight).to(operand)
        return matrix, matrix.float().sum(1), (beta[:, None] @ weight)[:, 0]

    matrix, *project_ends = fold(project.mT, gamma1, beta1)
    step, gain, offset = fold(square, gamma2, beta2)
    return matrix.mT, *project_ends, out.to(operand), step, gain + gamma2, offset + beta2 - shrinkage


def _norm_linear(x: Tensor, _, folded: Folded, gamma, out: Tensor, eps: float, statistics: Statistics, __=None) -> None:
    """Statistics are made here: what is handed on of x and of the result is not read."""
    wide, matrix = x.float(), folded.matrix.float()
    statistics.mean.copy_(wide.mean(1))
    statistics.rstd.copy_((wide.var(1, unbiased=False) + eps).rsqrt())
    mean, rstd = statistics.mean[:, None], statistics.rstd[:, None]
    if x.dtype == folded.matrix.dtype:
        result = rstd * (wide @ matrix - mean * folded.gain + (0 if gamma is None else wide * gamma)) + folded.offset
    else:
        normal = (wide - mean) * rstd
        result = normal.to(folded.matrix.dtype).float() @ matrix + (0 if gamma is None else normal * gamma) + folded.offset
    out.view(result.shape).copy_(result if gamma is None else result.relu())


def _linear(x: Tensor, weight: Tensor, out: torch.dtype, *, offset: Tensor, residual: Tensor, moments: Tensor) -> Tensor:
    return (x.float() @ weight.float() + offset.float() + residual.float()).to(out)


def _attention_gradient(g: Tensor, weight: Tensor, o: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    do = (g.to(weight.dtype).float() @ weight.float().t()).to(o.dtype).view_as(o)
    delta = (do.float() * o.float()).unflatten(-1, (heads, -1)).sum(-1) * scale
    return do, delta.permute(2, 0, 1)[:, None].contiguous()


def _row_sums(g: Tensor, result: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return torch.stack(((g.float() * (result.float() - offset)).sum(-1), (g.float() * gain).sum(-1)))


def _totals(g: Tensor, parts: int) -> Tensor:
    return torch.nn.functional.pad(g.float().sum(0)[None, None], (0, 0, 0, parts - 1))


def _norm_data_gradient(g, sums, x, folded: Folded, gamma, statistics: Statistics, residual=None, rectified=None) -> Gradient:
    """g is stored 1/deviation times, and so is dx for the step below."""
    normal = (x.float() - statistics.mean[:, None]) * statistics.rstd[:, None]
    dh = g.to(folded.matrix.dtype).float() @ folded.matrix.float().t() + (0 if gamma is None else g.float() * gamma)
    c1, c2 = sums.sum(1)[..., None] / x.shape[1]
    dx = dh - c2 - normal * c1 + (0 if residual is None else residual.float())
    blocks = row_blocks(folded.matrix, len(x))
    if rectified is None:
        return Gradient(dx.to(x.dtype), _totals(dx, blocks), None)
    dx = torch.where(x > 0, dx, 0)
    gain, offset, rstd = rectified
    stored = (dx * rstd[:, None]).to(x.dtype)
    parts = column_blocks(folded.matrix)
    row_sums = torch.nn.functional.pad(_row_sums(stored, x, gain, offset)[:, None], (0, 0, 0, parts - 1))
    return Gradient(stored, _totals(dx, blocks), row_sums)


def _weight_gradient(x, g, operand, *, mean=None, totals=None, transposed=False) -> Parts:
    centred = mean is not None and x.dtype != operand
    product = (x.float() - mean[:, None] if centred else x.float()).to(operand).float().t() @ g.to(operand).float()
    total = totals.sum(1)
    return Parts((product.t() if transposed else product)[None], total, product.sum(0)[None, None])


def _finish_layer(scale, project, out, ista) -> list[Tensor]:
    def finish(product, identity: bool) -> tuple[Tensor, Tensor, Tensor]:
        parts, weight, gamma, beta = product
        g, total = (parts.product[0] - parts.sums[0] / len(weight)) / scale, parts.total[0] / scale
        weight = weight.float() + torch.eye(len(weight)) if identity else weight.float()
        return (g * weight).sum(1), weight @ total, gamma[:, None] * g + beta[:, None] * total

    dgamma, dbeta, dweight = finish(project, False)
    return [dgamma, dbeta, dweight.t(), out.product[0] / scale, out.total[0] / scale, *finish(ista, True)]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def _mssa_forward(w: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    split = _heads(w, heads)
    scores = split @ split.transpose(-1, -2) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    o = weights.to(w.dtype).float() @ split / weights.sum(-1, keepdim=True)
    return o.transpose(1, 2).flatten(2).to(w.dtype), scores.logsumexp(-1)


def _mssa_backward(w: Tensor, do: Tensor, lse: Tensor, delta: Tensor, scale: float, folded: Folded, row_scale: Tensor) -> tuple:
    heads = delta.shape[0]
    split, g = _heads(w, heads), _heads(do, heads)
    delta = delta.sum(1).transpose(0, 1)[..., : w.shape[1], None] / scale
    p = (split @ split.transpose(-1, -2) * scale - lse[..., None]).exp()
    e = p * (g @ split.transpose(-1, -2) - delta)
    e = ((e + e.transpose(-1, -2)) * scale).to(w.dtype).float()
    dw = (p.transpose(-1, -2).to(w.dtype).float() @ g + e @ split).transpose(1, 2).flatten(2)
    stored = (dw * row_scale.view(*w.shape[:2], 1)).to(w.dtype)
    return stored, _row_sums(stored, w, folded.gain, folded.offset).flatten(1)[:, None], _totals(dw.flatten(0, 1), 1)


EMULATED = {
    "attention_gradient": _attention_gradient,
    "finish_layer": _finish_layer,
    "linear": _linear,
    "mssa_backward": _mssa_backward,
    "mssa_forward": _mssa_forward,
    "norm_data_gradient": _norm_data_gradient,
    "norm_linear": _norm_linear,
    "prepare_weights": _prepare_weights,
    "weight_gradient": _weight_gradient,
}
"""What `crate_fast.kernels.layer` launches, in PyTorch, with the kernels' roundings: operands and results in their dtypes,
everything between in float32."""


def perturbed(model: torch.nn.Module, amount: float = 0.2) -> torch.nn.Module:
    """`model` with noise on its vectors (norms and biases), so that nothing in it is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(amount * torch.randn_like(parameter))
    return model


def measure(options: argparse.Namespace, device: str) -> dict[str, dict[str, float]]:
    """The summary of every row over the seeds."""
    ratios: dict[str, list[list[float]]] = {}
    emulation = mock.patch.multiple(layer, **EMULATED) if device == "cpu" else nullcontext()
    with emulation:
        for seed in tqdm(range(options.seeds), desc="seeds", disable=None):
            torch.manual_seed(seed)
            ours = _model(options)
            published = reference.CRATE(**_arguments(ours))
            published.load_state_dict(ours.state_dict())
            images = _images(options, ours)
            cotangent = torch.randn(len(images), ours.mlp_head[1].out_features)
            inputs = (x.to(device) for x in (published, ours, images, cotangent))
            for row, values in compare(*inputs, own_sides=options.own_sides).items():
                ratios.setdefault(row, []).append(values)
    return {row: summarise(values) for row, values in ratios.items()}


def _model(options: argparse.Namespace) -> CRATE:
    if options.checkpoint:
        return load_checkpoint(options.checkpoint, backend="triton")
    sizes = {"dim": options.dim, "depth": options.depth, "heads": options.dim // 64, "dim_head": 64}
    return perturbed(CRATE(image_size=64, patch_size=8, num_classes=100, backend="triton", **sizes))


def _images(options: argparse.Namespace, model: CRATE) -> Tensor:
    if not options.checkpoint:
        return torch.randn(options.batch, model.channels, *model.image_size)
    settings = resolve({})
    data = Digits(model.image_size, torch.device("cpu"), rotate=settings.rotate, zoom=settings.zoom, shift=settings.shift)
    plan, images = Plan(data.train_count, data.train_count, torch.initial_seed()), []
    for epoch in range(1 + (options.batch - 1) // data.train_count):
        images += [batch for batch, _ in data.train_batches(plan, epoch)]
    return torch.cat(images)[: options.batch]


def _arguments(model: CRATE) -> dict:
    arguments = {name: value for name, value in constructor_arguments(model).items() if name not in ("backend", "stream")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line (that of the process if None)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, help="images (default: 16; of a checkpoint 1,437, an epoch)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a model of the digits run instead of a drawn one")
    parser.add_argument("--own-sides", action="store_true", help="count no entry that rounding turns at a threshold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    options = parser.parse_args(argv)
    options.batch = options.batch or (1437 if options.checkpoint else 16)
    return options


def main() -> None:
    options = parse(None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    summary = measure(options, device)
    how = "the kernels" if device == "cuda" else "emulated"
    print(f"errors against float64, fused layers ({how}) over published code; geometric means of {options.seeds} seeds")
    print(f"{'autocast':24}{'logits':>8}{'gradients: median':>20}{'p90':>8}{'p90 of means':>14}{'largest':>9}")
    for row, s in summary.items():
        print(f"{row:24}{s['logits']:8.2f}{s['median']:20.2f}{s['p90']:8.2f}{s['p90_of_means']:14.2f}{s['largest']:9.2f}")
    if options.json:
        model = "a checkpoint of the digits run" if options.checkpoint else f"{options.depth} layers, width {options.dim}"
        record = {"model": model, "seeds": options.seeds, "batch": options.batch}
        record |= {"how": how, "torch": torch.__version__, "ratios": summary}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
