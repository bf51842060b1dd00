"""Kernels launched and bytes moved by a layer, forward and backward: ours and the published code's, counted as they run.

    python benchmarks/run.py --suite traffic [--model mae-tiny]

Ours run in Triton's interpreter on a small shape; every launch is counted, and of every load and store the distinct
addresses, so that an element read by two programs of a kernel counts once, as it does for a GPU whose cache holds it. The
published code runs under 16-bit autocast; every operation that is not a mere view counts as one kernel that reads its inputs
and writes its results once. Weights, and statistics of less than a row's width, are told apart from activations.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # addresses can be counted only where Python executes them

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crate_fast import CRATE, CRATEMAE, reference
from crate_fast.kernels import INTERPRETED, runtime

# A prime number of tokens, so that only activations and row statistics have a size that it divides.
BATCH, TOKENS, DIM, HEADS = 1, 37, 64, 2


class Traffic(NamedTuple):
    """One kernel: its name, and bytes a token of activations, of row statistics, and bytes of weights, read and written."""

    name: str
    activations: float
    statistics: float
    weights: int


class _Touched:
    """The distinct addresses that a launch reads and writes."""

    def __init__(self) -> None:
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes of `tensor` read, and bytes written."""
        first = tensor.untyped_storage().data_ptr()
        last = first + tensor.untyped_storage().nbytes()
        total = 0
        for blocks in (self.read, self.written):
            if blocks:
                addresses = np.unique(np.concatenate(blocks))
                total += int(((addresses >= first) & (addresses < last)).sum()) * tensor.element_size()
        return total


@contextmanager
def _recorded(touched: _Touched) -> Iterator[None]:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def recording_load(ptrs, mask, *rest, **named):
        touched.read.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return load(ptrs, mask, *rest, **named)

    def recording_store(ptrs, value, mask, *rest, **named):
        touched.written.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return store(ptrs, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = recording_load, recording_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def count_kernels(run) -> list[Traffic]:
    """The kernels of `run()`, in order.

    Raises:
        RuntimeError: Triton was imported before the interpreter was asked for.
    """
    if not INTERPRETED:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    found: list[Traffic] = []
    pending: list[tuple[str, list[Tensor], _Touched]] = []

    def close() -> None:
        if pending:
            found.append(_summarise(*pending.pop()))

    touched = _Touched()

    def observer(kernel, programs, arguments, constants) -> None:
        close()
        touched.read, touched.written = [], []
        pending.append(
            (kernel.fn.__name__, [a for a in torch.utils._pytree.tree_leaves(arguments) if isinstance(a, Tensor)], touched)
        )

    with runtime.observed(observer), _recorded(touched):
        run()
    close()
    return found


def _summarise(name: str, tensors: list[Tensor], touched: _Touched) -> Traffic:
    rows, seen, sums = BATCH * TOKENS, set(), Counter()
    for tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in seen:
            seen.add(storage)
            sums[_class_of(tensor, rows)] += touched.bytes_of(tensor)
    return Traffic(
        name.strip("_").removesuffix("_kernel"), sums["activation"] / rows, sums["statistics"] / rows, sums["weight"]
    )


def _class_of(tensor: Tensor, rows: int) -> str:
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    if elements % rows:
        return "weight"
    return "activation" if tensor.numel() // rows >= DIM else "statistics"


class _Operations(TorchDispatchMode):
    """Every operation that computes, as a kernel that reads its inputs and writes its results once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Traffic] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _FREE and results:
            inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.found.append(self._traffic(name, [*inputs, *results]))
        return result

    @staticmethod
    def _traffic(name: str, tensors: list[Tensor]) -> Traffic:
        rows, sums = BATCH * TOKENS, Counter()
        for tensor in tensors:
            elements = tensor.numel()
            kind = "weight" if elements % rows else "activation" if elements // rows >= min(DIM, TOKENS) else "statistics"
            sums[kind] += elements * tensor.element_size()
        return Traffic(name, sums["activation"] / rows, sums["statistics"] / rows, sums["weight"])


_FREE = {"detach", "empty", "empty_like", "new_empty", "_unsafe_view", "new_empty_strided", "empty_strided", "lift_fresh"}
"""Operations that move nothing."""


ROWS = {"CRATE": ("layer",), "CRATE-MAE": ("encoder", "decoder")}
"""Of each model the kinds of layers."""
OF_MAE = {"encoder": "blocks", "decoder": "decoder_blocks"}


def _layers(depth: int, ours: bool, kind: str) -> nn.Module:
    """`depth` layers in a row, (batch, tokens, dim) to the same."""
    fused = dict(backend="triton", stream="float16") if ours else {}
    if kind not in OF_MAE:
        sizes = dict(image_size=8, patch_size=4, num_classes=3, dim=DIM, depth=depth, heads=HEADS, dim_head=DIM // HEADS)
        return (CRATE if ours else reference.CRATE)(**sizes, **fused).transformer
    sizes = dict(img_size=8, patch_size=4, embed_dim=DIM, depth=depth, num_heads=HEADS)
    blocks = getattr((CRATEMAE if ours else reference.CRATEMAE)(**sizes, **fused), OF_MAE[kind])
    return blocks if ours else nn.Sequential(*blocks)


@cache
def layer_traffic(ours: bool, kind: str) -> dict[str, list[Traffic]]:
    """The kernels of one layer under float16 autocast with a float16 stream: "forward" and "backward".

    kind: "layer" of a CRATE; "encoder" or "decoder" of a CRATE-MAE.
    """
    torch.manual_seed(0)
    passes = {}
    for depth in (2, 3):
        transformer = _layers(depth, ours, kind)
        x = torch.randn(BATCH, TOKENS, DIM, requires_grad=True)
        outs = []

        def forward(transformer=transformer, x=x, outs=outs) -> None:
            with torch.autocast("cpu", dtype=torch.float16):
                outs.append(transformer(x))

        def backward(outs=outs) -> None:
            outs[0].sum().backward()

        passes[depth] = [_kernels_of(run, ours) for run in (forward, backward)]
    # What three layers do more than two is what a layer does; the ends of the stack fall out.
    return {name: _difference(passes[2][i], passes[3][i]) for i, name in enumerate(("forward", "backward"))}


def _kernels_of(run, ours: bool) -> list[Traffic]:
    if ours:
        return count_kernels(run)
    with _Operations() as operations:
        run()
    return operations.found


def _difference(fewer: list[Traffic], more: list[Traffic]) -> list[Traffic]:
    left = Counter(fewer)
    kept = []
    for kernel in more:
        if left[kernel]:
            left[kernel] -= 1
        else:
            kept.append(kernel)
    return kept


def print_traffic(model: str) -> int:
    """The table of both for a layer of each kind that `model` has, and their sums; the exit status."""
    print(f"one layer, {BATCH} × {TOKENS} tokens, width {DIM}, {HEADS} heads; bytes a token as multiples of the width")
    for kind, (who, ours) in product(ROWS[model], (("crate_fast", True), ("published", False))):
        for part, kernels in layer_traffic(ours, kind).items():
            moved = sum(k.activations for k in kernels) / DIM
            print(f"\n{who}, {kind}, {part}: {len(kernels)} kernels, {moved:.1f}·dim bytes a token")
            print(f"  {'kernel':28} {'activations':>12} {'statistics':>11} {'weights, bytes':>15}")
            for kernel in kernels:
                print(f"  {kernel.name:28} {kernel.activations / DIM:8.2f}·dim {kernel.statistics:9.1f} B {kernel.weights:15,}")
    print("\nscores of the published attention count as activations: they grow with the number of tokens, not with dim")
    return 0


if __name__ == "__main__":
    raise SystemExit(print_traffic(sys.argv[1] if len(sys.argv) > 1 else "CRATE"))
