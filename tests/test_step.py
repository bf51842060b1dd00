"""A step of sparsification with another dictionary is one class: it trains, evaluates, is compiled, counted and saved."""

import copy

import pytest
import torch

from crate_fast import CRATE, checkpoint
from crate_fast.kernels import runtime
from crate_fast.modules import STEPS, SparseStep
from crate_fast.modules.layer import Layer
from crate_fast.training.monitor import training_flops

SIZES = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOUND = 1e-5  # relative


def make_untied() -> type[SparseStep]:
    """ISTA with a second dictionary E for what is taken away: M = η(D − EᵀD)."""

    class Untied(SparseStep, name="untied"):
        @staticmethod
        def shapes(dim):
            return {"weight": (dim, dim), "encoder": (dim, dim)}

        @staticmethod
        def reference(h, weights, step_size, lambd):
            d, e = weights
            return torch.relu(h + step_size * (h @ d - h @ e.t() @ d) - step_size * lambd)

        @staticmethod
        def fold(weights, step_size):
            d, e = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights)
            return step_size * (d - e.mT @ d)

        @staticmethod
        def fold_gradient(dm, weights, step_size):
            d, e = (w.to(dm.dtype) for w in weights)
            return step_size * (dm - e @ dm), -step_size * (d @ dm.t())

    return Untied


def make_overcomplete() -> type[SparseStep]:
    """Two ISTA steps on a dictionary of twice the width, and back: nothing that one M could do."""

    class Overcomplete(SparseStep, name="overcomplete"):
        @staticmethod
        def shapes(dim):
            return {"weight": (dim, 2 * dim)}

        @staticmethod
        def reference(h, weights, step_size, lambd):
            d = weights[0]
            code = torch.relu(step_size * (h @ d) - step_size * lambd)
            code = torch.relu(code + step_size * ((h - code @ d.t()) @ d) - step_size * lambd)
            return h + code @ d.t()

        @classmethod
        def sparsify(cls, h, weights, matrix, step_size, lambd, backend):
            cls.check(h, weights)
            return cls.reference(h, weights, step_size, lambd)

        @staticmethod
        def flops(dim):
            return 4 * dim * 2 * dim

    return Overcomplete


@pytest.fixture(params=[make_untied, make_overcomplete])
def step(request):
    made = request.param()
    yield made
    del STEPS[made.name]


def pair(step, backend):
    """A model and one that computes by the step's formula."""
    models = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        models.append(CRATE(**SIZES, step=step.name, backend=name).eval())
    return models


def error(got, want) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_is_differentiated_and_evaluated_as_its_formula_says_whoever_wrote_its_weights(step, backend):
    ours, right = pair(step, backend)
    for model in (ours, right):
        model(IMAGES).square().mean().backward()
    for (name, p), q in zip(ours.named_parameters(), right.parameters(), strict=True):
        assert error(p.grad, q.grad) < 20 * BOUND, name
    with torch.no_grad():
        for name in step.weight_names:
            assert error(ours(IMAGES), right(IMAGES)) < BOUND
            for model in (ours, right):
                model.transformer.layers[0][1].fn.get_parameter(name).data.mul_(1.1)
        assert error(torch.compile(ours, backend="eager")(IMAGES), right(IMAGES)) < BOUND


def test_the_kernels_run_it_whole_where_an_m_makes_it(step):
    ours, launched = pair(step, "triton")[0], []
    with runtime.observed(lambda kernel, *_: launched.append(kernel.__name__)):
        ours(IMAGES)
    assert ("_prepare_kernel" in launched) == (step.name == "untied")


def test_it_is_passed_by_as_the_published_one_is_unless_it_was_changed(step):
    layer: Layer = pair(step, "torch")[0].transformer.layers[0]
    assert layer.is_fusable(("torch",))
    layer[1].fn.__class__ = type("Changed", (step,), {})
    assert not layer.is_fusable(("torch",))


def test_files_name_it_and_those_of_the_published_one_name_none(step, tmp_path):
    ours, published = pair(step, "torch")[0], CRATE(**SIZES)
    for save, name in ((checkpoint.save_model, "model.safetensors"), (checkpoint.save_checkpoint, "model.pt")):
        save(ours, tmp_path / name)
        assert torch.equal(checkpoint.load_checkpoint(tmp_path / name)(IMAGES), ours(IMAGES))
    assert checkpoint.constructor_arguments(ours) == checkpoint.constructor_arguments(published) | {"step": step.name}
    mixed = copy.deepcopy(published)
    mixed.transformer.layers[0][1].fn = ours.transformer.layers[0][1].fn
    with pytest.raises(ValueError, match=r"the layers differ in .* step"):
        checkpoint.save_model(mixed, tmp_path / "mixed.safetensors")


def test_its_own_products_are_counted(step):
    ours, published = pair(step, "torch")[0], CRATE(**SIZES)
    more = 6 * SIZES["depth"] * 5 * (step.flops(SIZES["dim"]) - SIZES["dim"] ** 2)
    assert training_flops(ours) - training_flops(published) == more


def test_two_of_one_name_and_weights_that_do_not_fit_are_refused(step):
    with pytest.raises(ValueError, match=f"a step called '{step.name}' is there already"):
        type("Again", (step,), {}, name=step.name)
    with pytest.raises(ValueError, match="weight has shape"):
        step(dim=32, backend="torch")(torch.zeros(1, 2, 16))
