"""The kernels against the reference in float64: values, gradients, shapes that hurt, determinism."""

from functools import partial

import pytest
import torch
from conftest import DTYPES, HALVES, on_gpu

from crate_fast import functional, reference
from crate_fast.kernels import MSSA, LayerWeights, prepare_layers, stack_weights, tuning
from crate_fast.kernels.linear import Statistics, norm_linear
from crate_fast.kernels.stack import enter_forward
from crate_fast.kernels.weight_gradients import weight_gradient
from crate_fast.kernels.weights import NormProduct, finish_layer
from ties import resolved

TOKENS = (1, 17, 65, 197, 257)
WIDTHS = (16, 48, 64, 80, 128)

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that a kernel does not write is NaN, so that reading it shows."""

    def poison(empty):
        def poisoned(*args, **kwargs):
            result = empty(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def strided(*shape: int, layout: str) -> torch.Tensor:
    """Random numbers of a shape that lie "contiguous", in the middle of something larger, or with the last axis outermost."""
    if layout == "contiguous":
        return torch.randn(shape)
    if layout == "sliced":
        return torch.randn(*(2 * n + 1 for n in shape))[tuple(slice(1, None, 2) for _ in shape)]
    return torch.randn(shape[-1], *shape[:-1]).movedim(0, -1)


def check_mssa(batch: int, tokens: int, heads: int, width: int, layout: str, scale: float | None = None) -> None:
    torch.manual_seed(tokens + width)
    w = strided(batch, tokens, heads * width, layout=layout).requires_grad_()
    cotangent = strided(batch, tokens, heads * width, layout=layout)
    out = functional.mssa(w, heads, scale, backend="triton")
    (gradient,) = torch.autograd.grad(out, w, cotangent)
    exact_w = w.detach().double().requires_grad_()
    exact = reference.mssa(exact_w, heads, scale)
    (exact_gradient,) = torch.autograd.grad(exact, exact_w, cotangent.double())
    assert relative(out, exact.detach()) < 1e-5
    assert relative(gradient, exact_gradient) < 1e-5


# On a GPU what is compiled counts: one token makes code of its own, every stride too; heads in one part and in two show it.
AGREEING = [(tokens, width) for tokens in TOKENS for width in WIDTHS]
STRIDED = [(1, 16), (17, 48), (65, 80), (17, 128), (65, 64)]


@pytest.mark.parametrize(
    ("device", "tokens", "width"),
    [("cpu", *case) for case in AGREEING] + [on_gpu(*case) for case in AGREEING if case[0] > 1 or case[1] in (16, 80)],
    indirect=["device"],
)
def test_mssa_agrees_with_float64(tokens, width):
    check_mssa(1, tokens, 1, width, "contiguous")


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize(
    ("device", "tokens", "width"),
    [("cpu", *case) for case in STRIDED] + [on_gpu(*case) for case in STRIDED if case[1] in (16, 80)],
    indirect=["device"],
)
def test_mssa_takes_strides_as_they_come(tokens, width, layout):
    check_mssa(2, tokens, 3, width, layout)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_mssa_takes_any_scale(scale):
    check_mssa(1, 33, 2, 24, "contiguous", scale)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), DTYPES, indirect=["device"])
def test_mssa_repeats_itself_to_the_bit(dtype):
    w = torch.randn(2, 65, 96, dtype=dtype, requires_grad=True)
    runs = []
    for _ in range(2):
        out = functional.mssa(w, 2, backend="triton")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), w)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def results(run, leaves: list[torch.Tensor], cotangent: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The result of `run` and its gradients, everything in `dtype`."""
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]


def assert_no_worse(ours, theirs, inputs: tuple[list, torch.Tensor], dtype: torch.dtype, rectified: bool = False) -> None:
    """Result and gradients of `ours` are no further from float64 than those of `theirs`, of (leaves, cotangent) in `dtype`.

    If `rectified`, each is judged on its own sides of the threshold.
    """
    errors = []
    for run in (ours, theirs):
        found = results(run, *inputs, dtype)
        with resolved([found[0] > 0] if rectified else [], dtype):
            exact = results(theirs, *inputs, torch.float64)
        errors.append(map(relative, found, exact))
    for mine, other in zip(*errors, strict=True):
        assert mine <= 1.1 * other


@pytest.mark.parametrize("width", [*WIDTHS, 24])
@pytest.mark.parametrize(("device", "dtype"), HALVES, indirect=["device"])
def test_mssa_in_half_precision_is_no_worse_than_the_published_operations(dtype, width):
    torch.manual_seed(0)
    w, cotangent = torch.randn(2, 65, 2 * width), torch.randn(2, 65, 2 * width)
    assert_no_worse(lambda x: MSSA.apply(x, 2, width**-0.5), lambda x: reference.mssa(x, 2), ([w], cotangent), dtype)


def test_mssa_is_as_good_where_products_take_few_rows():
    """On Ampere the last tokens are rows of products, elsewhere columns."""
    torch.manual_seed(0)
    w, cotangent = torch.randn(2, 65, 128), torch.randn(2, 65, 128)
    with tuning.assumed(80):
        ours = results(lambda x: MSSA.apply(x, 2, 0.125), [w], cotangent, torch.float16)
    theirs = results(lambda x: MSSA.apply(x, 2, 0.125), [w], cotangent, torch.float16)
    exact = results(lambda x: reference.mssa(x, 2), [w], cotangent, torch.float64)
    for found, others, right in zip(ours, theirs, exact, strict=True):
        assert relative(found, right) <= 1.1 * relative(others, right)


@pytest.mark.parametrize("dim", [33, 96])
@pytest.mark.parametrize(("device", "dtype"), HALVES, indirect=["device"])
def test_ista_in_half_precision_is_no_worse_than_the_published_operations(dtype, dim):
    torch.manual_seed(0)
    h, weight, cotangent = torch.randn(2, 65, dim), torch.randn(dim, dim) / dim**0.5, torch.randn(2, 65, dim)
    inputs = [h, weight], cotangent
    assert_no_worse(partial(functional.ista, backend="triton"), reference.ista, inputs, dtype, rectified=True)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (17, 96), (65, 100), (257, 48), (5, 1)])
def test_ista_agrees_with_float64(tokens, dim, layout):
    torch.manual_seed(tokens + dim)
    h = strided(2, tokens, dim, layout=layout).requires_grad_()
    weight = (torch.randn(dim, dim) / dim**0.5).requires_grad_()
    cotangent = strided(2, tokens, dim, layout=layout)
    out = functional.ista(h, weight, 0.3, 0.2, backend="triton")
    gradients = torch.autograd.grad(out, (h, weight), cotangent)
    exact_inputs = [x.detach().double().requires_grad_() for x in (h, weight)]
    with resolved([out > 0], torch.float32):
        exact = reference.ista(*exact_inputs, 0.3, 0.2)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, cotangent.double())
    assert relative(out, exact.detach()) < 1e-5
    assert torch.equal(out == 0, exact == 0)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert relative(gradient, exact_gradient) < 1e-5


@pytest.mark.parametrize(("device", "dtype"), DTYPES, indirect=["device"])
@pytest.mark.parametrize("ratio", [0.7, 6.0, 50.0])
def test_norm_and_product_are_no_worse_than_plain_ones_at_any_mean(ratio, dtype):
    """LayerNorm inputs whose mean is `ratio` deviations away, against LayerNorm and product one after the other."""
    torch.manual_seed(0)
    rows, dim, out = 70, 96, 48
    x = (torch.randn(rows, dim) + ratio).to(dtype)
    weight, gamma, beta = torch.randn(dim, out) / dim**0.5, 1 + 0.2 * torch.randn(dim), 0.2 * torch.randn(dim)
    exact = torch.nn.functional.layer_norm(x.double(), (dim,), gamma.double(), beta.double()) @ weight.double()
    normal = torch.nn.functional.layer_norm(x.float(), (dim,), gamma, beta)
    plain = (normal.to(dtype).float() @ weight.to(dtype).float()).to(dtype)
    statistics = Statistics(torch.zeros(rows), torch.zeros(rows))
    weights = LayerWeights(gamma, beta, weight.t(), weight, None, gamma, beta, torch.zeros(dim, dim))
    (prepared,) = prepare_layers(stack_weights([weights]), 0.0, dtype)
    _, moments = enter_forward(x[None], dtype)
    ours = x.new_empty(rows, out)
    norm_linear(x, moments, prepared.folded()[0], None, ours, 1e-5, statistics)
    assert relative(ours, exact) <= 2 * relative(plain, exact)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("inputs", [16, 33, 257])
def test_weight_gradients_over_many_splits_are_right_and_repeat_themselves(inputs, identity):
    """Of s LN(x) (W [+ 1]) with a gradient s times too large, against autograd in float64."""
    torch.manual_seed(0)
    outputs = inputs if identity else 48
    x, g = torch.randn(700, inputs), torch.randn(700, outputs)
    weight, gamma, beta = torch.randn(outputs, inputs).t() / 7, torch.randn(inputs), torch.randn(inputs)
    leaves = [t.double().requires_grad_() for t in (gamma, beta, weight)]
    h = torch.nn.functional.layer_norm(x.double(), (inputs,), *leaves[:2])
    exact = torch.autograd.grad(h @ leaves[2] + (h if identity else 0), leaves, g.double())

    var, mean = torch.var_mean(x, 1, correction=0)
    g, scale = 32 * g, torch.tensor(32.0)
    stored, totals = g * (var + 1e-5).rsqrt()[:, None], g.unflatten(0, (7, 100)).sum(1)[None]

    def run():
        parts = weight_gradient(x, stored, torch.float32, mean=mean, totals=totals)
        assert len(parts.product) > 1
        product = NormProduct(parts, weight, gamma, beta)
        if identity:
            return finish_layer(scale, None, None, product)[5:]
        dgamma, dbeta, dweight, *_ = finish_layer(scale, product, None, None)
        return dgamma, dbeta, dweight.t()

    for ours, again, right in zip(run(), run(), exact, strict=True):
        assert relative(ours, right) < 1e-5
        assert torch.equal(ours, again)


def test_plain_weight_gradients_are_right():
    torch.manual_seed(0)
    x, g = torch.randn(700, 300), torch.randn(700, 48)
    parts = weight_gradient(x, g, torch.float32, totals=g.unflatten(0, (20, 35)).sum(1)[None], transposed=True)
    weight, bias = finish_layer(torch.tensor(0.25), None, parts, None)[3:5]
    assert relative(weight, 4 * g.double().t() @ x.double()) < 1e-6
    assert relative(bias, 4 * g.double().sum(0)) < 1e-6
