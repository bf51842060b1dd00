"""Evaluation never computes with weights of yesterday, whoever wrote them, and differentiates as the published class does."""

import copy
from contextlib import nullcontext
from types import MethodType

import pytest
import test_graphed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from crate_fast import CRATE, freeze
from crate_fast.model.cuda_graph import Graphed

SIZES = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOUND = 1e-5  # relative


def build(**options) -> CRATE:
    torch.manual_seed(0)
    return CRATE(**SIZES, **options).eval()


def reference_of(model: nn.Module) -> CRATE:
    reference = build(backend="reference")
    reference.load_state_dict(model.state_dict())
    return reference


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def step(optimizer, **options):
    """A step that is told its gradients, so that no backward pass is needed."""

    def write(model):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer(model.parameters(), lr=0.02, **options).step()

    return write


def data_copy(model):
    """As packages swap in the mean of the weights."""
    for p in model.parameters():
        p.data.copy_(1.3 * p.data)


def collective(model):
    for p in model.parameters():
        dist.broadcast(p.detach().mul_(0.5), 0)
        dist.all_reduce(p.detach())
        p.detach().numpy()[...] *= 1.3


def _learn(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)


def another_process(model):
    model.share_memory()
    process = mp.get_context("fork").Process(target=_learn, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0


def numpy_view(model):
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.3


def flatten(model) -> torch.Tensor:
    """The parameters made views of one buffer, which is returned."""
    buffer, start = parameters_to_vector(model.parameters()).detach().clone(), 0
    for p in model.parameters():
        p.data = buffer[start : start + p.numel()].view_as(p)
        start += p.numel()
    return buffer


def swap(model):
    for p in list(model.parameters()):
        torch.utils.swap_tensors(p, nn.Parameter(1.3 * p.detach()))


def converted(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    numpy_view(model)


class Larger(nn.Module):
    def forward(self, weight):
        return 1.3 * weight


def parametrised(model):
    for layer in model.transformer.layers:
        register_parametrization(layer[1].fn, "weight", Larger())
        remove_parametrizations(layer[1].fn, "weight")


WRITERS = {
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "Adam fused": step(torch.optim.Adam, fused=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "data.copy_": data_copy,
    "data.mul_": lambda model: [p.data.mul_(1.3) for p in model.parameters()],
    "collective": collective,
    "another process": another_process,
    "NumPy": numpy_view,
    "flat buffer": lambda model: flatten(model).mul_(1.3),
    "assigned": lambda model: model.load_state_dict({k: 1.3 * v for k, v in model.state_dict().items()}, assign=True),
    "swapped": swap,
    "converted": converted,
    "parametrised": parametrised,
    "vector": lambda model: vector_to_parameters(1.3 * parameters_to_vector(model.parameters()).detach(), model.parameters()),
}

READERS = {
    "no_grad": lambda model: (model, torch.no_grad()),
    "with gradients": lambda model: (model, nullcontext()),
    "compiled": lambda model: (torch.compile(model, backend="eager"), torch.no_grad()),
    "graphed": lambda model: (Graphed(model, IMAGES), nullcontext()),
}


records = test_graphed.records  # the stand-in for CUDA graphs, in place in every test here


@pytest.fixture
def alone(tmp_path):
    """A process group of one, for as long as one test: others may run in this process between those of this file."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reader", READERS)
def test_whoever_wrote_is_seen(alone, backend, reader):
    model = build(backend=backend)
    weights = copy.deepcopy(model.state_dict())
    call, mode = READERS[reader](model)
    for name, write in WRITERS.items():
        model.load_state_dict(weights)
        with mode:
            before = call(IMAGES).detach()
        write(model)
        with mode:
            after = call(IMAGES).detach()
        with torch.no_grad():
            want = reference_of(model)(IMAGES)
        assert error(after, want) < BOUND, name
        assert error(before, want) > 100 * BOUND, name


def no_parameter(module, name, registered):
    """The tensor doubled and no parameter any more, as packages that compute weights themselves leave it."""
    tensor = 2 * getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, tensor) if registered else setattr(module, name, tensor)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_that_are_no_parameters_are_computed_with(backend, registered):
    for place in ("0.norm", "0.fn.qkv", "0.fn.to_out.0", "1.norm", "1.fn"):
        model, published = build(backend=backend), build(backend="reference")
        for each in (model, published):
            no_parameter(each.transformer.layers[0].get_submodule(place), "weight", registered)
            no_parameter(each.to_patch_embedding[1], "weight", registered)
        for mode in (torch.no_grad(), nullcontext()):
            with mode:
                assert error(model(IMAGES), published(IMAGES)) < BOUND, place


def test_a_graph_of_the_operators_is_made_as_of_the_published_class():
    model = build()
    assert error(make_fx(model)(IMAGES)(IMAGES.flip(3)), reference_of(model)(IMAGES.flip(3))) < BOUND


def ista_of(model):
    return model.transformer.layers[0][1]


REPLACED = {
    "module": lambda model: setattr(ista_of(model), "norm", nn.LayerNorm(SIZES["dim"], eps=0.5)),
    "forward": lambda model: setattr(ista_of(model).norm, "forward", lambda x: 2 * x),
    "forward of all layers": lambda model: setattr(model.transformer, "forward", lambda x: 2 * x),
    "forward of the embedding": lambda model: setattr(model.to_patch_embedding[2], "forward", lambda x: 2 * x[..., :32]),
    "method": lambda model: setattr(ista_of(model).norm, "forward", MethodType(lambda self, x: 2 * x, ista_of(model).norm)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REPLACED)
def test_compiled_models_see_what_is_replaced(what):
    model = build(backend="torch")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IMAGES)
        REPLACED[what](model)
        assert error(compiled(IMAGES), model(IMAGES)) < BOUND


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_training_in_evaluation_mode_learns_from_the_weights_of_now(backend):
    model = build(backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        published = reference_of(model)
        for each in (model, published):
            each.zero_grad()
            each(IMAGES).square().mean().backward()
        for p, q in zip(model.parameters(), published.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_weights_of_a_functional_call_are_taken(backend):
    model = build(backend=backend)
    with torch.no_grad():
        for factor in (1.0, 1.3, 0.7):
            weights = {name: factor * p for name, p in model.named_parameters()}
            want = functional_call(build(backend="reference"), weights, (IMAGES,))
            assert error(functional_call(model, weights, (IMAGES,)), want) < BOUND


def test_contents_of_nan_and_of_both_zeros_are_told_apart():
    model = build(backend="torch")
    weight = model.transformer.layers[0][1].fn.weight
    with torch.no_grad():
        right = model(IMAGES)
        weight.data[0, 0], value = torch.nan, weight[0, 0].item()
        assert model(IMAGES).isnan().all()
        weight.data[0, 0] = value
        assert torch.equal(model(IMAGES), right)
        weight.data.zero_()
        zero = model(IMAGES)
        weight.data.neg_()
        assert torch.equal(model(IMAGES), zero)


def test_what_is_kept_goes_with_no_copy_and_no_file(tmp_path):
    model = build(backend="torch")
    with torch.no_grad():
        model(IMAGES)
    path = tmp_path / "parameters.pt"
    torch.save(dict(model.named_parameters()), path)
    assert path.stat().st_size < 1.5 * sum(4 * p.numel() for p in model.parameters()) + 20_000
    for name, p in torch.load(path, weights_only=True).items():
        assert torch.equal(p, model.get_parameter(name))
    assert error(copy.deepcopy(model)(IMAGES), model(IMAGES)) < BOUND


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_frozen_model_is_what_the_model_was(backend):
    model = build(backend=backend)
    frozen, right = freeze(model), model(IMAGES).detach()
    assert error(frozen(IMAGES), right) < BOUND
    assert not list(frozen.parameters()) and not frozen.state_dict() and not frozen(IMAGES).requires_grad
    numpy_view(model)
    assert error(frozen.eval()(IMAGES), right) < BOUND
    assert error(torch.compile(frozen, backend="eager")(IMAGES), right) < BOUND


def test_a_frozen_model_prepares_its_weights_once():
    from crate_fast.kernels import runtime

    def prepared(call, seen):
        with runtime.observed(lambda kernel, *_: seen.append(kernel.__name__)), torch.no_grad():
            call(IMAGES)
        return seen.count("_prepare_kernel")

    model = build(backend="triton")
    frozen = freeze(model)
    assert [prepared(model, []) for _ in range(2)] == [1, 1]
    assert [prepared(frozen, []) for _ in range(3)] == [1, 0, 0]
    with torch.autocast("cpu", dtype=torch.float16):
        assert [prepared(frozen, []) for _ in range(2)] == [1, 0]


GRADIENTS = [pytest.param(False, id="no_grad"), pytest.param(True, id="with gradients")]


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_forward_mode_has_tangents_of_images_and_of_weights(gradients):
    model = build()
    published, tangent = reference_of(model), IMAGES.flip(3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.set_grad_enabled(gradients):
        model(IMAGES)  # what evaluation keeps is there
        assert error(jvp(model, (IMAGES,), (tangent,))[1], jvp(published, (IMAGES,), (tangent,))[1]) < BOUND
        calls = [lambda w, m=m: functional_call(m, w, (IMAGES,)) for m in (model, published)]
        assert error(*[jvp(call, (weights,), (weights,))[1] for call in calls]) < BOUND
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(IMAGES, tangent)
            tangents = [forward_ad.unpack_dual(m(dual)).tangent for m in (model, published)]
            assert error(*tangents) < BOUND


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_vmap_over_models_and_over_images(gradients):
    models = [build() for _ in range(3)]
    for factor, model in enumerate(models, 1):
        with torch.no_grad():
            [p.mul_(1 + factor / 10) for p in model.parameters()]
    weights, buffers = stack_module_state(models)
    with torch.set_grad_enabled(gradients):
        together = vmap(lambda w, b: functional_call(models[0], (w, b), (IMAGES,)))(weights, buffers)
        assert error(together, torch.stack([reference_of(model)(IMAGES) for model in models])) < BOUND
        one_by_one = vmap(lambda image: models[0](image[None])[0])(IMAGES)
        assert error(one_by_one, reference_of(models[0])(IMAGES)) < BOUND


@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_are_the_published_ones(training):
    model = build().train(training)
    published = reference_of(model)

    def penalty(m):
        images = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(m.parameters()), allow_unused=True)

    for got, want in zip(penalty(model), penalty(published), strict=True):
        assert (got is None) == (want is None)
        assert got is None or error(got, want) < 10 * BOUND

    def curvature(m):
        """A Hessian-vector product, forward over reverse."""
        weights = {name: p.detach() for name, p in m.named_parameters()}
        return jvp(grad(lambda w: functional_call(m, w, (IMAGES,)).square().sum()), (weights,), (weights,))[1]

    got, want = curvature(model), curvature(published)
    assert max(error(got[name], want[name]) for name in want) < 10 * BOUND

    jacobians = [torch.autograd.functional.jacobian(m, IMAGES[:1], vectorize=True) for m in (model, published)]
    assert error(*jacobians) < BOUND
