"""Products of float32 on a CPU: oneDNN's agree with PyTorch's on whatever they are given, and are left to PyTorch elsewhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, cpu_products, functional, reference
from crate_fast.modules.applied import applied

SMALL: dict[str, Any] = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)
OURS = torch.backends.mkldnn.is_available()


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The shapes of oneDNN's products, of any size and on any processor."""
    found, product = [], cpu_products.product
    monkeypatch.setattr(cpu_products, "_IS_TAKEN", True)
    monkeypatch.setattr(cpu_products, "LEAST", 1)
    monkeypatch.setattr(cpu_products, "product", lambda *operands: found.append(operands[0].shape) or product(*operands))
    return found


def matrix(kind: str) -> torch.Tensor:
    """(20, 33) in memory of some kind."""
    torch.manual_seed(1)
    return {
        "plain": lambda: torch.randn(20, 33),
        "transposed": lambda: torch.randn(33, 20).t(),
        "every second": lambda: torch.randn(40, 66)[::2, ::2],
        "expanded": lambda: torch.randn(20, 1).expand(20, 33),
        "shifted": lambda: torch.randn(20 * 33 + 3)[3:].view(20, 33),
        "negative": lambda: torch.randn(20, 33, dtype=torch.complex64).conj().imag,
    }[kind]()


INPUTS = {
    "tokens": lambda: torch.randn(5, 7, 33),
    "transposed": lambda: torch.randn(33, 7).t(),
    "expanded": lambda: torch.randn(1, 33).expand(4, 33),
    "one row": lambda: torch.randn(1, 33),
    "a vector": lambda: torch.randn(33),
    "no rows": lambda: torch.randn(0, 7, 33),
}
BIASES = {"none": lambda: None, "plain": lambda: torch.randn(20), "expanded": lambda: torch.randn(1).expand(20)}
BIASES |= {"every second": lambda: torch.randn(40)[::2]}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("of", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kind", ["plain", "transposed", "every second", "expanded", "shifted", "negative"])
def test_products_and_gradients_are_pytorchs_whatever_the_strides(kind, of, bias):
    torch.manual_seed(0)
    tensors = [t for t in (of(), matrix(kind), bias()) if t is not None]
    found = []
    for linear in (cpu_products.linear, F.linear):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = linear(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def operands(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def second_derivatives(linear) -> list[torch.Tensor]:
    leaves = operands((3, 4), (5, 4), (5,))
    first = torch.autograd.grad(linear(*leaves).pow(3).sum(), leaves, create_graph=True)
    return list(torch.autograd.grad([g.square().sum() for g in first], leaves))


def batched_gradients(linear) -> list[torch.Tensor]:
    leaves = operands((3, 4), (5, 4), (5,))
    return list(torch.autograd.grad(linear(*leaves), leaves, torch.eye(15).view(15, 3, 5), is_grads_batched=True))


def forward_mode(linear) -> list[torch.Tensor]:
    x, weight, bias = (t.detach() for t in operands((3, 4), (5, 4), (5,)))
    return list(jvp(linear, (x, weight, bias), (x, weight, bias)))


def mapped(linear) -> list[torch.Tensor]:
    x, weight = operands((6, 3, 4), (6, 5, 4))
    return [vmap(linear)(x, weight), vmap(linear, (0, None))(x, weight[0]), vmap(linear, (None, 0))(x[0], weight)]


def partly_frozen(linear) -> list[torch.Tensor]:
    leaves = operands((3, 4), (5, 4), (5,))
    of = [[t if i == j else t.detach() for j, t in enumerate(leaves)] for i in range(3)]
    return [torch.autograd.grad(linear(*tensors).square().sum(), leaves[i])[0] for i, tensors in enumerate(of)]


@pytest.mark.parametrize("derive", [second_derivatives, batched_gradients, forward_mode, mapped, partly_frozen])
def test_derivatives_of_every_kind_are_pytorchs(derive):
    for ours, theirs in zip(derive(cpu_products.linear), derive(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_backward_pass_under_autocast_is_the_one_without():
    leaves = operands((3, 4), (5, 4), (5,))
    out = cpu_products.linear(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(map(torch.equal, found, expected))


def test_a_weight_that_is_frozen_keeps_no_tokens():
    kept = []
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        cpu_products.linear(x, weight)
    assert kept == [weight.shape]


@pytest.mark.parametrize("shapes", [[(3, 5), (2, 4)], [(3, 4), (2, 4), (3,)], [(3, 4), (2, 4, 1)]], ids=str)
def test_shapes_that_do_not_fit_are_refused_by_pytorch(shapes):
    with pytest.raises(RuntimeError):
        cpu_products.linear(*map(torch.randn, shapes))


@pytest.mark.skipif(not OURS, reason="no oneDNN for x86 here")
def test_all_products_of_evaluation_and_training_are_the_same(products):
    torch.manual_seed(0)
    model, images = CRATE(**SMALL, backend="torch"), torch.randn(2, 3, 8, 8)
    trained = model(images)
    of_training = sorted(products)
    products.clear()
    with torch.inference_mode():
        evaluated = model.eval()(images)
    assert torch.equal(trained, evaluated)
    # The embedding, two a layer and M with its product, of which the last layer projects the class token alone, the head.
    assert sorted(products) == of_training
    assert len(of_training) == 1 + 2 * 4 + 1
    products.clear()
    trained.sum().backward()
    assert len(products) == 2 * len(of_training) - 2  # one for each M, two for all else


@pytest.mark.parametrize("how", ["switched off", "counted", "autocast", "float64", "compiled", "of another class", "reference"])
def test_where_they_are_not_asked_for_products_are_pytorchs(how, products):
    torch.manual_seed(0)
    linear = nn.Linear(4, 5).double() if how == "float64" else nn.Linear(4, 5)
    x = torch.randn(3, 4, dtype=linear.weight.dtype)
    run, backend = applied, "reference" if how == "reference" else "torch"
    if how == "of another class":
        x = x.as_subclass(type("Own", (torch.Tensor,), {}))
    if how == "compiled":
        run = torch.compile(applied, backend="eager", fullgraph=True)
    with (
        torch.backends.mkldnn.flags(enabled=how != "switched off"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        FlopCounterMode(display=False) if how == "counted" else torch.enable_grad(),
    ):
        torch.testing.assert_close(run(linear, x, backend), F.linear(x, linear.weight, linear.bias), rtol=0, atol=0)
    assert not products


INTEL, AMD = (f"processor: 0\nvendor_id: {maker}\n\nprocessor: 1\n" for maker in ("GenuineIntel", "AuthenticAMD"))


@pytest.mark.parametrize(
    ("machine", "system", "cpuinfo", "processor", "mkl", "expected"),
    [
        ("x86_64", "linux", INTEL, "", True, True),
        ("x86_64", "linux", INTEL, "", False, False),
        ("x86_64", "linux", AMD, "", True, False),
        ("AMD64", "win32", None, "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True, True),
        ("AMD64", "win32", None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True, False),
        ("x86_64", "darwin", None, "i386", True, True),
        ("aarch64", "linux", "processor: 0\n", "", False, True),
    ],
)
def test_pytorchs_own_are_kept_where_they_are_the_makers(
    machine, system, cpuinfo, processor, mkl, expected, tmp_path, monkeypatch
):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.processor", lambda: processor)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: mkl)
    monkeypatch.setattr(cpu_products.sys, "platform", system)
    assert cpu_products._has_makers_own(tmp_path / "cpuinfo") is expected


def test_transforms_of_a_model_leave_its_products_to_pytorch(products):
    model, images = CRATE(**SMALL).eval(), torch.randn(2, 3, 8, 8)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    products.clear()
    jvp(lambda w: functional_call(model, w, (images,)), (weights,), (weights,))
    assert not products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
def test_a_step_of_few_tokens_is_no_less_precise_than_the_published_one(pure, dtype, monkeypatch):
    """In training in 16 bit; the other way, by M, is for many tokens."""
    monkeypatch.setattr(functional, "FAST_ON_CPU", {dtype: True})  # as on a processor with such products
    monkeypatch.setattr(functional, "ista_matrix", None)  # not this way

    def results(ista, *tensors: torch.Tensor) -> list[torch.Tensor]:
        *leaves, gradient = (t.detach().requires_grad_() for t in tensors)
        out = ista(*leaves)
        return [out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]

    def ratios(seed: int) -> list[float]:
        """Our error of [result, dh, dD] over the published one."""
        torch.manual_seed(seed)
        tensors = [t.to(dtype) if pure else t for t in (torch.randn(40, 64), torch.randn(64, 64) / 8, torch.randn(40, 64))]
        exact = results(reference.ista, *(t.double() for t in tensors))
        with torch.autocast("cpu", dtype, enabled=not pure):
            found = [results(ista, *tensors) for ista in (lambda h, d: functional.ista(h, d, backend="torch"), reference.ista)]
        ours, published = ([(a - b).norm().item() for a, b in zip(each, exact, strict=True)] for each in found)
        return [a / b for a, b in zip(ours, published, strict=True)]

    # The median, since an entry at the threshold that turns is most of a gradient's error.
    assert torch.tensor([ratios(seed) for seed in range(15)]).median(0).values.max() <= 1.01
