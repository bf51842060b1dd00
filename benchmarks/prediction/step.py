"""What a training step and an inference of CRATE launch, in order, with nothing run: our kernels and PyTorch's operations.

The model itself runs on tensors without memory (PyTorch's FakeTensor) under bfloat16 autocast, with cross-entropy and a Lion
step, as workloads.py times it. Whatever the kernels' launch code and PyTorch's dispatcher are asked for is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import crate_fast
import crate_fast.functional
from crate_fast import kernels, operators
from crate_fast.kernels import runtime, shapes, tuning
from crate_fast.model import SIZES
from crate_fast.modules import OvercompleteISTABlock, plain
from crate_fast.sizes import MAE_SIZES

from .launches import Launch, flat, specialise

IMAGE, PATCH, TOKENS, CLASSES = 224, 16, 197, 1000
PASSES = ("training", "inference")
WIDTHS = (16, 32, 48, 64, 80, 96, 128)
"""Of heads; attention alone is predicted for each."""


class Call(NamedTuple):
    """A launch of one of our kernels."""

    role: str  # under what tuning.py looks its shape up; "" if it does not
    kernel: object
    launch: Launch
    arguments: tuple
    programs: int
    bytes: int  # of all its tensors, each once

    @property
    def key(self) -> str:
        """Two calls with one key take the same time."""
        numbers = [x if isinstance(x, int | float | type(None)) else tuple(x.shape) for x in flat(self.arguments)]
        return repr((self.launch._replace(name=""), self.programs, numbers))


class Operation(NamedTuple):
    """One operation of PyTorch."""

    name: str
    bytes: int  # read and written
    flops: float
    bits: int  # of its widest floating-point input


class Recorded(NamedTuple):
    """A step: `batch` images, the calls of our kernels and the operations, in order."""

    calls: list[Call]
    operations: list[Operation]


class _Operations(TorchDispatchMode):
    """Writes down operations that compute; views and empty tensors do not."""

    def __init__(self, found: list[Operation]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = () if name.startswith("new_") else (args, kwargs)  # which take no more of a tensor than its dtype and device
        read = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        if not function.is_view and name not in _FREE and (read or written):
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            bits = max((8 * x.itemsize for x in read if x.is_floating_point()), default=32)
            written = written or tree_leaves(args[0])  # what changes its argument in place and returns nothing
            self.found.append(Operation(name, sum(map(_bytes, [*read, *written])), flops, bits))
        return result


_FREE = {
    "detach", "device", "empty", "empty_like", "new_empty", "_unsafe_view", "new_empty_strided", "empty_strided", "lift_fresh",
    "is_same_size", "sym_size", "_local_scalar_dense", "resize_",
}  # fmt: skip
"""Operations that move nothing."""


def _bytes(x: Tensor) -> int:
    """Of what a tensor shows, and no more than lies in memory: expanded ones have fewer."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@contextmanager
def _recorded(arch: int, calls: list[Call]) -> Iterator[None]:
    """While open, our kernels' launches on the CPU's tensors are written down and do nothing."""
    role = [("", None)]

    def naming(look_up):
        def named(name, *rest):
            role[0] = name, look_up(name, *rest)
            return role[0][1]

        return named

    def observer(kernel, programs, arguments, constants) -> None:
        launch = specialise(kernel, "", arguments, constants, 16)
        name, config = role[0]
        shaped = config is not None and constants.items() >= config.constants().items()
        size = sum(_bytes(x) for x in flat(arguments) if isinstance(x, Tensor))
        calls.append(Call(name if shaped else "", kernel, launch, arguments, programs, size))
        role[0] = "", None

    with ExitStack() as stack:
        stack.enter_context(tuning.assumed(arch))
        stack.enter_context(mock.patch.object(shapes, "matrix", naming(shapes.matrix)))
        stack.enter_context(mock.patch.object(shapes, "attention", naming(shapes.attention)))
        stack.enter_context(mock.patch.object(kernels, "INTERPRETED", True))  # so that the backend takes the CPU's tensors
        stack.enter_context(mock.patch.object(operators, "_is_seen", lambda argument: False))
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", lambda *arguments, **named: None))
        stack.enter_context(mock.patch.object(plain, "PLAIN", (*plain.PLAIN, FakeTensor)))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", lambda x: 0))
        stack.enter_context(runtime.observed(observer))
        yield


def record(size: str, batch: int, what: str, arch: int = 90) -> Recorded:
    """A step of CRATE-`size` ("training" or "inference") for `batch` images, with the shapes of an architecture.

    An inference is the second one: what is made of weights alone is kept from the first.
    """
    found = Recorded([], [])
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), _recorded(arch, found.calls):
        model = crate_fast.CRATE(image_size=IMAGE, patch_size=PATCH, num_classes=CLASSES, **SIZES[size], backend="triton")
        images = torch.empty(batch, 3, IMAGE, IMAGE)
        run = _training(model, images) if what == "training" else _inference(model, images)
        run()
        found.calls.clear()
        with _Operations(found.operations):
            run()
    return found


def record_mae(size: str, batch: int, arch: int = 90) -> Recorded:
    """A training step of CRATE-MAE-`size` for `batch` images; encoder and decoder both see all tokens."""
    found = Recorded([], [])
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), _recorded(arch, found.calls):
        model = crate_fast.CRATEMAE(img_size=IMAGE, patch_size=PATCH, **MAE_SIZES[size], backend="triton")
        run = _training(model, torch.empty(batch, 3, IMAGE, IMAGE), lambda images, _: model(images)[0])
        run()
        found.calls.clear()
        with _Operations(found.operations):
            run()
    return found


def inner_of(width: int) -> int:
    """The width of all heads together: about CRATE-tiny's."""
    return 384 // width * width


def record_attention(width: int, batch: int, arch: int = 90) -> Recorded:
    """Attention alone, forward and backward, in float16 with heads of a width."""
    found = Recorded([], [])
    with FakeTensorMode(), _recorded(arch, found.calls):
        w = torch.empty(batch, TOKENS, inner_of(width), dtype=torch.float16, requires_grad=True)
        out = crate_fast.functional.mssa(w, inner_of(width) // width, backend="triton")
        out.backward(torch.empty_like(out))
    return found


ODL = ("z1", "r", "z2", "out", "dD", "g2", "dr", "dD", "dD", "g1", "dD", "dh")
"""What the kernels of CRATE-α's step write, in the order of their launches."""


def record_odl(rows: int, dim: int, arch: int = 90) -> Recorded:
    """CRATE-α's step alone on tokens of a width, forward and backward under bfloat16 autocast."""
    found = Recorded([], [])
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), _recorded(arch, found.calls):
        step = OvercompleteISTABlock(dim, backend="triton")
        h = torch.empty(rows, dim, requires_grad=True)
        with _Operations(found.operations):
            out = step(h)
            out.backward(torch.empty_like(out))
    calls = [call._replace(role=f"odl {name}") for call, name in zip(found.calls, ODL, strict=True)]
    return found._replace(calls=calls)


def _training(model, images: Tensor, loss=None):
    """A step on the `loss` of images and labels; None: cross-entropy."""
    from lion_pytorch.foreach import Lion

    optimizer, labels = Lion(model.parameters(), lr=1e-5), torch.zeros(len(images), dtype=torch.long)

    if loss is None:
        loss = lambda images, labels: F.cross_entropy(model(images).float(), labels)  # noqa: E731

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(images, labels).backward()
        optimizer.step()

    return step


def _inference(model, images: Tensor):
    model.eval()

    def infer() -> None:
        with torch.no_grad():
            model(images)

    return infer
