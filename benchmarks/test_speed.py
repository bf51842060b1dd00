"""The operations and the model under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For those who track regressions with it; `benchmarks/run.py` is what compares with others.
"""

import pytest
import torch
import torch.nn.functional as F

from crate_fast import CRATE_tiny, functional, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
BATCH = 256 if DEVICE == "cuda" else 2
BACKENDS = ("auto", "reference")


def timed(benchmark, run) -> None:
    """Times `run` and what it left running on the device."""

    def finished() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_mssa(benchmark, backend, backward):
    w = torch.randn(BATCH, 197, 384, device=DEVICE, dtype=DTYPE, requires_grad=backward)

    def run() -> None:
        out = functional.mssa(w, 6, backend=backend)
        if backward:
            torch.autograd.grad(out, w, w.detach())

    timed(benchmark, run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_ista(benchmark, backend, backward):
    h = torch.randn(BATCH, 197, 384, device=DEVICE, dtype=DTYPE, requires_grad=backward)
    d = (torch.randn(384, 384, device=DEVICE) / 384**0.5).to(DTYPE).requires_grad_(backward)

    def run() -> None:
        out = functional.ista(h, d, backend=backend)
        if backward:
            torch.autograd.grad(out, (h, d), h.detach())

    timed(benchmark, run)


@pytest.mark.parametrize("published", [False, True], ids=["crate_fast", "published"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_crate_tiny(benchmark, published, training):
    sizes = dict(image_size=224, patch_size=16, num_classes=1000, dim=384, depth=12, heads=6, dim_head=64)
    model = (reference.CRATE(**sizes) if published else CRATE_tiny()).to(DEVICE).train(training)
    images, labels = torch.randn(BATCH, 3, 224, 224, device=DEVICE), torch.zeros(BATCH, dtype=torch.long, device=DEVICE)

    def run() -> None:
        with torch.set_grad_enabled(training), torch.autocast(DEVICE, dtype=DTYPE, enabled=torch.float32 != DTYPE):
            logits = model(images)
        if training:
            model.zero_grad()
            F.cross_entropy(logits.float(), labels).backward()

    timed(benchmark, run)
