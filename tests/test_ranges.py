"""What PyTorch's profiler shows of a model: its parts by their names, and nothing where no profiler is on."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from crate_fast import CRATE, ranges

SIZES = {"image_size": 16, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 3, "heads": 2, "dim_head": 16}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def shown(model, training: bool) -> dict[str, list[str]]:
    """By the parts of `model`, in the order in which they ran, what ran in each."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.set_grad_enabled(training):
        model.train(training)(IMAGES)
    parts = sorted((e for e in profiled.events() if e.name.startswith("crate_fast.")), key=lambda e: e.time_range.start)
    return {event.name.removeprefix("crate_fast."): [child.name for child in event.cpu_children] for event in parts}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_profiler_shows_embedding_layers_and_head(backend, training, checkpointing):
    model = CRATE(**SIZES, backend=backend)
    model.set_grad_checkpointing(checkpointing)
    parts = shown(model, training)
    weights = ["weights"] if backend == "triton" else []
    assert list(parts) == ["embedding", *weights, "layers.0", "layers.1", "layers.2", "head"]
    assert all(parts.values())
    assert "aten::layer_norm" in parts["head"]


def test_a_layer_alone_among_others_has_its_own_number():
    model = CRATE(**SIZES, backend="torch")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model.transformer.run(torch.randn(2, 5, 32), None, model.transformer.layers[1:2])
    assert {e.name for e in profiled.events() if e.name.startswith("crate_fast.")} == {"crate_fast.layers.1"}


def test_without_a_profiler_no_range_is_made(monkeypatch):
    monkeypatch.setattr(ranges, "record_function", None)
    CRATE(**SIZES)(IMAGES)
