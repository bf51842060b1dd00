"""How long the host takes to launch a layer: what limits small batches, and every batch of a fast GPU that runs eagerly.

    python benchmarks/run.py --suite host

Without a GPU everything runs but the kernels: the library's Python, autograd, and Triton's own launch code (its binder and
cache) up to the call of the driver, on a model of the published depth whose tensors are so small that PyTorch's own
operations cost their dispatch. With a GPU the same model is queued and nobody waits for it. The published code runs eagerly
on the same tensors for comparison: its operations' dispatch, and next to no work.

A layer's time is what ten layers more take more, over ten; forward and backward apart; the median over many rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter has a launch code of its own

import torch
import triton
from torch import Tensor, nn

from crate_fast import CRATE, kernels, reference
from timing import machine

DEPTHS = (2, 12)
SIZES = dict(image_size=8, patch_size=4, num_classes=4, dim=32, heads=2, dim_head=16)
TOKENS = 2


class _Kernel:
    """What stands for a compiled kernel: launched like one, and does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments) -> None:
        return None

    def run(self, *arguments) -> None:
        return None


@contextmanager
def launched_to_nowhere(record: Callable | None = None) -> Iterator[None]:
    """While open, Triton's launch code runs on CPU tensors, and its kernels do nothing.

    record: called with a kernel and the signature, constants, options and attributes it would be compiled with, the first time.
    """
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
    )

    def compiled(function, key, signature, device, constants, options, attributes, *more):
        if record is not None:
            record(function, signature, constants, options, attributes)
        return function.device_caches[device][0].setdefault(key, _Kernel())

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(triton.JITFunction, "_do_compile", compiled))
        stack.enter_context(mock.patch.object(kernels, "INTERPRETED", True))  # so that the backend takes CPU tensors
        yield


def measure(device: torch.device, rounds: int = 100) -> dict[str, dict[str, float]]:
    """Microseconds by row and part: "layer forward", "layer backward", "step" (of the deepest model, forward and backward)."""
    here = launched_to_nowhere() if device.type == "cpu" else mock.patch.dict({})
    found = {}
    with here, torch.autocast(device.type, dtype=torch.bfloat16):
        for name, build in (
            ("crate_fast", lambda **o: CRATE(**o, backend="triton")),
            ("published", lambda **o: reference.CRATE(**o)),
        ):
            for training in (True, False):
                models = [build(**SIZES, depth=depth).transformer.to(device).train(training) for depth in DEPTHS]
                found[f"{name}, {'training' if training else 'evaluation'}"] = _times(models, device, training, rounds)
    return found


def _times(models: list[nn.Module], device: torch.device, training: bool, rounds: int) -> dict[str, float]:
    x = torch.randn(1, TOKENS, SIZES["dim"], device=device, requires_grad=training)
    times: dict[tuple, list[float]] = {}
    for number in range(rounds + 20):
        for depth, model in zip(DEPTHS, models, strict=True):
            forward, backward = _step(model, x, training)
            if number >= 20:
                times.setdefault(("forward", depth), []).append(forward)
                times.setdefault(("backward", depth), []).append(backward)
    medians = {key: statistics.median(values) * 1e6 for key, values in times.items()}
    few, many = DEPTHS
    result = {f"layer {part}": (medians[part, many] - medians[part, few]) / (many - few) for part in ("forward", "backward")}
    return result | {"step": medians["forward", many] + medians["backward", many]}


def _step(model: nn.Module, x: Tensor, training: bool) -> tuple[float, float]:
    """Seconds until everything is queued, forward and backward."""
    model.zero_grad()
    clock = time.thread_time  # what other processes do does not count; on a CPU backward runs in this thread too
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
        clock = time.perf_counter
    started = clock()
    with torch.set_grad_enabled(training):
        out = model(x)
    forwarded = clock()
    if training:
        out.backward(out)
    return forwarded - started, clock() - forwarded


def print_host(out: Path | None) -> int:
    """The table, written to `out` as JSON too; the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = "queued on the GPU" if device.type == "cuda" else "kernels do nothing"
    print(f"microseconds of the host, medians; {how}; torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':28}{'layer forward':>15}{'layer backward':>16}{'step of ' + str(DEPTHS[1]) + ' layers':>20}")
    rows = measure(device)
    if out is not None:
        out.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(
            f"{name:28}"
            + "".join(
                f"{row[part]:{width}.1f}" for part, width in (("layer forward", 15), ("layer backward", 16), ("step", 20))
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(print_host(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
