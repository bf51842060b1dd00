"""PyTorch's counter of flops: it counts the products of this library's operators, and of all of them alike."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from crate_fast import CRATE, cpu_attention, operators, reference
from crate_fast.kernels import enter_stack, fused_layer, leave_stack
from crate_fast.kernels.mssa import attend
from crate_fast.model.transformer import layers_of
from crate_fast.modules import cpu_inference
from crate_fast.modules.kernel_weights import make_weights

SIZES = {"image_size": 16, "patch_size": 4, "num_classes": 7, "dim": 48, "depth": 1, "heads": 3, "dim_head": 16}
BATCH, TOKENS, DIM, INNER = 2, 17, 48, 48
ATTENTION = 2 * BATCH * TOKENS * TOKENS * INNER  # of one of its products
M = 2 * DIM**3


def added_product(_, a, b, **options) -> int:
    return 2 * a.numel() * b.shape[-1]


added_product._get_raw = True


def counted(function, *arguments) -> int:
    """PyTorch has no formula for the products that are added in place."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_product}) as counter:
        function(*arguments)
    return counter.get_total_flops()


def step(model, batch=BATCH):
    return lambda: model(torch.randn(batch, 3, 16, 16)).sum().backward()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_training_step_has_the_flops_of_the_published_code_but_for_the_step_of_sparsification(backend):
    """The step of sparsification is one product where the published code makes three, of an M that costs one, and one in its
    gradient. A counter of PyTorch's watches all modules, so that attention shows its probabilities."""
    ista = 2 * BATCH * TOKENS * DIM * DIM
    saved = 3 * 2 * ista
    assert counted(step(CRATE(**SIZES, backend=backend))) == counted(step(reference.CRATE(**SIZES))) - saved + 2 * M


@pytest.mark.parametrize("wanted", [True, False])
def test_fused_layers_have_the_flops_of_their_products(wanted):
    model = CRATE(**SIZES)
    (layer,) = layers_of(model.transformer)
    x = torch.randn(BATCH, TOKENS, DIM, requires_grad=True)
    layer.requires_grad_(wanted)

    def run():
        state = enter_stack(x, torch.float32)
        weights = make_weights([layer], torch.float32)[0]
        leave_stack(fused_layer(state, *weights, layer.settings()), torch.float32, None, False).sum().backward()

    forward = 2 * BATCH * layer.flops(TOKENS)
    linear = forward - 2 * ATTENTION
    assert counted(run) == forward + linear * (1 + wanted) + 5 * ATTENTION + (1 + wanted) * M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [2 << 20, 1 << 8], ids=["whole", "rows"])
def test_formulas_of_pytorchs_operations_give_what_pytorch_counts_in_them(dtype, block, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    model = CRATE(**SIZES, backend="torch").eval().to(dtype)
    (layer,), (_, norm, linear, last) = layers_of(model.transformer), model.to_patch_embedding
    w = torch.randn(BATCH, TOKENS, INNER, dtype=dtype)
    of_embedding = [norm.weight, norm.bias, linear.weight, linear.bias, last.weight, last.bias, model.cls_token]
    calls = {
        cpu_attention._tied_attention: (w, 3, 0.25),
        cpu_attention._tied_attention_gradient: (w, w, 3, 0.25),
        cpu_inference.evaluated_layer: (w, list(layer.weights()), 3, 0.25, 1e-5, 1e-5, "ista", 0.1, 0.1),
        cpu_inference.evaluated_embedding: (
            torch.randn(BATCH, 3, 16, 16, dtype=dtype), [*of_embedding, model.pos_embedding], [4, 4], [1e-5, 1e-5],
        ),
    }  # fmt: skip
    with torch.no_grad():
        for operator, arguments in calls.items():
            m = M if operator is cpu_inference.evaluated_layer else 0  # which is not kept while somebody counts
            assert counted(operator, *arguments) == counted(operator.body, *arguments) - m, operator.__name__


def test_a_counter_that_was_there_before_the_operators_counts_them(monkeypatch):
    """Which are made when they are first needed; and they do not import PyTorch's counter."""
    formulas, w = dict(operators.FORMULAS), torch.randn(BATCH, TOKENS, INNER)
    for formula in formulas:
        monkeypatch.delitem(flop_registry, formula, raising=False)
    with FlopCounterMode(display=False) as counter:
        attend(w, 3, 0.25)
    assert counter.get_total_flops() == 2 * ATTENTION
    assert formulas.keys() <= flop_registry.keys()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch.utils.flop_counter")
        operators._tell_counters()
        assert "torch.utils.flop_counter" not in sys.modules
