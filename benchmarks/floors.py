"""The work that CRATE cannot avoid: flops and bytes by formula, for every row of a benchmark.

Each kernel is counted with its flops and with each input read once and each output written once; its floor is the larger of
flops over the measured product rate and bytes over the measured copy rate. Attention's score matrix is symmetric, so 1.5 of
its two products forward and 3.5 of five backward are unavoidable; weights and per-row statistics are left out.
"""

from __future__ import annotations

from typing import NamedTuple

WIDENING = 4  # of CRATE-α's dictionaries, in widths of a token


class Kernel(NamedTuple):
    """Work of one kernel: `count` launches of `flops` and `bytes` each."""

    count: int
    flops: float
    bytes: float


class Shape(NamedTuple):
    """What a floor depends on: images, tokens of an image, width, total head width, layers, bytes of an element."""

    batch: int
    tokens: int
    dim: int
    inner: int
    depth: int
    element: int
    patch_dim: int = 768
    classes: int = 1000
    step: str = "ista"  # of sparsification: "ista", or CRATE-α's "odl"


def mssa(s: Shape, what: str) -> list[Kernel]:
    """Tied attention: `what` is "forward", "backward" or "both"."""
    product = 2.0 * s.batch * s.tokens * s.tokens * s.inner
    activation = float(s.batch * s.tokens * s.inner * s.element)
    forward, backward = Kernel(s.depth, 1.5 * product, 2 * activation), Kernel(s.depth, 3.5 * product, 3 * activation)
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}[what]


def ista(s: Shape, what: str) -> list[Kernel]:
    """The ISTA step: one product forward; the data gradient and the weight gradient backward."""
    product = _product(s, s.dim, s.dim)
    activation = _activation(s, s.dim)
    forward = Kernel(s.depth, product, 2 * activation)
    backward = [Kernel(s.depth, product, 3 * activation), Kernel(s.depth, product, 2 * activation)]
    return {"forward": [forward], "backward": backward, "both": [forward, *backward]}[what]


def odl(s: Shape, what: str) -> list[Kernel]:
    """CRATE-α's step on dictionaries of four widths: four products forward, each with what follows it; backward four of data
    and four of weights, of which z₁, z₂ and r are read, and r is not computed again."""
    product, narrow, wide = _product(s, s.dim, WIDENING * s.dim), _activation(s, s.dim), _activation(s, WIDENING * s.dim)
    forward = [narrow + wide, wide + 2 * narrow, narrow + 2 * wide, wide + 2 * narrow]
    data = [narrow + 2 * wide, wide + narrow, narrow + 3 * wide, wide + 2 * narrow]
    weights = [narrow + wide] * 4
    moved = {"forward": forward, "backward": data + weights, "both": forward + data + weights}[what]
    return [Kernel(s.depth, product, bytes_moved) for bytes_moved in moved]


STEPS = {"ista": ista, "odl": odl}
PARAMETERS = {"ista": 1, "odl": 2 * WIDENING}  # of a step, in squares of the width


def layer(s: Shape, what: str) -> list[Kernel]:
    """A whole layer: projection, attention, projection back, step of sparsification."""
    wide, narrow, product = _activation(s, s.dim), _activation(s, s.inner), _product(s, s.dim, s.inner)
    forward = [
        Kernel(s.depth, product, wide + narrow),
        *mssa(s, "forward"),
        Kernel(s.depth, product, narrow + 2 * wide),
        *STEPS[s.step](s, "forward"),
    ]
    backward = [
        *STEPS[s.step](s, "backward"),
        Kernel(s.depth, product, wide + narrow),
        Kernel(s.depth, product, wide + narrow),
        *mssa(s, "backward"),
        Kernel(s.depth, product, narrow + 3 * wide),
        Kernel(s.depth, product, wide + narrow),
    ]
    return {"forward": forward, "backward": backward, "both": forward + backward}[what]


def model(s: Shape, training: bool) -> list[Kernel]:
    """Embedding, layers and head; with `training` backward and an optimizer that moves 30 bytes a parameter as well."""
    embedding = 2.0 * s.batch * (s.tokens - 1) * s.patch_dim * s.dim
    image = float(s.batch * (s.tokens - 1) * s.patch_dim * s.element)
    head = 2.0 * s.batch * s.dim * s.classes
    passes = 2 if training else 1
    kernels = layer(s, "both" if training else "forward")
    kernels.append(Kernel(1, passes * embedding, passes * image + (2 * passes - 1) * _activation(s, s.dim)))
    kernels.append(Kernel(1, (3 if training else 1) * head, 0.0))
    if training:
        of_layer = 2 * s.dim * s.inner + PARAMETERS[s.step] * s.dim**2
        parameters = s.depth * of_layer + s.patch_dim * s.dim + s.tokens * s.dim + s.dim * s.classes
        kernels.append(Kernel(1, 0.0, 30.0 * parameters))
    return kernels


def mae(s: Shape) -> list[Kernel]:
    """A training step of CRATE-MAE: encoder and decoder, each of `s.depth` layers that see all tokens, embedding and prediction
    of patches, and an optimizer that moves 30 bytes a parameter. A decoder's layer has the products of an encoder's."""
    patches = 2.0 * s.batch * (s.tokens - 1) * s.patch_dim * s.dim
    image = float(s.batch * (s.tokens - 1) * s.patch_dim * s.element)
    parameters = 2 * s.depth * (2 * s.dim * s.inner + s.dim**2) + 2 * s.patch_dim * s.dim
    return [
        *layer(s._replace(depth=2 * s.depth), "both"),
        Kernel(1, 2 * patches, 2 * image + 3 * _activation(s, s.dim)),
        Kernel(1, 3 * patches, 3 * image + 3 * _activation(s, s.dim)),
        Kernel(1, 0.0, 30.0 * parameters),
    ]


def milliseconds(kernels: list[Kernel], ceilings: dict[str, float]) -> float:
    """The least time of `kernels` on a device of measured `ceilings`."""
    flops, rate = ceilings["flops_per_second"], ceilings["bytes_per_second"]
    return 1e3 * sum(k.count * max(k.flops / flops, k.bytes / rate) for k in kernels)


def totals(kernels: list[Kernel]) -> tuple[float, float]:
    """(flops, bytes) of all."""
    return sum(k.count * k.flops for k in kernels), sum(k.count * k.bytes for k in kernels)


def _product(s: Shape, inputs: int, outputs: int) -> float:
    return 2.0 * s.batch * s.tokens * inputs * outputs


def _activation(s: Shape, width: int) -> float:
    return float(s.batch * s.tokens * width * s.element)
