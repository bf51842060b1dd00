"""Coding rates and sparsity, layer by layer (arXiv:2306.01129, section 3.1; the published vis_utils)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import check_tensor
from ..errors import InspectionError
from ..functional import check_number
from ..model.crate import CRATE
from ..model.mae import CRATEMAE
from .views import LayerView, layer_views, project

PRECISION = 0.01
"""ε² of the coding rate, which the published code calls eps."""


class Measures(NamedTuple):
    """What each layer does to each image: four float64 tensors (layers, images) on the CPU, rates in nats.

    Attributes:
        subspace_rate: R^c(Z^ℓ | U), what the published code plots: of the tokens that enter the layer.
        compressed_rate: R^c(Z^{ℓ+1/2} | U), the same after MSSA: tokens through the same LayerNorm and subspaces U.
        nonzero: share of the entries of Z^{ℓ+1}, after ISTA, that are not exactly zero, 0 to 1; of CRATE-α those of z₂.
        rate: R(Z^{ℓ+1}), of all tokens in all dimensions.
    """

    subspace_rate: Tensor
    compressed_rate: Tensor
    nonzero: Tensor
    rate: Tensor

    def rows(self) -> list[dict[str, float | int]]:
        """A dict for each layer: "layer" from 1, then NAME_mean and NAME_std over the images for each measure.

        The deviations are as published: of rates that of a sample (n − 1), of `nonzero` that of the images themselves (n); for
        a single image 0.
        """
        rows: list[dict[str, float | int]] = [{"layer": 1 + index} for index in range(len(self.rate))]
        for name, values in self._asdict().items():
            means = values.mean(dim=1)
            freedom = 0 if name == "nonzero" else 1
            deviations = values.std(dim=1, correction=freedom) if values.shape[1] > 1 else torch.zeros_like(means)
            for row, mean, deviation in zip(rows, means.tolist(), deviations.tolist(), strict=True):
                row |= {f"{name}_mean": mean, f"{name}_std": deviation}
        return rows


def coding_rate(tokens: Tensor, precision: float = PRECISION) -> Tensor:
    """½ logdet(I + p/(m·ε²) XᵀX), X the L2-normalised tokens: the nats that m tokens of p dimensions cost, up to ε.

    Computed in float64 from the smaller of the two Gram matrices, whose determinants are equal. Zero tokens stay zero.

    Args:
        tokens: (..., m, p), finite, floating point.
        precision: ε², above 0.

    Returns:
        (...), float64, at least 0; on the tokens' device, or on the CPU where that has no float64.

    Raises:
        InspectionError: a token is not finite, or the precision not above 0.
        TypeError: the tokens are no tensor of floating point, or the precision is no number.
    """
    check_tensor("tokens", tokens)
    if tokens.dim() < 2:
        raise InspectionError(f"tokens have shape {tuple(tokens.shape)}; they must be (..., tokens, dimensions)")
    if not check_number("precision", precision) > 0:
        raise InspectionError(f"precision is {precision}; it must be above 0")
    m, p = tokens.shape[-2:]
    if tokens.numel() == 0:
        return tokens.new_zeros(tokens.shape[:-2], dtype=torch.float64)
    x = _directions(tokens)
    gram = x.mT @ x if p <= m else x @ x.mT
    gram.mul_(p / (m * precision)).diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.linalg.cholesky(gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _directions(tokens: Tensor) -> Tensor:
    """The tokens at length 1, in float64; zero where they are zero."""
    x = tokens.cpu() if tokens.device.type == "mps" else tokens
    x = x.to(torch.float64, copy=True)
    peak = x.abs().amax(-1, keepdim=True)  # first, so that no square overflows or vanishes
    if not peak.isfinite().all():
        raise InspectionError("the tokens are not finite, so they have no coding rate")
    x /= peak.masked_fill_(peak == 0, 1)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div_(length.masked_fill_(length == 0, 1))


def subspace_rate(projection: Tensor, heads: int, precision: float = PRECISION) -> Tensor:
    """R^c: the coding rates of the tokens in each head's subspace, summed over heads.

    Args:
        projection: w, (batch, tokens, heads × head width), finite.
        heads: number of heads.
        precision: ε², above 0.

    Returns:
        (batch,), float64.
    """
    return coding_rate(projection.unflatten(-1, (heads, -1)).transpose(1, 2), precision).sum(-1)


def measure_layers(model: CRATE | CRATEMAE, images: Tensor | Iterable[Tensor], precision: float = PRECISION) -> Measures:
    """The measures of every layer of `model` for every image.

    Args:
        model: on any device, in any mode, which it keeps; of a CRATEMAE its encoder is measured, no patch masked.
        images: (batch, channels, height, width), normalised as in training and on the model's device, or several such
            batches.
        precision: ε² of the coding rates, above 0.

    Raises:
        InspectionError: there are no images or no layers, or a layer's tokens are not finite.
        TypeError, ValueError: as `layer_views`.
    """
    batches = [images] if isinstance(images, Tensor) else images
    measured = [_measure_batch(model, batch, precision) for batch in batches if len(batch)]
    if not measured:
        raise InspectionError("there are no images to measure")
    return Measures(*(torch.cat(parts, dim=1) for parts in zip(*measured, strict=True)))


@torch.no_grad()
def _measure_batch(model: CRATE | CRATEMAE, images: Tensor, precision: float) -> Measures:
    layers = []
    for number, view in enumerate(layer_views(model, images), start=1):
        try:
            measured = measures_of(view, precision)
        except InspectionError as error:
            raise InspectionError(f"layer {number}: {error}") from error
        layers.append([value.cpu() for value in measured])
    if not layers:
        raise InspectionError("the model has no layers to measure")
    return Measures(*(torch.stack(values) for values in zip(*layers, strict=True)))


def measures_of(view: LayerView, precision: float = PRECISION) -> Measures:
    """Those of one layer: (batch,) each; raises InspectionError where its tokens are not finite."""
    return Measures(
        subspace_rate(view.projection, view.heads, precision),
        subspace_rate(project(view.layer, view.compressed), view.heads, precision),
        nonzero_share(view.code),
        coding_rate(view.tokens, precision),
    )


def nonzero_share(tokens: Tensor) -> Tensor:
    """The share of entries that are not exactly zero: (batch, tokens, dim) to (batch,), float64 on the CPU, 0 to 1."""
    return tokens.ne(0).flatten(1).sum(1).cpu().double() / (tokens.shape[1] * tokens.shape[2])
