"""The published mathematics of CRATE-α, step by step, in plain PyTorch at any precision.

This file defines correctness for `crate_fast.CRATEAlpha`, as reference.py does for CRATE. It is written to be read beside the
paper (Yang et al., "Scaling White-Box Transformers for Vision", arXiv:2405.20299), imports torch and reference.py alone, and
makes no attempt to be fast. `CRATEAlpha` here has the constructor, the parameter names and the order of random draws of the
class that is published in PyTorch, so one seed gives one model in both. LayerScale is of the class published in JAX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .reference import Attention, check_numbers

WIDENING = 4  # atoms of a dictionary, in widths of a token
EPS = 1e-6  # of a layer's LayerNorms; the head's is PyTorch's own, 1e-5


def sparse_code(h: Tensor, d: Tensor, step_size: float = 0.1, lambd: float = 0.1) -> Tensor:
    """Two steps of ISTA, from zero, on min over z ≥ 0 of ½‖h − D z‖² + λ‖z‖₁, for tokens in rows.

        z₁ = relu(η Dᵀh − ηλ)
        z₂ = relu(z₁ + η Dᵀ(h − D z₁) − ηλ)

    Args:
        h: (..., dim) tokens.
        d: (dim, 4 dim), the overcomplete dictionary D.
        step_size: η.
        lambd: λ, the price of a non-zero entry.

    Returns:
        (..., 4 dim), z₂, at least 0 everywhere.

    Raises:
        ValueError: η or λ is negative or not finite.
    """
    check_numbers(step_size, lambd)
    z1 = torch.relu(step_size * torch.matmul(h, d) - step_size * lambd)
    lasso_gradient = torch.matmul(torch.matmul(z1, d.t()) - h, d)
    return torch.relu(z1 - step_size * lasso_gradient - step_size * lambd)


def odl(h: Tensor, d: Tensor, d1: Tensor, step_size: float = 0.1, lambd: float = 0.1) -> Tensor:
    """Overcomplete dictionary learning without its residual: D₁ z₂, `sparse_code` of h by D decoded with another dictionary.

    Args:
        h: (..., dim) tokens.
        d, d1: (dim, 4 dim), D and D₁.
        step_size, lambd: η and λ.

    Returns:
        (..., dim).
    """
    return torch.matmul(sparse_code(h, d, step_size, lambd), d1.t())


class PreNorm(nn.Module):
    """`fn` of the layer-normalised input, with LayerScale times learned numbers, `init_values` at first."""

    def __init__(self, dim: int, fn: nn.Module, init_values: float | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fn = fn
        self.scale = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.fn(self.norm(x))
        return out if self.scale is None else out * self.scale


class OvercompleteISTABlock(nn.Module):
    """`odl` with learned dictionaries."""

    def __init__(self, dim: int, step_size: float, lambd: float) -> None:
        super().__init__()
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, WIDENING * dim)))
        self.D1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, WIDENING * dim)))
        self.step_size, self.lambd = step_size, lambd

    def forward(self, x: Tensor) -> Tensor:
        return odl(x, self.D, self.D1, self.step_size, self.lambd)


class Transformer(nn.Module):
    """Layers of x ← x + MSSA(LN(x)), then x ← x + ODL(LN(x))."""

    def __init__(self, dim: int, depth: int, block: tuple[int, int, float], step: tuple[float, float], scale) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()  # of pairs, which its type cannot say
        for _ in range(depth):
            attention = PreNorm(dim, Attention(dim, *block, out_bias=False), scale)
            self.layers.append(nn.ModuleList([attention, PreNorm(dim, OvercompleteISTABlock(dim, *step), scale)]))

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.layers:
            x = attention(x) + x
            x = sparsify(x) + x
        return x


class CRATEAlpha(nn.Module):
    """The published CRATE-α classifier; `ista`, `lambd`, fixed at 0.1 in PyTorch, and `init_values` are those of JAX."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        ista: float = 0.1,
        lambd: float = 0.1,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, (heads, dim_head, dropout), (ista, lambd), init_values)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.dropout(x + self.pos_embedding[:, : x.shape[1]])
        return self.mlp_head(self.transformer(x)[:, 0])
