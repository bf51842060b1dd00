"""What is measured: operations, a layer, inference, a training step; and whether a peer computes the right thing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crate_fast
import floors
from crate_fast import reference
from crate_fast.model import SIZES
from peers import COMPILED, Peer, Unavailable, graphed, in_mode
from timing import kept_bytes, peak_bytes, rotated, synchronise

IMAGE, PATCH, TOKENS, CLASSES = 224, 16, 197, 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the published code's own error against float64 may be before nothing else can be judged by it.
SANE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
SLACK = 4.0
"""A peer may be this many times as far from float64 as the published code in the same precision."""
GRAIN = 4e-3
"""What one entry at the relu's threshold that turns moves a gradient by here: no gradient is held to less."""
LARGE_PARITY_BATCH = 16
"""Images that parity is judged on where the workload has more than 8: like the large batches that are timed they make every
size a multiple of 16, for which Triton compiles code of its own. Up to 8, what is timed is judged."""


class Workload(NamedTuple):
    """One thing to do. `suite` is "ops", "layer", "inference" or "train"; `what` the operation and pass."""

    suite: str
    what: str  # "mssa forward", "ista both", "layer backward", "inference", "train"
    size: str  # of `crate_fast.model.SIZES`
    batch: int
    dtype: str

    @property
    def operation(self) -> str:
        return self.what.split()[0]

    @property
    def part(self) -> str:
        """ "forward", "backward" or "both"; of whole models "forward" or "both"."""
        return {"inference": "forward", "train": "both"}.get(self.what) or self.what.split()[1]

    def concerns(self, peer: Peer) -> bool:
        """Whether `peer` does such a thing: operations that are its own, a layer of this architecture, any whole model."""
        if self.suite == "ops":
            return getattr(peer, self.operation) is not None
        return peer.same_function or self.suite != "layer"

    def kernels(self) -> list[floors.Kernel]:
        """The unavoidable work."""
        sizes = SIZES[self.size]
        depth = sizes["depth"] if self.suite in ("inference", "train") else 1
        inner = sizes["heads"] * sizes["dim_head"]
        element = DTYPES[self.dtype].itemsize
        shape = floors.Shape(self.batch, TOKENS, sizes["dim"], inner, depth, element, 3 * PATCH**2, CLASSES)
        if self.suite in ("inference", "train"):
            return floors.model(shape, training=self.suite == "train")
        return getattr(floors, self.operation)(shape, self.part)


class Call(NamedTuple):
    """A peer made ready: `run` takes `inputs(batch)`; `leaves` are the weights that gradients are taken to."""

    run: Callable[..., Tensor]
    inputs: Callable[[int], tuple[Tensor, ...]]
    leaves: list[Tensor]
    module: nn.Module | None


def prepare(workload: Workload, peer: Peer, mode: str, device: torch.device) -> Call:
    """`peer` on the workload, in a mode, with weights and inputs that are the same for every peer.

    Raises:
        Unavailable: the peer cannot be built.
    """
    dtype, sizes = DTYPES[workload.dtype], SIZES[workload.size]
    if workload.suite == "ops":
        return _prepare_operation(workload, getattr(peer, workload.operation), mode, dtype, device)
    arguments = {"image_size": IMAGE, "patch_size": PATCH, "num_classes": CLASSES, **sizes}
    if workload.suite == "layer":
        arguments["depth"] = 1
    torch.manual_seed(0)
    weights = reference.CRATE(**arguments).state_dict()
    module = peer.model(arguments)
    if peer.same_function:
        module.load_state_dict(weights)
    module = (module.transformer if workload.suite == "layer" else module).to(device)
    module.train(workload.part != "forward")
    run = in_mode(module, mode)
    shape = (TOKENS, sizes["dim"]) if workload.suite == "layer" else (3, IMAGE, IMAGE)
    wants_gradient = workload.suite == "layer" and workload.part != "forward"

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *shape, device=device).requires_grad_(wants_gradient),)

    if _replays(workload, module, mode):
        with _autocast(device, dtype):
            run = crate_fast.graphed(module, *inputs(workload.batch))

    def autocast_run(*tensors: Tensor) -> Tensor:
        with _autocast(device, dtype):
            return run(*tensors)

    return Call(autocast_run, inputs, list(module.parameters()), module)


def _replays(workload: Workload, module: nn.Module | None, mode: str) -> bool:
    """Whether a CUDA graph is recorded as users of crate_fast do it, by `crate_fast.graphed`; others record the whole step."""
    return mode == "cuda graph" and workload.suite == "inference" and isinstance(module, crate_fast.CRATE)


def _prepare_operation(workload: Workload, function, mode: str, dtype: torch.dtype, device: torch.device) -> Call:
    sizes = SIZES[workload.size]
    heads, differentiate = sizes["heads"], workload.part != "forward"
    width = heads * sizes["dim_head"] if workload.operation == "mssa" else sizes["dim"]
    run = (lambda w: function(w, heads)) if workload.operation == "mssa" else function
    if mode in COMPILED:
        run = torch.compile(run, mode=mode if mode in ("max-autotune", "reduce-overhead") else None, dynamic=False)
    weight = torch.empty(width, width)
    nn.init.kaiming_uniform_(weight, generator=torch.Generator().manual_seed(0))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        tokens = torch.randn(batch, TOKENS, width, device=device).to(dtype)
        tensors = (tokens,) if workload.operation == "mssa" else (tokens, weight.to(device, dtype))
        return tuple(tensor.requires_grad_(differentiate) for tensor in tensors)

    return Call(run, inputs, [], None)


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Judge:
    """Parity against float64, allowed a multiple of the published code's own error in the same precision."""

    def __init__(self, workload: Workload, published: Peer, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self._call = prepare(workload, published, "eager", device)
        torch.manual_seed(1)
        self.inputs = self._call.inputs(workload.batch if workload.batch <= 8 else LARGE_PARITY_BATCH)
        self.truth = self._exact(published)
        self.published = self.errors(self._call)

    def _exact(self, published: Peer) -> list[Tensor]:
        """The output and, where the workload has a backward pass, every gradient, in float64."""
        inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs)
        if self._call.module is None:
            return self._results(self._call.run, inputs, [])
        module = prepare(self.workload._replace(dtype="float32"), published, "eager", self.device).module.double()
        return self._results(module, inputs, list(module.parameters()))

    def _results(self, run, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [*leaves, *(x for x in inputs if x.requires_grad)]
        if self.workload.part == "forward":
            with torch.inference_mode():
                return [run(*inputs)]
        out = run(*inputs)
        generator = torch.Generator(out.device).manual_seed(2)
        cotangent = torch.randn(out.shape, generator=generator, device=out.device)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    def errors(self, call: Call) -> list[float]:
        """Relative errors in norm of the output and, where there is a backward pass, the median over gradients."""
        results = self._results(call.run, self.inputs, call.leaves)
        pairs = zip(results, self.truth, strict=True)
        output, *gradients = (((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
        return [output, torch.tensor(gradients).median().item()] if gradients else [output]

    def verdict(self, errors: list[float]) -> str | None:
        """Why a peer with these errors is not right; None if it is."""
        for name, error, own in zip(("output", "gradients"), errors, self.published, strict=False):
            grain = GRAIN if name == "gradients" else 0.0
            if not own <= max(SANE[self.workload.dtype], SLACK * grain):
                return f"no parity: the published code's own {name} is {own:.1e} from float64, more than any rounding explains"
            if not error <= SLACK * max(own, grain):
                return f"no parity: {name} {error:.1e} from float64, where the published code is {own:.1e} from it"
        return None


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
    if mode == "cuda graph" and device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA GPU")
    started = time.perf_counter()
    call = prepare(workload, peer, mode, device)
    errors = judge.errors(call) if peer.same_function else []
    if peer.same_function:
        reason = judge.verdict(errors)
        if reason:
            raise Unavailable(reason)
    step, forward = _step(workload, call, device, fixed=mode in ("cuda graph", "max-autotune", "reduce-overhead"))
    step()
    synchronise(device)
    compile_seconds = None if mode in ("eager", "cuda graph") else time.perf_counter() - started
    owned = {t.untyped_storage().data_ptr() for t in call.leaves}
    kept = None if workload.part == "forward" else kept_bytes(forward, owned)
    peak = None if device.type == "cpu" and mode != "eager" else peak_bytes(step, device)
    if mode == "cuda graph" and not _replays(workload, call.module, mode):
        step = graphed(step)
    return Ready(step, errors, compile_seconds, peak, kept)


def _step(workload: Workload, call: Call, device: torch.device, fixed: bool) -> tuple[Callable, Callable]:
    """(what is timed, its forward pass alone)."""
    if workload.suite == "train":
        return _training_step(workload, call, device, fixed)
    give = _giver(lambda: call.inputs(workload.batch), device, fixed)

    def forward() -> Tensor:
        return call.run(*give())

    if workload.part == "forward":

        def infer() -> Tensor:
            with torch.inference_mode():
                return call.run(*give())

        return infer, forward
    if workload.part == "backward":
        inputs = give()
        out = call.run(*inputs)
        cotangent = torch.randn_like(out)
        leaves = [*call.leaves, *(x for x in inputs if x.requires_grad)]
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True), forward
    cotangent = torch.randn_like(forward())

    def both() -> tuple[Tensor, ...]:
        inputs = give()
        leaves = [*call.leaves, *(x for x in inputs if x.requires_grad)]
        return torch.autograd.grad(call.run(*inputs), leaves, cotangent)

    return both, forward


def _training_step(workload: Workload, call: Call, device: torch.device, fixed: bool) -> tuple[Callable, Callable]:
    """Forward, loss, backward and a Lion step, gradients freed in between."""
    from lion_pytorch.foreach import Lion

    optimizer = Lion(call.module.parameters(), lr=1e-5)

    def make() -> tuple[Tensor, Tensor]:
        return (*call.inputs(workload.batch), torch.randint(CLASSES, (workload.batch,), device=device))

    give = _giver(make, device, fixed)

    def loss() -> Tensor:
        images, labels = give()
        return F.cross_entropy(call.run(images).float(), labels)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step, loss


def _giver(make, device: torch.device, fixed: bool):
    if fixed:
        inputs = make()
        return lambda: inputs
    return rotated(make, device)
