"""Judging where a relu stands between: on which side of its threshold an entry within rounding of it falls is chance.

One such entry on the other side moves a gradient by more than all rounding does, and another processor, which sums in another
order, moves others. So what a computation in few bits gives is compared with float64 on the computation's own sides, and
the sides are judged by themselves: only entries within rounding of the threshold may be on the wrong one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

WITHIN = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""How far from the threshold, which lies in entries of about 1, rounding can turn one."""


def sides(transformer: torch.nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    """Which entries of each layer's result are above the threshold, where `out` is what they make of x in this context."""
    layers, found = transformer.layers, []
    try:
        for depth in range(1, len(layers)):
            transformer.layers = layers[:depth]
            found.append(transformer(x) > 0)
    finally:
        transformer.layers = layers
    return [*found, out > 0]


@contextmanager
def resolved(sides: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """While open, each call of `torch.relu` keeps the entries of the next of `sides`, which were computed in `dtype`.

    AssertionError if one is on the wrong side that is not within rounding of the threshold, or if there are too many sides.
    """
    left = list(sides)

    def relu(x: Tensor) -> Tensor:
        kept = left.pop(0)
        assert x[(x > 0) != kept].abs().lt(WITHIN[dtype]).all()
        return torch.where(kept, x, 0)

    with mock.patch.object(torch, "relu", relu):
        yield
    assert not left
