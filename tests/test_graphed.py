"""Inference as a CUDA graph, as far as it goes without a GPU: what is recorded, and when the model itself is called.

`emulated` stands for `torch.cuda.make_graphed_callables`: a replay computes with the memory that the weights had when recorded.
"""

import copy
from contextlib import nullcontext

import pytest
import torch

import crate_fast
from crate_fast import CRATE, BackendError, freeze, graphed
from crate_fast.model.cuda_graph import Graphed

SIZES = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)


@pytest.fixture(autouse=True)
def records(monkeypatch):
    """How often something was recorded."""
    found = []

    def emulated(run, sample: tuple, num_warmup_iters: int):
        assert not torch.is_autocast_enabled("cpu")
        for _ in range(num_warmup_iters):
            run(*sample)
        model = run.__self__._model
        places = {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()}
        recorded = copy.deepcopy(model, places)
        out = run(*sample)
        found.append(len(sample[0]))

        def replay(images):
            sample[0].copy_(images)
            with torch.autocast(**run.__self__._autocast):
                return out.copy_(recorded(sample[0]))

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", emulated)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CRATE(**SIZES, backend="triton").eval()


@pytest.mark.slow
def test_logits_are_the_models_and_stay_as_they_are(model, records):
    first, second = torch.randn(2, 3, 3, 8, 8)
    run = Graphed(model, torch.zeros(3, 3, 8, 8))
    with torch.inference_mode():
        kept = run(first)
        assert torch.equal(run(second), model(second))
        assert torch.equal(kept, model(first))
    assert records == [3]


def test_what_is_recorded_in_inference_mode_runs_outside_of_it(model):
    with torch.inference_mode():
        run = Graphed(model, torch.zeros(3, 3, 8, 8))
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(run(images), model(images))


def test_other_images_go_through_the_model(model, records):
    images = torch.randn(2, 3, 8, 8)
    run = Graphed(model, torch.zeros(3, 3, 8, 8))
    assert torch.equal(run(images), model(images))
    with pytest.raises(TypeError, match=r"the image is torch\.float16"):
        run(torch.zeros(3, 3, 8, 8).half())
    assert records == [3]


CHANGES = {
    "replaced": lambda layer: setattr(layer[1].fn, "weight", torch.nn.Parameter(2 * layer[1].fn.weight.detach())),
    "pointed elsewhere": lambda layer: setattr(layer[1].fn.weight, "data", 2 * layer[1].fn.weight.detach()),
    "transposed": lambda layer: setattr(layer[1].fn.weight, "data", layer[1].fn.weight.data.t()),
    "another module": lambda layer: setattr(layer[1], "norm", torch.nn.LayerNorm(32, eps=0.5)),
    "another step size": lambda layer: setattr(layer[1].fn, "step_size", 0.5),
}
"""What a replay, which reads the memory of the recording, would not see; `test_kept.py` has what it sees."""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_recorded_anew(records, backend, change):
    torch.manual_seed(0)
    model = CRATE(**SIZES, backend=backend).eval()
    images = torch.randn(3, 3, 8, 8)
    run = Graphed(model, images)
    before = run(images)
    CHANGES[change](model.transformer.layers[0])
    with torch.no_grad():
        assert torch.equal(run(images), model(images))
    assert not torch.equal(run(images), before)
    assert records == [3, 3]
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\) first"):
        model.train(), run(images)


def test_the_autocast_of_the_recording_counts(model):
    images = torch.randn(3, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.float16):
        run, right = Graphed(model, images), model(images)
    assert run(images).dtype == torch.float16
    assert torch.equal(run(images), right)


def test_a_frozen_model_is_recorded_with_what_it_keeps(model, records):
    images = torch.randn(3, 3, 8, 8)
    frozen = freeze(model)
    run, right = Graphed(frozen, images), model(images).detach()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    assert torch.equal(run(images), right)
    assert records == [3]


def test_what_cannot_be_recorded_is_said(model):
    with pytest.raises(BackendError, match="the images are on cpu; they must be on a CUDA GPU"):
        graphed(model, torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\) first"):
        Graphed(model.train(), torch.zeros(3, 3, 8, 8))
    with pytest.raises(TypeError, match="images is a list"):
        graphed(model, [])
    assert "graphed" in crate_fast.__all__
