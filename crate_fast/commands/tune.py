"""`crate-fast tune`: measures the kernels' shapes on this machine's GPU and stores the fastest where the library looks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BackendError
from ..optional import require
from ..sizes import ALPHA_SIZES, SIZES
from .arguments import positive

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32")
ALPHA = "alpha-"
NAMED = SIZES | {f"{ALPHA}{size}": sizes for size, sizes in ALPHA_SIZES.items()}
"""By what `--size` takes."""
SIDE, PATCH = 224, 16  # of the published images, and of their patches where a size has no others


class Workload(NamedTuple):
    """One kernel of a layer on tensors of the size asked for."""

    kernel: str
    sizes: tuple[int, ...]
    run: Callable[[], object]


def add_flags(parser: argparse.ArgumentParser, _: list[str]) -> None:
    """Gives the subcommand's parser its flags."""
    parser.description = (
        "Measures a handful of block shapes for each kernel of a layer on the GPU at hand (minutes) and stores the "
        "fastest in $CRATE_FAST_CACHE/tuning.json, or ~/.cache/crate_fast/tuning.json, where every later run finds them. "
        "Without it the kernels run with shapes chosen from what the compiler makes of them."
    )
    parser.add_argument("--size", choices=NAMED, default="tiny", help="a published size, alpha- of CRATE-α (default: tiny)")
    for name, text in (("dim", "width of a token"), ("heads", "attention heads"), ("dim-head", "width of a head")):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{text} (default: the size's)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens of an image (default: the size's, of 224 pixels)")
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="images (default: 256)")
    parser.add_argument("--precision", choices=DTYPES, default="float16", help="of matrix operands; 16-bit types share shapes")
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> None:
    require("tqdm")
    import torch

    from ..backend import choose_backend

    if not torch.cuda.is_available():
        raise BackendError("tune measures on a GPU, and PyTorch sees none here")
    size = NAMED[arguments.size]
    dim, heads = arguments.dim or size["dim"], arguments.heads or size["heads"]
    head_width, dtype = arguments.dim_head or size["dim_head"], getattr(torch, arguments.precision)
    count = arguments.tokens or (SIDE // size.get("patch_size", PATCH)) ** 2 + 1
    choose_backend("triton", torch.empty(0, dtype=dtype, device="cuda"), head_width)
    torch.manual_seed(0)
    tokens = torch.randn(arguments.batch_size, count, dim, dtype=dtype, device="cuda")
    layer = alpha_workloads if arguments.size.startswith(ALPHA) else workloads
    from ..kernels import shapes, tuning

    winners = find_winners(layer(tokens, heads, head_width), dtype, _milliseconds)
    path = tuning.store(torch.cuda.get_device_name(), winners)
    shapes.forget()
    for name, config in winners.items():
        print(f"{name:32} {config}")
    print(f"stored in {path}")


def find_winners(jobs: list[Workload], dtype: torch.dtype, clock: Callable[[Callable], float]) -> dict:
    """The fastest `tuning.Config` of every job by `clock(run)`, under the key that the library looks it up by.

    A shape that the GPU cannot run, because it wants more shared memory or registers than there are, is passed over.
    """
    from triton.runtime.errors import OutOfResources

    from ..bar import Bar
    from ..kernels import tuning

    pairs = [(job, config) for job in jobs for config in tuning.candidates(job.kernel, dtype)]
    times: dict[str, dict] = {}
    with Bar(len(pairs)) as bar:
        for job, config in pairs:
            with tuning.forced(job.kernel, config), suppress(OutOfResources):
                duration = clock(job.run)
                times.setdefault(tuning.key(job.kernel, dtype, *job.sizes), {})[config] = duration
            bar.update()
    return {name: min(measured, key=lambda config: measured[config]) for name, measured in times.items()}


def _milliseconds(run: Callable) -> Any:
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median")


def workloads(tokens: torch.Tensor, heads: int, head_width: int) -> list[Workload]:
    """Every kernel of a CRATE's layer on `tokens`, as forward and backward launch it.

    tokens: (batch, tokens, dim), of the operands' dtype.
    """
    import torch

    from ..kernels import gradients, layer, linear, mssa, weight_gradients

    batch, count, dim = tokens.shape
    dtype, inner, scale = tokens.dtype, heads * head_width, head_width**-0.5
    x = tokens.reshape(-1, dim)
    gamma, beta = torch.ones(dim, device=x.device), torch.zeros(dim, device=x.device)
    matrices = (_weight(x, inner, dim), _weight(x, dim, inner), beta, gamma, beta, _weight(x, dim, dim))
    (prepared,) = layer.prepare_layers(layer.stack_weights([layer.LayerWeights(gamma, beta, *matrices)]), 0.01, dtype)
    (project, step), out = prepared.folded(), prepared.out_weight
    statistics = linear.Statistics(*torch.empty(2, len(x), device=x.device))
    rectified = gradients.Rectified(step.gain, step.offset, statistics.rstd)

    moments = torch.stack((x.float().mean(1), x.float().var(1, correction=0) * dim))[:, None]
    made = [linear.empty_moments(*of, len(x)) for of in (("out_project", out), ("ista", step.matrix))]
    w, y = x.new_empty(batch, count, inner), torch.empty_like(x)
    linear.norm_linear(x, moments, project, None, w, 1e-5, statistics)
    o, lse = mssa.mssa_forward(w, heads, scale)
    do, delta = gradients.attention_gradient(x, out, o, heads, scale)

    def mssa_backward() -> tuple:
        return mssa.mssa_backward(w, do, lse, delta, scale, project, statistics.rstd)

    dw, sums, totals = mssa_backward()
    dw = dw.view(-1, inner)

    def weight_gradient(size: tuple[int, int], a, g, name: str = "weight_gradient", **norm) -> Workload:
        return Workload(name, size, lambda: weight_gradients.weight_gradient(a, g, dtype, **norm))

    jobs = [
        Workload("project", (dim, inner), lambda: linear.norm_linear(x, moments, project, None, w, 1e-5, statistics)),
        Workload("mssa_forward", (head_width,), lambda: mssa.mssa_forward(w, heads, scale)),
        Workload(
            "out_project",
            (inner, dim),
            lambda: linear.linear(o.view(-1, inner), out, dtype, offset=beta, residual=x, moments=made[0]),
        ),
        Workload("ista", (dim, dim), lambda: linear.norm_linear(x, moments, step, gamma, y, 1e-5, statistics, made[1])),
        Workload("ista_gradient", (dim, dim), lambda: gradients.norm_data_gradient(x, sums, x, step, gamma, statistics)),
        Workload(
            "mixed_product", (dim, dim), lambda: gradients.data_gradient(x.float(), step.matrix, torch.float32, shrink=True)
        ),
        Workload(
            "mixed_ista_gradient",
            (dim, dim),
            lambda: gradients.norm_data_gradient(x.float(), sums, x.float(), step, gamma, statistics),
        ),
        weight_gradient((dim, dim), x, x, mean=statistics.mean),
        Workload("out_gradient", (inner, dim), lambda: gradients.attention_gradient(x, out, o, heads, scale)),
        weight_gradient((inner, dim), o.view(-1, inner), x),
        Workload("mixed_product", (inner, dim), lambda: gradients.attention_gradient(x.float(), out, o, heads, scale)),
        weight_gradient((dim, dim), x.float(), x.float(), "mixed_gradient", mean=statistics.mean),
        weight_gradient((inner, dim), o.view(-1, inner), x.float(), "mixed_gradient"),
        weight_gradient((dim, inner), x.float(), dw, "mixed_gradient", mean=statistics.mean, totals=totals),
        Workload("mssa_backward", (head_width,), mssa_backward),
        Workload(
            "project_gradient",
            (dim, inner),
            lambda: gradients.norm_data_gradient(dw, sums, x, project, None, statistics, residual=x, rectified=rectified),
        ),
        weight_gradient((dim, inner), x, dw, mean=statistics.mean, totals=totals),
    ]
    return list({(job.kernel, job.sizes): job for job in jobs}.values())


def alpha_workloads(tokens: torch.Tensor, heads: int, head_width: int) -> list[Workload]:
    """The same of a CRATE-α's layer. Launches that share a shape are one job: each way through a dictionary has four."""
    import torch

    from ..kernels import attention_sums, linear, mssa, weight_gradients
    from ..reference_alpha import WIDENING

    batch, count, dim = tokens.shape
    dtype, scale, wide = tokens.dtype, head_width**-0.5, WIDENING * dim
    x = tokens.reshape(-1, dim)
    d, code = (_weight(x, *size).to(dtype) for size in ((dim, wide), (len(x), wide)))
    offset = torch.zeros(wide, device=x.device)
    w = _weight(x, len(x), heads * head_width).to(dtype).view(batch, count, -1)
    o, lse = mssa.mssa_forward(w, heads, scale)
    delta = attention_sums.head_products(o, w, heads, scale)

    def into(**ends) -> torch.Tensor:
        return linear.linear(x, d, dtype, name="odl", **ends)

    def back(out: torch.dtype = dtype, **ends) -> torch.Tensor:
        return linear.linear(code, d.t(), out, name="odl_back", **ends)

    def all_into() -> list:
        forward = [into(offset=offset, rectify=True), into(offset=offset, rectify=True, residual=code)]
        return [*forward, into(mask=code), into(mask=code, residual=code)]

    return [
        Workload("mssa_forward", (head_width,), lambda: mssa.mssa_forward(w, heads, scale)),
        Workload("mssa_backward", (head_width,), lambda: mssa.mssa_backward(w, w, lse, delta, scale)),
        Workload("odl", (dim, wide), all_into),
        Workload("odl_back", (wide, dim), lambda: [back(residual=x), back(), back(), back(torch.float32, residual=x)]),
        Workload("odl_gradient", (dim, wide), lambda: weight_gradients.weight_gradient(x, code, dtype, name="odl_gradient")),
    ]


def _weight(like: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    import torch

    return torch.randn(outputs, inputs, device=like.device) / inputs**0.5
