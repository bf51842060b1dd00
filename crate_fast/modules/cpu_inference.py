"""What evaluation computes on "torch" when nothing is differentiated, watched or cast: operators that compilers leave whole."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..cpu_products import linear
from ..operators import operator
from .kept import kept_matrix
from .step import STEPS


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _layer_flops(x, weights, heads, scale, eps_mssa, eps_step, step, step_size, lambd) -> int:
    """M is kept, and forming it counts for nothing."""
    tokens, dim = x.shape[1:]
    return 2 * x.shape[0] * tokens * (2 * len(weights[2]) * (dim + tokens) + STEPS[step].flops(dim))


@operator(fake=_like, flops=_layer_flops)
def evaluated_layer(
    x: Tensor,
    weights: list[Tensor],
    heads: int,
    scale: float,
    eps_mssa: float,
    eps_step: float,
    step: str,
    step_size: float,
    lambd: float,
) -> Tensor:
    """A plain layer of (batch, tokens, dim), its `weights` as `Layer.weights` gives them, its step of sparsification by name.

    One operator, so that M is kept from call to call under torch.compile too.
    """
    norm1_weight, norm1_bias, project, out_weight, out_bias, norm2_weight, norm2_bias, *of_step = weights
    width = x.shape[-1:]
    w = linear(F.layer_norm(x, width, norm1_weight, norm1_bias, eps_mssa), project)
    # Between its products a layer of 16 bit computes in float32, as under autocast, and rounds its result once: three roundings
    # of the stream a layer, as the published code has them, are what its error is made of.
    wide = torch.promote_types(x.dtype, torch.float32)
    z = linear(functional.attend(w, heads, scale), out_weight, out_bias).to(wide).add_(x)
    h = F.layer_norm(z, width, norm2_weight.to(wide), norm2_bias.to(wide), eps_step)
    sparse = STEPS[step]
    operand = x.dtype if wide != x.dtype else functional.operand_dtype(x)
    matrix = kept_matrix(sparse.fold, of_step, step_size, operand) if sparse.folds else None
    with torch.autocast(x.device.type, x.dtype) if wide != x.dtype else nullcontext():
        return sparse.sparsify(h, of_step, matrix, step_size, lambd, "torch").to(x.dtype)


def _embedded_shape(image, weights, patch_size, eps):
    batch, _, height, width = image.shape
    count = (height // patch_size[0]) * (width // patch_size[1])
    return image.new_empty(batch, 1 + count, weights[4].shape[0])


def _embedding_flops(image, weights, patch_size, eps) -> int:
    return 2 * image.numel() * len(weights[2])


@operator(fake=_embedded_shape, flops=_embedding_flops)
def evaluated_embedding(image: Tensor, weights: list[Tensor], patch_size: list[int], eps: list[float]) -> Tensor:
    """The class token and the embedded patches, with their positions: (batch, 1 + patches, dim).

    One operator, because torch.compile fuses the LayerNorm of patches into reading them with a stride, several times: 16.9 ms
    where the modules one by one take 11.5, for 8 images of 224 pixels on two cores of an EPYC.

    Args:
        image: (batch, channels, height, width).
        weights: of the patches' LayerNorm (weight, bias), the Linear (weight, bias), the tokens' LayerNorm (weight, bias),
            then the class token (1, 1, dim) and the positions (1, at least 1 + patches, dim).
        patch_size: height and width of a patch.
        eps: of the two LayerNorms.
    """
    patch_weight, patch_bias, weight, bias, norm_weight, norm_bias, class_token, positions = weights
    patches = _patches(image, *patch_size)
    batch, count, size = patches.shape
    tokens = linear(F.layer_norm(patches, (size,), patch_weight, patch_bias, eps[0]), weight, bias)
    tokens = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps[1])
    embedded = tokens.new_empty(batch, 1 + count, norm_weight.shape[0])
    embedded[:, :1] = class_token + positions[:, :1]
    torch.add(tokens, positions[:, 1 : 1 + count], out=embedded[:, 1:])
    return embedded


def _patches(image: Tensor, height: int, width: int) -> Tensor:
    """(batch, channels, height, width) to (batch, patches, values), values in the order of rows, columns, channels.

    Channels come together first: then whole rows of a patch are copied, 0.65 instead of 1.55 ms for 8 images of 224 pixels.
    """
    image = image.permute(0, 2, 3, 1).contiguous()
    grid = image.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # batch, rows, height, columns, width, channels
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)
