"""What is measured: operations, a layer, inference, a training step, made ready to be judged (judge.py) and timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crate_fast
import floors
from crate_fast import reference, reference_alpha
from crate_fast.model import SIZES as OF_CRATE
from crate_fast.sizes import ALPHA_SIZES, MAE_SIZES
from peers import COMPILED, Peer, in_mode
from timing import rotated

IMAGE, PATCH, TOKENS, CLASSES = 224, 16, 197, 1000
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "pure bfloat16": torch.bfloat16, "pure float16": torch.float16,
}  # fmt: skip
"""By name: 16 bit means autocast, "pure" 16 bit that weights and images are of that dtype themselves."""

SIZES = (
    OF_CRATE
    | {f"alpha-{size}": sizes for size, sizes in ALPHA_SIZES.items()}
    | {f"mae-{size}": sizes for size, sizes in OF_CRATE.items()}
)
"""By name: the published sizes of CRATE, those of CRATE-α in its own patches, and those of CRATE-MAE, which has as many layers
again for its decoder and is measured in training alone."""


def largest_batch(size: str) -> int:
    """Images of a step with which a size is measured on a GPU: 1,024, or the power of two for which its layers have room."""
    room = (1 << 24) // (SIZES[size]["dim"] * SIZES[size]["depth"])
    return min(1024, 1 << (room.bit_length() - 1))


class Workload(NamedTuple):
    """One thing to do. `suite` is "ops", "layer", "inference" or "train"; `what` the operation and pass."""

    suite: str
    what: str  # "mssa forward", "ista both", "layer backward", "inference", "train"
    size: str  # of `SIZES`
    batch: int
    dtype: str

    @property
    def operation(self) -> str:
        return self.what.split()[0]

    @property
    def part(self) -> str:
        """ "forward", "backward" or "both"; of whole models "forward" or "both"."""
        return {"inference": "forward", "train": "both"}.get(self.what) or self.what.split()[1]

    @property
    def is_pure(self) -> bool:
        """Whether weights and images are 16 bit themselves, without autocast."""
        return self.dtype.startswith("pure ")

    @property
    def is_alpha(self) -> bool:
        """Whether it is CRATE-α's."""
        return self.size.startswith("alpha-")

    @property
    def is_mae(self) -> bool:
        """Whether it is CRATE-MAE's."""
        return self.size.startswith("mae-")

    @property
    def builder(self) -> str:
        """The field of `Peer` that builds such a model."""
        return "alpha" if self.is_alpha else "mae" if self.is_mae else "model"

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token among them."""
        return (IMAGE // SIZES[self.size].get("patch_size", PATCH)) ** 2 + 1

    def concerns(self, peer: Peer) -> bool:
        """Whether `peer` does such a thing: operations that are its own, a layer of this architecture, any whole model."""
        if getattr(peer, self.builder) is None or (self.is_mae and self.suite != "train"):
            return False
        if self.suite == "ops":
            return getattr(peer, self.operation) is not None
        return peer.same_function or self.suite != "layer"

    def kernels(self) -> list[floors.Kernel]:
        """The unavoidable work."""
        sizes = SIZES[self.size]
        depth = sizes["depth"] if self.suite in ("inference", "train") else 1
        inner = sizes["heads"] * sizes["dim_head"]
        element = DTYPES[self.dtype].itemsize
        patch, step = sizes.get("patch_size", PATCH), "odl" if self.is_alpha else "ista"
        shape = floors.Shape(self.batch, self.tokens, sizes["dim"], inner, depth, element, 3 * patch**2, CLASSES, step)
        if self.is_mae:
            return floors.mae(shape)
        if self.suite in ("inference", "train"):
            return floors.model(shape, training=self.suite == "train")
        return getattr(floors, self.operation)(shape, self.part)


REFERENCES = {"model": reference.CRATE, "alpha": reference_alpha.CRATEAlpha, "mae": reference.CRATEMAE}
"""The published mathematics by `Workload.builder`."""


class Masked(nn.Module):
    """A CRATE-MAE that masks the same patches at every call: of images what it predicts, or with `whole` the loss.

    Of its parameters those learn that its loss depends on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            if name.startswith("decoder_embed") or name.endswith("pos_embed"):
                parameter.requires_grad_(False)

    def forward(self, images: Tensor, whole: bool = False) -> Tensor:
        torch.manual_seed(0)
        loss, predicted, _ = self.model(images)
        return loss if whole else predicted


def learned(module: nn.Module) -> list[nn.Parameter]:
    """The parameters to which gradients are taken."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


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
    if workload.is_mae:
        arguments = {"img_size": IMAGE, "patch_size": PATCH, **MAE_SIZES[workload.size.removeprefix("mae-")]}
    torch.manual_seed(0)
    weights = REFERENCES[workload.builder](**arguments).state_dict()
    module = getattr(peer, workload.builder)(arguments)
    if peer.same_function:
        module.load_state_dict(weights)
    module = (module.transformer if workload.suite == "layer" else module).to(device)
    pure = dtype if workload.is_pure else torch.float32
    module.to(pure)
    module.train(workload.part != "forward")
    run = in_mode(module, mode)
    if workload.is_mae:  # which draws, so that no CUDA graph of it is recorded
        run = module = Masked(run)
    shape = (workload.tokens, sizes["dim"]) if workload.suite == "layer" else (3, IMAGE, IMAGE)
    wants_gradient = workload.suite == "layer" and workload.part != "forward"

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *shape, device=device).to(pure).requires_grad_(wants_gradient),)

    if replays_itself(workload, module, mode):
        with _autocast(device, workload):
            run = crate_fast.graphed(module, *inputs(workload.batch))

    def autocast_run(*arguments) -> Tensor:
        with _autocast(device, workload):
            return run(*arguments)

    return Call(autocast_run, inputs, learned(module), module)


def replays_itself(workload: Workload, module: nn.Module | None, mode: str) -> bool:
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
        tokens = torch.randn(batch, workload.tokens, width, device=device).to(dtype)
        tensors = (tokens,) if workload.operation == "mssa" else (tokens, weight.to(device, dtype))
        return tuple(tensor.requires_grad_(differentiate) for tensor in tensors)

    return Call(run, inputs, [], None)


def _autocast(device: torch.device, workload: Workload) -> AbstractContextManager:
    dtype = DTYPES[workload.dtype]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32 and not workload.is_pure)


def timed_step(workload: Workload, call: Call, device: torch.device, fixed: bool) -> tuple[Callable, Callable]:
    """(what is timed, its forward pass alone); `fixed`: on the same inputs every time, as a CUDA graph must."""
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
    """Forward, loss, backward and an optimizer's step, gradients freed in between."""
    optimizer = OPTIMIZERS[optimizer_name()](call.module.parameters())

    def make() -> tuple[Tensor, Tensor]:
        return (*call.inputs(workload.batch), torch.randint(CLASSES, (workload.batch,), device=device))

    give = _giver(make, device, fixed)

    def loss() -> Tensor:
        images, labels = give()
        if workload.is_mae:
            return call.run(images, True)
        return F.cross_entropy(call.run(images).float(), labels)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step, loss


def _lion(parameters) -> torch.optim.Optimizer:
    from lion_pytorch.foreach import Lion

    return Lion(parameters, lr=1e-5)


OPTIMIZERS = {"Lion": _lion, "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)}
"""Of a timed training step; the second moves as many bytes, but for one pass over the weights."""


def optimizer_name() -> str:
    """The one of `OPTIMIZERS` that training steps are timed with here: Lion where lion-pytorch is at hand. Rows say which."""
    return "Lion" if importlib.util.find_spec("lion_pytorch") else "SGD with momentum"


def _giver(make, device: torch.device, fixed: bool):
    if fixed:
        inputs = make()
        return lambda: inputs
    return rotated(make, device)
