"""Timing that peers cannot quarrel about: interleaved rounds, device events, quartiles; and what the machine can do at best."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crate_fast.cpu_products import linear


class Timing(NamedTuple):
    """Milliseconds of one call: quartiles over `samples` rounds."""

    median: float
    q1: float
    q3: float
    samples: int


def steady_allocator() -> None:
    """Lets the C library keep freed memory, as PyTorch's allocator does on GPUs.

    Without it every large CPU tensor is mapped anew and faulted in page by page: a training step of CRATE-tiny took 6.3 s
    instead of 0.8 s on a virtual machine, of the published code and of ours.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**28)


def current(device: torch.device) -> AbstractContextManager:
    """While open, events, graphs and whatever names no device are on `device`, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least_rounds: int = 7,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times every step in turn, round by round, the order turning with the round, for about `seconds` in all.

    A round calls a step as often as it takes to fill 10 ms, so that the clock's grain and, on a GPU, the launch of the first
    call do not count. What is called to find that number is not counted; a step that must warm up longer comes warm.

    between: called before every sample, and the step once after it, uncounted: `torch.cuda.empty_cache` where the steps' memory
        does not fit side by side.
    """
    counts, samples = {}, {name: [] for name in steps}
    for name, step in steps.items():
        if between is not None:
            between()
            step()
        counts[name] = max(1, min(1000, round(10 / max(_measure(step, 1, device), 1e-3))))
    names, started, rounds = list(steps), time.perf_counter(), 0
    while rounds < least_rounds or (time.perf_counter() - started < seconds and rounds < 200):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            if between is not None:
                between()
                steps[name]()
            samples[name].append(_measure(steps[name], counts[name], device))
        rounds += 1
    return {name: quartiles(values) for name, values in samples.items()}


def _measure(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Milliseconds a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) * 1e3 / count


def quartiles(values: list[float]) -> Timing:
    """Of milliseconds, one a round."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median, q1, q3, len(values))


def rotated(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A function that gives one of several sets of fresh random inputs after the other, more than the last cache holds."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = [first, *(make() for _ in range(max(1, min(7, 2 * cache // max(size, 1)))))]
    state = [0]

    def give() -> tuple[Tensor, ...]:
        state[0] = (state[0] + 1) % len(sets)
        return sets[state[0]]

    return give


class _LiveBytes(TorchDispatchMode):
    """Counts the memory that tensors made inside take at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call of `step` holds at a time, beyond what was held before it.

    On a GPU as the allocator counts; on a CPU what PyTorch's operations return, without what they use inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as count:
        step()
    return count.peak


def kept_bytes(forward: Callable[[], object], owned: set[int]) -> int:
    """Bytes of distinct memory kept from `forward` to its backward; storages whose address is in `owned` do not count."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values())


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches here and now: bytes a second of a large copy, flops a second of a large product in `dtype`.

    Of the quickest quarter: while others have the cores it reaches less than it can.
    """
    large = device.type == "cuda"
    source = torch.empty(2**28 if large else 2**25, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    side = 8192 if large else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    steps: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}
    if not large:
        steps["our product"] = lambda: linear(a, b)  # a CPU's, by whichever library is faster
    for step in steps.values():
        step()
    times = interleave(steps, device, 1.0)
    copied = 2 * source.numel() * source.element_size()
    return {
        "bytes_per_second": copied / times["copy"].q1 * 1e3,
        "flops_per_second": 2 * side**3 / min(time.q1 for name, time in times.items() if name != "copy") * 1e3,
    }


def machine(device: torch.device) -> dict:
    """Who measured: device, driver, versions, commit."""
    import triton

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": len((_output("git", "status", "--porcelain") or "").splitlines()),
    }
    if device.type == "cuda":
        driver = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
        return {"device": torch.cuda.get_device_name(device), "driver": driver[0] if driver else None} | facts
    return {"device": f"{_processor()}, {torch.get_num_threads()} threads", "driver": None} | facts


def conditions(device: torch.device) -> dict:
    """The state of the device while it measures: clocks and temperature of a GPU, the load of a CPU."""
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
        # By its name of its own: CUDA_VISIBLE_DEVICES numbers GPUs anew, for PyTorch but not for the driver's tool.
        gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        values = (_output("nvidia-smi", gpu, f"--query-gpu={query}", "--format=csv,noheader") or "").splitlines()
        return {query: values[0] if values else None}
    return {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.path.dirname(__file__) or ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
