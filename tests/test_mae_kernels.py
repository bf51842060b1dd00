"""CRATE-MAE on the fused kernels against its formula in float64: values, gradients, memory, determinism, 16 bit."""

from statistics import median

import pytest
import torch
from test_kernels import poisoned_memory, relative  # noqa: F401 (a fixture that is used by itself)
from test_mae import SMALL, drawn, far, moved, trained

from crate_fast import CRATEMAE, reference
from crate_fast.kernels import runtime


@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_the_decoders_kernels_agree_with_float64(device, tokens):
    options = {"embed_dim": 36, "depth": 2 if tokens == 17 else 1}  # heads of 18
    ours = moved(drawn(CRATEMAE, **SMALL | options, backend="triton")).decoder_blocks.to(device)
    right = reference.CRATEMAE(**SMALL | options).decoder_blocks.double().to(device)
    right.load_state_dict(ours.state_dict())
    x, towards, launched = torch.randn(1, tokens, 36), torch.randn(1, tokens, 36), []
    own, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    with runtime.observed(lambda kernel, *_: launched.append(kernel.__name__)):
        found = ours(own)
        found.backward(towards)
    expected = right[0](wanted) if options["depth"] == 1 else right[1](right[0](wanted))
    expected.backward(towards.double())
    assert far(found, expected) < 1e-5 and far(own.grad, wanted.grad) < 1e-5
    for (name, p), q in zip(ours.named_parameters(), right.parameters(), strict=True):
        if q.grad.abs().max() > 1e-9:  # one token attends to itself whatever its scores are
            assert far(p.grad, q.grad) < 2e-5, name
    assert launched.count("_enter_kernel") == 1 and launched.count("_mssa_kernel") <= options["depth"]


def test_the_whole_model_on_kernels_agrees_with_float64():
    ours, images = moved(drawn(CRATEMAE, **SMALL | {"depth": 1}, backend="triton")), torch.randn(1, 3, 16, 16)
    right = reference.CRATEMAE(**SMALL | {"depth": 1}).double()
    right.load_state_dict(ours.state_dict())
    *found, own = trained(ours, images)
    *expected, gradients = trained(right, images.double())
    assert all(far(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    assert own.keys() == gradients.keys() and all(far(own[name], gradients[name]) < 1e-4 for name in own)


def test_gradients_too_small_for_half_precision_reach_the_decoders_weights(device):
    decoder = moved(drawn(CRATEMAE, **SMALL, backend="triton")).decoder_blocks.to(device)
    tokens, towards, gradients = torch.randn(1, 9, 32), 1e-9 * torch.randn(1, 9, 32), []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast(device.type, dtype=torch.float16, enabled=dtype == torch.float16):
            result = decoder(tokens) if dtype == torch.float16 else decoder[1](decoder[0](tokens))
        assert result.dtype == torch.float32
        (result * towards).sum().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
        decoder.zero_grad()
    assert all(far(gradients[0][name], g) < 0.02 for name, g in gradients[1].items())


@pytest.mark.parametrize(
    "autocast, most", [(torch.bfloat16, 0.75), (torch.float16, 1.1)], ids=lambda value: str(value).removeprefix("torch.")
)
def test_in_16_bit_it_is_no_further_from_float64_than_the_published_code(device, autocast, most):
    """Prediction, and the median over gradients, under autocast; bfloat16 keeps float16 activations."""
    options = SMALL | {"img_size": 12, "embed_dim": 36, "depth": 1}  # 10 tokens, heads of 18
    ours = moved(drawn(CRATEMAE, **options, backend="triton")).to(device)
    theirs, right = (drawn(reference.CRATEMAE, **options).to(device) for _ in range(2))
    for other in (theirs, right):
        other.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 12, 12, device=device)
    _, pred, _, gradients = trained(right.double(), images.double())
    ratios = []
    with torch.autocast(device.type, dtype=autocast):
        for model in (ours, theirs):
            _, found, _, own = trained(model, images)
            ratios.append((relative(found, pred), median(relative(own[name], g) for name, g in gradients.items())))
    assert all(mine <= most * published for mine, published in zip(*ratios, strict=True)), ratios


def test_a_training_step_repeats_itself_to_the_bit(device):
    model = drawn(CRATEMAE, **SMALL | {"depth": 1}, backend="triton").to(device)
    images, found = torch.randn(1, 3, 16, 16, device=device), []
    for _ in range(2):
        model.zero_grad()
        found.append(trained(model, images)[3])
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
