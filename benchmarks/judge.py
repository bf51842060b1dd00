"""Whether a peer computes the right thing, before and as it is timed: no speed without parity."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from peers import Peer, Unavailable, check_graphs, graphed
from timing import kept_bytes, peak_bytes, synchronise
from workloads import DTYPES, Call, Workload, learned, prepare, replays_itself, timed_step

# What the published code's own error against float64 may be before nothing else can be judged by it.
SANE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
SLACK = 4.0
"""A peer may be this many times as far from float64 as the published code in the same precision."""
GRAIN = 4e-3
"""What one entry at the relu's threshold that turns moves a gradient by here: no gradient is held to less."""
JUDGED = 2
"""Images that float64 computes where the workload has more than 8; up to 8, all are."""
FIXED_INPUTS = ("cuda graph", "max-autotune", "reduce-overhead")


class Judge:
    """Parity against float64, allowed a multiple of the published code's own error in the same precision.

    A peer is judged on the batch that is timed, so that the very kernels and graphs that are timed are judged, and nothing is
    compiled twice: a large batch repeats the judged images, and only their outputs and gradients are asked for.
    """

    def __init__(self, workload: Workload, published: Peer, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self._call = prepare(workload, published, "eager", device)
        torch.manual_seed(1)
        self.count = workload.batch if workload.batch <= 8 else JUDGED
        self.inputs = self._call.inputs(self.count)
        self.truth = self._exact(published)
        self.published = self._errors(self._call, self.inputs)
        self._call = None  # its weights are not needed any more

    def _exact(self, published: Peer) -> list[Tensor]:
        """The output and, where the workload has a backward pass, every gradient, in float64."""
        inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs)
        if self._call.module is None:
            return self._results(self._call.run, inputs, [])
        module = prepare(self.workload._replace(dtype="float32"), published, "eager", self.device).module
        if self.workload.is_pure:
            module.to(DTYPES[self.workload.dtype])  # weights as they are rounded: what is judged is what is computed with them
        module.double()
        return self._results(module, inputs, learned(module))

    def _results(self, run, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
        """Of the judged images; the first of the inputs has them, and may have more."""
        if self.workload.part == "forward":
            with torch.inference_mode():
                return [run(*inputs)[: self.count]]
        leaves = [*(x for x in inputs if x.requires_grad), *leaves]
        out = run(*inputs)
        generator = torch.Generator(out.device).manual_seed(2)
        cotangent = torch.zeros(out.shape, device=out.device)
        judged = cotangent[: self.count]
        judged.copy_(torch.randn(judged.shape, generator=generator, device=out.device))
        gradients = list(torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))
        if inputs[0].requires_grad:
            gradients[0] = gradients[0][: self.count]
        return [out[: self.count].detach(), *gradients]

    def errors(self, call: Call) -> list[float]:
        """Relative errors in norm of the output and, where there is a backward pass, the median over gradients."""
        images = torch.arange(self.workload.batch, device=self.device) % self.count
        first = self.inputs[0].detach()[images].requires_grad_(self.inputs[0].requires_grad)
        return self._errors(call, (first, *self.inputs[1:]))

    def _errors(self, call: Call, inputs: tuple[Tensor, ...]) -> list[float]:
        output, *gradients = distances(self._results(call.run, inputs, call.leaves), self.truth)
        return [output, torch.tensor(gradients).median().item()] if gradients else [output]

    def verdict(self, errors: list[float]) -> str | None:
        """Why a peer with these errors is not right; None if it is."""
        for name, error, own in zip(("output", "gradients"), errors, self.published, strict=False):
            grain = GRAIN if name == "gradients" else 0.0
            if not own <= max(SANE[DTYPES[self.workload.dtype]], SLACK * grain):
                return f"no parity: the published code's own {name} is {own:.1e} from float64, more than any rounding explains"
            if not error <= SLACK * max(own, grain):
                return f"no parity: {name} {error:.1e} from float64, where the published code is {own:.1e} from it"
        return None


def distances(found: list[Tensor], right: list[Tensor]) -> list[float]:
    """How far each tensor is from the right one, relative to its norm."""
    pairs = zip(found, right, strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]


class Ready(NamedTuple):
    """A peer that passed parity, to be timed."""

    step: Callable[[], object]
    errors: list[float]
    compile_seconds: float | None
    peak: int | None
    kept: int | None


def make_ready(workload: Workload, peer: Peer, mode: str, device: torch.device, judge: Judge) -> Ready:
    """Builds, judges and warms up a peer.

    Raises:
        Unavailable: it cannot run, or has no parity.
    """
    if mode == "cuda graph":
        check_graphs(device)
    with peer.around():
        ready = _make_ready(workload, peer, mode, device, judge)

    def step() -> object:
        with peer.around():
            return ready.step()

    return ready if peer.around is nullcontext else ready._replace(step=step)


def _make_ready(workload: Workload, peer: Peer, mode: str, device: torch.device, judge: Judge) -> Ready:
    started = time.perf_counter()
    call = prepare(workload, peer, mode, device)
    errors = judge.errors(call) if peer.same_function else []
    _refuse(judge.verdict(errors) if peer.same_function else None)
    step, forward = timed_step(workload, call, device, fixed=mode in FIXED_INPUTS)
    step()
    synchronise(device)
    compile_seconds = None if mode in ("eager", "cuda graph") else time.perf_counter() - started
    owned = {t.untyped_storage().data_ptr() for t in call.leaves}
    kept = None if workload.part == "forward" else kept_bytes(forward, owned)
    peak = None if device.type == "cpu" and mode != "eager" else peak_bytes(step, device)
    if mode == "cuda graph" and not replays_itself(workload, call.module, mode):
        step = _recorded(workload, call, step, judge)
    return Ready(step, errors, compile_seconds, peak, kept)


def _refuse(reason: str | None) -> None:
    if reason:
        raise Unavailable(reason)


def _recorded(workload: Workload, call: Call, step: Callable[[], object], judge: Judge) -> Callable[[], object]:
    """A CUDA graph of `step`, judged by what a replay gives from the weights that `step` itself was run from."""
    weights = [leaf.detach().clone() for leaf in call.leaves]

    def results(run) -> list[Tensor]:
        with torch.no_grad():
            for leaf, weight in zip(call.leaves, weights, strict=True):
                leaf.copy_(weight)
        out = run()
        found = [leaf.grad for leaf in call.leaves] if workload.suite == "train" else out
        return [x.detach().clone() for x in (found if isinstance(found, list | tuple) else [found])]

    expected = results(step)
    replay = graphed(step)
    found = torch.tensor(distances(results(replay), expected)).median().item()
    _refuse(judge.verdict([found] if workload.part == "forward" else [0.0, found]))
    return replay
