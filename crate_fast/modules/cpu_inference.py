"""What evaluation computes on "torch" when nothing is differentiated, watched or cast: operators that compilers leave whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import functional
from .plain import PLAIN, keeps_nothing

_ATTRIBUTE = "_crate_fast_kept"  # of a dictionary D
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Kept(NamedTuple):
    """M, beside the proof of what it was made of; on the D it belongs to, so that it goes when that goes."""

    source: Tensor  # a copy of D, (dim, dim)
    step_size: float
    operator: Tensor  # M, (dim, dim)

    def __reduce__(self):
        return set, ()  # copies and pickles of D hold nothing, in a type that every unpickler knows


def kept_operator(weight: Tensor, step_size: float) -> Tensor:
    """`functional.ista_operator`; on a CPU kept from call to call, as long as D is bit for bit what it was made of.

    Nothing but the contents tells: fused optimizers, writes through `.data`, NumPy and shared memory move no version counter.
    A comparison reads 2·dim² values, where M costs 2·dim³ operations; on a GPU the host would have to wait for it.
    """
    if weight.device.type != "cpu" or type(weight) not in PLAIN or keeps_nothing() or is_in_torch_dispatch_mode():
        return functional.ista_operator(weight, step_size)
    kept = getattr(weight, _ATTRIBUTE, None)
    if not (isinstance(kept, Kept) and kept.step_size == step_size and _same_bits(kept.source, weight)):
        with torch.inference_mode(False), torch.no_grad():
            source = weight.detach().clone()  # M is made of the copy: another process may be writing
            kept = Kept(source, step_size, functional.ista_operator(source, step_size))
        setattr(weight, _ATTRIBUTE, kept)
    return kept.operator


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit: NaN is itself, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = torch.int64 if all(map(_is_words, (a, b))) else _INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


def _is_words(x: Tensor) -> bool:
    """Whether the rows of x may be read in words of eight bytes."""
    size = x.element_size()
    in_step = x.storage_offset() * size % 8 == 0 and x.shape[-1] * size % 8 == 0
    return in_step and x.is_contiguous()  # pyright: ignore[reportReturnType] (nothing is symbolic here)


@torch.library.custom_op("crate_fast::evaluated_layer", mutates_args=())
def evaluated_layer(
    x: Tensor,
    weights: list[Tensor],
    heads: int,
    scale: float,
    eps_mssa: float,
    eps_ista: float,
    step_size: float,
    lambd: float,
) -> Tensor:
    """A plain layer of (batch, tokens, dim), its `weights` as `Layer.weights` gives them.

    One operator, so that M is kept from call to call under torch.compile too.
    """
    norm1_weight, norm1_bias, project, out_weight, out_bias, norm2_weight, norm2_bias, dictionary = weights
    width = x.shape[-1:]
    w = F.linear(F.layer_norm(x, width, norm1_weight, norm1_bias, eps_mssa), project)
    z = F.linear(functional.attend(w, heads, scale), out_weight, out_bias).add_(x)
    h = F.layer_norm(z, width, norm2_weight, norm2_bias, eps_ista)
    return functional.ista_with_operator(h, dictionary, kept_operator(dictionary, step_size), step_size, lambd, "torch")


@evaluated_layer.register_fake
def _(x, weights, heads, scale, eps_mssa, eps_ista, step_size, lambd):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("crate_fast::evaluated_embedding", mutates_args=())
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
    tokens = F.linear(F.layer_norm(patches, (size,), patch_weight, patch_bias, eps[0]), weight, bias)
    tokens = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps[1])
    embedded = tokens.new_empty(batch, 1 + count, norm_weight.shape[0])
    embedded[:, :1] = class_token + positions[:, :1]
    torch.add(tokens, positions[:, 1 : 1 + count], out=embedded[:, 1:])
    return embedded


@evaluated_embedding.register_fake
def _(image, weights, patch_size, eps):
    batch, _, height, width = image.shape
    count = (height // patch_size[0]) * (width // patch_size[1])
    return image.new_empty(batch, 1 + count, weights[4].shape[0])


def _patches(image: Tensor, height: int, width: int) -> Tensor:
    """(batch, channels, height, width) to (batch, patches, values), values in the order of rows, columns, channels.

    Channels come together first: then whole rows of a patch are copied, 0.65 instead of 1.55 ms for 8 images of 224 pixels.
    """
    image = image.permute(0, 2, 3, 1).contiguous()
    grid = image.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # batch, rows, height, columns, width, channels
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)
