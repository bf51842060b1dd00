"""Tensors and modules that are not what kernels are made for: read as PyTorch reads them, or left to the modules."""

import copy

import pytest
import torch
from torch import nn

from crate_fast import CRATE, functional
from crate_fast.kernels.runtime import readable

LAYER = dict(image_size=8, patch_size=4, num_classes=5, dim=64, depth=2, heads=4, dim_head=16)


def negative(*shape: int) -> torch.Tensor:
    """Numbers that stand in memory with the other sign, as PyTorch leaves them after `conj().imag`."""
    x = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x


def results(run, *inputs: torch.Tensor, gradient: torch.Tensor | None = None) -> list[torch.Tensor]:
    """run(*inputs) and its gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) if gradient is None else gradient)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def layers(backend: str) -> nn.Module:
    torch.manual_seed(0)
    return CRATE(**LAYER, backend=backend).transformer


def test_negative_views_keep_their_sign():
    torch.manual_seed(0)
    w, h, gradient, d = negative(2, 5, 64), negative(2, 5, 64), negative(2, 5, 64), torch.randn(64, 64) / 8

    def both(backend: str) -> list[torch.Tensor]:
        attended = results(lambda w: functional.mssa(w, 4, backend=backend), w, gradient=gradient)
        shrunk = results(lambda h: functional.ista(h, d, backend=backend), h, gradient=gradient)
        return attended + shrunk + results(layers(backend), h, gradient=gradient)

    assert_same(both("triton"), both("reference"))


def test_columns_too_far_apart_for_32_bits_are_brought_together():
    far = torch.empty_strided((2, 64), (1, 2**25), device="meta")
    near = torch.empty_strided((2, 64), (1, 2**24), device="meta")
    assert readable(far).stride() == (64, 1)
    assert readable(near) is near


def test_overflowing_scores_that_do_not_count_leave_no_nan():
    w = torch.full((1, 40, 16), 1e25)
    w[:, 32:] = -1e15  # their scores against all tokens before overflow to -inf, a whole block of keys
    out = functional.mssa(w, 1, 1.0, backend="triton")
    torch.testing.assert_close(out[:, 32:], functional.mssa(w, 1, 1.0, backend="reference")[:, 32:])


VECTORS = ("0.norm.weight", "0.norm.bias", "0.fn.to_out.0.bias", "1.norm.weight", "1.norm.bias")


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("expanded", [False, True], ids=["every second", "expanded"])
def test_parameters_of_any_stride_are_read_as_they_are(name, expanded):
    def changed(backend: str) -> nn.Module:
        transformer = layers(backend)
        values = torch.tensor([0.5]).expand(64) if expanded else torch.linspace(-1, 1, 128)[::2]
        module, _, parameter = name.rpartition(".")
        setattr(transformer.layers[0].get_submodule(module), parameter, nn.Parameter(values))
        return transformer

    x = torch.randn(2, 5, 64)
    assert_same(results(changed("triton"), x), results(changed("reference"), x))


MISFITS = {
    "heads": lambda attention, step: setattr(attention.fn, "heads", 3),
    "heads of a fraction": lambda attention, step: setattr(attention.fn, "heads", 2.0),
    "scale": lambda attention, step: setattr(attention.fn, "scale", float("nan")),
    "a narrow result": lambda attention, step: attention.fn.to_out.__setitem__(0, nn.Linear(64, 32)),
    "a narrow way out": lambda attention, step: attention.fn.to_out.__setitem__(0, nn.Linear(48, 64)),
    "first norm": lambda attention, step: setattr(attention, "norm", nn.LayerNorm(32)),
    "second norm": lambda attention, step: setattr(step, "norm", nn.LayerNorm(32)),
    "dictionary": lambda attention, step: setattr(step.fn, "weight", nn.Parameter(torch.eye(32))),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_layers_whose_sizes_do_not_fit_are_refused(change):
    transformer = layers("triton")
    change(*transformer.layers[0])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"heads|scale|size|shape"):
        transformer(torch.randn(2, 5, 64))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sizes_that_only_modules_can_broadcast_are_left_to_them(backend):
    transformer = layers("reference")
    transformer.layers[0][0].fn.to_out[0].bias = nn.Parameter(torch.ones(1))
    transformer.layers[1][1].norm = nn.LayerNorm((5, 64))
    fast = copy.deepcopy(transformer)
    for module in fast.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    x = torch.randn(2, 5, 64)
    assert_same(results(fast, x), results(transformer, x))
    with torch.no_grad():
        assert_same([fast.eval()(x)], [transformer.eval()(x)])


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_tokens_of_no_width_shrink_to_nothing(backend):
    assert functional.ista(torch.ones(3, 0), torch.ones(0, 0), backend=backend).shape == (3, 0)
