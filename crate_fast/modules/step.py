"""What a layer asks of its step of sparsification, so that a step with another dictionary is another file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..backend import choose_backend, is_transformed
from .kept import kept_matrix

PUBLISHED_STEP = "ista"  # what files mean that name none
STEPS: dict[str, type[SparseStep]] = {}
"""The steps there are, by name: `CRATE(step=NAME)` is made of one."""


class SparseStep(nn.Module):
    """A step of sparsification: tokens (..., dim) to the same, with learned weights, a step size η and a threshold λ.

    A subclass with a name, `class Other(SparseStep, name="other")`, is a step of its own. Layers, their evaluation, the fused
    kernels, checkpoints and the count of flops know of it what it says here: its weights (`shapes`), the formula that defines
    it (`reference`), and four more, all functions of tensors with `weights` in the order of `shapes`: `fold`, `sparsify`,
    `fold_gradient` and `flops`. Where there is an M with which the step is relu(h + h M − ηλ), `fold` and `fold_gradient` are
    all there is to say: the rest is here, and the kernels run it. Where there is none, those two are left out, and `sparsify`
    says how the step is computed; its layers run by their modules. With `residual = True` a layer is z + step(LN(z)), z being
    x + MSSA(x), and `code` may say what of it is sparse.

    Args:
        dim, hidden_dim: width of a token; the published class takes it twice and uses the first.
        dropout: accepted as in the published class, which does not use it.
        step_size: η, finite and at least 0, as the next.
        lambd: λ.
        backend: see `crate_fast.choose_backend`.

    Raises:
        ValueError: η or λ is negative or not finite.
    """

    name: ClassVar[str]
    weight_names: ClassVar[tuple[str, ...]]

    residual: ClassVar[bool] = False  # whether a layer adds the step to what entered it; such layers run by their modules
    folds: ClassVar[bool]  # whether there is an M

    def __init_subclass__(cls, name: str | None = None, **options) -> None:
        super().__init_subclass__(**options)
        if name is None:
            return  # of a step that is changed or wrapped: not what layers may pass by
        if name in STEPS:
            raise ValueError(f"a step called {name!r} is there already; allowed is any other name than {', '.join(STEPS)}")
        cls.name, cls.weight_names = name, tuple(cls.shapes(1))
        cls.folds = cls.fold is not SparseStep.fold
        STEPS[name] = cls

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, shape in self.shapes(dim).items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()
        self.step_size = functional.check_positive("step_size", step_size)
        self.lambd = functional.check_positive("lambd", lambd)
        self.backend = backend

    def reset_parameters(self) -> None:
        """Draws the weights anew, in the order of `shapes`."""
        for name in self.weight_names:
            nn.init.kaiming_uniform_(getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        choice = choose_backend(self.backend, x)
        weights: list[Any] = [getattr(self, name) for name in self.weight_names]
        if choice.name == "reference":
            return self.reference(x, weights, self.step_size, self.lambd)
        kept = self.folds and not (self.training or torch.is_grad_enabled() or is_transformed())
        dtype = functional.operand_dtype(x) if choice.name == "torch" else None  # the kernels cast M themselves
        matrix = kept_matrix(self.fold, weights, self.step_size, dtype) if kept else None
        return self.sparsify(x, weights, matrix, self.step_size, self.lambd, choice.name)

    @staticmethod
    def shapes(dim: int) -> dict[str, tuple[int, ...]]:
        """Its weights by their names in the state_dict, in the order in which they are drawn, for tokens of width `dim`."""
        raise NotImplementedError

    @staticmethod
    def reference(h: Tensor, weights: Sequence[Tensor], step_size: float, lambd: float) -> Tensor:
        """The step by its formula, literally."""
        raise NotImplementedError

    @staticmethod
    def fold(weights: Sequence[Tensor], step_size: float) -> Tensor:
        """M, (dim, dim), or of weights stacked along a first axis (layers, dim, dim), in float32 or better whatever autocast
        says; differentiable."""
        raise NotImplementedError

    @staticmethod
    def fold_gradient(dm: Tensor, weights: Sequence[Tensor], step_size: float) -> tuple[Tensor, ...]:
        """The gradients of the weights, in their dtypes, from M's, float32 or better. The kernels' M is made of copies of many
        layers' weights, where autograd does not see whose they are."""
        raise NotImplementedError

    @classmethod
    def sparsify(
        cls, h: Tensor, weights: Sequence[Tensor], matrix: Tensor | None, step_size: float, lambd: float, backend: str
    ) -> Tensor:
        """The step of h, (..., dim), on "triton" or "torch", with M at hand or, where that is None, formed here."""
        cls.check(h, weights)
        matrix = cls.fold(weights, step_size) if matrix is None else matrix
        return functional.rectified_product(h, matrix, step_size * lambd, backend)

    @classmethod
    def check(cls, h: Tensor, weights: Sequence[Tensor]) -> None:
        """Raises ValueError where the weights are not those of a step for h."""
        for (name, shape), weight in zip(cls.shapes(h.shape[-1]).items(), weights, strict=True):
            if weight.shape != shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}; for h of {tuple(h.shape)} it must be {shape}")

    def code(self, h: Tensor) -> Tensor:
        """What the step makes sparse of h, (..., dim), whose sparsity `crate-fast inspect` measures: what it gives itself."""
        return self(h)

    @staticmethod
    def flops(dim: int) -> int:
        """Multiplications of a token's products, forward."""
        return dim * dim
