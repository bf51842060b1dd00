"""The step of CRATE-MAE's decoder: codes back to what they stand for, by one product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from .. import cpu_products
from .step import SparseStep


class Dictionary(SparseStep, name="dictionary"):
    """h Wᵀ, nothing added and nothing rectified (arXiv:2404.02446); arguments as of `SparseStep`, η and λ count for nothing."""

    @staticmethod
    def shapes(dim: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (dim, dim)}

    @staticmethod
    def reference(h: Tensor, weights: Sequence[Tensor], step_size: float, lambd: float) -> Tensor:
        return linear(h, weights[0])

    @classmethod
    def sparsify(
        cls, h: Tensor, weights: Sequence[Tensor], matrix: Tensor | None, step_size: float, lambd: float, backend: str
    ) -> Tensor:
        cls.check(h, weights)
        return cpu_products.linear(h, weights[0])
