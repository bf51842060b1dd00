"""The published step of sparsification: ISTA on a square dictionary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional, reference
from .step import SparseStep


class FeedForward(SparseStep, name="ista"):
    """The ISTA step on a learned dictionary `weight`, D (arXiv:2306.01129, equation 17); arguments as of `SparseStep`.

    In evaluation without gradients, on a CPU, M = η(D − DᵀD) is kept beside a copy of the `weight` it was made of, and used
    again where that is still the same to the bit; else every call forms it.
    """

    @staticmethod
    def shapes(dim: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (dim, dim)}

    @staticmethod
    def reference(h: Tensor, weights: Sequence[Tensor], step_size: float, lambd: float) -> Tensor:
        return reference.ista(h, weights[0], step_size, lambd)

    @staticmethod
    def fold(weights: Sequence[Tensor], step_size: float) -> Tensor:
        return functional.ista_matrix(weights[0], step_size)

    @staticmethod
    def fold_gradient(dm: Tensor, weights: Sequence[Tensor], step_size: float) -> tuple[Tensor]:
        """dD = η(dM − D(dM + dMᵀ)), in two products' worth of launches."""
        d = weights[0].to(dm.dtype)
        dd = torch.addmm(dm, d, dm + dm.t(), beta=step_size, alpha=-step_size)
        return (dd if dd.dtype is weights[0].dtype else dd.to(weights[0].dtype),)

    @classmethod
    def sparsify(
        cls, h: Tensor, weights: Sequence[Tensor], matrix: Tensor | None, step_size: float, lambd: float, backend: str
    ) -> Tensor:
        if matrix is not None or cls.fold is not FeedForward.fold:  # which a subclass may have changed
            return super().sparsify(h, weights, matrix, step_size, lambd, backend)
        cls.check(h, weights)
        return functional.ista_step(h, weights[0], step_size, lambd, backend)

    @classmethod
    def check(cls, h: Tensor, weights: Sequence[Tensor]) -> None:
        functional.check_ista(h, weights[0])
