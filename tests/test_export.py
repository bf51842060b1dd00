"""Models leave Python: torch.export and torch.jit.trace record PyTorch's own operators, for any batch."""

import pytest
import torch

from crate_fast import CRATE, CRATEMAE

SMALL = dict(image_size=8, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, dim_head=16)


@pytest.fixture(params=["differentiated", "not differentiated"])
def model(request):
    torch.manual_seed(0)
    model = CRATE(**SMALL).eval()
    with torch.set_grad_enabled(request.param == "differentiated"):
        model(torch.zeros(1, 3, 8, 8))  # what evaluation keeps is there, and must not be recorded
        yield model


def test_exported_models_take_any_batch_and_know_pytorch_alone(model):
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    images = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(exported.module()(images), model(images))
    assert "crate_fast" not in str(exported.graph)


def test_an_exported_crate_mae_takes_any_batch_and_masks_as_it_is_told():
    model = CRATEMAE(img_size=8, patch_size=2, embed_dim=32, depth=1, num_heads=2).eval()
    batch = torch.export.Dim("batch")
    arguments, shapes = (torch.randn(2, 3, 8, 8), 0.5, torch.rand(2, 16)), ({0: batch}, None, {0: batch})
    exported, images, noise = (
        torch.export.export(model, arguments, dynamic_shapes=shapes),
        torch.randn(7, 3, 8, 8),
        torch.rand(7, 16),
    )
    for found, expected in zip(exported.module()(images, 0.5, noise), model(images, 0.5, noise), strict=True):
        torch.testing.assert_close(found, expected)
    assert "crate_fast" not in str(exported.graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_traced_models_take_any_batch_and_know_pytorch_alone(model, tmp_path):
    torch.jit.trace(model, torch.randn(2, 3, 8, 8)).save(tmp_path / "model.pt")  # with its check, a trace without gradients
    traced, images = torch.jit.load(tmp_path / "model.pt"), torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(traced(images), model(images))
    assert "crate_fast::" not in str(traced.inlined_graph)
    assert "aten::mT" not in str(traced.inlined_graph)  # which torch.onnx.export(dynamo=False) does not know


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_models_in_bfloat16_are_traced(model):
    half, images = model.bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    traced = torch.jit.trace(half, images, check_trace=False)
    torch.testing.assert_close(traced(images), half(images), rtol=0.05, atol=0.05)
