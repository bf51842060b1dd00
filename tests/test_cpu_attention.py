"""MSSA on a CPU, by PyTorch in blocks of any size and by the kernels compiled for it: against the reference in float64, and the
published code in 16 bit."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, cpu_attention, functional, reference

SIZES = [(1, 16), (17, 48), (65, 80), (197, 64), (257, 128)]
BLOCKS = {"whole images": 2 << 20, "one image": 1 << 16, "some rows": 1 << 12, "one row": 1, "kernels": None}


@pytest.fixture(autouse=True, params=BLOCKS.values(), ids=BLOCKS)
def block(request, monkeypatch):
    if request.param is None:
        request.getfixturevalue("cpu_kernels")
    else:
        monkeypatch.setattr(cpu_attention, "BLOCK", request.param)


def in_blocks(*names: str):
    """A test in these of `BLOCKS` alone."""
    return pytest.mark.parametrize("block", [BLOCKS[name] for name in names], ids=names, indirect=True)


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


@pytest.fixture
def one_thread():
    """Of which larger products of float32 are oneDNN's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@in_blocks("whole images", "kernels")
@pytest.mark.parametrize("size", [0.3, 1.0, 1.5, 3.0], ids="tokens times {}".format)
@pytest.mark.parametrize(("tokens", "width"), [(197, 64), (530, 64)])
def test_float32_is_no_less_precise_than_the_published_operations_whatever_the_norms(tokens, width, size, one_thread):
    """On both sides of the limit up to which powers are not shifted, and where PyTorch or oneDNN multiply."""
    w, gradient = (x[..., : 2 * width] for x in of(tokens, width, torch.float32))
    w = w * size
    low = cpu_attention._are_low(cpu_attention._by_heads(w, 2), width**-0.5)
    assert all(low) if size < 2 else not any(low)
    errors = []
    exact = results(lambda x, _: reference.mssa(x, 2), w.double(), gradient.double())
    for attend in (ours, reference.mssa):
        found = results(lambda x, _, attend=attend: attend(x, 2), w, gradient)
        errors.append([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
    for error, published in zip(*errors, strict=True):
        assert error <= 1.1 * published


@in_blocks("whole images", "one image", "some rows", "kernels")
@pytest.mark.parametrize("value", [30.0, 1e18, float("inf"), float("nan")], ids=str)
def test_what_is_large_or_no_number_is_as_published_and_changes_no_bit_of_others(value):
    w, gradient = of(110, 16, torch.float32)
    before = results(ours, w, gradient)
    w[0, 5, 16:32] = value
    after, again = results(ours, w, gradient), results(ours, w, gradient)
    for one, two, old, expected in zip(after, again, before, results(reference.mssa, w, gradient), strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
        torch.testing.assert_close(one, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        assert torch.equal(one[1], old[1])
        assert torch.equal(one[0, :, :16], old[0, :, :16])
