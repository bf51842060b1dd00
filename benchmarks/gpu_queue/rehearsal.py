"""What stands for the GPU in a rehearsal: kernels that do nothing, models of one layer, graphs that are not recorded.

Everything else is what runs on a GPU. Values mean nothing, so nobody is judged by them; one peer runs out of memory once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch

import crate_fast
import judge
import workloads
from host import launched_to_nowhere
from workloads import Workload

from . import kinds, speed

TOY = dict(dim=64, depth=1, heads=2, dim_head=32)
TOO_LARGE = ("base", 16, "published")
"""Size, batch and peer of a training step that has no room."""

REPLACED = (
    (workloads, dict(IMAGE=8, PATCH=4, TOKENS=5, CLASSES=4, SIZES=dict.fromkeys(workloads.SIZES, TOY))),
    (speed, dict(BATCHES=(16, 8), SECONDS=0.01, ROUNDS=2, memory_gib=lambda device: 78.0)),
    (speed, dict(ceilings=lambda device, dtype: {"bytes_per_second": 4.3e12, "flops_per_second": 7.9e14})),
    (kinds, dict(PARITY_BATCH=16, INFERENCE=(1, 9), TUNED_BATCH=1, PHOTOGRAPHS=(80, 8))),
    (kinds, dict(PRECISION=["--seeds=1", "--dim=128", "--depth=1", "--batch=1"])),
    (kinds, dict(LOOP=dict(dim=32, depth=1, heads=1, image_size=16, patch_size=8, batch_size=16, workers=1))),
    (judge, dict(check_graphs=lambda device: None, graphed=lambda step: step)),
    (crate_fast, dict(graphed=lambda model, images: model)),
    (torch, dict(compile=partial(torch.compile, backend="eager"))),
)


@contextmanager
def rehearsed() -> Iterator[None]:
    """While open, steps run on a CPU in seconds."""
    make_ready = judge.make_ready

    def with_little_memory(workload: Workload, peer, mode, device, judged):
        if workload.suite == "train" and (workload.size, workload.batch, peer.name) == TOO_LARGE:
            raise torch.OutOfMemoryError("as if it were too large")
        return make_ready(workload, peer, mode, device, judged)

    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(launched_to_nowhere())
        for module, names in REPLACED:
            stack.enter_context(mock.patch.multiple(module, **names))
        stack.enter_context(mock.patch.object(speed, "make_ready", with_little_memory))
        stack.enter_context(mock.patch.object(judge.Judge, "verdict", lambda self, errors: None))
        yield
