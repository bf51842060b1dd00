"""The CRATE-α classifier: CRATE with an overcomplete dictionary, two of them, and a residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import check_number
from ..modules.odl import OvercompleteISTABlock
from ..reference_alpha import EPS
from ..sizes import ALPHA_SIZES
from .crate import CRATE
from .transformer import Transformer


class CRATEAlpha(CRATE):
    """A white-box vision transformer that scales (Yang et al., "Scaling White-Box Transformers for Vision", arXiv:2405.20299).

    Takes the arguments of the class published in PyTorch, draws the same weights from the same seed, and has the same
    state_dict. A layer is z ← x + MSSA(LN(x)), x ← z + ODL(LN(z)), with ODL as `crate_fast.modules.OvercompleteISTABlock` has
    it; the head reads the class token. On a GPU its attention and its steps of sparsification are fused operators, and all else
    PyTorch's.

    Args:
        image_size: side of the image in pixels, or (height, width).
        patch_size: side of a patch in pixels, or (height, width); must divide `image_size`.
        num_classes: number of logits.
        dim: width of a token; the dictionaries are (dim, 4 dim).
        depth: number of layers.
        heads: attention heads (subspaces) of a layer.
        channels: channels of an image.
        dim_head: width of a head.
        dropout: on attention probabilities and after the attention's projection back.
        emb_dropout: on the embedded tokens.
        ista: step size η, 0.1 as published.
        lambd: threshold λ, 0.1 as published.
        backend: "triton", "torch", "reference" or "auto"; see `crate_fast.choose_backend`.
        drop_path: stochastic depth, in training: the share of a batch's images for which the last layer leaves out a step, of
            the two each by itself; 0 in the first layer, linearly more from layer to layer.
        init_values: of LayerScale, learned factors on what each step adds; None: without it, as in PyTorch.

    Raises: as `crate_fast.CRATE`.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
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
        backend: str = "auto",
        drop_path: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        self._init_values = None if init_values is None else check_number("init_values", init_values)
        sizes: dict[str, Any] = dict(image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim)
        sizes |= dict(depth=depth, heads=heads, channels=channels, dim_head=dim_head)
        numbers: dict[str, Any] = dict(dropout=dropout, emb_dropout=emb_dropout, ista=ista, lambd=lambd, drop_path=drop_path)
        super().__init__(**sizes, **numbers, backend=backend, step=OvercompleteISTABlock.name)

    @property
    def init_values(self) -> float | None:
        """What LayerScale was at first; None without it."""
        return self._init_values

    def _make_embedding(self, dim: int) -> None:
        self.conv1 = nn.Conv2d(self.channels, dim, kernel_size=self.patch_size, stride=self.patch_size)

    def _made_layers(self, *sizes) -> Transformer:
        return Transformer(*sizes, eps=EPS, out_bias=False, init_values=self._init_values)

    def _embedding(self) -> nn.Module:
        return self.conv1

    def embed_patches(self, image: Tensor) -> Tensor:
        return self.conv1(image).flatten(2).transpose(1, 2)

    def _embeds_at_once(self, image: Tensor) -> bool:
        return False

    @torch.no_grad()
    def reset_for_training(self) -> None:
        """Draws all weights anew as the code published in JAX does, by which the published models were trained.

        The class published in PyTorch, for inference, draws others: dictionaries half as large, positions fifty times.
        """
        self.reset_parameters()  # norms and LayerScale are the same
        nn.init.kaiming_uniform_(self.conv1.weight)
        for layer in self.transformer.modules():
            if isinstance(layer, OvercompleteISTABlock):
                for dictionary in (layer.D, layer.D1):
                    nn.init.kaiming_uniform_(dictionary, mode="fan_out")  # JAX's fan in: the first axis
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        head: Any = self.mlp_head[1]
        patches: Any = self.conv1
        nn.init.normal_(self.cls_token, std=1e-6)
        for weight in (self.pos_embedding, head.weight):
            nn.init.normal_(weight, std=0.02)
        for bias in (patches.bias, head.bias):
            bias.zero_()


def build(size: str, num_classes: int = 1000, **options) -> CRATEAlpha:
    """A CRATEAlpha of a published size for 224 px, in its published patches unless `options` have others."""
    arguments: dict[str, Any] = dict(image_size=224, num_classes=num_classes)
    arguments |= ALPHA_SIZES[size] | options
    return CRATEAlpha(**arguments)


def CRATEAlpha_tiny(num_classes: int = 1000, **options) -> CRATEAlpha:
    """CRATE-α-Ti/16: width 192, 12 layers, 3 heads. `options` are keywords of `CRATEAlpha`."""
    return build("tiny", num_classes, **options)


def CRATEAlpha_small(num_classes: int = 1000, **options) -> CRATEAlpha:
    """CRATE-α-S/16: width 576, 12 layers, 12 heads. `options` are keywords of `CRATEAlpha`."""
    return build("small", num_classes, **options)


def CRATEAlpha_base(num_classes: int = 1000, **options) -> CRATEAlpha:
    """CRATE-α-B/16: width 768, 12 layers, 12 heads; published for patches of 32, 16 and 8 too (`patch_size`); 72,328,936
    parameters. `options` are keywords of `CRATEAlpha`."""
    return build("base", num_classes, **options)


def CRATEAlpha_large(num_classes: int = 1000, **options) -> CRATEAlpha:
    """CRATE-α-L/14: width 1024, 24 layers, 16 heads; published for patches of 32, 14 and 8 (`patch_size`); 253,650,920
    parameters. `options` are keywords of `CRATEAlpha`."""
    return build("large", num_classes, **options)


def CRATEAlpha_huge(num_classes: int = 1000, **options) -> CRATEAlpha:
    """CRATE-α-H/14: width 1280, 32 layers, 16 heads of width 80. `options` are keywords of `CRATEAlpha`."""
    return build("huge", num_classes, **options)
