"""CUDA graphs of forward and backward, as far as they go without a GPU: what is recorded, what is computed by it, what is not.

`emulated` stands for `torch.cuda.make_graphed_callables`, to whose rules it holds what it is given: inputs are copied to where
they were at the recording, and weights must still be where they were.
"""

from contextlib import nullcontext

import pytest
import torch
from test_loop import make_trainer, step
from torch import nn


def emulated(module: nn.Module, sample: tuple, num_warmup_iters: int) -> nn.Module:
    assert not torch.is_autocast_enabled("cpu")
    assert module.training
    forward, weights, (static,) = module.forward, tuple(module.parameters()), sample
    places = [weight.data_ptr() for weight in weights]
    for _ in range(num_warmup_iters):
        out = forward(static)
        torch.autograd.grad(out, weights, torch.full_like(out, torch.nan))

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, *_):
            assert images.shape == static.shape
            assert [weight.data_ptr() for weight in weights] == places
            static.copy_(images)
            with torch.enable_grad():
                ctx.out = forward(static)
            return ctx.out.detach()

        @staticmethod
        def backward(ctx, gradient):
            return None, *torch.autograd.grad(ctx.out, weights, gradient)

    def replay(images):
        module.replays.append(len(images))
        return Replay.apply(images, *weights)

    module.replays, module.forward = [], replay
    return module


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", emulated)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    torch.set_num_threads(1)  # so small are the tensors


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_whole_parts_are_replayed_and_others_are_not_to_the_same_bits(precision):
    settings = dict(last_batch="keep", accumulate=2, ema=0.9, clip_norm=1.0, mixup=0.2, dropout=0.1, precision=precision)
    plain, graphed = make_trainer(**settings), make_trainer(cuda_graphs="yes", **settings)
    for place in (0, 1, 22):  # the last one has 29 images of 64
        for trainer in (plain, graphed):
            step(trainer, place)
        assert torch.equal(graphed.flat.gradients, plain.flat.gradients)
        assert torch.equal(graphed.flat.weights, plain.flat.weights)
    assert graphed.net._graph.replays == [32] * 4
    assert graphed.meter.read() == plain.meter.read()
    images, _ = next(plain.data.test_batches(32, plain.ranks))
    for trainer in (plain, graphed):
        trainer.model.eval()
    with torch.inference_mode():
        assert torch.equal(graphed.model(images), plain.model(images))
    assert graphed.net._graph.replays == [32] * 4


def test_a_step_that_is_not_finite_moves_nothing():
    trainer = make_trainer(cuda_graphs="yes")
    before = trainer.flat.weights.clone()
    images, labels = next(trainer.data.train_batches(trainer.plan, 1))
    images[0, 0, 0, 0] = torch.nan
    trainer._train_step(0, iter([(images, labels)]))
    step(trainer, 1)
    assert trainer.net._graph.replays == [64] * 2
    assert torch.equal(trainer.flat.weights, before)
    assert trainer.bad_step.item() == 1
