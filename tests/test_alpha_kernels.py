"""CRATE-α's step by the kernels against its formula in float64: values, gradients, memory, determinism, NaN, 16 bit."""

import json
from contextlib import ExitStack

import pytest
import torch
from conftest import BENCHMARKS, DTYPES, HALVES
from test_kernels import poisoned_memory, relative, strided  # noqa: F401 (a fixture that is used by itself)
from test_tuning import shapes
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import BackendError, CRATEAlpha, reference_alpha
from crate_fast.kernels import ODL, odl, tuning
from crate_fast.modules import OvercompleteISTABlock
from crate_fast.sizes import ALPHA_SIZES
from ties import recorded, resolved

pytestmark = pytest.mark.usefixtures("device")


def step(h, d, d1, step_size=0.1, lambd=0.1):
    return OvercompleteISTABlock.sparsify(h, (d, d1), None, step_size, lambd, "triton")


def dictionaries(dim: int) -> list[torch.Tensor]:
    return [torch.nn.init.kaiming_uniform_(torch.empty(dim, 4 * dim)) for _ in range(2)]


def codes(h, d, d1, step_size, lambd) -> list[torch.Tensor]:
    """Where the kernels' two codes are above their thresholds."""
    rows = h.detach().reshape(-1, h.shape[-1]).contiguous()
    _, _, *found = odl.odl_step(rows, rows, d.detach(), d.detach() * -step_size, d1.detach() * step_size, lambd)
    return [code.view(*h.shape[:-1], -1) > 0 for code in found]


def results(run, leaves, cotangent, dtype) -> list[torch.Tensor]:
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]


def assert_agrees(h, d, d1, cotangent, numbers=(0.1, 0.1)) -> None:
    """Result and gradients of the kernels are the formula's in float64 to 1e-5."""
    leaves = [x.requires_grad_() for x in (h, d, d1)]
    out = step(*leaves, *numbers)
    got = [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
    with resolved(codes(h, d, d1, *numbers), torch.float32):
        want = results(lambda *x: reference_alpha.odl(*x, *numbers), leaves, cotangent, torch.float64)
    for mine, right in zip(got, want, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == right.shape
        assert relative(mine, right) < 1e-5


SIZES = [(1, 16), (17, 48), (1, 80), (65, 24), (197, 8), (257, 3), (3, 33), (1, 128), (5, 1)]


@pytest.mark.parametrize(("tokens", "dim"), SIZES)
def test_the_step_agrees_with_float64(tokens, dim):
    torch.manual_seed(tokens + dim)
    assert_agrees(torch.randn(1, tokens, dim), *dictionaries(dim), torch.randn(1, tokens, dim))


@pytest.mark.parametrize(("dim", "layout"), [(16, "sliced"), (7, "transposed")])
def test_the_step_takes_strides_as_they_come(dim, layout):
    torch.manual_seed(dim)
    h, cotangent = (strided(2, 17, dim, layout=layout) for _ in range(2))
    assert_agrees(h, *(strided(dim, 4 * dim, layout=layout) / dim**0.5 for _ in range(2)), cotangent)
    assert_agrees(h[0, 0], *dictionaries(dim), torch.ones(1).expand(dim))


@pytest.mark.parametrize("numbers", [(1.0, 0.5), (1e-4, 0.1), (0.7, 0.0)], ids=str)
def test_the_step_takes_any_step_size_and_threshold(numbers):
    torch.manual_seed(0)
    assert_agrees(torch.randn(1, 19, 16), *dictionaries(16), torch.randn(1, 19, 16), numbers)


@pytest.mark.parametrize(("device", "dtype"), DTYPES, indirect=["device"])
def test_the_step_is_right_in_every_shape_of_its_tiles(dtype):
    """In those of the table and in those that `crate-fast tune` may choose."""
    torch.manual_seed(0)
    leaves, cotangent = [torch.randn(1, 70, 20), *dictionaries(20)], torch.randn(1, 70, 20)
    want, configs = results(step, leaves, cotangent, dtype), [shapes(kernel, dtype) for kernel in tuning.ODL]
    for index in range(max(map(len, configs))):
        with ExitStack() as stack:
            for kernel, of in zip(tuning.ODL, configs, strict=True):
                stack.enter_context(tuning.forced(kernel, of[index % len(of)]))
            got = results(step, leaves, cotangent, dtype)
        errors = [relative(mine, right.double()) for mine, right in zip(got, want, strict=True)]
        assert max(errors) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_architecture_has_a_shape_for_the_step(architecture):
    with tuning.assumed(architecture):
        for dtype, dim in ((d, n) for d in (torch.float16, torch.float32) for n in (192, 768, 33)):
            assert tuning.matrix("odl", dtype, dim, 4 * dim, torch.device("cpu")).block_n <= 128
            assert tuning.matrix("odl_back", dtype, 4 * dim, dim, torch.device("cpu")).block_n <= 256
            assert tuning.matrix("odl_gradient", dtype, dim, 4 * dim, torch.device("cpu")).block_n <= 256


def test_a_dictionarys_gradient_keeps_all_multiprocessors_busy():
    """In every size, where one part of all tokens would leave up to 45% of an H100 idle."""
    for sizes in ALPHA_SIZES.values():
        dim, device = sizes["dim"], torch.device("cpu")
        config = tuning.matrix("odl_gradient", torch.float16, dim, 4 * dim, device)
        tiles = -(-dim // config.block_m) * (4 * dim // config.block_n)
        programs = tiles * tuning.splits(tiles, 1 << 16, config, even=True)
        assert programs / (-(-programs // 132) * 132) > 0.9


def test_without_tokens_or_with_a_step_of_zero_nothing_is_added():
    weights = [d.requires_grad_() for d in dictionaries(16)]
    for shape, size in (((0, 5, 16), 0.1), ((2, 0, 16), 0.1), ((2, 3, 16), 0.0)):
        h = torch.randn(shape, requires_grad=True)
        y = step(h, *weights, size)
        assert y.shape == shape and not y.any()
        assert not any(g.any() for g in torch.autograd.grad(y, (h, *weights), torch.ones(shape)))


@pytest.mark.parametrize(("device", "dtype"), DTYPES, indirect=["device"])
def test_the_step_repeats_itself_to_the_bit_and_counts_its_products(dtype):
    torch.manual_seed(0)
    leaves = [x.to(dtype) for x in (torch.randn(4, 65, 16), *dictionaries(16))]
    cotangent = torch.randn(4, 65, 16)
    first = results(step, leaves, cotangent, dtype)
    with FlopCounterMode(display=False) as counter:
        again = results(step, leaves, cotangent, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert counter.get_total_flops() == 12 * 2 * 4 * 65 * 4 * 16**2


@pytest.mark.parametrize(("device", "dtype"), HALVES, indirect=["device"])
@pytest.mark.parametrize(("dim", "numbers"), [(48, (0.1, 0.1)), (25, (0.1, 0.1)), (25, (1e-3, 0.1))], ids=str)
def test_in_half_precision_it_is_no_worse_than_its_formula(dtype, dim, numbers):
    torch.manual_seed(0)
    leaves, cotangent = [torch.randn(2, 33, dim), *dictionaries(dim)], torch.randn(2, 33, dim)
    formula = lambda *x: reference_alpha.odl(*x, *numbers)  # noqa: E731
    errors = []
    for run in (lambda *x: step(*x, *numbers), formula):
        with recorded() as sides:
            found = results(run, leaves, cotangent, dtype)
        with resolved(sides or codes(*(x.to(dtype) for x in leaves), *numbers), dtype):
            exact = results(formula, leaves, cotangent, torch.float64)
        errors.append(list(map(relative, found, exact)))
    assert all(mine <= 1.1 * other for mine, other in zip(*errors, strict=True)), errors


def test_under_autocast_it_takes_products_in_16_bit_and_gives_gradients_as_they_came():
    torch.manual_seed(0)
    block, h, cotangent = OvercompleteISTABlock(32, backend="triton"), torch.randn(2, 17, 32), torch.randn(2, 17, 32)
    leaves = [h.requires_grad_(), block.D, block.D1]
    with torch.autocast(h.device.type, torch.float16):
        out = block(h)
    assert out.dtype == torch.float16
    got = torch.autograd.grad(out, leaves, cotangent.half())
    want = results(reference_alpha.odl, leaves, cotangent, torch.float64)
    for mine, right in zip((out, *got), want, strict=True):
        assert relative(mine, right) < 5e-3
    assert {g.dtype for g in got} == {torch.float32}


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(wanted):
    torch.manual_seed(0)
    leaves = [torch.randn(1, 17, 16), *dictionaries(16)]
    want = results(step, leaves, torch.ones(1, 17, 16), torch.float32)[1:]
    for leaf, need in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(need)
    with FlopCounterMode(display=False) as counter:
        step(*leaves).sum().backward()
    for leaf, need, right in zip(leaves, wanted, want, strict=True):
        assert torch.equal(leaf.grad, right) if need else leaf.grad is None
    products = {0: 4, 1: 6, 2: 1}[wanted.index(True)]
    assert counter.get_total_flops() == (4 + products) * 2 * 17 * 4 * 16**2


def test_ten_values_a_token_and_width_are_kept_and_three_roundings_of_dictionaries():
    block, h, kept = OvercompleteISTABlock(16, backend="triton"), torch.randn(2, 17, 16), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        for dtype, dictionary in ((torch.float16, 3), (torch.float32, 3)):
            kept.clear()
            with torch.autocast(h.device.type, dtype, enabled=dtype != torch.float32):
                block(h)
            assert {t.dtype for t in kept.values()} == {dtype}
            assert sum(t.numel() for t in kept.values()) == 10 * h.numel() + dictionary * block.D.numel()
        kept.clear()
        block.requires_grad_(False)(h)
    assert not kept


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_each_product_reads_and_writes_what_it_must_once():
    """In 16 bit, bytes a token in widths of one: of h, r, y and their gradients 2, of a code or its gradient 8."""
    import traffic  # which asks for the interpreter as it is imported

    leaves = [torch.randn(traffic.BATCH, traffic.TOKENS, traffic.DIM), *dictionaries(traffic.DIM)]
    counted = traffic.count_kernels(lambda: results(step, leaves, torch.ones(leaves[0].shape), torch.float16))
    forward, backward = [10, 12, 18, 10], [10, 18, 10, 10, 10, 26, 10, 12]
    assert [kernel.activations / traffic.DIM for kernel in counted] == forward + backward


def test_nan_stays_where_it_is_and_is_not_lost():
    torch.manual_seed(0)
    d, d1 = dictionaries(16)
    h = torch.randn(1, 70, 16)
    clean = results(step, [h, d, d1], torch.ones(1, 70, 16), torch.float32)
    h[0, 3, 5] = float("nan")
    cotangent = torch.ones(1, 70, 16)
    cotangent[0, 69, 2] = float("nan")
    out, dh, dd, dd1 = results(step, [h, d, d1], cotangent, torch.float32)
    token = torch.arange(70)
    assert out[0, 3].isnan().all() and torch.equal(out[:, token != 3], clean[0][:, token != 3])
    assert dh[0, 69].isnan().all() and torch.equal(dh[0, 4:69], clean[1][0, 4:69])
    right = results(reference_alpha.odl, [h, d, d1], cotangent, torch.float64)[1]
    assert relative(dh[0, :69], right[0, :69]) < 1e-5  # relu's gradient goes on where it is NaN
    assert dd.isnan().all() and dd1.isnan().all()
    d[2, 7] = float("nan")
    assert step(torch.randn(1, 3, 16), d, d1).isnan().all()


@pytest.mark.parametrize(
    "options", [dict(dim=80, dim_head=80, heads=1), dict(dim=48, dim_head=24, heads=2, init_values=0.7)], ids=str
)
def test_a_model_on_the_kernels_is_the_formula(options):
    sizes = dict(image_size=8, patch_size=4, num_classes=5, depth=2) | options
    images, found = torch.randn(2, 3, 8, 8), []
    for kind, more in ((CRATEAlpha, dict(backend="triton")), (reference_alpha.CRATEAlpha, {})):
        torch.manual_seed(0)
        model = kind(**sizes, **more).to(torch.float32 if more else torch.float64)
        logits = model(images.to(model.cls_token.dtype))
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(relative(mine, right) < 1e-5 for mine, right in zip(*found, strict=True))


def test_compilers_take_it_whole_and_the_operators_are_what_they_say():
    torch.manual_seed(0)
    block, h = OvercompleteISTABlock(16, backend="triton"), torch.randn(2, 5, 16, requires_grad=True)
    want = block(h)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = compiled(h)
    assert torch.equal(got, want)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), (h, block.D, block.D1)) for y in (got, want)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    rows, weights = torch.randn(5, 16), [torch.randn(16, 64) for _ in range(3)]
    y, *saved = odl.odl_step(rows, rows, *weights, 0.1)
    for name, arguments in {
        "odl_step": (rows, rows, *weights, 0.1),
        "odl_step_backward": (y, [rows, *saved, *weights], 0.1, torch.float32, [True, False, True]),
    }.items():
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.crate_fast, name).default, arguments, test_utils=tests)


def test_the_committed_prediction_has_the_step_in_every_size_and_on_every_architecture():
    predicted, launches = json.loads((BENCHMARKS / "results" / "predicted.json").read_text()), {}
    for row in predicted["rows"]:
        launches[row["size"]] = launches.get(row["size"], 0) + row["count"] * (row["pass"] == "odl")
    assert {size for size, count in launches.items() if count == 12} == {f"alpha-{size}" for size in ALPHA_SIZES}
    assert {r["arch"] for r in predicted["resources"] if r["size"] == "alpha-huge"} == {"sm_80", "sm_100"}


def test_what_the_kernels_cannot_take_is_refused_by_name():
    block = OvercompleteISTABlock(16, backend="triton")
    with pytest.raises(BackendError, match=r"dtype is torch\.float64; the kernels take float16, bfloat16 and float32"):
        block.double()(torch.zeros(1, 2, 16, dtype=torch.float64))
    with pytest.raises(BackendError, match=r"transforms of torch\.func"):
        torch.func.vmap(block.float())(torch.zeros(2, 3, 16))
    h = torch.randn(1, 2, 16, requires_grad=True)
    y = ODL.apply(h, block.D, block.D1, 0.1, 0.1, torch.float32)
    (gradient,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
