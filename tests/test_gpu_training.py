"""What of training a GPU does differently: scaled gradients, data on streams of their own, graphs, nccl, the profiler.

Every body runs on the CPU as well, so that on a GPU only the device is new; graphs are emulated there.
"""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import on_gpu
from helpers.pictures import make_folder
from test_graphs import emulated
from test_loop import make_trainer, step
from torch.utils._python_dispatch import TorchDispatchMode

from crate_fast.checkpoint import load_checkpoint
from crate_fast.data.augment_batch import Changes
from crate_fast.data.device_loader import Pictures, Resident
from crate_fast.data.loader import Normalise
from crate_fast.data.open import Data, open_data
from crate_fast.data.order import Plan
from crate_fast.data.pack_encoding import Settings
from crate_fast.data.pack_folder import open_packs
from crate_fast.data.pack_loader import Packed
from crate_fast.data.pack_writer import prepare
from crate_fast.data.samples import COLOUR
from crate_fast.eval_transform import STD
from crate_fast.processes import ALONE
from crate_fast.training import TrainConfig, resolve, train
from crate_fast.training.cuda_graphs import Graphed
from crate_fast.training.loop import NEVER
from crate_fast.training.parallel.ddp import replicate

CPU = torch.device("cpu")
DIGITS = dict(image_size=8, dim=16, depth=2, heads=1, dim_head=16, epochs=1, num_threads=1, optimizer="AdamW", lr=1e-3)
PHOTOS = dict(image_size=24, patch_size=8, dim=16, depth=1, heads=1, dim_head=16, num_threads=1, batch_size=8)
CIFAR = dict(data="cifar10", rotate=0.0, zoom=0.0, shift=0.0)
LATE = 20_000_000  # clocks, about 10 ms: what was launched is not done when the next batches are


@pytest.fixture(params=["cpu", on_gpu()])
def place(request):
    """Where a run computes; other than with `device`, tensors are made where the code says."""
    return CPU if request.param == "cpu" else request.getfixturevalue("gpu")


@pytest.fixture
def graphs(place, monkeypatch):
    if place == CPU:
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", emulated)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)


@pytest.fixture
def group(place, tmp_path):
    """A process group of one, by the backend that a run has there."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo" if place == CPU else "nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_scaled_gradients_move_weights_and_infinite_ones_do_not(place):
    trainer = make_trainer(device=place.type, precision="float16", optimizer="AdamW", depth=2)
    before = trainer.flat.weights.clone()
    step(trainer)
    moved = trainer.flat.weights.clone()
    assert moved.isfinite().all() and not torch.equal(moved, before)
    trainer.scaler.update(2.0**80)
    step(trainer, 1)
    assert torch.equal(trainer.flat.weights, moved)
    assert trainer.scaler.get_scale() == 2.0**79
    assert trainer.bad_step.item() == NEVER  # the scaler tries again, with less


@pytest.mark.parametrize("augment", ["randaugment", "trivial"])
def test_images_that_lie_on_the_device_are_changed_there_as_on_the_host(place, augment):
    """To one value of 256 in a hundredth of them: sums of weights may be rounded in another order."""
    store = Pictures(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8), list(range(64)))
    config = TrainConfig(**CIFAR, image_size=40, augment=augment, erase=0.5)
    pairs = (Resident("cifar10", store, store, 64, config, where) for where in (place, CPU))
    batches = [[*data.train_batches(Plan(64, 32), 1), *data.test_batches(32, ALONE)] for data in pairs]
    for (images, labels), (right, numbers) in zip(*batches, strict=True):
        assert (images.device.type, labels.tolist()) == (place.type, numbers.tolist())
        values = (images.cpu() - right).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        assert values.max() <= 1.01
        assert (values > 0.5).float().mean() <= 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder") / "folder", train=48, val=12)


def from_packs(folder, target, place: torch.device) -> Data:
    """Raw packs, which need no JPEG decoder."""
    prepare(folder, target / "packs", Settings(short_side=32, raw=True, pack_images=16), workers=1)
    packs = open_packs(target / "packs")
    return Packed(packs, resolve(PHOTOS | {"data": str(target / "packs"), "workers": 2}), place, ALONE)


def from_folder(folder, target, place: torch.device) -> Data:
    return open_data(resolve(PHOTOS | {"data": str(folder), "workers": 2}), place, ALONE)


@pytest.mark.parametrize("source", [from_packs, from_folder])
def test_batches_copied_beside_computing_arrive_whole_however_late_it_is(place, folder, tmp_path, source):
    """The device is kept busy, so that batches which were given up are not yet read when their memory could go to others."""

    def copies(data: Data) -> list[torch.Tensor]:
        found = []
        for images, labels in data.train_batches(Plan(48, 8), 1):
            if images.device != CPU:
                torch.cuda._sleep(LATE)
            found += [images * 1, labels * 1]
            del images, labels
        return [tensor.cpu() for tensor in found]

    data = source(folder, tmp_path, place)
    found = copies(data)
    for ours, right in zip(found, copies(source(folder, tmp_path / "cpu", CPU)), strict=True):
        torch.testing.assert_close(ours, right)
    assert place == CPU or source is from_folder or data._slots._tensors.is_pinned()


def test_what_other_streams_read_is_copied_to_the_device_and_not_computed_there():
    """A copy from the host is over when it returns; a kernel is not, and the streams of data wait for none."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_meta:
                seen.add(func.overloadpacket)
            return out

    seen, device = set(), torch.device("meta")
    with Seen():
        Normalise(device)
        Changes(TrainConfig(**CIFAR, erase=0.5), device, COLOUR)
    assert seen == {torch.ops.aten._to_copy}


def test_graphs_in_a_process_group_sum_the_models_gradients(place, graphs, group):
    plain, graphed = (make_trainer(device=place.type, optimizer="AdamW", cuda_graphs=answer) for answer in ("no", "yes"))
    assert isinstance(graphed.net, Graphed)
    graphed.net = replicate(graphed.net, graphed.compute)
    for trainer in (plain, graphed):
        step(trainer)
    torch.testing.assert_close(graphed.flat.gradients, plain.flat.gradients)
    torch.testing.assert_close(graphed.flat.weights, plain.flat.weights)
    assert place != CPU or graphed.net.module._graph.replays == [64]


def test_a_run_in_parts_on_one_device_is_the_run_that_is_whole(place, tmp_path):
    """--device without a number, as users give it; a group of one is made and left again."""
    found = []
    for strategy in ("ddp", "fsdp"):
        out = tmp_path / strategy
        run, score = train(TrainConfig(out=str(out), device=place.type, strategy=strategy, **DIGITS))
        found.append((score.loss, load_checkpoint(run.model).state_dict()))
        assert not dist.is_initialized()
    (loss, weights), (loss_of_parts, weights_of_parts) = found
    assert loss_of_parts == pytest.approx(loss, rel=1e-2)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_of_parts[name], weight, rtol=1e-2, atol=2e-3)


def test_a_trace_shows_the_devices_kernels(place, tmp_path):
    run, _ = train(TrainConfig(out=str(tmp_path / "run"), device=place.type, profile="yes", **DIGITS))
    events = json.loads(run.trace.read_text())["traceEvents"]
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep#") and event.get("ph") == "X"]
    assert {"ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"} <= set(steps)
    kernels = {event["name"] for event in events if event.get("cat") == "kernel"}
    assert ("_mssa_forward_kernel" in kernels) == (place != CPU)
