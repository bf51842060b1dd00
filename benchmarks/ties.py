"""Judging where a relu stands between: on which side of its threshold an entry within rounding of it falls is chance.

One such entry on the other side moves a gradient by more than all rounding does, and another processor, which sums in another
order, moves others. So what a computation in few bits gives is compared with float64 on the computation's own sides, and
the sides are judged by themselves: only entries within rounding of the threshold may be on the wrong one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from crate_fast import kernels

WITHIN = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""How far from the threshold, which lies in entries of about 1, rounding can turn one."""


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """A list that grows, while open, by which entries are above the threshold in the result of each call of `torch.relu`, and
    of each layer and ISTA step that kernels run."""
    sides = []

    def recording(call: Callable, values: Callable = lambda result: result) -> Callable:
        def called(*arguments):
            result = call(*arguments)
            sides.append(values(result).detach() > 0)
            return result

        return called

    with (
        mock.patch.object(torch, "relu", recording(torch.relu)),
        mock.patch.object(kernels.ISTA, "apply", recording(kernels.ISTA.apply)),
        mock.patch.object(kernels, "fused_layer", recording(kernels.fused_layer, lambda state: state.x)),
    ):
        yield sides


@contextmanager
def replayed(sides: list[Tensor]) -> Iterator[list[Tensor]]:
    """While open, each call of `torch.relu` keeps the entries of the next of `sides`; a list that grows by what stood on the
    other side. IndexError or AssertionError if there are too few sides or too many."""
    left, turned = list(sides), []

    def relu(x: Tensor) -> Tensor:
        kept = left.pop(0)
        turned.append(x.detach()[(x > 0) != kept])
        return torch.where(kept, x, 0)

    with mock.patch.object(torch, "relu", relu):
        yield turned
    assert not left


@contextmanager
def resolved(sides: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """`replayed`, of `sides` that were computed in `dtype`; AssertionError if one is on the wrong side that is not within
    rounding of the threshold."""
    with replayed(sides) as turned:
        yield
    assert all(x.abs().lt(WITHIN[dtype]).all() for x in turned)
