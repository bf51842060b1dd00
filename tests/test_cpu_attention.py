"""MSSA by PyTorch on a CPU, in blocks of any size: against the reference in float64, and the published code in 16 bit."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, cpu_attention, functional, reference

SIZES = [(1, 16), (17, 48), (65, 80), (197, 64), (257, 128)]
BLOCKS = {"whole images": 2 << 20, "one image": 1 << 16, "some rows": 1 << 12, "one row": 1}

pytestmark = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


@pytest.fixture(autouse=True)
def blocks(block, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)


def results(attend, w: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """[out, dw] in float64."""
    leaf = w.detach().requires_grad_()
    out = attend(leaf, 3)
    assert out.dtype == w.dtype
    return [x.double() for x in (out, *torch.autograd.grad(out, leaf, gradient))]


def of(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """w, not contiguous, and a gradient of the result."""
    torch.manual_seed(tokens)
    return torch.randn(tokens, 2, 3 * width, dtype=dtype).transpose(0, 1), torch.randn(2, tokens, 3 * width, dtype=dtype)


def ours(w: torch.Tensor, heads: int) -> torch.Tensor:
    return functional.mssa(w, heads, backend="torch")


def errors(tokens: int, width: int, dtype: torch.dtype, attend) -> list[float]:
    w, gradient = of(tokens, width, dtype)
    exact = results(reference.mssa, w.double(), gradient.double())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(results(attend, w, gradient), exact, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_it_agrees_with_float64(tokens, width, dtype, bound):
    assert max(errors(tokens, width, dtype, ours)) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SIZES[1:4])
def test_16_bit_is_no_less_precise_than_the_published_operations(tokens, width, dtype):
    for error, published in zip(errors(tokens, width, dtype, ours), errors(tokens, width, dtype, reference.mssa), strict=True):
        assert error <= 1.05 * published


def test_a_token_that_is_no_number_spoils_its_own_image_alone():
    w, gradient = of(17, 16, torch.float32)
    w[0, 5, 3] = float("nan")
    for result in results(ours, w, gradient):
        assert result[0, :, :16].isnan().all()
        assert result[1].isfinite().all()


def test_backward_is_given_the_tokens_alone():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        w = torch.randn(2, 17, 48, requires_grad=True)
        ours(w, 3)
    assert kept == [w.shape]


def test_images_of_none_are_none():
    w = torch.randn(0, 17, 48, requires_grad=True)
    out = ours(w, 3)
    assert out.shape == w.shape
    assert torch.autograd.grad(out.sum(), w)[0].shape == w.shape


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_whoever_watches_operators_gets_the_same_under_autocast(training):
    model = CRATE(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16).train(training)
    image = torch.randn(2, 3, 8, 8)

    def logits() -> torch.Tensor:
        with torch.inference_mode(not training), torch.autocast("cpu", torch.bfloat16):
            return model(image)

    expected = logits()
    with FlopCounterMode(display=False):
        torch.testing.assert_close(logits(), expected, rtol=0.02, atol=0.02)
