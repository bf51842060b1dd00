"""Models whose products are all of nn.Linear: the same numbers, and nothing left that a tool for nn.Linear passes by."""

import copy

import pytest
import torch
from torch import nn

from crate_fast import CRATE, as_linears, reference

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def models(backend="auto"):
    """(a model, the published class in float64 with its weights)."""
    torch.manual_seed(0)
    model, published = CRATE(**SIZES, backend=backend).eval(), reference.CRATE(**SIZES).eval().double()
    published.load_state_dict(model.state_dict())
    return model, published


def error(model, published) -> float:
    with torch.no_grad():
        expected = published(IMAGES.double())
        return ((model(IMAGES).double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_the_numbers_are_the_same_and_every_matrix_is_that_of_an_nn_linear(backend):
    model, published = models(backend)
    linears = as_linears(nn.Sequential(model).eval())
    assert error(linears, published) < 1e-6
    matrices = {id(weight) for weight in linears.parameters() if weight.dim() == 2}
    assert matrices == {id(module.weight) for module in linears.modules() if isinstance(module, nn.Linear)}
    assert len(matrices) == 2 + 3 * SIZES["depth"]


def test_it_is_a_copy_that_neither_trains_nor_changes_what_it_was_made_of():
    model, published = models()
    before = copy.deepcopy(model.state_dict())
    linears = as_linears(model)
    for weight in linears.parameters():
        assert not weight.requires_grad
        weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert error(model, published) < 1e-6
    with pytest.raises(ValueError, match=r"call model\.eval"):
        as_linears(model.train())
    with pytest.raises(TypeError, match="not a Linear"):
        as_linears(nn.Linear(2, 2))


@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "weights and tokens"])
def test_torchao_quantises_the_dictionaries_too(dynamic):
    quantization = pytest.importorskip("torchao.quantization")
    model, published = models()
    linears = as_linears(model)
    kind = quantization.Int8DynamicActivationInt8WeightConfig if dynamic else quantization.Int8WeightOnlyConfig
    quantization.quantize_(linears, kind())
    kinds = {type(weight).__name__ for weight in linears.parameters() if weight.dim() == 2}
    assert "Parameter" not in kinds and len(kinds) == 1
    assert 0 < error(linears, published) < (0.05 if dynamic else 0.01)
